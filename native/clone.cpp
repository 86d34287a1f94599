#include "clone.h"

namespace bitstep {
namespace BITSTEP_CLONE {

#if defined(BITSTEP_TABLES)
constexpr int32_t kTable = 2;
#else
constexpr int32_t kTable = 0;
#endif

const Clone clone = {kTable, quantize,     convolve,      group_norm,
                     attend, attend_coded, fake_quantize, fake_quantize_backward};

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
