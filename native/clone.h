// The kernels of one instruction set, as dispatch.cpp sees them.
#pragma once

#include "bitstep.h"

namespace bitstep {

struct Clone {
  decltype(&bitstep_quantize) quantize;
  decltype(&bitstep_convolution) convolution;
  decltype(&bitstep_group_norm) group_norm;
  decltype(&bitstep_attention) attention;
};

namespace portable { extern const Clone clone; }
namespace avx2 { extern const Clone clone; }
namespace avx512 { extern const Clone clone; }

#ifdef BITSTEP_CLONE
namespace BITSTEP_CLONE {
decltype(bitstep_quantize) quantize;
decltype(bitstep_convolution) convolution;
decltype(bitstep_group_norm) group_norm;
decltype(bitstep_attention) attention;
}  // namespace BITSTEP_CLONE
#endif

}  // namespace bitstep
