#include "clone.h"

namespace bitstep {
namespace BITSTEP_CLONE {

const Clone clone = {quantize, convolution, group_norm, attention};

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
