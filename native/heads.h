// Heads of attention, and their operands as the two attention kernels multiply them: 16-bit integers, summed in 32 bits.
//
// Both products are computed transposed, with a query in each lane: softmax then needs no operation across lanes, and
// its result is the operand of the second product as it stands.
#pragma once

#include <algorithm>

#include "bitstep.h"
#include "divide.h"
#include "parallel.h"
#include "simd.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

constexpr int kWide = 2 * kLanes;    // queries side by side
constexpr int kRows = 8;             // keys, or channels of values, multiplied side by side
constexpr int64_t kBlockKeys = 128;  // whose weighted values one sum holds
constexpr int64_t kAhead = 12;       // tokens between a load and its use

inline int lanes_left(int64_t count, int64_t at) { return static_cast<int>(std::min<int64_t>(kLanes, count - at)); }

// |x| and most, whichever is larger.
inline F largest_size(F most, F x) { return max(most, max(x, -x)); }

// Two values of the range of int16 in one lane.
inline I join(I low, I high) { return (low & 0xffff) | (high << 16); }

// The two 16-bit values at p in every lane.
inline I broadcast2(const int16_t* p) { return broadcast4(reinterpret_cast<const uint8_t*>(p)); }

// take(row, half, sum over pairs of left[row][pair] . right[pair][query]) for the queries of a half.
template <class Take>
inline __attribute__((always_inline)) void multiply(const int16_t* left, int64_t left_stride, const int32_t* right,
                                                    int64_t pairs, const Take& take) {
  I acc[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = I{};
  for (int64_t pair = 0; pair < pairs; ++pair, right += kWide) {
    const I w0 = load(right);
    const I w1 = load(right + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const I a = broadcast2(left + r * left_stride + 2 * pair);
      acc[r][0] = dot2(acc[r][0], a, w0);
      acc[r][1] = dot2(acc[r][1], a, w1);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    take(r, 0, acc[r][0]);
    take(r, 1, acc[r][1]);
  }
}

// Where the heads lie in memory. Packed keys are [keys][words], packed values [blocks of keys][words][keys of a block].
struct Heads {
  const bitstep_attention_shape& shape;
  const int64_t channels;  // of all heads
  const int64_t pairs, words, keys;  // channels of a head by two, and rounded up; keys rounded up

  explicit Heads(const bitstep_attention_shape& shape)
      : shape(shape),
        channels(int64_t{shape.heads} * shape.head_channels),
        pairs(divide_up(shape.head_channels, 2)),
        words(round_up(shape.head_channels, kLanes)),
        keys(round_up(shape.keys, kBlockKeys)) {}

  int64_t count() const { return int64_t{shape.batch} * shape.heads; }

  // Of a head's part of the first of so many tokens.
  int64_t offset(int64_t head, int64_t tokens) const {
    return head / shape.heads * tokens * channels + head % shape.heads * shape.head_channels;
  }

  // kLanes channels from c on, those beyond the head zero.
  F load_channels(const float* x, int64_t c) const { return load_some(x + c, lanes_left(shape.head_channels, c)); }

  // Start to load a head's part of a token: they lie far apart.
  void fetch(const float* x) const {
    for (int64_t c = 0; c < shape.head_channels; c += 16) __builtin_prefetch(x + c);
  }

  // pack_keys(head, keys) and pack_values(head, values) for every head, then
  // attend(head, first query, number of queries, keys, values) for every tile of its queries.
  template <class PackKeys, class PackValues, class Attend>
  void run(const PackKeys& pack_keys, const PackValues& pack_values, const Attend& attend, int threads) const {
    const int64_t size = keys * words, tiles = divide_up(shape.queries, kWide);
    auto* key_words = static_cast<int16_t*>(scratch(Slot::kKeys, count() * size * sizeof(int16_t)));
    auto* value_words = static_cast<int16_t*>(scratch(Slot::kValues, count() * size * sizeof(int16_t)));
    parallel_for(2 * count(), threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / 2;
        i % 2 ? pack_values(head, value_words + head * size) : pack_keys(head, key_words + head * size);
      }
    });
    parallel_for(count() * tiles, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / tiles, first = i % tiles * kWide;
        const int queries = static_cast<int>(std::min<int64_t>(kWide, shape.queries - first));
        attend(head, first, queries, key_words + head * size, value_words + head * size);
      }
    });
  }

  // The keys of a head as words; round gives the integers of values.
  template <class Round>
  void pack_keys(const float* k, const Round& round, int16_t* out) const {
    for (int64_t key = 0; key < shape.keys; ++key) {
      for (int64_t c = 0; c < words; c += kLanes) {
        store_words(out + key * words + c, round(load_channels(k + key * channels, c)));
      }
    }
    std::fill(out + shape.keys * words, out + round_up(shape.keys, kRows) * words, int16_t{0});
  }

  // kLanes channels, from c on, of the values of a head as words.
  template <class Round>
  void pack_values(const float* v, int64_t c, const Round& round, int16_t* values) const {
    for (int64_t key = 0; key < shape.keys; key += 2 * kLanes) {
      const auto value = [&](int64_t at) {
        return at < shape.keys ? round(load_channels(v + at * channels, c)) : I{};
      };
      I pairs[kLanes];
      for (int i = 0; i < kLanes; ++i) pairs[i] = join(value(key + 2 * i), value(key + 2 * i + 1));
      transpose(pairs);
      int16_t* out = values + key / kBlockKeys * kBlockKeys * words + c * kBlockKeys + key % kBlockKeys;
      for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<int32_t*>(out + i * kBlockKeys), pairs[i]);
    }
  }
};

