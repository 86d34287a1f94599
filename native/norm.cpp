// Group normalization of an NHWC map, as a gain and a shift per sample and channel for the next quantization.
#include <algorithm>
#include <cmath>

#include "clone.h"
#include "divide.h"
#include "parallel.h"
#include "simd.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

constexpr int64_t kChunkPixels = 64;  // summed in float before they are added up in double

// Sums of the values less a pivot, and of their squares, over some pixels, per channel. A value of the channel as pivot
// leaves nothing large to cancel where the mean is far from zero. Pixels are read in order, as memory likes it.
void moments(const float* x, const float* pivot, int64_t pixels, int64_t channels, float* sums, float* squares) {
  constexpr int64_t kTogether = 4;
  std::fill(sums, sums + channels, 0.0f);
  std::fill(squares, squares + channels, 0.0f);
  const auto add = [&](int64_t count) __attribute__((always_inline)) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, channels - c));
      F s = load_some(sums + c, lanes), q = load_some(squares + c, lanes);
      const F origin = load_some(pivot + c, lanes);
      for (int64_t p = 0; p < count; ++p) {
        const F value = load_some(x + p * channels + c, lanes) - origin;
        s += value;
        q += value * value;
      }
      store_some(sums + c, s, lanes);
      store_some(squares + c, q, lanes);
    }
    x += count * channels;
  };
  for (; pixels >= kTogether; pixels -= kTogether) add(kTogether);
  add(pixels);
}

}  // namespace

void group_norm(const bitstep_map& map, const bitstep_prologue& prologue, const float* x, float* gain, float* shift,
                int threads) {
  const int64_t channels = map.channels, own = channels - map.rest_channels, groups = prologue.groups;
  const int64_t pixels = int64_t{map.height / map.repeat} * (map.width / map.repeat);
  const int64_t chunks = divide_up(pixels, kChunkPixels), width = channels / groups;
  auto* parts = static_cast<float*>(scratch(Slot::kMoments, map.batch * chunks * 2 * channels * sizeof(float)));
  parallel_for(map.batch * chunks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t sample = part / chunks, first = part % chunks * kChunkPixels;
      const int64_t at = sample * pixels + first, count = std::min(kChunkPixels, pixels - first);
      float* sums = parts + part * 2 * channels;
      const float *pivot = x + sample * pixels * own, *rest_pivot = map.rest + sample * pixels * map.rest_channels;
      moments(x + at * own, pivot, count, own, sums, sums + channels);
      moments(map.rest + at * map.rest_channels, rest_pivot, count, map.rest_channels, sums + own,
              sums + channels + own);
    }
  });
  for (int64_t sample = 0; sample < map.batch; ++sample) {
    const float *pivot = x + sample * pixels * own, *rest_pivot = map.rest + sample * pixels * map.rest_channels;
    for (int64_t group = 0; group < groups; ++group) {
      double total = 0, squares = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* sums = parts + (sample * chunks + chunk) * 2 * channels + group * width;
        const double n = static_cast<double>(std::min(kChunkPixels, pixels - chunk * kChunkPixels));
        for (int64_t c = 0; c < width; ++c) {
          const int64_t channel = group * width + c;
          const double p = channel < own ? pivot[channel] : rest_pivot[channel - own], sum = sums[c];
          total += sum + n * p;
          squares += sums[channels + c] + p * (2 * sum + n * p);
        }
      }
      const double count = static_cast<double>(pixels * width), mean = total / count;
      const double deviation = std::sqrt(std::max(squares / count - mean * mean, 0.0) + prologue.eps);
      for (int64_t c = group * width; c < (group + 1) * width; ++c) {
        const double g = (prologue.gain ? prologue.gain[c] : 1) / deviation;
        gain[sample * channels + c] = static_cast<float>(g);
        shift[sample * channels + c] = static_cast<float>((prologue.shift ? prologue.shift[c] : 0) - mean * g);
      }
    }
  }
}

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
