// fp32 -> activation codes, for every kernel that ends in them.
#pragma once

#include "bitstep.h"
#include "simd.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

// One sample's step.
class Coder {
 public:
  Coder(const bitstep_step& step, int sample) {
    const int row = step.rows == 1 ? 0 : sample;
    const float zero_point = step.zero_point[row];
    scale_ = step.scale[row];
    reciprocal_ = splat(1.0f / scale_);
    least_ = splat(-zero_point);
    most_ = splat(static_cast<float>(step.top) - zero_point);
    zero_point_ = splat(static_cast<int32_t>(zero_point));
  }

  I operator()(F x) const { return centred(x) + zero_point_; }

  // Codes less the zero point. Clamped before the conversion, where out of range floats have no int32.
  I centred(F x) const { return to_int(min(max(x * reciprocal_, least_), most_)); }

  float scale() const { return scale_; }
  uint8_t zero() const { return static_cast<uint8_t>(zero_point_[0]); }

 private:
  float scale_;
  F reciprocal_, least_, most_;
  I zero_point_;
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
