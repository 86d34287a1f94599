// Elementary functions of vectors.
#pragma once

#include <initializer_list>

#include "simd.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

// e**x within 2 units in the last place; 0 below -87, e**88 above 88 (the polynomial is Cephes' expf).
inline F exp(F x) {
  const F bounded = min(max(x, splat(-87.0f)), splat(88.0f));
  const F n = round(bounded * splat(1.44269504f));
  const F r = bounded - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
  F p = splat(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = p * r + splat(c);
  }
  const I power = (to_int(n) + 127) << 23;
  return x < splat(-87.0f) ? F{} : (p * r * r + r + 1.0f) * (F)power;
}

inline F silu(F x) { return x / (1.0f + exp(-x)); }

// x Phi(x) with the tanh approximation; (1 + tanh(u)) / 2 is the logistic function of 2 u.
inline F gelu(F x) { return x / (1.0f + exp(x * (x * x * splat(-0.0713548162726f) - 1.5957691216057f))); }

}  // namespace
}  // namespace BITSTEP_CLONE
}  // namespace bitstep
