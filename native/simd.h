// Vectors of float and int32 for the instruction set of this clone, and the few operations that differ between them.
//
// Arithmetic on F and I uses the compiler's vector extensions (gcc, clang); what follows is the rest: masked memory
// access, rounding, narrowing, and the 4-way dot product of bytes that everything here is built on.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(BITSTEP_avx512) || defined(BITSTEP_avx2)
#include <immintrin.h>
#endif

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

#if defined(BITSTEP_avx512)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float F __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t W __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

inline F splat(float x) { return x - F{}; }
inline I splat(int32_t x) { return x - I{}; }
inline F load(const float* p) { return *reinterpret_cast<const F*>(p); }
inline I load(const int32_t* p) { return *reinterpret_cast<const I*>(p); }
inline void store(float* p, F x) { *reinterpret_cast<F*>(p) = x; }
inline void store(int32_t* p, I x) { *reinterpret_cast<I*>(p) = x; }
inline F to_float(I x) { return __builtin_convertvector(x, F); }

// ``count`` lanes (1..kLanes) are read or written, the others are zero or left alone.
inline F load(const float* p, int count);
inline void store(float* p, F x, int count);
// Nearest integer, ties to even.
inline F round(F x);
inline F max(F a, F b);
inline F min(F a, F b);
// 1 / x within a relative 2e-7; x positive, and neither it nor its reciprocal subnormal.
inline F reciprocal(F x);
// Nearest int32, ties to even; x is in range.
inline I to_int(F x);
// Lanes in 0..255 to bytes.
inline void store_bytes(uint8_t* p, I x, int count);
// The four bytes at p in every lane.
inline I broadcast4(const uint8_t* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return splat(x);
}
// Over all lanes.
inline float sum(F x);
inline float largest(F x);
// Lanes in the range of int16.
inline void store_words(int16_t* p, I x);
// The lanes of a and b as words, saturated to 0..65535, in an order that pairs know.
inline W to_words(I a, I b);
// For the lanes of to_words's a (low_pairs) or b (high_pairs), the words of two vectors next to each other.
inline I low_pairs(W even, W odd);
inline I high_pairs(W even, W odd);
// a * b / 2**15 of signed words, rounded.
inline W multiply_high(W a, W b);
// x / 2**n, rounded down.
inline W shift_right(W x, W n);
// Lane n of the result is lane index[n] of a and b side by side.
inline I pick(I a, I b, I index);
// acc + sum over the two int16 of each lane of a * w.
inline I dot2(I acc, I a, I w);
// acc + sum over the four bytes of each lane of a (unsigned) * w (signed), exactly.
inline I dot4(I acc, I a, I w);
// The same where two products add up to an int16.
inline I dot4_small(I acc, I a, I w);

#if defined(BITSTEP_avx512)

inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
inline F load(const float* p, int count) { return (F)_mm512_maskz_loadu_ps(first(count), p); }
inline void store(float* p, F x, int count) { _mm512_mask_storeu_ps(p, first(count), (__m512)x); }
inline F round(F x) { return (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
inline F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
inline F reciprocal(F x) {
  const F r = (F)_mm512_rcp14_ps((__m512)x);
  return r * (2.0f - x * r);
}
inline I to_int(F x) { return (I)_mm512_cvtps_epi32((__m512)x); }
inline void store_bytes(uint8_t* p, I x, int count) {
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)x);
  auto* out = reinterpret_cast<__m128i*>(p);
  count == kLanes ? _mm_storeu_si128(out, bytes) : _mm_mask_storeu_epi8(p, first(count), bytes);
}
inline I dot4(I acc, I a, I w) { return (I)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)w); }
inline I dot4_small(I acc, I a, I w) { return dot4(acc, a, w); }
inline float sum(F x) { return _mm512_reduce_add_ps((__m512)x); }
inline float largest(F x) { return _mm512_reduce_max_ps((__m512)x); }
inline I dot2(I acc, I a, I w) { return (I)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)w); }
inline void store_words(int16_t* p, I x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)x));
}
inline W to_words(I a, I b) { return (W)_mm512_packus_epi32((__m512i)a, (__m512i)b); }
inline I low_pairs(W even, W odd) { return (I)_mm512_unpacklo_epi16((__m512i)even, (__m512i)odd); }
inline I high_pairs(W even, W odd) { return (I)_mm512_unpackhi_epi16((__m512i)even, (__m512i)odd); }
inline W multiply_high(W a, W b) { return (W)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b); }
inline W shift_right(W x, W n) { return x >> n; }
inline I pick(I a, I b, I index) { return (I)_mm512_permutex2var_epi32((__m512i)a, (__m512i)index, (__m512i)b); }

