// The kernels of one instruction set, as dispatch.cpp sees them.
#pragma once

#include "bitstep.h"

namespace bitstep {

struct Clone {
  decltype(&bitstep_quantize) quantize;
  decltype(&bitstep_convolution) convolution;
};

namespace portable { extern const Clone clone; }
namespace avx2 { extern const Clone clone; }
namespace avx512 { extern const Clone clone; }

#ifdef BITSTEP_CLONE
namespace BITSTEP_CLONE {
void quantize(const bitstep_map*, const bitstep_step*, const float*, uint8_t*, int);
void convolution(const bitstep_layer*, const bitstep_map*, const bitstep_step*, const uint8_t*, const float*, float*,
                 int);
}  // namespace BITSTEP_CLONE
#endif

}  // namespace bitstep
