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
  for (int first = 0; first < count; first += Bytes::kShare, out += kWide) {
    store(out, join<Bytes>([&](int i) {
            const I one = first + i < count ? code(first + i) : I{};
            total += one;
            return one;
          }));
  }
  return total;
}

// e**(step * (logits - their largest)), [keys][kWide], in place of the logits; the sums over the keys.
void exponentiate(float* logits, int64_t keys, const I (&most)[2], float step, F (&total)[2]) {
  const F slope = splat(step * 1.44269504f);
  total[0] = total[1] = F{};
  for (int64_t key = 0; key < keys; ++key) {
    for (int half = 0; half < 2; ++half) {
      float* at = logits + key * kWide + half * kLanes;
      const F power = exp2(to_float((I)load(at) - most[half]) * slope);
      total[half] += power;
      store(at, power);
    }
  }
}

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
        auto* logits = static_cast<float*>(scratch(Slot::kLogits, heads.keys * kWide * sizeof(float)));
        const int32_t* of_keys = key_sums + head * heads.keys;
        I most[2] = {splat(-INT_MAX), splat(-INT_MAX)};
        for (int64_t key = 0; key < shape.keys; key += kRows) {  // keys beyond the last are zero in memory
          multiply<Kind>(keys + key * heads.width, heads.width, tile.queries(), heads.groups,
                         [&](int r, int half, I sums) {
                           const I logit = sums + splat(of_keys[key + r]);
                           if (key + r < shape.keys) most[half] = logit > most[half] ? logit : most[half];
                           store(logits + (key + r) * kWide + half * kLanes, (F)logit);
                         });
        }
        F total[2];
        exponentiate(logits, shape.keys, most, shape.scale * query.scale() * key_coder.scale(), total);
        const F inverse[2] = {1.0f / total[0], 1.0f / total[1]};
        alignas(64) int32_t weights[kBlockKeys / Kind::kShare * kWide];
        for (int64_t begin = 0; begin < shape.keys; begin += kBlockKeys) {
          const int count = static_cast<int>(std::min(kBlockKeys, shape.keys - begin));
          I rest[2];
          for (int half = 0; half < 2; ++half) {
            const auto code = [&](int key) {
              return probability(load(logits + (begin + key) * kWide + half * kLanes) * inverse[half]);
            };
            rest[half] = (code_in_fours(code, count, weights + half * kLanes) - count * probability.zero()) *
                         (half_of(steps[kValue]) - value.zero());
          }
          const int32_t* of_values = value_sums + (head * blocks + begin / kBlockKeys) * heads.width;
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
