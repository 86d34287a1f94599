// Steps by lookup, for weights that are signs: 64 bytes hold, for each of 4 groups of 4 activations a, the 16 sums of
// +-a, and the 4 signs of a weight select one of them.
#pragma once

#include "panel.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

#if defined(BITSTEP_avx512)

// A dot product with ones adds the four groups: 256 multiply-adds in two instructions.
struct Tables : Dots {
  static constexpr int kScaling = 4;
  static constexpr int kStep = 64;
  static constexpr int kPixels = 6, kColumns = 4;

  template <int V>
  static void add(I (&acc)[V], const uint8_t* p, const I (&w)[V]) {
    const __m512i table = _mm512_loadu_si512(p);
    for (int v = 0; v < V; ++v) {
      const __m512i sums = _mm512_permutexvar_epi8((__m512i)w[v], table);
      acc[v] = (I)_mm512_dpbusd_epi32((__m512i)acc[v], _mm512_set1_epi8(1), sums);
    }
  }

  // The tables of `count` codes, a multiple of 16.
  static void fill(const uint8_t* codes, int64_t count, uint8_t zero_point, uint8_t* tables) {
    // byte 16 g + n of a table takes activation 4 g + i, negated (from lane 1) where bit i of n is clear
    alignas(64) uint8_t pick[4][64];
    for (int i = 0; i < 4; ++i) {
      for (int byte = 0; byte < 64; ++byte) pick[i][byte] = byte / 16 * 4 + i + (byte >> i & 1 ? 0 : 16);
    }
    const __m512i pick0 = _mm512_load_si512(pick[0]), pick1 = _mm512_load_si512(pick[1]);
    const __m512i pick2 = _mm512_load_si512(pick[2]), pick3 = _mm512_load_si512(pick[3]);
    for (int64_t i = 0; i < count; i += 16) {
      const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
      const __m512i centred = _mm512_sub_epi8(four, _mm512_set1_epi8(static_cast<char>(zero_point)));
      const __m512i both = _mm512_mask_sub_epi8(centred, 0xffff0000, _mm512_setzero_si512(), centred);
      const __m512i a = _mm512_add_epi8(_mm512_permutexvar_epi8(pick0, both), _mm512_permutexvar_epi8(pick1, both));
      const __m512i b = _mm512_add_epi8(_mm512_permutexvar_epi8(pick2, both), _mm512_permutexvar_epi8(pick3, both));
      _mm512_store_si512(tables + kScaling * i, _mm512_add_epi8(a, b));
    }
  }
};

#else

// Each half of a register looks up one group for 16 output channels (vpshufb). Entries are raised by kRaise, so that
// two of them add up in a byte without a sign; sums of the even and of the odd channels then gather in words, of the
// groups in either half apart, and have to become 32 bits wide after kRoom steps.
struct Tables {
  static constexpr int kScaling = 4;
  static constexpr int kStep = 64;
  static constexpr int kPixels = 2, kColumns = 2;
  static constexpr int kRaise = 60;  // of 4 activations of 4 bits, centred
  static constexpr int64_t kRoom = 65535 / (4 * kRaise);

  static void begin(int32_t* sums, const Window& window) {
    for (int i = 0; i < kColumn; ++i) sums[i] = static_cast<int32_t>(-4 * kRaise * window.count());
  }

  // acc[even] gathers whole words, an odd channel's sum above an even one's; acc[odd] the odd ones alone.
  template <int V>
  static void add(I (&acc)[V], const uint8_t* p, const I (&w)[V]) {
    const auto* tables = reinterpret_cast<const __m256i*>(p);
    const __m256i first = _mm256_loadu_si256(tables), second = _mm256_loadu_si256(tables + 1);
    for (int v = 0; v < V; v += 2) {
      const __m256i sums = _mm256_add_epi8(_mm256_shuffle_epi8(first, (__m256i)w[v]),
                                           _mm256_shuffle_epi8(second, (__m256i)w[v + 1]));
      acc[v] = (I)_mm256_add_epi16((__m256i)acc[v], sums);
      acc[v + 1] = (I)_mm256_add_epi16((__m256i)acc[v + 1], _mm256_srli_epi16(sums, 8));
    }
  }

  // sums += acc of a column
  static void settle(int32_t* sums, const I* acc) {
    const __m256i odd = (__m256i)acc[1], even = _mm256_sub_epi16((__m256i)acc[0], _mm256_slli_epi16(odd, 8));
    const __m256i halves[2] = {_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd)};
    for (const __m256i half : halves) {
      const I low = (I)_mm256_cvtepu16_epi32(_mm256_castsi256_si128(half));
      const I high = (I)_mm256_cvtepu16_epi32(_mm256_extracti128_si256(half, 1));
      store(sums, load(sums) + low + high);
      sums += kLanes;
    }
  }

  // The tables of `count` codes, a multiple of 16.
  static void fill(const uint8_t* codes, int64_t count, uint8_t zero_point, uint8_t* tables) {
    // byte 16 g + n of a table takes activation 4 g + i, negated where bit i of n is clear
    alignas(32) uint8_t pick[4][64];
    alignas(32) int8_t sign[4][32];
    for (int i = 0; i < 4; ++i) {
      for (int byte = 0; byte < 64; ++byte) pick[i][byte] = byte / 16 * 4 + i;
      for (int byte = 0; byte < 32; ++byte) sign[i][byte] = byte >> i & 1 ? 1 : -1;
    }
    for (int64_t i = 0; i < count; i += 16) {
      const __m256i four = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
      const __m256i centred = _mm256_sub_epi8(four, _mm256_set1_epi8(static_cast<char>(zero_point)));
      for (int half = 0; half < 64; half += 32) {
        __m256i sums = _mm256_set1_epi8(kRaise);
        for (int k = 0; k < 4; ++k) {
          const __m256i activation =
              _mm256_shuffle_epi8(centred, *reinterpret_cast<const __m256i*>(pick[k] + half));
          sums = _mm256_add_epi8(sums, _mm256_sign_epi8(activation, *reinterpret_cast<const __m256i*>(sign[k])));
        }
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables + kScaling * i + half), sums);
      }
    }
  }
};

#endif

}  // namespace
}  // namespace BITSTEP_CLONE
}  // namespace bitstep
