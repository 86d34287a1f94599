// Attention between quantized operands: queries, keys, values and probabilities are codes less their zero point, both
// products sums of integers, and nothing is rounded but the softmax between them, which is fp32.
//
// A probability's code depends on all keys of its query, so that the softmax is finished before values are mixed.
//
// Bytes are multiplied: codes u of queries and probabilities as they are, codes s of keys and values less half of their
// range, so that
//
//   sum (u - zero_u) (s + half - zero_s) = sum u s - zero_u sum s + (half - zero_s) sum (u - zero_u)
//
// For logits the last term is the same for all keys of a query: the softmax does not see it.
#include <climits>
#include <numeric>

#include "clone.h"
#include "codes.h"
#include "functions.h"
#include "heads.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

enum Operand { kQuery, kKey, kValue, kProbability };

// Half of the range of codes.
int half_of(const bitstep_step& step) { return (step.top + 1) / 2; }

// Whether two products of codes u and s add up to an int16.
bool are_small(const bitstep_step& u, const bitstep_step& s) { return 2 * u.top * half_of(s) <= INT16_MAX; }

// factor * the sum of every row.
void times_sums(int factor, const int8_t* rows, int64_t count, int64_t size, int32_t* out) {
  for (int64_t row = 0; row < count; ++row, rows += size) out[row] = factor * std::accumulate(rows, rows + size, 0);
}

// code(0) to code(count - 1), four in a lane with zeros after the last, [count / 4][kWide]; their sum.
template <class Code>
I code_in_fours(const Code& code, int count, int32_t* out) {
  I total{};
  const auto take = [&](int first, int share) {
    const I joined = join<Bytes>([&](int i) { return i < share ? code(first + i) : I{}; });
    total = dot4(total, joined, splat(0x01010101));
    store(out + first / Bytes::kShare * kWide, joined);
  };
  const int rest = count % Bytes::kShare;
  for (int first = 0; first < count - rest; first += Bytes::kShare) take(first, Bytes::kShare);
  if (rest) take(count - rest, rest);
  return total;
}

// The softmax of a tile's queries over all keys. Powers are of differences to the largest logit so far, which a factor
// for every block of keys makes up for when all are known.
class Softmax {
 public:
  // step: of the logits
  Softmax(float step, int64_t keys)
      : slope_(splat(step * 1.44269504f)),
        powers_(static_cast<float*>(scratch(Slot::kPowers, keys * kWide * sizeof(float)))),
        origins_(static_cast<int32_t*>(scratch(Slot::kOrigins, keys / kBlockKeys * kWide * sizeof(int32_t)))) {}

  // Take the logits [count][kWide] of a block of keys.
  void take(int64_t block, const int32_t* logits, int64_t count, const I (&most)[2]) {
    F total[2];
    for (int half = 0; half < 2; ++half) {
      total[half] = total_[half] * since(most_[half], most[half]);
      store(origins_ + block * kWide + half * kLanes, most_[half] = most[half]);
    }
    float* power = powers_ + block * kBlockKeys * kWide;
    for (int64_t key = 0; key < count; ++key, power += kWide, logits += kWide) {
      for (int half = 0; half < 2; ++half) {
        const F one = since(load(logits + half * kLanes), most[half]);
        total[half] += one;
        store(power + half * kLanes, one);
      }
    }
    for (int half = 0; half < 2; ++half) total_[half] = total[half];
  }

  // The probability of a query of a half and a key of a block, once all are taken.
  auto probabilities(int64_t block, int half) const {
    const F factor = since(load(origins_ + block * kWide + half * kLanes), most_[half]) / total_[half];
    const float* powers = powers_ + block * kBlockKeys * kWide + half * kLanes;
    return [factor, powers](int key) { return load(powers + key * kWide) * factor; };
  }

  I most(int half) const { return most_[half]; }

 private:
  // e**(the difference of logits)
  F since(I logit, I most) const { return exp2(to_float(logit - most) * slope_); }

  const F slope_;
  float* const powers_;
  int32_t* const origins_;
  I most_[2] = {splat(-INT_MAX / 2), splat(-INT_MAX / 2)};  // any logit less that is an int32
  F total_[2] = {};
};

