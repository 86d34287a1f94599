// softmax(scale Q K^T) V in 16-bit fixed point with 32-bit sums: 2 multiply-adds per lane where fp32 has 1, and finer
// than bf16. Queries and keys have a step per row, values one per channel; probabilities are fractions of the row's
// largest, in 13 bits.
#include <algorithm>
#include <cmath>

#include "clone.h"
#include "functions.h"
#include "parallel.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

constexpr int kWide = 2 * kLanes;      // keys, or channels, accumulated side by side
constexpr int kRows = 8;               // queries accumulated side by side
constexpr int kTile = 32;              // queries that share a pass over keys and values
constexpr int64_t kSpan = 64;          // keys whose weighted values a 32-bit sum holds:
constexpr int kProbability = 8191;     //   64 x 8191 x 4096 < 2**31
constexpr float kValue = 4096;
constexpr int64_t kBlock = 2 * kSpan;  // keys between two corrections of the softmax

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

int lanes_left(int64_t count, int64_t at) { return static_cast<int>(std::min<int64_t>(kLanes, count - at)); }

float largest_size(const float* x, int64_t count) {
  F most{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const F value = load_some(x + i, lanes_left(count, i));
    most = max(most, max(value, -value));
  }
  return largest(most);
}

// The factor that takes values of at most `most` to at most `limit`; any, where they are next to nothing.
float fixed_scale(float most, float limit) { return most > 1e-30f ? limit / most : 1.0f; }

// x * scale as 16-bit integers; writes whole vectors.
void fix(const float* x, int64_t count, float scale, int16_t* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store_words(out + i, to_int(load_some(x + i, lanes_left(count, i)) * splat(scale)));
  }
}

// The pair of 16-bit values at p in every lane.
I broadcast2(const int16_t* p) { return broadcast4(reinterpret_cast<const uint8_t*>(p)); }

// out[row][column] = sum over pairs of left[row][pair] . right[pair][column], for R rows and kWide columns.
template <int R>
void multiply(const int16_t* left, int64_t left_stride, const int32_t* right, int64_t right_stride, int64_t pairs,
              I (&out)[kRows][2]) {
  I acc[R][2] = {};
  for (int64_t pair = 0; pair < pairs; ++pair, right += right_stride) {
    const I w0 = load(right);
    const I w1 = load(right + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const I a = broadcast2(left + r * left_stride + 2 * pair);
      acc[r][0] = dot2(acc[r][0], a, w0);
      acc[r][1] = dot2(acc[r][1], a, w1);
    }
  }
  for (int r = 0; r < R; ++r) {
    out[r][0] = acc[r][0];
    out[r][1] = acc[r][1];
  }
}

class Attention {
 public:
  explicit Attention(const bitstep_attention_shape& shape)
      : shape_(shape),
        channels_(int64_t{shape.heads} * shape.head_channels),
        pairs_((shape.head_channels + 1) / 2),
        keys_(round_up(shape.keys, kBlock)),
        columns_(round_up(shape.head_channels, kWide)),
        limit_(std::min(32767.0f, std::floor(std::sqrt(2147483647.0f / (2 * pairs_))) - 1)) {}

