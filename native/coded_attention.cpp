// Attention between quantized operands: queries, keys, values and probabilities are codes less their zero point, both
// products sums of integers, and nothing is rounded but the softmax between them, which is fp32.
//
// A probability's code depends on all keys of its query, so that the softmax is finished before values are mixed.
#include <climits>

#include "clone.h"
#include "codes.h"
#include "functions.h"
#include "heads.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

enum Operand { kQuery, kKey, kValue, kProbability };

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

}  // namespace

void attend_coded(const bitstep_attention_shape& shape, const bitstep_step* steps, const float* q, const float* k,
                  const float* v, float* y, int threads) {
  const Heads heads(shape);
  const auto coder = [&](Operand operand, int64_t head) {
    return Coder(steps[operand], static_cast<int>(head / shape.heads));
  };
  const auto round = [](const Coder& code) { return [&code](F x) { return code.centred(x); }; };
  heads.run(
      [&](int64_t head, int16_t* keys) {
        const Coder code = coder(kKey, head);
        heads.pack_keys(k + heads.offset(head, shape.keys), round(code), keys);
      },
      [&](int64_t head, int16_t* values) {
        const Coder code = coder(kValue, head);
        for (int64_t c = 0; c < heads.words; c += kLanes) {
          heads.pack_values(v + heads.offset(head, shape.keys), c, round(code), values);
        }
      },
      [&](int64_t head, int64_t first, int queries, const int16_t* keys, const int16_t* values) {
        const Coder query = coder(kQuery, head), probability = coder(kProbability, head);
        const int64_t at = heads.offset(head, shape.queries) + first * heads.channels;
        Tile tile(heads, queries);
        for (int half = 0; half < 2; ++half) {
          tile.read(q + at, half);
          tile.round(half, round(query));
        }
        auto* logits = static_cast<float*>(scratch(Slot::kLogits, heads.keys * kWide * sizeof(float)));
        I most[2] = {splat(-INT_MAX), splat(-INT_MAX)};
        for (int64_t key = 0; key < shape.keys; key += kRows) {  // keys beyond the last are zero in memory
          multiply(keys + key * heads.words, heads.words, tile.queries(), heads.pairs, [&](int r, int half, I sums) {
            if (key + r < shape.keys) most[half] = sums > most[half] ? sums : most[half];
            store(logits + (key + r) * kWide + half * kLanes, (F)sums);
          });
        }
        F total[2];
        exponentiate(logits, shape.keys, most, shape.scale * query.scale() * coder(kKey, head).scale(), total);
        const F inverse[2] = {1.0f / total[0], 1.0f / total[1]}, one[2] = {splat(1.0f), splat(1.0f)};
        alignas(64) int32_t weights[kBlockKeys / 2 * kWide];
        for (int64_t begin = 0; begin < shape.keys; begin += kBlockKeys) {
          const int64_t count = std::min(kBlockKeys, shape.keys - begin);
          for (int64_t key = 0; key < count; key += 2) {
            for (int half = 0; half < 2; ++half) {
              const float* powers = logits + (begin + key) * kWide + half * kLanes;
              const I even = probability.centred(load(powers) * inverse[half]);
              const I odd = key + 1 < count ? probability.centred(load(powers + kWide) * inverse[half]) : I{};
              store(weights + key / 2 * kWide + half * kLanes, join(even, odd));
            }
          }
          tile.mix(values + begin * heads.words, weights, divide_up(count, 2), one);
        }
        const F gain = splat(probability.scale() * coder(kValue, head).scale());
        tile.write([&](int, int64_t) { return gain; }, y + at);
      },
      threads);
}

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