// Some queries of one head side by side, and the sums of values that they gather.
class Tile {
 public:
  Tile(const Heads& heads, int queries)
      : heads_(heads),
        count_(queries),
        rows_(static_cast<float*>(scratch(Slot::kQueryRows, heads.words * kLanes * sizeof(float)))),
        queries_(static_cast<int32_t*>(scratch(Slot::kQueries, heads.pairs * kWide * sizeof(int32_t)))),
        mixed_(static_cast<float*>(scratch(Slot::kMixed, heads.words * kWide * sizeof(float)))) {
    std::fill(mixed_, mixed_ + heads.words * kWide, 0.0f);
  }

  // [pairs][kWide]: two channels of every query.
  const int32_t* queries() const { return queries_; }

  // Read a half of the queries; the largest size of each.
  F read(const float* q, int half) {
    for (int i = 0; i < kLanes; ++i) heads_.fetch(q + row(half, i) * heads_.channels);
    F most{};
    for (int64_t c = 0; c < heads_.words; c += kLanes) {
      I x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = (I)heads_.load_channels(q + row(half, i) * heads_.channels, c);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) {
        most = largest_size(most, (F)x[i]);
        store(rows_ + (c + i) * kLanes, (F)x[i]);
      }
    }
    return most;
  }

  // Make the half that was read last integers.
  template <class Round>
  void round(int half, const Round& round) {
    for (int64_t pair = 0; pair < heads_.pairs; ++pair) {
      const float* both = rows_ + 2 * pair * kLanes;
      store(queries_ + pair * kWide + half * kLanes, join(round(load(both)), round(load(both + kLanes))));
    }
  }

  // mixed = correction * mixed + values . weights; weights [pairs][kWide] of two keys, values of their block.
  void mix(const int16_t* values, const int32_t* weights, int64_t pairs, const F (&correction)[2]) {
    for (int64_t c = 0; c < heads_.shape.head_channels; c += kRows) {
      multiply(values + c * kBlockKeys, kBlockKeys, weights, pairs, [&](int r, int half, I sums) {
        float* mixed = mixed_ + (c + r) * kWide + half * kLanes;
        store(mixed, load(mixed) * correction[half] + to_float(sums));
      });
    }
  }

  // y = gain(half, channel) * mixed
  template <class Gain>
  void write(const Gain& gain, float* y) const {
    for (int half = 0; half < 2; ++half) {
      for (int64_t c = 0; c < heads_.words; c += kLanes) {
        I x[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          x[i] = (I)(load(mixed_ + (c + i) * kWide + half * kLanes) * gain(half, c + i));
        }
        transpose(x);
        for (int i = 0; i < std::min(kLanes, count_ - half * kLanes); ++i) {
          store_some(y + (half * kLanes + i) * heads_.channels + c, (F)x[i], lanes_left(heads_.shape.head_channels, c));
        }
      }
    }
  }

 private:
  int row(int half, int i) const { return std::min(half * kLanes + i, count_ - 1); }  // a short tile repeats its last

  const Heads& heads_;
  const int count_;
  float* rows_;
  int32_t* queries_;
  float* mixed_;
};

}  // namespace
}  // namespace BITSTEP_CLONE
}  // namespace bitstep
