// Heads of attention, and their operands as the two attention kernels multiply them: integers of 16 or 8 bits, summed in
// 32 bits.
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
constexpr int kRows = kLanes / 2;    // keys, or channels of values, multiplied side by side
constexpr int64_t kBlockKeys = 128;  // whose weighted values one sum holds
constexpr int64_t kAhead = 12;       // tokens between a load and its use

inline int lanes_left(int64_t count, int64_t at) { return static_cast<int>(std::min<int64_t>(kLanes, count - at)); }

// |x| and most, whichever is larger.
inline F largest_size(F most, F x) { return max(most, max(x, -x)); }

// What is multiplied: keys and values on the left, queries and probabilities on the right, kShare of them in a lane.
struct Words {  // of the range of int16
  using Left = int16_t;
  static constexpr int kShare = 2;
  static I dot(I acc, I left, I right) { return dot2(acc, left, right); }
  static void store_left(Left* p, I x) { store_words(p, x); }
};
struct Bytes {  // of the range of int8 on the left, of uint8 on the right
  using Left = int8_t;
  static constexpr int kShare = 4;
  static I dot(I acc, I left, I right) { return dot4(acc, right, left); }
  static void store_left(Left* p, I x) { store_bytes(reinterpret_cast<uint8_t*>(p), x & 0xff, kLanes); }
};
struct SmallBytes : Bytes {  // two of whose products add up to an int16
  static I dot(I acc, I left, I right) { return dot4_small(acc, right, left); }
};

// The integers at(0) to at(kShare - 1) in one lane.
template <class Kind, class At>
inline I join(const At& at) {
  constexpr int kBits = 32 / Kind::kShare;
  I joined{};
#pragma GCC unroll 4
  for (int i = 0; i < Kind::kShare; ++i) joined |= (at(i) & ((1 << kBits) - 1)) << (i * kBits);
  return joined;
}

// take(row, half, sum over groups of left[row][group] . right[group][query]) for the queries of a half.
template <class Kind, class Take>
inline __attribute__((always_inline)) void multiply(const typename Kind::Left* left, int64_t left_stride,
                                                    const int32_t* right, int64_t groups, const Take& take) {
  I acc[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = I{};
  for (int64_t group = 0; group < groups; ++group, right += kWide) {
    const I w0 = load(right);
    const I w1 = load(right + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto* at = left + r * left_stride + Kind::kShare * group;
      const I a = broadcast4(reinterpret_cast<const uint8_t*>(at));
      acc[r][0] = Kind::dot(acc[r][0], a, w0);
      acc[r][1] = Kind::dot(acc[r][1], a, w1);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    take(r, 0, acc[r][0]);
    take(r, 1, acc[r][1]);
  }
}

// Where the heads lie in memory. Packed keys are [keys][width], packed values [blocks of keys][width][keys of a block].
template <class Kind>
struct Heads {
  using Left = typename Kind::Left;

  const bitstep_attention_shape& shape;
  const int64_t channels;  // of all heads
  const int64_t groups, width, keys;  // channels of a head by kShare, and rounded up; keys rounded up

  explicit Heads(const bitstep_attention_shape& shape)
      : shape(shape),
        channels(int64_t{shape.heads} * shape.head_channels),
        groups(divide_up(shape.head_channels, Kind::kShare)),
        width(round_up(shape.head_channels, kLanes)),
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
    const int64_t size = keys * width, tiles = divide_up(shape.queries, kWide);
    auto* packed_keys = static_cast<Left*>(scratch(Slot::kKeys, count() * size * sizeof(Left)));
    auto* packed_values = static_cast<Left*>(scratch(Slot::kValues, count() * size * sizeof(Left)));
    parallel_for(2 * count(), threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / 2;
        i % 2 ? pack_values(head, packed_values + head * size) : pack_keys(head, packed_keys + head * size);
      }
    });
    parallel_for(count() * tiles, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / tiles, first = i % tiles * kWide;
        const int queries = static_cast<int>(std::min<int64_t>(kWide, shape.queries - first));
        attend(head, first, queries, packed_keys + head * size, packed_values + head * size);
      }
    });
  }

  // The keys of a head; round gives the integers of values.
  template <class Round>
  void pack_keys(const float* k, const Round& round, Left* out) const {
    for (int64_t key = 0; key < shape.keys; ++key) {
      for (int64_t c = 0; c < width; c += kLanes) {
        Kind::store_left(out + key * width + c, round(load_channels(k + key * channels, c)));
      }
    }
    std::fill(out + shape.keys * width, out + round_up(shape.keys, kRows) * width, Left{0});
  }

  // kLanes channels, from c on, of the values of a head.
  template <class Round>
  void pack_values(const float* v, int64_t c, const Round& round, Left* values) const {
    for (int64_t key = 0; key < keys; key += Kind::kShare * kLanes) {  // zeros beyond the last
      const auto value = [&](int64_t at) {
        return at < shape.keys ? round(load_channels(v + at * channels, c)) : I{};
      };
      I joined[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        joined[i] = join<Kind>([&](int j) { return value(key + Kind::kShare * i + j); });
      }
      transpose(joined);
      Left* out = values + key / kBlockKeys * kBlockKeys * width + c * kBlockKeys + key % kBlockKeys;
      for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<int32_t*>(out + i * kBlockKeys), joined[i]);
    }
  }
};