#elif defined(BITSTEP_avx2)

inline __m256i first(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F load(const float* p, int count) { return (F)_mm256_maskload_ps(p, first(count)); }
inline void store(float* p, F x, int count) { _mm256_maskstore_ps(p, first(count), (__m256)x); }
inline F round(F x) { return (F)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
inline F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
inline F reciprocal(F x) {
  const F r = (F)_mm256_rcp_ps((__m256)x);
  return r * (2.0f - x * r);
}
inline I to_int(F x) { return (I)_mm256_cvtps_epi32((__m256)x); }
inline void store_bytes(uint8_t* p, I x, int count) {
  const __m256i words = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const __m128i eight = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  uint8_t out[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), eight);
  std::memcpy(p, out, count);
}
#if defined(BITSTEP_avxvnni)
inline I dot4(I acc, I a, I w) { return (I)_mm256_dpbusd_epi32((__m256i)acc, (__m256i)a, (__m256i)w); }
inline I dot4_small(I acc, I a, I w) { return dot4(acc, a, w); }
inline I dot2(I acc, I a, I w) { return (I)_mm256_dpwssd_epi32((__m256i)acc, (__m256i)a, (__m256i)w); }
#else
inline I dot4(I acc, I a, I w) {
  // vpmaddubsw saturates; so even and odd bytes become words, of which a loop has those of either side to share
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)w, 8), 8), odd = _mm256_srai_epi16((__m256i)w, 8);
  acc += (I)_mm256_madd_epi16(_mm256_and_si256((__m256i)a, _mm256_set1_epi16(0x00ff)), even);
  return acc + (I)_mm256_madd_epi16(_mm256_srli_epi16((__m256i)a, 8), odd);
}
inline I dot4_small(I acc, I a, I w) {
  return acc + (I)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)w), _mm256_set1_epi16(1));
}
inline I dot2(I acc, I a, I w) { return acc + (I)_mm256_madd_epi16((__m256i)a, (__m256i)w); }
#endif
inline float sum(F x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float largest(F x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline void store_words(int16_t* p, I x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)x, (__m256i)x), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(words));
}
inline W to_words(I a, I b) { return (W)_mm256_packus_epi32((__m256i)a, (__m256i)b); }
inline I low_pairs(W even, W odd) { return (I)_mm256_unpacklo_epi16((__m256i)even, (__m256i)odd); }
inline I high_pairs(W even, W odd) { return (I)_mm256_unpackhi_epi16((__m256i)even, (__m256i)odd); }
inline W multiply_high(W a, W b) { return (W)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b); }
inline W shift_right(W x, W n) {  // only lanes of 32 bits have shifts of their own
  const __m256i value = (__m256i)x, count = (__m256i)n, low = _mm256_set1_epi32(0xffff);
  const __m256i even = _mm256_srlv_epi32(_mm256_and_si256(value, low), _mm256_and_si256(count, low));
  const __m256i odd = _mm256_srlv_epi32(value, _mm256_srli_epi32(count, 16));
  return (W)_mm256_blend_epi16(even, odd, 0xaa);
}
inline I pick(I a, I b, I index) {
  const __m256i at = (__m256i)index;
  const __m256i low = _mm256_permutevar8x32_epi32((__m256i)a, at), high = _mm256_permutevar8x32_epi32((__m256i)b, at);
  return (I)_mm256_blendv_epi8(low, high, _mm256_cmpgt_epi32(at, _mm256_set1_epi32(kLanes - 1)));
}

