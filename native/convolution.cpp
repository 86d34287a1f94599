// Convolution as implicit matrix multiplication: codes u8 NHWC with a border, packed weights, fp32 out.
//
// A tile of output pixels times a panel of output channels is accumulated in registers over the whole kernel window:
// every pixel of the tile has a pointer into the codes, and a step into the window moves all of them alike. Two kinds
// of steps share that loop:
//
//   bytes   4 input channels by a dot product of bytes; packed weights become bytes one panel at a time
//   tables  16 input channels by lookup, for weights that are signs. 64 bytes hold, for each of 4 groups of 4
//           activations a, the 16 sums of +-a; the weight is 4 signs and selects one sum (vpermb), and a dot product
//           with ones adds the four groups: 256 multiply-adds in two instructions.
#include <algorithm>

#include "clone.h"
#include "codes.h"
#include "parallel.h"

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

constexpr int kBlock = 64;                          // bytes: 16 output channels x 4
constexpr int kColumn = 16;                         // output channels
constexpr int kVectors = kColumn / kLanes;          // accumulators per column and pixel
constexpr int kMaxPanel = 4;                        // columns
#if defined(BITSTEP_avx512)
constexpr bool kWholePanels = true;  // all columns of a panel are accumulated at once
#else
constexpr bool kWholePanels = false;
#endif

struct Bytes {
  static constexpr int kScaling = 1;  // bytes of source per code
  static constexpr int kStep = 4;     // bytes of source
#if defined(BITSTEP_avx512)
  static constexpr int kPixels = 12, kColumns = 2;
#else
  static constexpr int kPixels = 4, kColumns = 1;
#endif
  static I activation(const uint8_t* p) { return broadcast4(p); }
  static I add(I acc, I a, I w) { return dot4(acc, a, w); }
};

#if defined(BITSTEP_avx512)
struct Tables {
  static constexpr int kScaling = 4;
  static constexpr int kStep = 64;
  static constexpr int kPixels = 6, kColumns = 4;
  static I activation(const uint8_t* p) { return load(reinterpret_cast<const int32_t*>(p)); }
  static I add(I acc, I table, I index) {
    const __m512i sums = _mm512_permutexvar_epi8((__m512i)index, (__m512i)table);
    return (I)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi8(1), sums);
  }
};
#endif

// The kernel window over the codes, as runs of consecutive bytes that every pixel visits.
struct Window {
  int64_t runs, steps;      // runs, and steps in each
  int64_t across, down;     // bytes from run to run in a kernel row, and from kernel row to kernel row
  int64_t runs_per_row;

  int64_t count() const { return runs * steps; }
};

typedef uint8_t B __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));

// Blocks of bytes from memory that keeps `Bits` of each.
template <int Bits>
void unpack(const uint8_t* packed, const int8_t* zero, int columns, int64_t blocks, uint8_t* out) {
  constexpr int kShare = 8 / Bits;
  const I mask = splat(((1 << Bits) - 1) * 0x01010101);
  const auto* zeros = reinterpret_cast<const uint8_t*>(zero);
  int64_t at = 0;  // of the block's column in zeros
  for (; blocks > 0; blocks -= kShare, packed += kBlock) {
#pragma GCC unroll 8
    for (int part = 0; part < kShare; ++part, out += kBlock) {
      if (part >= blocks) return;
      for (int i = 0; i < kBlock; i += kLanes * 4) {
        const I code = load(reinterpret_cast<const int32_t*>(packed + i)) >> part * Bits & mask;
        const B value = (B)(Bits == 1 ? code + code : code) - *reinterpret_cast<const B*>(zeros + at + i);
        *reinterpret_cast<B*>(out + i) = value;
      }
      at = at + kBlock == columns * kBlock ? 0 : at + kBlock;
    }
  }
}

constexpr int64_t kChunk = 16;  // steps

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
      const int64_t count = kChunk * columns;
      unpack(packed, zero, columns, std::min(count, blocks), out);
      packed += count / share * kBlock;
      out += count * kBlock;
      blocks -= count;
    }
    for (const uint8_t* stop = std::min(next + fetched, end); next < stop; next += kBlock) __builtin_prefetch(next, 0, 2);
  }
};