// Some queries of one head side by side, and the sums of values that they gather.
template <class Kind>
class Tile {
 public:
  Tile(const Heads<Kind>& heads, int queries)
      : heads_(heads),
        count_(queries),
        rows_(static_cast<float*>(scratch(Slot::kQueryRows, heads.width * kLanes * sizeof(float)))),
        queries_(static_cast<int32_t*>(scratch(Slot::kQueries, heads.groups * kWide * sizeof(int32_t)))),
        mixed_(static_cast<float*>(scratch(Slot::kMixed, heads.width * kWide * sizeof(float)))) {
    std::fill(mixed_, mixed_ + heads.width * kWide, 0.0f);
  }

  // Read a half of the queries; the largest size of each.
  F read(const float* q, int half) {
    for (int i = 0; i < kLanes; ++i) heads_.fetch(q + row(half, i) * heads_.channels);
    F most{};
    for (int64_t c = 0; c < heads_.width; c += kLanes) {
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
    for (int64_t group = 0; group < heads_.groups; ++group) {
      const float* rows = rows_ + Kind::kShare * group * kLanes;
      const I joined = join<Kind>([&](int i) { return round(load(rows + i * kLanes)); });
      store(queries_ + group * kWide + half * kLanes, joined);
    }
  }

  // The logits [count][kWide] of up to kBlockKeys keys: logit(key, its products with a half of the queries). `most` grows
  // to the largest of every query. (Keys beyond the last are zero in memory.)
  template <class Logit>
  void logits(const typename Kind::Left* keys, int64_t count, const Logit& logit, int32_t* out, I (&most)[2]) const {
    for (int64_t key = 0; key < count; key += kRows) {
      multiply<Kind>(keys + key * heads_.width, heads_.width, queries_, heads_.groups, [&](int r, int half, I sums) {
        const I one = logit(key + r, sums);
        if (key + r < count) most[half] = one > most[half] ? one : most[half];
        store(out + (key + r) * kWide + half * kLanes, one);
      });
    }
  }

  // mixed = add(mixed, channel, half, values . weights); weights [groups][kWide] of kShare keys, values of their block.
  template <class Add>
  void mix(const typename Kind::Left* values, const int32_t* weights, int64_t groups, const Add& add) {
    for (int64_t c = 0; c < heads_.shape.head_channels; c += kRows) {
      multiply<Kind>(values + c * kBlockKeys, kBlockKeys, weights, groups, [&](int r, int half, I sums) {
        float* mixed = mixed_ + (c + r) * kWide + half * kLanes;
        store(mixed, add(load(mixed), c + r, half, sums));
      });
    }
  }

  // y = gain(half, channel) * mixed
  template <class Gain>
  void write(const Gain& gain, float* y) const {
    for (int half = 0; half < 2; ++half) {
      for (int64_t c = 0; c < heads_.width; c += kLanes) {
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

  const Heads<Kind>& heads_;
  const int count_;
  float* rows_;
  int32_t* queries_;  // [groups][kWide]: kShare channels of every query
  float* mixed_;
};

}  // namespace
}  // namespace BITSTEP_CLONE
}  // namespace bitstep
