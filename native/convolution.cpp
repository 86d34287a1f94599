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

struct Bytes {
  static constexpr int kStep = 4;
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
};

// sums[pixel][column] over the window, for P pixels and C columns of a panel of weight_stride / 64 columns.
template <class Kind, int P, int C>
void accumulate(const uint8_t* const* pixels, const Window& window, const uint8_t* weight, int64_t weight_stride,
                int32_t* sums) {
  constexpr int V = C * kVectors;
  I acc[P][V] = {};
  for (int64_t run = 0; run < window.runs; ++run) {
    const int64_t offset = run / window.runs_per_row * window.down + run % window.runs_per_row * window.across;
    const uint8_t* at[P];
    for (int p = 0; p < P; ++p) at[p] = pixels[p] + offset;
    for (int64_t step = 0; step < window.steps; ++step, weight += weight_stride) {
      I w[V];
      for (int v = 0; v < V; ++v) w[v] = load(reinterpret_cast<const int32_t*>(weight) + v * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
        const I a = Kind::activation(at[p] + step * Kind::kStep);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[p][v] = Kind::add(acc[p][v], a, w[v]);
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int v = 0; v < V; ++v) *reinterpret_cast<I*>(sums + p * weight_stride / 4 + v * kLanes) = acc[p][v];
  }
}

template <class Kind, int C, int P = Kind::kPixels>
void accumulate(int pixel_count, const uint8_t* const* pixels, const Window& window, const uint8_t* weight,
                int64_t weight_stride, int32_t* sums) {
  if (pixel_count == P) return accumulate<Kind, P, C>(pixels, window, weight, weight_stride, sums);
  if constexpr (P > 1) accumulate<Kind, C, P - 1>(pixel_count, pixels, window, weight, weight_stride, sums);
}

template <class Kind, int C = Kind::kColumns>
void accumulate(int columns, int pixel_count, const uint8_t* const* pixels, const Window& window,
                const uint8_t* weight, int64_t weight_stride, int32_t* sums) {
  if (columns == C) return accumulate<Kind, C>(pixel_count, pixels, window, weight, weight_stride, sums);
  if constexpr (C > 1) {
    accumulate<Kind, C - 1>(columns, pixel_count, pixels, window, weight, weight_stride, sums);
  }
}

typedef uint8_t B __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));

// Blocks of bytes from memory that keeps `Bits` of each.
template <int Bits>
void unpack(const uint8_t* packed, const int8_t* zero, int columns, int64_t blocks, bool table, uint8_t* out) {
  constexpr int kShare = 8 / Bits;
  const I mask = splat(((1 << Bits) - 1) * 0x01010101), group = splat(0x30201000);
  int column = 0;
  for (int64_t block = 0; block < blocks; packed += kBlock) {
    for (int part = 0; part < kShare && block < blocks; ++part, ++block) {
      const uint8_t* z = reinterpret_cast<const uint8_t*>(zero) + column * kBlock;
      for (int i = 0; i < kBlock; i += kLanes * 4) {
        const I code = load(reinterpret_cast<const int32_t*>(packed + i)) >> part * Bits & mask;
        const B value = (B)(Bits == 1 ? code + code : code) - *reinterpret_cast<const B*>(z + i);
        *reinterpret_cast<B*>(out + block * kBlock + i) = table ? (B)(code | group) : value;
      }
      if (++column == columns) column = 0;
    }
  }
}

class Convolution {
 public:
  Convolution(const bitstep_layer& layer, const bitstep_map& map, const bitstep_step& step)
      : layer_(layer), map_(map), step_(step), border_(map) {
    out_h_ = (border_.height - layer.dilation_h * (layer.kernel_h - 1) - 1) / layer.stride_h + 1;
    out_w_ = (border_.width - layer.dilation_w * (layer.kernel_w - 1) - 1) / layer.stride_w + 1;
    columns_ = (layer.out_channels + kColumn - 1) / kColumn * layer.bases;
    panels_ = (columns_ + layer.panel - 1) / layer.panel;
  }

