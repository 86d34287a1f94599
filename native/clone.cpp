#include "clone.h"

namespace bitstep {
namespace BITSTEP_CLONE {

#if defined(BITSTEP_TABLES)
constexpr int32_t kTable = BITSTEP_TABLE_APART;
#else
constexpr int32_t kTable = BITSTEP_TABLE_NONE;
#endif

const Clone clone = {kTable, quantize,     convolve,      group_norm,
                     attend, attend_coded, fake_quantize, fake_quantize_backward};

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
