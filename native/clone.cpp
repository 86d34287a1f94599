#include "clone.h"

namespace bitstep {
namespace BITSTEP_CLONE {

const Clone clone = {quantize, convolve, group_norm, attend};

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
