// Elementary functions of vectors.
#pragma once

#include <initializer_list>

#include "simd.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

// 2**x within a relative 3e-7, 2**-126 for x below that, x below 127 (a polynomial fitted on [-1/2, 1/2]).
inline F exp2(F x) {
  x = max(x, splat(-126.0f));
  const F magic = splat(12582912.0f);  // 1.5 * 2**23, in whose last bits a sum has its integer
  const F shifted = x + magic, r = x - (shifted - magic);
  F p = splat(1.32764895e-3f);
  for (const float c : {9.67554743e-3f, 5.55071328e-2f, 2.40221196e-1f, 6.93146967e-1f, 1.0f}) p = p * r + splat(c);
  return (F)((I)p + ((I)shifted << 23));
}

// e**x, x at most 88; the error of x log2(e) makes it a relative 1e-7 |x|.
inline F exp(F x) { return exp2(x * splat(1.44269504f)); }

// 1 / (1 + e**-x); 1e-35 for x below -80.
inline F logistic(F x) { return reciprocal(1.0f + exp(min(-x, splat(80.0f)))); }

inline F silu(F x) { return x * logistic(x); }

// x Phi(x) with the tanh approximation; (1 + tanh(u)) / 2 is the logistic function of 2 u.
inline F gelu(F x) { return x * logistic(x * (x * x * splat(0.0713548162726f) + 1.5957691216057f)); }

// x Phi(x) within 1e-7 |x|: Phi(-|x|) = erfc(|x| / sqrt(2)) / 2 by Abramowitz and Stegun's 7.1.26.
inline F exact_gelu(F x) {
  const F size = max(x, -x), t = reciprocal(1.0f + size * splat(0.2316418940f));
  F tail = splat(0.5f * 1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) tail = tail * t + splat(0.5f * c);
  return max(x, splat(0.0f)) - size * t * tail * exp(max(x * x * splat(-0.5f), splat(-80.0f)));
}

}  // namespace
}  // namespace BITSTEP_CLONE
}  // namespace bitstep
