// One tile of output pixels times one panel of output channels, over the whole kernel window: the inner loops of
// convolution.cpp.
//
// Every pixel of the tile has a pointer into the codes, and a step into the window moves all of them alike. Sums stay
// in registers. Two kinds of steps share a loop, and a third (tiles.h) has one of its own:
//
//   bytes   4 input channels by a dot product of bytes; packed weights become bytes one panel at a time
//   tables  16 input channels by lookup, for weights that are signs. 64 bytes hold, for each of 4 groups of 4
//           activations a, the 16 sums of +-a; the weight is 4 signs and selects one sum (vpermb), and a dot product
//           with ones adds the four groups: 256 multiply-adds in two instructions.
//   tiles   up to 64 input channels of 16 pixels by the matrix unit, 16384 multiply-adds an instruction
#pragma once

#include <algorithm>

#include "simd.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

constexpr int kBlockBytes = 64;             // 16 output channels x 4
constexpr int kColumn = 16;                 // output channels
constexpr int kVectors = kColumn / kLanes;  // accumulators per column and pixel
constexpr int kMaxPanel = 4;                // columns
#if defined(BITSTEP_avx512)
constexpr bool kWholePanels = true;  // all columns of a panel are accumulated at once
#else
constexpr bool kWholePanels = false;
#endif

constexpr int64_t kChunkSteps = 16;  // after which more weights become bytes

// The kernel window over the codes, as runs of consecutive bytes that every pixel visits.
struct Window {
  int64_t runs, steps;      // runs, and steps in each
  int64_t across, down;     // bytes from run to run in a kernel row, and from kernel row to kernel row
  int64_t runs_per_row;
  int64_t beside;           // bytes from a pixel's window to that of the next in its row
  int part;                 // steps, at most kChunkSteps: what a run has a whole number of

  int64_t count() const { return runs * steps; }
  int64_t offset(int64_t run) const { return run / runs_per_row * down + run % runs_per_row * across; }
};

typedef uint8_t B __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));

// Blocks of bytes from memory that keeps `Bits` of each.
template <int Bits>
void unpack(const uint8_t* packed, const int8_t* zero, int columns, int64_t blocks, uint8_t* out) {
  constexpr int kShare = 8 / Bits;
  const I mask = splat(((1 << Bits) - 1) * 0x01010101);
  const auto* zeros = reinterpret_cast<const uint8_t*>(zero);
  int64_t at = 0;  // of the block's column in zeros
  for (; blocks > 0; blocks -= kShare, packed += kBlockBytes) {
#pragma GCC unroll 8
    for (int part = 0; part < kShare; ++part, out += kBlockBytes) {
      if (part >= blocks) return;
      for (int i = 0; i < kBlockBytes; i += kLanes * 4) {
        const I code = load(reinterpret_cast<const int32_t*>(packed + i)) >> part * Bits & mask;
        const B value = (B)(Bits == 1 ? code + code : code) - *reinterpret_cast<const B*>(zeros + at + i);
        *reinterpret_cast<B*>(out + i) = value;
      }
      at = at + kBlockBytes == columns * kBlockBytes ? 0 : at + kBlockBytes;
    }
  }
}

// The weights of a panel, which become bytes as the first tile goes through them, while they are in the nearest cache;
// meanwhile, and with the other tiles, the memory of the next panel is fetched.
struct Feed {
  const uint8_t* weight;  // [steps][columns] blocks of bytes
  int columns;
  void (*unpack)(const uint8_t* packed, const int8_t* zero, int columns, int64_t blocks, uint8_t* out);
  const uint8_t* packed;
  const int8_t* zero;
  int64_t blocks;  // that are still packed
  uint8_t* out;
  int share;       // of blocks in a packed one
  const uint8_t* next;
  const uint8_t* end;
  int64_t fetched;  // bytes of the next panel with every chunk

  // Called before each chunk of steps.
  void advance() {
    if (blocks > 0) {
      const int64_t count = kChunkSteps * columns;
      unpack(packed, zero, columns, std::min(count, blocks), out);
      packed += count / share * kBlockBytes;
      out += count * kBlockBytes;
      blocks -= count;
    }
    const uint8_t* stop = std::min(next + fetched, end);
    for (; next < stop; next += kBlockBytes) __builtin_prefetch(next, 0, 2);
  }
};

// Of kinds whose accumulators are the sums themselves; a column has kVectors of them.
struct Dots {
  static constexpr int64_t kRoom = INT64_MAX;  // steps before sums have to leave the accumulators

