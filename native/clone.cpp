#include "clone.h"

namespace bitstep {
namespace BITSTEP_CLONE {

const Clone clone = {quantize, convolution};

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
