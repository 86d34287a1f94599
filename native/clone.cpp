#include "clone.h"

namespace bitstep {
namespace BITSTEP_CLONE {

const Clone clone = {quantize, convolve, group_norm, attend, attend_coded, fake_quantize, fake_quantize_backward};

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