  void run(const float* q, const float* k, const float* v, float* y, int threads) const {
    const int64_t heads = int64_t{shape_.batch} * shape_.heads;
    auto* keys = static_cast<int32_t*>(scratch(Slot::kKeys, heads * keys_ * pairs_ * sizeof(int32_t)));
    auto* key_steps = static_cast<float*>(scratch(Slot::kKeySteps, heads * keys_ * sizeof(float)));
    auto* values = static_cast<int32_t*>(scratch(Slot::kValues, heads * keys_ / 2 * columns_ * sizeof(int32_t)));
    auto* value_steps = static_cast<float*>(scratch(Slot::kValueSteps, heads * columns_ * sizeof(float)));
    parallel_for(heads, threads, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        const int64_t start = offset(head, shape_.keys);
        pack_keys(k + start, keys + head * keys_ * pairs_, key_steps + head * keys_);
        pack_values(v + start, values + head * keys_ / 2 * columns_, value_steps + head * columns_);
      }
    });
    const int64_t tiles = (shape_.queries + kTile - 1) / kTile;
    parallel_for(heads * tiles, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / tiles, first = i % tiles * kTile;
        const int64_t start = offset(head, shape_.queries) + first * channels_;
        Tile tile(*this, static_cast<int>(std::min<int64_t>(kTile, shape_.queries - first)), q + start);
        for (int64_t key = 0; key < shape_.keys; key += kBlock) {
          tile.attend(keys + (head * keys_ + key) * pairs_, key_steps + head * keys_ + key,
                      values + (head * keys_ + key) / 2 * columns_, std::min(kBlock, shape_.keys - key));
        }
        tile.finish(value_steps + head * columns_, y + start);
      }
    });
  }

 private:
  int64_t offset(int64_t head, int64_t tokens) const {
    return head / shape_.heads * tokens * channels_ + head % shape_.heads * shape_.head_channels;
  }

  // [keys / kWide][pairs][kWide] of two channels
  void pack_keys(const float* k, int32_t* keys, float* steps) const {
    auto* row = static_cast<int16_t*>(scratch(Slot::kQueries, row_words() * sizeof(int16_t)));
    for (int64_t key = 0; key < keys_; ++key, k += channels_) {
      int32_t* out = keys + key / kWide * pairs_ * kWide + key % kWide;
      if (key >= shape_.keys) {
        steps[key] = 0;
        for (int64_t pair = 0; pair < pairs_; ++pair) out[pair * kWide] = 0;
        continue;
      }
      const float scale = fixed_scale(largest_size(k, shape_.head_channels), limit_);
      steps[key] = 1 / scale;
      fix(k, shape_.head_channels, scale, row);
      for (int64_t pair = 0; pair < pairs_; ++pair) std::memcpy(out + pair * kWide, row + 2 * pair, sizeof(int32_t));
    }
  }

  // [keys / 2][columns] of two keys
  void pack_values(const float* v, int32_t* values, float* steps) const {
    std::fill(steps, steps + columns_, 0.0f);
    for (int64_t key = 0; key < shape_.keys; ++key) {
      for (int64_t c = 0; c < shape_.head_channels; c += kLanes) {
        const F value = load_some(v + key * channels_ + c, lanes_left(shape_.head_channels, c));
        store(steps + c, max(load(steps + c), max(value, -value)));
      }
    }
    for (int64_t c = 0; c < columns_; c += kLanes) {
      const F most = load(steps + c);
      store(steps + c, most > splat(1e-30f) ? most * splat(1 / kValue) : splat(1.0f));
    }
    for (int64_t key = 0; key < keys_; key += 2) {
      for (int64_t c = 0; c < columns_; c += kLanes) {
        const int count = lanes_left(shape_.head_channels, c);
        I both[2] = {};
        for (int i = 0; i < 2 && count > 0 && key + i < shape_.keys; ++i) {
          both[i] = to_int(load_some(v + (key + i) * channels_ + c, count) / load(steps + c));
        }
        store(values + key / 2 * columns_ + c, (both[0] & 0xffff) | (both[1] << 16));
      }
    }
  }

  // 16-bit words of a packed row of queries or keys, with room for whole vectors.
  int64_t row_words() const { return round_up(2 * pairs_, kLanes); }

  // Some queries of one head, and what they have gathered from the keys so far.
  class Tile {
   public:
    Tile(const Attention& attention, int rows, const float* q)
        : a_(attention),
          rows_(rows),
          queries_(static_cast<int16_t*>(scratch(Slot::kQueries, kTile * a_.row_words() * sizeof(int16_t)))),
          mixed_(static_cast<float*>(scratch(Slot::kMixed, kTile * a_.columns_ * sizeof(float)))) {
      std::fill(mixed_, mixed_ + kTile * a_.columns_, 0.0f);
      for (int r = 0; r < kTile; ++r) {
        const float* row = q + std::min(r, rows - 1) * a_.channels_;  // a short tile repeats its last row
        const float scale = fixed_scale(largest_size(row, a_.shape_.head_channels), a_.limit_);
        steps_[r] = a_.shape_.scale * 1.44269504f / scale;  // logarithms to base 2
        fix(row, a_.shape_.head_channels, scale, queries_ + r * a_.row_words());
        most_[r] = -INFINITY;
        total_[r] = 0;
      }
    }

    // Add up to kBlock keys; those beyond count are zero in memory.
    void attend(const int32_t* keys, const float* key_steps, const int32_t* values, int64_t count) {
      for (int first = 0; first < rows_; first += kRows) {
        alignas(64) float logits[kRows * kBlock];
        alignas(64) int16_t probabilities[kRows * kBlock];
        compute_logits(first, keys, key_steps, count, logits);
        for (int r = 0; r < kRows; ++r) {
          compute_probabilities(first + r, logits + r * kBlock, count, probabilities + r * kBlock);
        }
        mix(first, probabilities, values, count);
      }
    }

    void finish(const float* value_steps, float* y) const {
      for (int r = 0; r < rows_; ++r) {
        const F inverse = splat(1 / (total_[r] * kProbability));
        for (int64_t c = 0; c < a_.shape_.head_channels; c += kLanes) {
          const F value = load(mixed_ + r * a_.columns_ + c) * inverse * load(value_steps + c);
          store_some(y + r * a_.channels_ + c, value, lanes_left(a_.shape_.head_channels, c));
        }
      }
    }

   private:
    void compute_logits(int first, const int32_t* keys, const float* key_steps, int64_t count, float* logits) const {
      for (int64_t key = 0; key < count; key += kWide) {
        I sums[kRows][2];
        multiply<kRows>(queries_ + first * a_.row_words(), a_.row_words(), keys + key * a_.pairs_, kWide, a_.pairs_,
                        sums);
        for (int half = 0; half < 2; ++half) {
          const int64_t at = key + half * kLanes;
          const F step = load(key_steps + at);
          for (int r = 0; r < kRows; ++r) {
            store(logits + r * kBlock + at, to_float(sums[r][half]) * (splat(steps_[first + r]) * step));
          }
        }
      }
      for (int64_t at = count; at < round_up(count, kLanes); ++at) {
        for (int r = 0; r < kRows; ++r) logits[r * kBlock + at] = -INFINITY;
      }
    }

    void compute_probabilities(int row, const float* logits, int64_t count, int16_t* probabilities) {
      F most = load(logits);
      for (int64_t at = kLanes; at < count; at += kLanes) most = max(most, load(logits + at));
      const float top = std::max(most_[row], largest(most));
      if (top > most_[row]) {
        const float correction = std::exp2(most_[row] - top);
        total_[row] *= correction;
        float* mixed = mixed_ + row * a_.columns_;
        for (int64_t c = 0; c < a_.columns_; ++c) mixed[c] *= correction;
        most_[row] = top;
      }
      F total{};
      int64_t at = 0;
      for (; at < count; at += kLanes) {
        const F fraction = exp2(load(logits + at) - top);
        total += fraction;
        store_words(probabilities + at, to_int(fraction * splat(float{kProbability})));
      }
      std::fill(probabilities + at, probabilities + kBlock, int16_t{0});
      total_[row] += sum(total);
    }

    void mix(int first, const int16_t* probabilities, const int32_t* values, int64_t count) {
      for (int64_t key = 0; key < count; key += kSpan) {
        for (int64_t c = 0; c < a_.columns_; c += kWide) {
          I sums[kRows][2];
          multiply<kRows>(probabilities + key, kBlock, values + key / 2 * a_.columns_ + c, a_.columns_, kSpan / 2,
                          sums);
          for (int r = 0; r < kRows; ++r) {
            float* mixed = mixed_ + (first + r) * a_.columns_ + c;
            store(mixed, load(mixed) + to_float(sums[r][0]));
            store(mixed + kLanes, load(mixed + kLanes) + to_float(sums[r][1]));
          }
        }
      }
    }

    const Attention& a_;
    const int rows_;
    int16_t* queries_;
    float* mixed_;
    float steps_[kTile], most_[kTile], total_[kTile];
  };

  const bitstep_attention_shape& shape_;
  int64_t channels_, pairs_, keys_, columns_;
  float limit_;
};

}  // namespace

void attend(const bitstep_attention_shape& shape, const float* q, const float* k, const float* v, float* y,
            int threads) {
  if (shape.keys > 0) Attention(shape).run(q, k, v, y, threads);
}

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
