// The kernels of one instruction set, as dispatch.cpp sees them.
#pragma once

#include "bitstep.h"

namespace bitstep {

// x -> codes with their border; the prologue has no groups.
using Quantize = void(const bitstep_map& map, const bitstep_prologue& prologue, const bitstep_step& step,
                      const float* x, uint8_t* codes, int threads);
// codes -> y.
using Convolve = void(const bitstep_layer& layer, const bitstep_map& map, const bitstep_step& step,
                      const uint8_t* codes, const bitstep_epilogue& epilogue, float* y, int threads);
// The prologue's group normalization of x as a gain and a shift, both [batch][channels].
using GroupNorm = void(const bitstep_map& map, const bitstep_prologue& prologue, const float* x, float* gain,
                       float* shift, int threads);
// bitstep_attention.
using Attend = void(const bitstep_attention_shape& shape, const float* q, const float* k, const float* v, float* y,
                    int threads);
// bitstep_coded_attention.
using AttendCoded = void(const bitstep_attention_shape& shape, const bitstep_step* steps, const float* q,
                         const float* k, const float* v, float* y, int threads);
// bitstep_fake_quantize and bitstep_fake_quantize_backward.
using FakeQuantize = void(const bitstep_rows& rows, const float* x, float* y, int threads);
using FakeQuantizeBackward = void(const bitstep_rows& rows, const float* x, const float* grad, float* grad_x,
                                  float* grad_scale, float* grad_zero_point, int threads);

struct Clone {
  int32_t table;  // bitstep_table
  Quantize* quantize;
  Convolve* convolve;
  GroupNorm* group_norm;
  Attend* attend;
  AttendCoded* attend_coded;
  FakeQuantize* fake_quantize;
  FakeQuantizeBackward* fake_quantize_backward;
};

namespace portable { extern const Clone clone; }
namespace avx2 { extern const Clone clone; }
namespace avxvnni { extern const Clone clone; }
namespace avx512 { extern const Clone clone; }
namespace avx512vbmi { extern const Clone clone; }
namespace amx { extern const Clone clone; }

#ifdef BITSTEP_CLONE
namespace BITSTEP_CLONE {
Quantize quantize;
Convolve convolve;
GroupNorm group_norm;
Attend attend;
AttendCoded attend_coded;
FakeQuantize fake_quantize;
FakeQuantizeBackward fake_quantize_backward;
}  // namespace BITSTEP_CLONE
#endif

}  // namespace bitstep