// sums[pixel][column] over the window, for P pixels and C columns of a panel of weight_stride / 64 columns.
template <class Kind, int P, int C>
void accumulate(const uint8_t* const* pixels, const Window& window, int column, Feed& feed, int32_t* sums) {
  constexpr int V = C * kVectors;
  const int64_t stride = (kWholePanels ? C : feed.columns) * kBlock;
  const uint8_t* weight = feed.weight + column * kBlock;
  I acc[P][V] = {};
  for (int64_t run = 0; run < window.runs; ++run) {
    const int64_t offset = run / window.runs_per_row * window.down + run % window.runs_per_row * window.across;
    for (int64_t step = 0, next; step < window.steps; step = next) {
      next = std::min(step + kChunk, window.steps);
      feed.advance();
      const uint8_t* at[P];
      for (int p = 0; p < P; ++p) at[p] = pixels[p] + offset + next * Kind::kStep;
      for (int64_t i = (step - next) * Kind::kStep; i < 0; i += Kind::kStep, weight += stride) {
        I w[V];
        for (int v = 0; v < V; ++v) w[v] = load(reinterpret_cast<const int32_t*>(weight) + v * kLanes);
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
          const I a = Kind::activation(at[p] + i);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[p][v] = Kind::add(acc[p][v], a, w[v]);
        }
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int v = 0; v < V; ++v) store(sums + (p * feed.columns + column) * kColumn + v * kLanes, acc[p][v]);
  }
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

class Convolution {
 public:
  Convolution(const bitstep_layer& layer, const bitstep_map& map, const bitstep_step& step)
      : layer_(layer), map_(layer_map(layer, map)), step_(step), border_(map_) {
    out_h_ = (border_.height - layer.dilation_h * (layer.kernel_h - 1) - 1) / layer.stride_h + 1;
    out_w_ = (border_.width - layer.dilation_w * (layer.kernel_w - 1) - 1) / layer.stride_w + 1;
    columns_ = (layer.out_channels + kColumn - 1) / kColumn * layer.bases;
    panels_ = (columns_ + layer.panel - 1) / layer.panel;
    prepare_outputs();
  }

  void run(const uint8_t* codes, const bitstep_epilogue& epilogue, float* y, int threads) const {
#if defined(BITSTEP_avx512)
    if (layer_.table) return run<Tables>(codes, epilogue, y, threads);
#endif
    run<Bytes>(codes, epilogue, y, threads);
  }

 private:
  // A 1x1 convolution sees no neighbours: its pixels become many short rows, which are easier to share.
  static bitstep_map layer_map(const bitstep_layer& layer, bitstep_map map) {
    const int area = layer.kernel_h * layer.kernel_w * layer.stride_h * layer.stride_w;
    if (area == 1 && map.pad_h == 0 && map.pad_w == 0) {
      const int pixels = map.height * map.width;
      for (map.width = std::min(pixels, 16); pixels % map.width; --map.width) {}
      map.height = pixels / map.width;
    }
    return map;
  }

  // Per row of the step and output channel of each basis: y = sum of (sums + offset) * factor.
  void prepare_outputs() {
    const int64_t count = int64_t{columns_} * kColumn;
    offset_ = static_cast<int32_t*>(scratch(Slot::kOffsets, step_.rows * count * sizeof(int32_t)));
    factor_ = static_cast<float*>(scratch(Slot::kFactors, step_.rows * count * sizeof(float)));
    for (int64_t row = 0; row < step_.rows; ++row) {
      const I zero_point = splat(static_cast<int32_t>(step_.zero_point[row]));
      for (int64_t i = 0; i < count; i += kLanes) {
        store(offset_ + row * count + i, -zero_point * load(layer_.sum + i));
        store(factor_ + row * count + i, splat(step_.scale[row]) * load(layer_.scale + i));
      }
    }
  }

  // Threads share whichever is larger, activations (by rows of the map) or weights (by panels), so that the larger
  // part stays in one core's cache.
  template <class Kind>
  void run(const uint8_t* codes, const bitstep_epilogue& epilogue, float* y, int threads) const {
    const int64_t rows = map_.batch * out_h_;
    const int64_t code_bytes = map_.batch * border_.height * border_.row_bytes * Kind::kScaling;
    const int64_t weight_bytes = panels_ * panel_stride(layer_.panel * window<Kind>().count());
    const int64_t parts = code_bytes < weight_bytes ? 1 : std::min<int64_t>(threads, rows);
    const int64_t shares = std::max<int64_t>(1, threads / parts);
    parallel_for(parts * shares, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i / shares;
        run_rows<Kind>(codes, rows * part / parts, rows * (part + 1) / parts, i % shares, shares, epilogue, y);
      }
    });
  }

  // One of `shares` equal shares of the work on output rows [first, end) of the batch's batch * out_h, in bands that
  // fit the cache.
  template <class Kind>
  void run_rows(const uint8_t* codes, int64_t first, int64_t end, int64_t share, int64_t shares,
                const bitstep_epilogue& epilogue, float* y) const {
    const int64_t halo = int64_t{layer_.dilation_h} * (layer_.kernel_h - 1) + 1;
    const int64_t cached = (kBandBytes / (border_.row_bytes * Kind::kScaling) - halo) / layer_.stride_h + 1;
    const int64_t bands = (end - first + std::max<int64_t>(1, cached) - 1) / std::max<int64_t>(1, cached);
    for (int64_t band = 0; band < bands; ++band) {
      const int64_t top = first + (end - first) * band / bands, bottom = first + (end - first) * (band + 1) / bands;
      const uint8_t* source = codes;
#if defined(BITSTEP_avx512)
      if (layer_.table) source = make_tables(codes, code_row(top), code_row(bottom - 1) + halo);
#endif
      const int64_t pixels = (bottom - top) * out_w_, tiles = (pixels + Kind::kPixels - 1) / Kind::kPixels;
      const int64_t work = panels_ * tiles;
      for (int64_t at = work * share / shares, stop = work * (share + 1) / shares, next; at < stop; at = next) {
        const int64_t panel = at / tiles;
        next = std::min(stop, (panel + 1) * tiles);
        run_panel<Kind>(source, static_cast<int>(panel), top * out_w_, pixels, at - panel * tiles,
                        next - panel * tiles, tiles, epilogue, y);
      }
    }
  }

  template <class Kind>
  void run_panel(const uint8_t* source, int panel, int64_t first_pixel, int64_t pixels, int64_t tile, int64_t stop,
                 int64_t tiles, const bitstep_epilogue& epilogue, float* y) const {
    const int first_column = panel * layer_.panel, columns = std::min(layer_.panel, columns_ - first_column);
    const Window window = this->window<Kind>();
    Feed feed = make_feed(panel, columns, window, stop - tile);
    alignas(64) int32_t sums[Kind::kPixels * kMaxPanel * kColumn];
    const uint8_t* at[Kind::kPixels];
    for (; tile < stop; ++tile) {
      // tiles of nearly equal height, so that none is left with a pixel or two
      const int64_t begin = first_pixel + pixels * tile / tiles, end = first_pixel + pixels * (tile + 1) / tiles;
      const int count = static_cast<int>(end - begin);
      Corner corner = corner_of(begin);
      for (int p = 0; p < count; ++p) {
        at[p] = source + advance(corner) * Kind::kScaling;
        fetch_outputs(begin + p, first_column, columns, epilogue, y);
      }
      for (int c = 0; c < columns; c += Kind::kColumns) {
        const int width = std::min(Kind::kColumns, columns - c);
        accumulate<Kind>(width, count, at, window, c, feed, sums);
      }
      finish(begin, count, first_column, columns, sums, epilogue, y);
    }
  }

  template <class Kind>
  Window window() const {
    const int64_t tap = layer_.padded_channels * Kind::kScaling;
    const bool merged = layer_.dilation_w == 1;
    Window window;
    window.runs_per_row = merged ? 1 : layer_.kernel_w;
    window.runs = window.runs_per_row * layer_.kernel_h;
    window.steps = tap * (merged ? layer_.kernel_w : 1) / Kind::kStep;
    window.across = tap * layer_.dilation_w;
    window.down = border_.row_bytes * Kind::kScaling * layer_.dilation_h;
    return window;
  }

  // Row of codes where the window of an output row (counted over the batch) begins.
  int64_t code_row(int64_t row) const { return row / out_h_ * border_.height + row % out_h_ * layer_.stride_h; }

  // Where the window of an output pixel begins in the codes; stepped from pixel to pixel to save the divisions.
  struct Corner {
    int64_t row, x, offset;
  };

  Corner corner_of(int64_t pixel) const {
    const int64_t row = pixel / out_w_, x = pixel % out_w_;
    return {row, x, code_row(row) * border_.row_bytes + x * layer_.stride_w * layer_.padded_channels};
  }

  int64_t advance(Corner& corner) const {
    const int64_t offset = corner.offset;
    corner.offset += int64_t{layer_.stride_w} * layer_.padded_channels;
    if (++corner.x == out_w_) corner = {corner.row + 1, 0, code_row(corner.row + 1) * border_.row_bytes};
    return offset;
  }

  // Bytes of memory that hold some blocks.
  int64_t panel_stride(int64_t blocks) const {
    const int share = 8 / layer_.bits;
    return (blocks + share - 1) / share * kBlock;
  }

  Feed make_feed(int panel, int columns, const Window& window, int64_t tiles) const {
    const int64_t stride = panel_stride(window.count() * layer_.panel), blocks = window.count() * columns;
    const int64_t chunks = tiles * window.runs * ((window.steps + kChunk - 1) / kChunk);
    Feed feed;
    feed.columns = columns;
    feed.packed = layer_.weight + panel * stride;
    feed.next = feed.packed + stride;
    feed.end = panel + 2 < panels_ ? feed.next + stride : feed.next;
    feed.fetched = (stride / chunks / kBlock + 1) * kBlock;
    if (layer_.bits == 8) {
      feed.weight = feed.packed;
      feed.blocks = 0;
    } else {
      feed.unpack = layer_.bits == 4 ? unpack<4> : layer_.bits == 2 ? unpack<2> : unpack<1>;
      feed.zero = layer_.zero + int64_t{panel} * layer_.panel * kBlock;
      feed.share = 8 / layer_.bits;
      feed.blocks = blocks;
      feed.out = static_cast<uint8_t*>(scratch(Slot::kPanel, blocks * kBlock));
      feed.weight = feed.out;
    }
    return feed;
  }

  // Start to load what finish() will write and read, as the pixels of a tile lie far apart.
  void fetch_outputs(int64_t pixel, int column, int columns, const bitstep_epilogue& epilogue, const float* y) const {
    const int64_t at = pixel * layer_.out_channels + column / layer_.bases * kColumn;
    for (int64_t i = at; i < at + columns * kColumn / layer_.bases; i += kBlock / sizeof(float)) {
      __builtin_prefetch(y + i, 1);
      if (epilogue.residual) __builtin_prefetch(epilogue.residual + i);
    }
  }

  // sums -> y for the pixels of a tile and the columns of a panel.
  void finish(int64_t pixel, int count, int column, int columns, const int32_t* sums,
              const bitstep_epilogue& epilogue, float* y) const {
    const int64_t area = out_h_ * out_w_;
    const int first = column / layer_.bases * kColumn, last = first + columns / layer_.bases * kColumn;
    int64_t sample = pixel / area;
    for (const int64_t end = pixel + count; pixel < end; ++pixel, sums += columns * kColumn) {
      sample += pixel == (sample + 1) * area;
      const int64_t at_pixel = pixel * layer_.out_channels, at_sample = sample * layer_.out_channels;
      const int64_t at_row = step_.rows == 1 ? 0 : sample * columns_ * kColumn;
      const float* bias = epilogue.bias ? epilogue.bias + (epilogue.bias_rows == 1 ? 0 : at_sample) : nullptr;
      const float* gain = epilogue.gain ? epilogue.gain + at_sample : nullptr;
      const float* residual = epilogue.residual ? epilogue.residual + at_pixel : nullptr;
      const int32_t* acc = sums;
      int64_t at = at_row + column * kColumn;
      for (int channel = first; channel < last; channel += kColumn) {
        for (int v = 0; v < kColumn && channel + v < layer_.out_channels; v += kLanes) {
          const int lanes = std::min(kLanes, layer_.out_channels - channel - v);
          F total{};
          for (int basis = 0; basis < layer_.bases; ++basis) {
            const int i = basis * kColumn + v;
            total += to_float(load(acc + i) + load(offset_ + at + i)) * load(factor_ + at + i);
          }
          if (bias) total += load_some(bias + channel + v, lanes);
          if (gain) total *= load_some(gain + channel + v, lanes);
          if (residual) total += load_some(residual + channel + v, lanes);
          store_some(y + at_pixel + channel + v, total, lanes);
        }
        acc += layer_.bases * kColumn;
        at += layer_.bases * kColumn;
      }
    }
  }

  static constexpr int64_t kBandBytes = 1 << 20;

