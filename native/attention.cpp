// softmax(scale Q K^T) V in 16-bit fixed point: 2 multiply-adds per lane where fp32 has 1, and finer than bf16. Queries
// have a step each, the keys of a head one, values one per channel; probabilities are fractions of the row's largest so
// far, in 13 bits. Exponentials are taken of 16-bit logarithms.
#include <climits>
#include <cmath>

#include "clone.h"
#include "functions.h"
#include "heads.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

constexpr float kValue = 2020;  // kBlockKeys x 2**13 x 2020 < 2**31, less 1 % that rounding may add to large logarithms
constexpr float kDepth = 4096;  // steps of a logarithm to base 2, in 16 bits

// The step by which values of at most `most` are at most `limit` steps; any, where they are next to nothing.
F fixed_step(F most, float limit) { return most > splat(1e-30f) ? most * splat(1 / limit) : splat(1.0f); }

// The nearest integer of steps.
auto in_steps(F step) {
  return [scale = 1.0f / step](F x) { return to_int(x * scale); };
}

W words(int x) { return static_cast<uint16_t>(x) - W{}; }

// 2**(14 - x / kDepth) within a relative 8e-5 and half a step; x at least kDepth.
W probability(W x) {
  const W fraction = x << 3 & 0x7fff;
  W p = words(-1278);  // a polynomial fitted on [0, 1], in units of 2**-15
  for (const int c : {7539, -22643, 32766}) p = multiply_high(p, fraction) + words(c);
  return (shift_right(p, x >> 12) + 1) >> 1;
}

// The step of the keys of a head, which become integers of at most `limit`.
float pack_keys(const Heads<Words>& heads, const float* k, float limit, int16_t* keys) {
  F most{};
  for (int64_t key = 0; key < heads.shape.keys; ++key) {
    heads.fetch(k + (key + kAhead) * heads.channels);
    for (int64_t c = 0; c < heads.width; c += kLanes) {
      most = largest_size(most, heads.load_channels(k + key * heads.channels, c));
    }
  }
  const F step = fixed_step(splat(largest(most)), limit);
  heads.pack_keys(k, in_steps(step), keys);
  return step[0];
}

void pack_values(const Heads<Words>& heads, const float* v, int16_t* values, float* steps) {
  for (int64_t c = 0; c < heads.width; c += kLanes) {
    F most{};
    for (int64_t key = 0; key < heads.shape.keys; ++key) {
      __builtin_prefetch(v + (key + kAhead) * heads.channels + c);
      most = largest_size(most, heads.load_channels(v + key * heads.channels, c));
    }
    const F step = fixed_step(most, kValue);
    store(steps + c, step);
    heads.pack_values(v, c, in_steps(step), values);
  }
}

// The softmax of a tile's queries over the keys so far.
class Softmax {
 public:
  // steps: of the logits to base 2
  explicit Softmax(const F (&steps)[2]) : steps_{steps[0], steps[1]} {}

  // Take up to kBlockKeys; logits [count][kWide] to probabilities [count / 2][kWide] of two keys. What was gathered
  // from earlier keys is to be multiplied by the correction.
  void take(const int32_t* logits, int64_t count, const I (&most)[2], int32_t* probabilities, F (&correction)[2]) {
    F step[2], origin[2];
    for (int half = 0; half < 2; ++half) {
      correction[half] = exp2((to_float(most_[half]) - to_float(most[half])) * steps_[half]);
      most_[half] = most[half];
      step[half] = steps_[half] * splat(-kDepth);
      origin[half] = splat(kDepth) - to_float(most[half]) * step[half];
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
    for (int half = 0; half < 2; ++half) total_[half] = total_[half] * correction[half] + to_float(total[half]);
  }

  I most(int half) const { return most_[half]; }
  F total(int half) const { return total_[half]; }

 private:
  const F steps_[2];
  I most_[2] = {splat(-INT_MAX), splat(-INT_MAX)};
  F total_[2] = {};
};

}  // namespace

void attend(const bitstep_attention_shape& shape, const float* q, const float* k, const float* v, float* y,
            int threads) {
  const Heads<Words> heads(shape);
  const float limit = std::min(32767.0f, std::floor(std::sqrt(2147483647.0f / (Words::kShare * heads.groups))) - 1);
  auto* key_steps = static_cast<float*>(scratch(Slot::kKeySteps, heads.count() * sizeof(float)));
  auto* value_steps = static_cast<float*>(scratch(Slot::kValueSteps, heads.count() * heads.width * sizeof(float)));
  heads.run(
      [&](int64_t head, int16_t* keys) {
        key_steps[head] = pack_keys(heads, k + heads.offset(head, shape.keys), limit, keys);
      },
      [&](int64_t head, int16_t* values) {
        pack_values(heads, v + heads.offset(head, shape.keys), values, value_steps + head * heads.width);
      },
      [&](int64_t head, int64_t first, int queries, const int16_t* keys, const int16_t* values) {
        const int64_t at = heads.offset(head, shape.queries) + first * heads.channels;
        Tile<Words> tile(heads, queries);
        F steps[2];
        for (int half = 0; half < 2; ++half) {
          const F step = fixed_step(tile.read(q + at, half), limit);
          tile.round(half, in_steps(step));
          // bounded, so that every difference of logarithms has a depth, where they show little but rounding
          steps[half] = min(step * splat(shape.scale * 1.44269504f * key_steps[head]), splat(0x1p-14f));
        }
        Softmax softmax(steps);
        alignas(64) int32_t logits[kBlockKeys * kWide];
        alignas(64) int32_t probabilities[kBlockKeys / Words::kShare * kWide];
        for (int64_t begin = 0; begin < shape.keys; begin += kBlockKeys) {
          const int64_t count = std::min(kBlockKeys, shape.keys - begin);
          I most[2] = {softmax.most(0), softmax.most(1)};
          tile.logits(keys + begin * heads.width, count, [](int64_t, I sums) { return sums; }, logits, most);
          F correction[2];
          softmax.take(logits, count, most, probabilities, correction);
          tile.mix(values + begin * heads.width, probabilities, divide_up(count, Words::kShare),
                   [&](F mixed, int64_t, int half, I sums) { return mixed * correction[half] + to_float(sums); });
        }
        const F inverse[2] = {1.0f / softmax.total(0), 1.0f / softmax.total(1)};
        const float* value_step = value_steps + head * heads.width;
        tile.write([&](int half, int64_t c) { return inverse[half] * splat(value_step[c]); }, y + at);
      },
      threads);
}

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