template <class Kind>
void attend_codes(const bitstep_attention_shape& shape, const bitstep_step* steps, const float* q, const float* k,
                  const float* v, float* y, int threads) {
  const Heads<Kind> heads(shape);
  const int64_t blocks = heads.keys / kBlockKeys;
  const auto coder = [&](Operand operand, int64_t head) {
    return Coder(steps[operand], static_cast<int>(head / shape.heads));
  };
  const auto lowered = [&](const Coder& code, Operand operand) {
    return [&code, half = splat(half_of(steps[operand]))](F x) { return code(x) - half; };
  };
  auto* key_sums = static_cast<int32_t*>(scratch(Slot::kKeySums, heads.count() * heads.keys * sizeof(int32_t)));
  auto* value_sums =
      static_cast<int32_t*>(scratch(Slot::kValueSums, heads.count() * blocks * heads.width * sizeof(int32_t)));
  heads.run(
      [&](int64_t head, int8_t* keys) {
        const Coder key = coder(kKey, head);
        heads.pack_keys(k + heads.offset(head, shape.keys), lowered(key, kKey), keys);
        times_sums(-coder(kQuery, head).zero(), keys, shape.keys, heads.width, key_sums + head * heads.keys);
      },
      [&](int64_t head, int8_t* values) {
        const Coder value = coder(kValue, head);
        for (int64_t c = 0; c < heads.width; c += kLanes) {
          heads.pack_values(v + heads.offset(head, shape.keys), c, lowered(value, kValue), values);
        }
        const int zero = coder(kProbability, head).zero();
        times_sums(-zero, values, blocks * heads.width, kBlockKeys, value_sums + head * blocks * heads.width);
      },
      [&](int64_t head, int64_t first, int queries, const int8_t* keys, const int8_t* values) {
        const Coder query = coder(kQuery, head), key_coder = coder(kKey, head), value = coder(kValue, head);
        const Coder probability = coder(kProbability, head);
        const int64_t at = heads.offset(head, shape.queries) + first * heads.channels;
        Tile<Kind> tile(heads, queries);
        for (int half = 0; half < 2; ++half) {
          tile.read(q + at, half);
          tile.round(half, query);
        }
        Softmax softmax(shape.scale * query.scale() * key_coder.scale(), heads.keys);
        alignas(64) int32_t logits[kBlockKeys * kWide];
        for (int64_t begin = 0; begin < shape.keys; begin += kBlockKeys) {
          const int64_t count = std::min(kBlockKeys, shape.keys - begin);
          I most[2] = {softmax.most(0), softmax.most(1)};
          const auto logit = [of_keys = key_sums + head * heads.keys + begin](int64_t key, I sums) {
            return sums + splat(of_keys[key]);
          };
          tile.logits(keys + begin * heads.width, count, logit, logits, most);
          softmax.take(begin / kBlockKeys, logits, count, most);
        }
        alignas(64) int32_t weights[kBlockKeys / Kind::kShare * kWide];
        for (int64_t begin = 0; begin < shape.keys; begin += kBlockKeys) {
          const int64_t block = begin / kBlockKeys;
          const int count = static_cast<int>(std::min(kBlockKeys, shape.keys - begin));
          I rest[2];
          for (int half = 0; half < 2; ++half) {
            const auto code = [&probability, of = softmax.probabilities(block, half)](int key) {
              return probability(of(key));
            };
            rest[half] = (code_in_fours(code, count, weights + half * kLanes) - count * probability.zero()) *
                         (half_of(steps[kValue]) - value.zero());
          }
          const int32_t* of_values = value_sums + (head * blocks + block) * heads.width;
          tile.mix(values + begin * heads.width, weights, divide_up(count, Kind::kShare),
                   [&](F mixed, int64_t c, int half, I sums) {
                     return mixed + to_float(sums + splat(of_values[c]) + rest[half]);
                   });
        }
        const F gain = splat(probability.scale() * value.scale());
        tile.write([&](int, int64_t) { return gain; }, y + at);
      },
      threads);
}

}  // namespace

void attend_coded(const bitstep_attention_shape& shape, const bitstep_step* steps, const float* q, const float* k,
                  const float* v, float* y, int threads) {
  const bool small = are_small(steps[kQuery], steps[kKey]) && are_small(steps[kProbability], steps[kValue]);
  (small ? attend_codes<SmallBytes> : attend_codes<Bytes>)(shape, steps, q, k, v, y, threads);
}

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
