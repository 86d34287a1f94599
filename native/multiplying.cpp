// A clone that multiplies with instructions of its own; all else it does with AVX512.
#include "clone.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

Clone multiplying() {
  Clone clone = avx512::clone;
  clone.convolve = convolve;
#if defined(BITSTEP_TABLES)  // (the matrix unit is faster with bytes)
  clone.table = BITSTEP_TABLE_BESIDE;
#endif
  return clone;
}

}  // namespace

const Clone clone = multiplying();

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