  void run(const uint8_t* codes, const bitstep_epilogue& epilogue, float* y, int threads) const {
#if defined(BITSTEP_avx512)
    if (layer_.table) return run_tables(codes, epilogue, y, threads);
#endif
    run<Bytes>(codes, 0, map_.batch * out_h_, epilogue, y, threads);
  }

 private:
  // Output rows [first, last) of the batch's batch * out_h; source holds their codes or tables.
  template <class Kind>
  void run(const uint8_t* source, int64_t first, int64_t last, const bitstep_epilogue& epilogue, float* y, int threads) const {
    const int64_t pixels = (last - first) * out_w_;
    const int64_t tiles = (pixels + Kind::kPixels - 1) / Kind::kPixels;
    parallel_for(panels_ * tiles, threads, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t panel = begin / tiles, stop = std::min(end, (panel + 1) * tiles);
        run_panel<Kind>(source, static_cast<int>(panel), first * out_w_, pixels, begin - panel * tiles,
                        stop - panel * tiles, tiles, epilogue, y);
        begin = stop;
      }
    });
  }

  template <class Kind>
  void run_panel(const uint8_t* source, int panel, int64_t first_pixel, int64_t pixels, int64_t tile, int64_t stop,
                 int64_t tiles, const bitstep_epilogue& epilogue, float* y) const {
    const int64_t scaling = layer_.table ? 4 : 1;  // bytes of source per code
    const int columns = std::min(layer_.panel, columns_ - panel * layer_.panel);
    const Window window = make_window(Kind::kStep, scaling);
    const int64_t blocks = window.runs * window.steps * columns;
    const uint8_t* weight = panel_bytes(panel, columns, blocks);
    alignas(64) int32_t sums[Kind::kPixels * kMaxPanel * kColumn];
    const uint8_t* at[Kind::kPixels];
    for (; tile < stop; ++tile) {
      // tiles of nearly equal height, so that none is left with a pixel or two
      const int64_t begin = first_pixel + pixels * tile / tiles, end = first_pixel + pixels * (tile + 1) / tiles;
      const int count = static_cast<int>(end - begin);
      Corner corner = corner_of(begin);
      for (int p = 0; p < count; ++p) at[p] = source + advance(corner) * scaling;
      for (int c = 0; c < columns; c += Kind::kColumns) {
        const int width = std::min(Kind::kColumns, columns - c);
        accumulate<Kind>(width, count, at, window, weight + c * kBlock, int64_t{columns} * kBlock, sums + c * kColumn);
      }
      for (int p = 0; p < count; ++p) {
        finish(begin + p, panel * layer_.panel, columns, sums + p * columns * kColumn, epilogue, y);
      }
    }
  }

  Window make_window(int step_bytes, int64_t scaling) const {
    const int64_t tap = layer_.padded_channels * scaling;
    const bool merged = layer_.dilation_w == 1;
    Window window;
    window.runs_per_row = merged ? 1 : layer_.kernel_w;
    window.runs = window.runs_per_row * layer_.kernel_h;
    window.steps = tap * (merged ? layer_.kernel_w : 1) / step_bytes;
    window.across = tap * layer_.dilation_w;
    window.down = border_.row_bytes * scaling * layer_.dilation_h;
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

  const uint8_t* panel_bytes(int panel, int columns, int64_t blocks) const {
    const int share = 8 / layer_.bits;
    const int64_t steps = blocks / columns;
    const int64_t stride = (steps * layer_.panel + share - 1) / share * kBlock;
    const uint8_t* packed = layer_.weight + panel * stride;
    if (layer_.bits == 8) return packed;
    auto* out = static_cast<uint8_t*>(scratch(Slot::kPanel, blocks * kBlock));
    const int8_t* zero = layer_.zero + int64_t{panel} * layer_.panel * kBlock;
    if (layer_.bits == 4) unpack<4>(packed, zero, columns, blocks, layer_.table, out);
    if (layer_.bits == 2) unpack<2>(packed, zero, columns, blocks, layer_.table, out);
    if (layer_.bits == 1) unpack<1>(packed, zero, columns, blocks, layer_.table, out);
    return out;
  }

  // sums -> y for one pixel and the columns of a panel.
  void finish(int64_t pixel, int column, int columns, const int32_t* sums, const bitstep_epilogue& epilogue,
              float* y) const {
    const int64_t sample = map_.batch == 1 ? 0 : pixel / (out_h_ * out_w_);
    const int64_t row = step_.rows == 1 ? 0 : sample;
    const F step_scale = splat(step_.scale[row]);
    const I zero_point = splat(static_cast<int32_t>(step_.zero_point[row]));
    const int64_t at_pixel = pixel * layer_.out_channels, at_sample = sample * layer_.out_channels;
    const float* bias = epilogue.bias ? epilogue.bias + (epilogue.bias_rows == 1 ? 0 : at_sample) : nullptr;
    const float* gain = epilogue.gain ? epilogue.gain + at_sample : nullptr;
    const float* residual = epilogue.residual ? epilogue.residual + at_pixel : nullptr;
    for (int c = 0; c < columns; c += layer_.bases) {
      for (int v = 0; v < kVectors; ++v) {
        const int channel = (column + c) / layer_.bases * kColumn + v * kLanes;
        const int count = std::min(kLanes, layer_.out_channels - channel);
        if (count <= 0) break;
        F total{};
        for (int basis = 0; basis < layer_.bases; ++basis) {
          const int at = (column + c + basis) * kColumn + v * kLanes;
          const I acc = *reinterpret_cast<const I*>(sums + (c + basis) * kColumn + v * kLanes);
          total += to_float(acc - zero_point * load(layer_.sum + at)) * load(layer_.scale + at);
        }
        total *= step_scale;
        if (bias) total += load_some(bias + channel, count);
        if (gain) total *= load_some(gain + channel, count);
        if (residual) total += load_some(residual + channel, count);
        store_some(y + at_pixel + channel, total, count);
      }
    }
  }

#if defined(BITSTEP_avx512)
  // Tables are four times the codes, so they are made for a band of output rows that fits the cache.
  void run_tables(const uint8_t* codes, const bitstep_epilogue& epilogue, float* y, int threads) const {
    const int64_t halo = int64_t{layer_.dilation_h} * (layer_.kernel_h - 1) + 1;
    const int64_t row_bytes = 4 * border_.row_bytes;
    const int64_t cached = std::max<int64_t>(1, (kBandBytes * threads / row_bytes - halo) / layer_.stride_h + 1);
    for (int64_t first = 0, last; first < map_.batch * out_h_; first = last) {
      last = std::min(first + cached, map_.batch * out_h_);
      const int64_t from = code_row(first);
      const int64_t to = code_row(last - 1) + halo;
      auto* tables = static_cast<uint8_t*>(scratch(Slot::kTables, (to - from) * row_bytes));
      parallel_for(to - from, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          make_tables(codes + (from + row) * border_.row_bytes, (from + row) / border_.height,
                      tables + row * row_bytes);
        }
      });
      run<Tables>(tables - from * row_bytes, first, last, epilogue, y, threads);
    }
  }

  static constexpr int64_t kBandBytes = 1 << 20;

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
      _mm512_store_si512(tables + 4 * i, _mm512_add_epi8(a, b));
    }
  }
#endif

  const bitstep_layer& layer_;
  const bitstep_map& map_;
  const bitstep_step& step_;
  const Border border_;
  int64_t out_h_, out_w_;
  int columns_, panels_;
};

}  // namespace

void convolve(const bitstep_layer& layer, const bitstep_map& map, const bitstep_step& step, const uint8_t* codes,
              const bitstep_epilogue& epilogue, float* y, int threads) {
  Convolution(layer, map, step).run(codes, epilogue, y, threads);
}

}  // namespace BITSTEP_CLONE
}  // namespace bitstep
