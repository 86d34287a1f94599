// fp32 NHWC -> u8 codes with the border that convolution needs, after normalization and activation.
#include <cmath>

#include "clone.h"
#include "codes.h"
#include "functions.h"
#include "parallel.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

enum Activation { kNone, kSilu, kGelu };

// One run of channels on its way to codes; null pointers leave a stage out.
struct Run {
  const float* x;
  const float* gain;
  const float* shift;
  const float* channel_reciprocal;
  F mean, deviation_reciprocal;
};

template <Activation A, bool LayerNorm>
void encode(const Coder& code, const Run& run, int64_t count, uint8_t* out) {
  const auto encode_at = [&](int64_t i, int lanes) __attribute__((always_inline)) {
    F value = load_some(run.x + i, lanes);
    if (LayerNorm) value = (value - run.mean) * run.deviation_reciprocal;
    if (run.gain) value *= load_some(run.gain + i, lanes);
    if (run.shift) value += load_some(run.shift + i, lanes);
    if (A == kSilu) value = silu(value);
    if (A == kGelu) value = gelu(value);
    if (run.channel_reciprocal) value *= load_some(run.channel_reciprocal + i, lanes);
    store_bytes(out + i, code(value), lanes);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) encode_at(i, kLanes);
  if (i < count) encode_at(i, static_cast<int>(count - i));
}

void normalize(Run& run, int64_t channels, float eps) {
  F total{};
  for (int64_t i = 0; i < channels; i += kLanes) {
    total += load_some(run.x + i, static_cast<int>(channels - i < kLanes ? channels - i : kLanes));
  }
  run.mean = splat(sum(total) / channels);
  F squares{};
  for (int64_t i = 0; i < channels; i += kLanes) {
    const int lanes = static_cast<int>(channels - i < kLanes ? channels - i : kLanes);
    const F centred = load_some(run.x + i, lanes) - run.mean;
    squares += lanes == kLanes ? centred * centred : fill_from(centred * centred, lanes, 0);
  }
  run.deviation_reciprocal = splat(1.0f / std::sqrt(sum(squares) / channels + eps));
}

template <Activation A, bool LayerNorm>
void quantize_map(const bitstep_map& map, const bitstep_prologue& prologue, const bitstep_step& step, const float* x,
                  uint8_t* codes, int threads) {
  const Border border(map);
  const int64_t channels = map.channels, padded = map.padded_channels;
  const bool per_channel = LayerNorm || prologue.gain || prologue.shift || step.channel_reciprocal;
  const bool dense = channels == padded && !per_channel;
  parallel_for(map.batch * border.height, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / border.height;
      const Coder code(step, static_cast<int>(sample));
      uint8_t* out = open_row(map, border, row, code.zero(), codes);
      if (!out) continue;
      const int64_t at_sample = prologue.rows == 1 ? 0 : sample * channels;
      Run run{};
      run.x = x + (sample * map.height + row % border.height - map.pad_h) * map.width * channels;
      run.gain = prologue.gain ? prologue.gain + at_sample : nullptr;
      run.shift = prologue.shift ? prologue.shift + at_sample : nullptr;
      run.channel_reciprocal = step.channel_reciprocal;
      if (dense) {
        encode<A, LayerNorm>(code, run, map.width * channels, out);
        continue;
      }
      for (int64_t pixel = 0; pixel < map.width; ++pixel, run.x += channels, out += padded) {
        if (LayerNorm) normalize(run, channels, prologue.eps);
        encode<A, LayerNorm>(code, run, channels, out);
        std::memset(out + channels, code.zero(), padded - channels);
      }
    }
  });
}

}  // namespace

void quantize(const bitstep_map& map, const bitstep_prologue& prologue, const bitstep_step& step, const float* x,
              uint8_t* codes, int threads) {
  static constexpr decltype(&quantize_map<kNone, false>) kMaps[3][2] = {
      {quantize_map<kNone, false>, quantize_map<kNone, true>},
      {quantize_map<kSilu, false>, quantize_map<kSilu, true>},
      {quantize_map<kGelu, false>, quantize_map<kGelu, true>},
  };
  kMaps[prologue.activation][prologue.normalization](map, prologue, step, x, codes, threads);
}

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