#if defined(BITSTEP_avx512)
  // The tables of rows [from, to) of codes; addressed as if those of all rows were there.
  const uint8_t* make_tables(const uint8_t* codes, int64_t from, int64_t to) const {
    const int64_t row_bytes = border_.row_bytes * Tables::kScaling;
    auto* tables = static_cast<uint8_t*>(scratch(Slot::kTables, (to - from) * row_bytes));
    for (int64_t row = from; row < to; ++row) {
      make_tables(codes + row * border_.row_bytes, row / border_.height, tables + (row - from) * row_bytes);
    }
    return tables - from * row_bytes;
  }

  void make_tables(const uint8_t* codes, int64_t sample, uint8_t* tables) const {
    const int row = step_.rows == 1 ? 0 : static_cast<int>(sample);
    const __m512i zero_point = _mm512_set1_epi8(static_cast<char>(step_.zero_point[row]));
    // byte 16 g + n of a table takes activation 4 g + i, negated (from lane 1) where bit i of n is clear
    alignas(64) uint8_t pick[4][64];
    for (int i = 0; i < 4; ++i) {
      for (int byte = 0; byte < 64; ++byte) pick[i][byte] = byte / 16 * 4 + i + (byte >> i & 1 ? 0 : 16);
    }
    const __m512i pick0 = _mm512_load_si512(pick[0]), pick1 = _mm512_load_si512(pick[1]);
    const __m512i pick2 = _mm512_load_si512(pick[2]), pick3 = _mm512_load_si512(pick[3]);
    for (int64_t i = 0; i < border_.row_bytes; i += 16) {
      const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
      const __m512i centred = _mm512_sub_epi8(four, zero_point);
      const __m512i both = _mm512_mask_sub_epi8(centred, 0xffff0000, _mm512_setzero_si512(), centred);
      const __m512i a = _mm512_add_epi8(_mm512_permutexvar_epi8(pick0, both), _mm512_permutexvar_epi8(pick1, both));
      const __m512i b = _mm512_add_epi8(_mm512_permutexvar_epi8(pick2, both), _mm512_permutexvar_epi8(pick3, both));
      _mm512_store_si512(tables + Tables::kScaling * i, _mm512_add_epi8(a, b));
    }
  }
#endif

  const bitstep_layer& layer_;
  const bitstep_map map_;
  const bitstep_step& step_;
  const Border border_;
  int64_t out_h_, out_w_;
  int columns_, panels_;
  int32_t* offset_;
  float* factor_;
};

}  // namespace

void convolve(const bitstep_layer& layer, const bitstep_map& map, const bitstep_step& step, const uint8_t* codes,
              const bitstep_epilogue& epilogue, float* y, int threads) {
  Convolution(layer, map, step).run(codes, epilogue, y, threads);
}

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
