// Rows of values rounded to codes and back, and the gradients: one pass over memory where arithmetic on whole tensors
// takes ten.
#include <algorithm>

#include "clone.h"
#include "divide.h"
#include "parallel.h"
#include "simd.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

constexpr int64_t kChunkValues = 8192;  // summed in float before they are added up in double

// The step of one row.
struct Rounding {
  F reciprocal, scale, zero_point, top;

  Rounding(const bitstep_rows& rows, int64_t row)
      : reciprocal(splat(1.0f / rows.scale[row])),
        scale(splat(rows.scale[row])),
        zero_point(splat(rows.zero_point[row])),
        top(splat(static_cast<float>(rows.top))) {}

  F nearest(F x) const { return round(x * reciprocal) + zero_point; }
  // min and max return their second argument where one is not a number, which so comes out again.
  F clipped(F code) const { return min(top, max(splat(0.0f), code)); }
};

// part(row, first, count, index) for every chunk of every row.
template <class Part>
void for_chunks(const bitstep_rows& rows, int threads, const Part& part) {
  const int64_t chunks = divide_up(rows.length, kChunkValues);
  parallel_for(rows.count * chunks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index / chunks, first = index % chunks * kChunkValues;
      part(row, row * rows.length + first, std::min(kChunkValues, rows.length - first), index);
    }
  });
}

}  // namespace

void fake_quantize(const bitstep_rows& rows, const float* x, float* y, int threads) {
  for_chunks(rows, threads, [&](int64_t row, int64_t first, int64_t count, int64_t) {
    const Rounding rounding(rows, row);
    for_vectors(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const F code = rounding.clipped(rounding.nearest(load_some(x + first + i, lanes)));
      store_some(y + first + i, (code - rounding.zero_point) * rounding.scale, lanes);
    });
  });
}

void fake_quantize_backward(const bitstep_rows& rows, const float* x, const float* grad, float* grad_x,
                            float* grad_scale, float* grad_zero_point, int threads) {
  const int64_t chunks = divide_up(rows.length, kChunkValues);
  auto* sums = static_cast<float*>(scratch(Slot::kGradients, 2 * rows.count * chunks * sizeof(float)));
  for_chunks(rows, threads, [&](int64_t row, int64_t first, int64_t count, int64_t index) {
    const Rounding rounding(rows, row);
    F of_scale{}, lost{};
    for_vectors(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const F value = load_some(x + first + i, lanes), g = load_some(grad + first + i, lanes);
      const F nearest = rounding.nearest(value), code = rounding.clipped(nearest);
      const F level = code - rounding.zero_point, none{};
      const auto inside = code == nearest;
      of_scale += g * (inside ? level - value * rounding.reciprocal : level);
      lost += inside ? none : g;
      store_some(grad_x + first + i, inside ? g : none, lanes);
    });
    sums[2 * index] = sum(of_scale);
    sums[2 * index + 1] = sum(lost);
  });
  for (int64_t row = 0; row < rows.count; ++row) {
    double of_scale = 0, lost = 0;
    for (int64_t index = row * chunks; index < (row + 1) * chunks; ++index) {
      of_scale += sums[2 * index];
      lost += sums[2 * index + 1];
    }
    grad_scale[row] = static_cast<float>(of_scale);
    grad_zero_point[row] = static_cast<float>(-lost * rows.scale[row]);
  }
}

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
