// fp32 NHWC -> u8 codes with the border that convolution needs, after normalization and activation.
#include <cmath>

#include "clone.h"
#include "codes.h"
#include "functions.h"
#include "parallel.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

enum Activation { kNone, kSilu, kGelu, kGeglu };

// One run of channels on its way to codes; null pointers leave a stage out.
struct Run {
  const float* x;
  const float* gain;
  const float* shift;
  const float* channel_reciprocal;
  F mean, deviation_reciprocal;

  // Another run, of the channels from some number on.
  Run from(int64_t channel, const float* values) const {
    const auto later = [&](const float* p) { return p ? p + channel : nullptr; };
    return {values, later(gain), later(shift), later(channel_reciprocal), mean, deviation_reciprocal};
  }
};

template <Activation A, bool LayerNorm>
void encode(const Coder& code, const Run& run, int64_t count, uint8_t* out) {
  for_vectors(count, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    F value = load_some(run.x + i, lanes);
    if (LayerNorm) value = (value - run.mean) * run.deviation_reciprocal;
    if (run.gain) value *= load_some(run.gain + i, lanes);
    if (run.shift) value += load_some(run.shift + i, lanes);
    if (A == kSilu) value = silu(value);
    if (A == kGelu) value = gelu(value);
    if (A == kGeglu) value *= exact_gelu(load_some(run.x + count + i, lanes));  // the gates follow
    if (run.channel_reciprocal) value *= load_some(run.channel_reciprocal + i, lanes);
    store_bytes(out + i, code(value), lanes);
  });
}

// take(vector, lanes) for the values of a run.
template <class Take>
inline void each(const float* x, int64_t count, const Take& take) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    take(load_some(x + i, lanes), lanes);
  }
}

// Layer normalization over two runs together.
void normalize(Run& run, int64_t count, Run& rest, int64_t rest_count, float eps) {
  const float channels = static_cast<float>(count + rest_count);
  F total{}, squares{};
  const auto add = [&](F x, int) { total += x; };
  each(run.x, count, add);
  each(rest.x, rest_count, add);
  const F mean = splat(sum(total) / channels);
  const auto add_square = [&](F x, int lanes) {
    const F centred = x - mean;
    squares += lanes == kLanes ? centred * centred : fill_from(centred * centred, lanes, 0);
  };
  each(run.x, count, add_square);
  each(rest.x, rest_count, add_square);
  run.mean = rest.mean = mean;
  run.deviation_reciprocal = rest.deviation_reciprocal = splat(1.0f / std::sqrt(sum(squares) / channels + eps));
}

template <Activation A, bool LayerNorm>
void quantize_map(const bitstep_map& map, const bitstep_prologue& prologue, const bitstep_step& step, const float* x,
                  uint8_t* codes, int threads) {
  const Border border(map);
  const int64_t channels = map.channels, padded = map.padded_channels, own = channels - map.rest_channels;
  const bool per_channel = LayerNorm || prologue.gain || prologue.shift || step.channel_reciprocal;
  const int64_t in_memory = A == kGeglu ? 2 * own : own;
  const bool dense = A != kGeglu && own == padded && !per_channel && map.repeat == 1;
  parallel_for(map.batch * border.height, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / border.height, y = row % border.height - map.pad_h;
      const Coder code(step, static_cast<int>(sample));
      uint8_t* out = open_row(map, border, row, code.zero(), codes);
      if (!out) continue;
      if (y % map.repeat && row > begin) {
        std::memcpy(out, out - border.row_bytes, map.width * padded);
        continue;
      }
      const int64_t at_sample = prologue.rows == 1 ? 0 : sample * channels;
      const int64_t at_pixel = (sample * map.height + y) / map.repeat * (map.width / map.repeat);
      Run run{};
      run.x = x + at_pixel * in_memory;
      run.gain = prologue.gain ? prologue.gain + at_sample : nullptr;
      run.shift = prologue.shift ? prologue.shift + at_sample : nullptr;
      run.channel_reciprocal = step.channel_reciprocal;
      if (dense) {
        encode<A, LayerNorm>(code, run, map.width * channels, out);
        continue;
      }
      Run rest = run.from(own, map.rest + at_pixel * map.rest_channels);
      for (int64_t pixel = 0; pixel < map.width; pixel += map.repeat, run.x += in_memory, rest.x += map.rest_channels) {
        if (LayerNorm) normalize(run, own, rest, map.rest_channels, prologue.eps);
        encode<A, LayerNorm>(code, run, own, out);
        encode<A, LayerNorm>(code, rest, map.rest_channels, out + own);
        std::memset(out + channels, code.zero(), padded - channels);
        const uint8_t* first = out;
        for (out += padded; out < first + map.repeat * padded; out += padded) std::memcpy(out, first, padded);
      }
    }
  });
}

}  // namespace

void quantize(const bitstep_map& map, const bitstep_prologue& prologue, const bitstep_step& step, const float* x,
              uint8_t* codes, int threads) {
  static constexpr decltype(&quantize_map<kNone, false>) kMaps[4][2] = {
      {quantize_map<kNone, false>, quantize_map<kNone, true>},
      {quantize_map<kSilu, false>, quantize_map<kSilu, true>},
      {quantize_map<kGelu, false>, quantize_map<kGelu, true>},
      {quantize_map<kGeglu, false>, quantize_map<kGeglu, false>},
  };
  kMaps[prologue.activation][prologue.normalization](map, prologue, step, x, codes, threads);
}

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
