// fp32 NHWC -> u8 codes with the border that convolution needs.
#include "clone.h"
#include "codes.h"
#include "parallel.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

void code_run(const Coder& code, const float* x, const float* channel_reciprocal, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    F value = lanes == kLanes ? load(x + i) : load(x + i, lanes);
    if (channel_reciprocal) value *= lanes == kLanes ? load(channel_reciprocal + i) : load(channel_reciprocal + i, lanes);
    store_bytes(out + i, code(value), lanes);
  }
}

}  // namespace

void quantize(const bitstep_map* map, const bitstep_step* step, const float* x, uint8_t* codes, int threads) {
  const Border border(*map);
  const int64_t channels = map->channels, padded = map->padded_channels;
  const bool dense = channels == padded && !step->channel_reciprocal;
  parallel_for(map->batch * border.height, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = row / border.height;
      const Coder code(*step, static_cast<int>(sample));
      uint8_t* out = open_row(*map, border, row, code.zero(), codes);
      if (!out) continue;
      const float* in = x + (sample * map->height + row % border.height - map->pad_h) * map->width * channels;
      if (dense) {
        code_run(code, in, nullptr, map->width * channels, out);
        continue;
      }
      for (int64_t pixel = 0; pixel < map->width; ++pixel, in += channels, out += padded) {
        code_run(code, in, step->channel_reciprocal, channels, out);
        std::memset(out + channels, code.zero(), padded - channels);
      }
    }
  });
}

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
