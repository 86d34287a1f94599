// softmax(scale Q K^T) V in 16-bit fixed point with 32-bit sums: 2 multiply-adds per lane where fp32 has 1, and finer
// than bf16. Queries have a step each, the keys of a head one, values one per channel; probabilities are fractions of
// the row's largest, in 13 bits.
//
// Both products are computed transposed, with a query in each lane: softmax then needs no operation across lanes, and
// its result is the operand of the second product as it stands. Exponentials are taken of 16-bit logarithms.
#include <algorithm>
#include <climits>
#include <cmath>

#include "clone.h"
#include "functions.h"
#include "parallel.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

constexpr int kWide = 2 * kLanes;  // queries side by side
constexpr int kRows = 8;           // keys, or channels of values, multiplied side by side
constexpr int64_t kBlock = 128;    // keys between two corrections of the softmax, whose weighted values a sum holds:
constexpr float kValue = 2020;     //   128 x 2**13 x 2020 < 2**31, less 1 % that rounding may add to large logarithms
constexpr float kDepth = 4096;     // steps of a logarithm to base 2, in 16 bits
constexpr int64_t kAhead = 12;     // tokens between a load and its use

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

int lanes_left(int64_t count, int64_t at) { return static_cast<int>(std::min<int64_t>(kLanes, count - at)); }

// |x| and most, whichever is larger.
F largest_size(F most, F x) { return max(most, max(x, -x)); }

// The step by which values of at most `most` are at most `limit` steps; any, where they are next to nothing.
F fixed_step(F most, float limit) { return most > splat(1e-30f) ? most * splat(1 / limit) : splat(1.0f); }

// Two values of the range of int16 in one lane.
I join(I low, I high) { return (low & 0xffff) | (high << 16); }

W words(int x) { return static_cast<uint16_t>(x) - W{}; }

// 2**(14 - x / kDepth) within a relative 8e-5 and half a step; x at least kDepth.
W probability(W x) {
  const W fraction = x << 3 & 0x7fff;
  W p = words(-1278);  // a polynomial fitted on [0, 1], in units of 2**-15
  for (const int c : {7539, -22643, 32766}) p = multiply_high(p, fraction) + words(c);
  return (shift_right(p, x >> 12) + 1) >> 1;
}

// The two 16-bit values at p in every lane.
I broadcast2(const int16_t* p) { return broadcast4(reinterpret_cast<const uint8_t*>(p)); }

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

class Attention {
 public:
  explicit Attention(const bitstep_attention_shape& shape)
      : shape_(shape),
        channels_(int64_t{shape.heads} * shape.head_channels),
        pairs_((shape.head_channels + 1) / 2),
        words_(round_up(shape.head_channels, kLanes)),
        keys_(round_up(shape.keys, kBlock)),
        limit_(std::min(32767.0f, std::floor(std::sqrt(2147483647.0f / (2 * pairs_))) - 1)) {}

