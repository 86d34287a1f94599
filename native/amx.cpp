// AMX multiplies; all else is done with AVX512.
#include "clone.h"

namespace bitstep {
namespace amx {
namespace {

Clone with_tiles() {
  Clone clone = avx512::clone;
  clone.convolve = convolve;
  return clone;
}

}  // namespace

const Clone clone = with_tiles();

}  // namespace amx
}  // namespace bitstep
