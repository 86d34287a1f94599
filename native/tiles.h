// Steps on the processor's matrix unit (AMX): registers of 16 rows x 64 bytes, and products of two of them.
//
// Its instructions are written here rather than taken from the compiler's headers: those take register numbers as text,
// which no template can make, and do not say that a tile is loaded from memory which may just have been written.
#pragma once

#include "panel.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

constexpr int kTileRows = 16;

template <int Tile>
void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}

// Rows lie `stride` bytes apart.
template <int Tile>
void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(Tile) : "memory");
}

// sums += activations (u8) x weights (s8)
template <int Sums, int Activations, int Weights>
void tile_dot() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Activations), "i"(Weights));
}

struct Tiles {
  static constexpr int kScaling = 1;
  static constexpr int kStep = 4;
  static constexpr int kPixels = 2 * kTileRows, kColumns = 2;

  // Whether tiles are filled well enough to be faster than single dot products.
  static bool pay(const Window& window, int64_t pixels) {
    return window.part >= kTileRows / 2 && pixels > kTileRows / 2;
  }
};

// Tiles 0 to 3 are sums [16][16], 4 and 5 activations [16][4 part], 6 and 7 weights [part][16][4].
template <>
class Registers<Tiles> {
 public:
  explicit Registers(const Window& window) {
    static_assert(kChunkSteps <= kTileRows);
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } layout;
    for (int tile = 0; tile < 8; ++tile) {
      layout.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? window.part * Tiles::kStep : kBlockBytes);
      layout.rows[tile] = static_cast<uint8_t>(tile < 6 ? kTileRows : window.part);
    }
    asm volatile("ldtilecfg %0" : : "m"(layout));
  }
  ~Registers() { asm volatile("tilerelease"); }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;
};

// Where up to 16 pixels have their bytes in a part of a run.
class TilePixels {
 public:
  TilePixels(const uint8_t* const* pixels, int count, const Window& window)
      : pixels_(pixels),
        count_(count),
        beside_(window.beside),
        bytes_(~uint64_t{0} >> (64 - window.part * Tiles::kStep)) {
    for (int p = 1; p < kTileRows; ++p) gathered_ |= p >= count || pixels[p] - pixels[p - 1] != beside_;
  }

  template <int Tile>
  void load(int64_t offset) {
    if (!gathered_) return tile_load<Tile>(pixels_[0] + offset, beside_);
    for (int p = 0; p < count_; ++p) {
      _mm512_store_si512(rows_[p], _mm512_maskz_loadu_epi8(bytes_, pixels_[p] + offset));
    }
    tile_load<Tile>(rows_, kBlockBytes);
  }

 private:
  const uint8_t* const* pixels_;
  const int count_;
  const int64_t beside_;
  const __mmask64 bytes_;
  bool gathered_ = false;  // as they do not lie one beside the other
  alignas(64) uint8_t rows_[kTileRows][kBlockBytes];
};

// sums[pixel][column] over the window, for up to 16 P pixels and a panel of C columns.
template <int P, int C>
void accumulate_tiles(int count, const uint8_t* const* pixels, const Window& window, Feed& feed, int32_t* sums) {
  constexpr int64_t kRow = C * kBlockBytes;
  TilePixels first(pixels, std::min(count, kTileRows), window);
  TilePixels second(pixels + kTileRows * (P - 1), count - kTileRows * (P - 1), window);
  const uint8_t* weight = feed.weight;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t run = 0; run < window.runs; ++run) {
    const int64_t begin = window.offset(run), end = begin + window.steps * Tiles::kStep;
    for (int64_t at = begin; at < end; at += window.part * Tiles::kStep, weight += window.part * kRow) {
      feed.advance();
      first.load<4>(at);
      tile_load<6>(weight, kRow);
      tile_dot<0, 4, 6>();
      if constexpr (C == 2) {
        tile_load<7>(weight + kBlockBytes, kRow);
        tile_dot<1, 4, 7>();
      }
      if constexpr (P == 2) {
        second.load<5>(at);
        tile_dot<2, 5, 6>();
        if constexpr (C == 2) tile_dot<3, 5, 7>();
      }
    }
  }
  tile_store<0>(sums, kRow);
  if constexpr (C == 2) tile_store<1>(sums + kColumn, kRow);
  sums += kTileRows * C * kColumn;
  if constexpr (P == 2) tile_store<2>(sums, kRow);
  if constexpr (P == 2 && C == 2) tile_store<3>(sums + kColumn, kRow);
}

template <>
inline void accumulate_panel<Tiles>(int columns, int pixel_count, const uint8_t* const* pixels, const Window& window,
                                    Feed& feed, int32_t* sums) {
  const auto run = columns == 1 ? pixel_count <= kTileRows ? accumulate_tiles<1, 1> : accumulate_tiles<2, 1>
                                : pixel_count <= kTileRows ? accumulate_tiles<1, 2> : accumulate_tiles<2, 2>;
  run(pixel_count, pixels, window, feed, sums);
}

}  // namespace
}  // namespace BITSTEP_CLONE
}  // namespace bitstep