  void run(const float* q, const float* k, const float* v, float* y, int threads) const {
    const int64_t heads = int64_t{shape_.batch} * shape_.heads;
    auto* keys = static_cast<int16_t*>(scratch(Slot::kKeys, heads * keys_ * words_ * sizeof(int16_t)));
    auto* key_steps = static_cast<float*>(scratch(Slot::kKeySteps, heads * sizeof(float)));
    auto* values = static_cast<int16_t*>(scratch(Slot::kValues, heads * keys_ * words_ * sizeof(int16_t)));
    auto* value_steps = static_cast<float*>(scratch(Slot::kValueSteps, heads * words_ * sizeof(float)));
    parallel_for(2 * heads, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / 2, start = offset(head, shape_.keys);
        if (i % 2) {
          pack_values(v + start, values + head * keys_ * words_, value_steps + head * words_);
        } else {
          key_steps[head] = pack_keys(k + start, keys + head * keys_ * words_);
        }
      }
    });
    const int64_t tiles = (shape_.queries + kWide - 1) / kWide;
    parallel_for(heads * tiles, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / tiles, first = i % tiles * kWide;
        const int64_t start = offset(head, shape_.queries) + first * channels_;
        const int queries = static_cast<int>(std::min<int64_t>(kWide, shape_.queries - first));
        Tile tile(*this, queries, q + start, key_steps[head]);
        for (int64_t key = 0; key < shape_.keys; key += kBlock) {
          const int64_t block = (head * keys_ + key) * words_;
          tile.attend(keys + block, values + block, std::min(kBlock, shape_.keys - key));
        }
        tile.finish(value_steps + head * words_, y + start);
      }
    });
  }

 private:
  int64_t offset(int64_t head, int64_t tokens) const {
    return head / shape_.heads * tokens * channels_ + head % shape_.heads * shape_.head_channels;
  }

  // kLanes channels from c on, those beyond the head zero.
  F load_channels(const float* x, int64_t c) const { return load_some(x + c, lanes_left(shape_.head_channels, c)); }

  // Start to load a head's part of a token: they lie far apart.
  void fetch(const float* x) const {
    for (int64_t c = 0; c < shape_.head_channels; c += 16) __builtin_prefetch(x + c);
  }

  // [keys][words]; returns the step.
  float pack_keys(const float* k, int16_t* keys) const {
    F most{};
    for (int64_t key = 0; key < shape_.keys; ++key) {
      fetch(k + (key + kAhead) * channels_);
      for (int64_t c = 0; c < words_; c += kLanes) most = largest_size(most, load_channels(k + key * channels_, c));
    }
    const F step = fixed_step(splat(largest(most)), limit_), scale = 1.0f / step;
    for (int64_t key = 0; key < shape_.keys; ++key) {
      for (int64_t c = 0; c < words_; c += kLanes) {
        store_words(keys + key * words_ + c, to_int(load_channels(k + key * channels_, c) * scale));
      }
    }
    std::fill(keys + shape_.keys * words_, keys + round_up(shape_.keys, kRows) * words_, int16_t{0});
    return step[0];
  }

  // [blocks of keys][channels][keys of a block], and a step per channel
  void pack_values(const float* v, int16_t* values, float* steps) const {
    for (int64_t c = 0; c < words_; c += kLanes) {
      F most{};
      for (int64_t key = 0; key < shape_.keys; ++key) {
        __builtin_prefetch(v + (key + kAhead) * channels_ + c);
        most = largest_size(most, load_channels(v + key * channels_, c));
      }
      const F step = fixed_step(most, kValue), scale = 1.0f / step;
      store(steps + c, step);
      for (int64_t key = 0; key < shape_.keys; key += 2 * kLanes) {
        const auto value = [&](int64_t at) {
          return at < shape_.keys ? to_int(load_channels(v + at * channels_, c) * scale) : I{};
        };
        I pairs[kLanes];
        for (int i = 0; i < kLanes; ++i) pairs[i] = join(value(key + 2 * i), value(key + 2 * i + 1));
        transpose(pairs);
        int16_t* out = values + key / kBlock * kBlock * words_ + c * kBlock + key % kBlock;
        for (int i = 0; i < kLanes; ++i) store(reinterpret_cast<int32_t*>(out + i * kBlock), pairs[i]);
      }
    }
  }

  // Some queries of one head, and what they have gathered from the keys so far.
  class Tile {
   public:
    Tile(const Attention& attention, int queries, const float* q, float key_step)
        : a_(attention),
          count_(queries),
          queries_(static_cast<int32_t*>(scratch(Slot::kQueries, a_.pairs_ * kWide * sizeof(int32_t)))),
          mixed_(static_cast<float*>(scratch(Slot::kMixed, a_.words_ * kWide * sizeof(float)))) {
      for (int i = 0; i < queries; ++i) a_.fetch(q + i * a_.channels_);
      std::fill(mixed_, mixed_ + a_.words_ * kWide, 0.0f);
      auto* rows = static_cast<float*>(scratch(Slot::kRows, a_.words_ * kLanes * sizeof(float)));
      for (int half = 0; half < 2; ++half) {
        F most{};
        for (int64_t c = 0; c < a_.words_; c += kLanes) {
          I x[kLanes];
          for (int i = 0; i < kLanes; ++i) {  // a short tile repeats its last query
            x[i] = (I)a_.load_channels(q + std::min(half * kLanes + i, queries - 1) * a_.channels_, c);
          }
          transpose(x);
          for (int i = 0; i < kLanes; ++i) {
            most = largest_size(most, (F)x[i]);
            store(rows + (c + i) * kLanes, (F)x[i]);
          }
        }
        const F step = fixed_step(most, a_.limit_), scale = 1.0f / step;
        // logarithms to base 2; bounded, so that every difference has a depth, where they show little but rounding
        steps_[half] = min(step * splat(a_.shape_.scale * 1.44269504f * key_step), splat(0x1p-14f));
        for (int64_t pair = 0; pair < a_.pairs_; ++pair) {
          const float* both = rows + 2 * pair * kLanes;
          const I words = join(to_int(load(both) * scale), to_int(load(both + kLanes) * scale));
          store(queries_ + pair * kWide + half * kLanes, words);
        }
      }
    }

    // Add up to kBlock keys; those beyond count are zero in memory.
    void attend(const int16_t* keys, const int16_t* values, int64_t count) {
      alignas(64) int32_t logits[kBlock * kWide];
      alignas(64) int32_t probabilities[kBlock / 2 * kWide];
      I most[2] = {most_[0], most_[1]};
      for (int64_t key = 0; key < count; key += kRows) {
        multiply(keys + key * a_.words_, a_.words_, queries_, a_.pairs_, [&](int r, int half, I sums) {
          if (key + r < count) most[half] = sums > most[half] ? sums : most[half];
          store(logits + (key + r) * kWide + half * kLanes, sums);
        });
      }
      F correction[2];
      for (int half = 0; half < 2; ++half) {
        correction[half] = exp2((to_float(most_[half]) - to_float(most[half])) * steps_[half]);
        most_[half] = most[half];
        total_[half] *= correction[half];
      }
      exponentiate(logits, count, probabilities);
      mix(values, probabilities, (count + 1) / 2, correction);
    }

    void finish(const float* value_steps, float* y) const {
      for (int half = 0; half < 2; ++half) {
        const F inverse = 1.0f / total_[half];
        for (int64_t c = 0; c < a_.words_; c += kLanes) {
          I x[kLanes];
          for (int i = 0; i < kLanes; ++i) {
            x[i] = (I)(load(mixed_ + (c + i) * kWide + half * kLanes) * inverse * splat(value_steps[c + i]));
          }
          transpose(x);
          for (int i = 0; i < std::min(kLanes, count_ - half * kLanes); ++i) {
            store_some(y + (half * kLanes + i) * a_.channels_ + c, (F)x[i], lanes_left(a_.shape_.head_channels, c));
          }
        }
      }
    }

   private:
    // Logits [count][kWide] to probabilities [count / 2][kWide] of two keys; adds their sums to the totals.
    void exponentiate(const int32_t* logits, int64_t count, int32_t* probabilities) {
      F step[2], origin[2];
      for (int half = 0; half < 2; ++half) {
        step[half] = steps_[half] * splat(-kDepth);
        origin[half] = splat(kDepth) - to_float(most_[half]) * step[half];
      }
      const auto probabilities_of = [&](int64_t key) {
        I depth[2];
        for (int half = 0; half < 2; ++half) {
          depth[half] = to_int(to_float(load(logits + key * kWide + half * kLanes)) * step[half] + origin[half]);
        }
        return probability(to_words(depth[0], depth[1]));
      };
      I total[2] = {};
      for (int64_t key = 0; key < count; key += 2, probabilities += kWide) {
        const W even = probabilities_of(key), odd = key + 1 < count ? probabilities_of(key + 1) : W{};
        const I pairs[2] = {low_pairs(even, odd), high_pairs(even, odd)};
        for (int half = 0; half < 2; ++half) {
          total[half] = dot2(total[half], pairs[half], splat(0x00010001));
          store(probabilities + half * kLanes, pairs[half]);
        }
      }
      for (int half = 0; half < 2; ++half) total_[half] += to_float(total[half]);
    }

    // mixed = correction * mixed + values . probabilities
    void mix(const int16_t* values, const int32_t* probabilities, int64_t pairs, const F (&correction)[2]) {
      for (int64_t c = 0; c < a_.shape_.head_channels; c += kRows) {
        multiply(values + c * kBlock, kBlock, probabilities, pairs, [&](int r, int half, I sums) {
          float* mixed = mixed_ + (c + r) * kWide + half * kLanes;
          store(mixed, load(mixed) * correction[half] + to_float(sums));
        });
      }
    }

    const Attention& a_;
    const int count_;
    int32_t* queries_;
    float* mixed_;
    F steps_[2];
    I most_[2] = {splat(-INT_MAX), splat(-INT_MAX)};
    F total_[2] = {};
  };

  const bitstep_attention_shape& shape_;
  int64_t channels_, pairs_, words_, keys_;
  float limit_;
};

}  // namespace

void attend(const bitstep_attention_shape& shape, const float* q, const float* k, const float* v, float* y,
            int threads) {
  if (shape.keys > 0) Attention(shape).run(q, k, v, y, threads);
}

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
