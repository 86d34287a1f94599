// Steps for instruction sets that multiply bytes by vpmaddubsw, whose sums of two products are words: exact where the
// products are small enough.
#pragma once

#include "panel.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

// For pairs of products that fit a word.
struct Pairs : Bytes {
  template <int V>
  static void add(I (&acc)[V], const uint8_t* p, const I (&w)[V]) {
    const I a = broadcast4(p);
    for (int v = 0; v < V; ++v) acc[v] = dot4_small(acc[v], a, w[v]);
  }
};

// For products so small that those of kRoom steps fit; the sums of a column's channels then become 32 bits wide.
struct Words : Bytes {
  static constexpr int kPixels = 6;
  static constexpr int64_t kRoom = 4 * kChunkSteps;

  static void begin(int32_t* sums, const Window&) { std::fill_n(sums, kColumn, 0); }

  template <int V>
  static void add(I (&acc)[V], const uint8_t* p, const I (&w)[V]) {
    const __m256i a = (__m256i)broadcast4(p);
    for (int v = 0; v < V; ++v) {
      acc[v] = (I)_mm256_add_epi16((__m256i)acc[v], _mm256_maddubs_epi16(a, (__m256i)w[v]));
    }
  }

  static void settle(int32_t* sums, const I* acc) {
    for (int v = 0; v < kVectors; ++v, sums += kLanes) {
      store(sums, load(sums) + (I)_mm256_madd_epi16((__m256i)acc[v], _mm256_set1_epi16(1)));
    }
  }
};

}  // namespace
}  // namespace BITSTEP_CLONE
}  // namespace bitstep