#else

inline F load(const float* p, int count) {
  F x{};
  for (int i = 0; i < count; ++i) x[i] = p[i];
  return x;
}
inline void store(float* p, F x, int count) {
  for (int i = 0; i < count; ++i) p[i] = x[i];
}
inline F round(F x) {
  // adding 1.5 * 2**23 leaves no fraction bits; beyond 2**22 there are too few to matter
  const F magic = splat(12582912.0f);
  const F rounded = x + magic - magic, size = x < 0 ? -x : x;
  return size < splat(4194304.0f) ? rounded : x;
}
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F reciprocal(F x) { return 1.0f / x; }
inline I to_int(F x) { return __builtin_convertvector(round(x), I); }
inline void store_bytes(uint8_t* p, I x, int count) {
  for (int i = 0; i < count; ++i) p[i] = static_cast<uint8_t>(x[i]);
}
inline I dot4(I acc, I a, I w) {
  for (int byte = 0; byte < 4; ++byte) {
    acc += (a >> (8 * byte) & 255) * (w << (24 - 8 * byte) >> 24);
  }
  return acc;
}
inline I dot4_small(I acc, I a, I w) { return dot4(acc, a, w); }
inline float sum(F x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}
inline float largest(F x) {
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}
inline I dot2(I acc, I a, I w) { return acc + (a << 16 >> 16) * (w << 16 >> 16) + (a >> 16) * (w >> 16); }
inline void store_words(int16_t* p, I x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int16_t>(x[i]);
}
inline W to_words(I a, I b) {
  W x;
  for (int i = 0; i < kLanes; ++i) {
    x[i] = static_cast<uint16_t>(a[i] < 0 ? 0 : a[i] > 65535 ? 65535 : a[i]);
    x[kLanes + i] = static_cast<uint16_t>(b[i] < 0 ? 0 : b[i] > 65535 ? 65535 : b[i]);
  }
  return x;
}
inline I low_pairs(W even, W odd) {
  I x;
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<int32_t>(even[i] | uint32_t{odd[i]} << 16);
  return x;
}
inline I high_pairs(W even, W odd) {
  I x;
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<int32_t>(even[kLanes + i] | uint32_t{odd[kLanes + i]} << 16);
  return x;
}
inline W multiply_high(W a, W b) {
  W x;
  for (int i = 0; i < 2 * kLanes; ++i) {
    x[i] = static_cast<uint16_t>((static_cast<int16_t>(a[i]) * static_cast<int16_t>(b[i]) + (1 << 14)) >> 15);
  }
  return x;
}
inline W shift_right(W x, W n) { return x >> n; }
inline I pick(I a, I b, I index) {
  I x;
  for (int i = 0; i < kLanes; ++i) x[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return x;
}

#endif

inline F load_some(const float* p, int count) { return count == kLanes ? load(p) : load(p, count); }
inline void store_some(float* p, F x, int count) { count == kLanes ? store(p, x) : store(p, x, count); }

// at(i, lanes) for every vector of [0, count); `at` is to be inlined, once for whole vectors and once for the rest.
template <class At>
inline void for_vectors(int64_t count, const At& at) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) at(i, kLanes);
  if (i < count) at(i, static_cast<int>(count - i));
}

// Lane i of vector j becomes lane j of vector i.
template <int Size = kLanes / 2>
inline void transpose(I (&x)[kLanes]) {
  // blocks of Size x Size change places across the diagonal
  I low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & Size ? i - Size + kLanes : i;
    high[i] = i & Size ? i + kLanes : i + Size;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & Size) continue;
    const I a = x[i], b = x[i + Size];
    x[i] = pick(a, b, low);
    x[i + Size] = pick(a, b, high);
  }
  if constexpr (Size > 1) transpose<Size / 2>(x);
}

// x with another value from lane `count` on.
inline F fill_from(F x, int count, float value) {
  for (int i = count; i < kLanes; ++i) x[i] = value;
  return x;
}

}  // namespace
}  // namespace BITSTEP_CLONE
}  // namespace bitstep
