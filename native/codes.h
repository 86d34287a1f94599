// fp32 -> activation codes, for every kernel that ends in them.
#pragma once

#include "bitstep.h"
#include "simd.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

// One sample's step.
struct Coder {
  F reciprocal, zero_point, top;

  Coder(const bitstep_step& step, int sample) {
    const int row = step.rows == 1 ? 0 : sample;
    reciprocal = splat(1.0f / step.scale[row]);
    zero_point = splat(step.zero_point[row]);
    top = splat(static_cast<float>(step.top));
  }

  I operator()(F x) const {
    // clamped before the conversion, where out of range floats have no int32
    return to_int(min(max(round(x * reciprocal) + zero_point, F{}), top));
  }

  uint8_t zero() const { return static_cast<uint8_t>(zero_point[0]); }
};

// The layout of a map of codes.
struct Border {
  int64_t height, width, row_bytes;

  explicit Border(const bitstep_map& map)
      : height(map.height + 2 * map.pad_h),
        width(map.width + 2 * map.pad_w),
        row_bytes(width * map.padded_channels) {}
};

// Fill what of a row of codes is no pixel; return where its pixels start, or null for a row of the border.
inline uint8_t* open_row(const bitstep_map& map, const Border& border, int64_t row, uint8_t zero, uint8_t* codes) {
  uint8_t* out = codes + row * border.row_bytes;
  const int64_t y = row % border.height - map.pad_h;
  if (y < 0 || y >= map.height) {
    std::memset(out, zero, border.row_bytes);
    return nullptr;
  }
  const int64_t side = int64_t{map.pad_w} * map.padded_channels;
  std::memset(out, zero, side);
  std::memset(out + border.row_bytes - side, zero, side);
  return out + side;
}

}  // namespace
}  // namespace BITSTEP_CLONE
}  // namespace bitstep