  static void begin(int32_t*, const Window&) {}
  static void settle(int32_t* sums, const I* acc) {
    for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, acc[v]);
  }
};

struct Bytes : Dots {
  static constexpr int kScaling = 1;  // bytes of source per code
  static constexpr int kStep = 4;     // bytes of source
#if defined(BITSTEP_avx512)
  static constexpr int kPixels = 12, kColumns = 2;
#elif defined(BITSTEP_avxvnni)
  static constexpr int kPixels = 6, kColumns = 1;
#else
  static constexpr int kPixels = 4, kColumns = 1;
#endif

  // acc += a pixel's activations at p, times the weights of some columns
  template <int V>
  static void add(I (&acc)[V], const uint8_t* p, const I (&w)[V]) {
    const I a = broadcast4(p);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[v] = dot4(acc[v], a, w[v]);
  }
};

// sums[pixel][column] over the window, for P pixels and C columns of a panel.
template <class Kind, int P, int C>
void accumulate(const uint8_t* const* pixels, const Window& window, int column, Feed& feed, int32_t* sums) {
  constexpr int V = C * kVectors;
  const int64_t stride = (kWholePanels ? C : feed.columns) * kBlockBytes;
  const uint8_t* weight = feed.weight + column * kBlockBytes;
  I acc[P][V] = {};
  const auto for_columns = [&](const auto& visit) {
    for (int p = 0; p < P; ++p) {
      for (int c = 0; c < C; ++c) visit(sums + (p * feed.columns + column + c) * kColumn, acc[p] + c * kVectors);
    }
  };
  for_columns([&](int32_t* to, const I*) { Kind::begin(to, window); });
  int64_t room = Kind::kRoom;
  for (int64_t run = 0; run < window.runs; ++run) {
    const int64_t offset = window.offset(run);
    for (int64_t step = 0, next; step < window.steps; step = next) {
      next = std::min(step + kChunkSteps, window.steps);
      feed.advance();
      if constexpr (Kind::kRoom < INT64_MAX) {
        if (room < kChunkSteps) {
          for_columns([](int32_t* to, I* from) {
            Kind::settle(to, from);
            std::fill_n(from, kVectors, I{});
          });
          room = Kind::kRoom;
        }
        room -= next - step;
      }
      const uint8_t* at[P];
      for (int p = 0; p < P; ++p) at[p] = pixels[p] + offset + next * Kind::kStep;
      for (int64_t i = (step - next) * Kind::kStep; i != 0; i += Kind::kStep, weight += stride) {
        I w[V];
        for (int v = 0; v < V; ++v) w[v] = load(reinterpret_cast<const int32_t*>(weight) + v * kLanes);
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) Kind::add(acc[p], at[p] + i, w);
      }
    }
  }
  for_columns([](int32_t* to, const I* from) { Kind::settle(to, from); });
}

template <class Kind, int C, int P = Kind::kPixels>
void accumulate(int pixel_count, const uint8_t* const* pixels, const Window& window, int column, Feed& feed,
                int32_t* sums) {
  if (pixel_count == P) return accumulate<Kind, P, C>(pixels, window, column, feed, sums);
  if constexpr (P > 1) accumulate<Kind, C, P - 1>(pixel_count, pixels, window, column, feed, sums);
}

template <class Kind, int C = Kind::kColumns>
void accumulate(int columns, int pixel_count, const uint8_t* const* pixels, const Window& window,
                int column, Feed& feed, int32_t* sums) {
  if (columns == C) return accumulate<Kind, C>(pixel_count, pixels, window, column, feed, sums);
  if constexpr (C > 1) {
    accumulate<Kind, C - 1>(columns, pixel_count, pixels, window, column, feed, sums);
  }
}

// sums[pixel][column] over the window, for a panel and up to Kind::kPixels pixels.
template <class Kind>
void accumulate_panel(int columns, int pixel_count, const uint8_t* const* pixels, const Window& window, Feed& feed,
                      int32_t* sums) {
  for (int c = 0; c < columns; c += Kind::kColumns) {
    accumulate<Kind>(std::min(Kind::kColumns, columns - c), pixel_count, pixels, window, c, feed, sums);
  }
}

// What the calling thread has to set up while it accumulates.
template <class Kind>
struct Registers {
  explicit Registers(const Window&) {}
};

}  // namespace
}  // namespace BITSTEP_CLONE
}  // namespace bitstep
