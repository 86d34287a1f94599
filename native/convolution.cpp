// Convolution as implicit matrix multiplication: codes u8 NHWC with a border, packed weights, fp32 out.
//
// A tile of output pixels times a panel of output channels is accumulated at a time (panel.h).
#include <algorithm>

#include "clone.h"
#include "codes.h"
#include "divide.h"
#include "panel.h"
#include "parallel.h"
#if defined(BITSTEP_TABLES)
#include "tables.h"
#endif
#if defined(BITSTEP_amx)
#include "tiles.h"
#endif
#if defined(BITSTEP_WORDS)
#include "words.h"
#endif

namespace bitstep {
namespace BITSTEP_CLONE {
namespace {

class Convolution {
 public:
  Convolution(const bitstep_layer& layer, const bitstep_map& map, const bitstep_step& step)
      : layer_(layer), map_(map), step_(step), border_(map_) {
    out_h_ = (border_.height - layer.dilation_h * (layer.kernel_h - 1) - 1) / layer.stride_h + 1;
    out_w_ = (border_.width - layer.dilation_w * (layer.kernel_w - 1) - 1) / layer.stride_w + 1;
    columns_ = static_cast<int>(divide_up(layer.out_channels, kColumn)) * layer.bases;
    panels_ = static_cast<int>(divide_up(columns_, layer.panel));
    prepare_outputs();
  }

  void run(const uint8_t* codes, const bitstep_epilogue& epilogue, float* y, int threads) const {
#if defined(BITSTEP_TABLES)
    if (layer_.table) return run<Tables>(codes, epilogue, y, threads);
#endif
#if defined(BITSTEP_amx)
    if (Tiles::pay(window<Tiles>(), map_.batch * out_h_ * out_w_)) return run<Tiles>(codes, epilogue, y, threads);
#endif
#if defined(BITSTEP_WORDS)
    const int64_t pair = int64_t{2} * step_.top * layer_.largest;
    if (pair * Words::kRoom <= INT16_MAX) return run<Words>(codes, epilogue, y, threads);
    if (pair <= INT16_MAX) return run<Pairs>(codes, epilogue, y, threads);
#endif
    run<Bytes>(codes, epilogue, y, threads);
  }

 private:
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
      const Registers<Kind> registers(window<Kind>());
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
    const int64_t bands = divide_up(end - first, std::max<int64_t>(1, cached));
    for (int64_t band = 0; band < bands; ++band) {
      const int64_t top = first + (end - first) * band / bands, bottom = first + (end - first) * (band + 1) / bands;
      const uint8_t* source = codes;
#if defined(BITSTEP_TABLES)
      if (layer_.table) source = make_tables(codes, code_row(top), code_row(bottom - 1) + halo);
#endif
      const int64_t pixels = (bottom - top) * out_w_, tiles = divide_up(pixels, Kind::kPixels);
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
      accumulate_panel<Kind>(columns, count, at, window, feed, sums);
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
    window.beside = tap * layer_.stride_w;
    for (window.part = kChunkSteps; window.steps % window.part; --window.part) {}
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
    return divide_up(blocks, 8 / layer_.bits) * kBlockBytes;
  }

  Feed make_feed(int panel, int columns, const Window& window, int64_t tiles) const {
    const int64_t stride = panel_stride(window.count() * layer_.panel), blocks = window.count() * columns;
    const int64_t chunks = tiles * window.runs * divide_up(window.steps, kChunkSteps);
    Feed feed;
    feed.columns = columns;
    feed.packed = layer_.weight + panel * stride;
    feed.next = feed.packed + stride;
    feed.end = panel + 2 < panels_ ? feed.next + stride : feed.next;
    feed.fetched = (stride / chunks / kBlockBytes + 1) * kBlockBytes;
    if (layer_.bits == 8) {
      feed.weight = feed.packed;
      feed.blocks = 0;
    } else {
      feed.unpack = layer_.bits == 4 ? unpack<4> : layer_.bits == 2 ? unpack<2> : unpack<1>;
      feed.zero = layer_.zero + int64_t{panel} * layer_.panel * kBlockBytes;
      feed.share = 8 / layer_.bits;
      feed.blocks = blocks;
      feed.out = static_cast<uint8_t*>(scratch(Slot::kPanel, blocks * kBlockBytes));
      feed.weight = feed.out;
    }
    return feed;
  }

  // Start to load what finish() will write and read, as the pixels of a tile lie far apart.
  void fetch_outputs(int64_t pixel, int column, int columns, const bitstep_epilogue& epilogue, const float* y) const {
    const int64_t at = pixel * layer_.out_channels + column / layer_.bases * kColumn;
    for (int64_t i = at; i < at + columns * kColumn / layer_.bases; i += kBlockBytes / sizeof(float)) {
      __builtin_prefetch(y + i, 1);
      if (epilogue.residual) __builtin_prefetch(epilogue.residual + i);
    }
  }

  // sums -> y for the pixels of a tile and the columns of a panel.
  void finish(int64_t pixel, int count, int column, int columns, const int32_t* sums,
              const bitstep_epilogue& epilogue, float* y) const {
    const int64_t area = out_h_ * out_w_, end = pixel + count;
    for (int64_t sample = pixel / area, next; pixel < end; pixel = next, ++sample) {
      next = std::min(end, (sample + 1) * area);
      for (int c = 0; c < columns; c += layer_.bases) {
        const int channel = (column + c) / layer_.bases * kColumn;
        for (int v = 0; v < kColumn && channel + v < layer_.out_channels; v += kLanes) {
          const int lanes = std::min(kLanes, layer_.out_channels - channel - v);
          const int64_t at = int64_t{column + c} * kColumn + v;
          if (layer_.bases == 2) {
            finish<2>(sample, pixel, next, at, channel + v, lanes, columns, sums + c * kColumn + v, epilogue, y);
          } else {
            finish<1>(sample, pixel, next, at, channel + v, lanes, columns, sums + c * kColumn + v, epilogue, y);
          }
        }
      }
      sums += (next - pixel) * columns * kColumn;
    }
  }

  // The same for some channels of pixels of one sample; `at` is where the channels lie among those of all columns.
  template <int Bases>
  void finish(int64_t sample, int64_t pixel, int64_t end, int64_t at, int channel, int lanes, int columns,
              const int32_t* sums, const bitstep_epilogue& epilogue, float* y) const {
    at += step_.rows == 1 ? 0 : sample * columns_ * kColumn;
    I offset[Bases];
    F factor[Bases];
    for (int basis = 0; basis < Bases; ++basis) {
      offset[basis] = load(offset_ + at + basis * kColumn);
      factor[basis] = load(factor_ + at + basis * kColumn);
    }
    const int64_t at_sample = sample * layer_.out_channels + channel;
    const int64_t at_bias = epilogue.bias_rows == 1 ? channel : at_sample;
    const F bias = epilogue.bias ? load_some(epilogue.bias + at_bias, lanes) : F{};
    const F gain = epilogue.gain ? load_some(epilogue.gain + at_sample, lanes) : splat(1.0f);
    const float* residual = epilogue.residual;
    for (int64_t i = pixel * layer_.out_channels + channel; pixel < end; ++pixel) {
      F total = bias;
      for (int basis = 0; basis < Bases; ++basis) {
        total += to_float(load(sums + basis * kColumn) + offset[basis]) * factor[basis];
      }
      total *= gain;
      if (residual) total += load_some(residual + i, lanes);
      store_some(y + i, total, lanes);
      i += layer_.out_channels;
      sums += columns * kColumn;
    }
  }

  static constexpr int64_t kBandBytes = 1 << 20;

#if defined(BITSTEP_TABLES)
  // The tables of rows [from, to) of codes; addressed as if those of all rows were there.
  const uint8_t* make_tables(const uint8_t* codes, int64_t from, int64_t to) const {
    const int64_t row_bytes = border_.row_bytes * Tables::kScaling;
    auto* tables = static_cast<uint8_t*>(scratch(Slot::kTables, (to - from) * row_bytes));
    for (int64_t row = from; row < to; ++row) {
      const float zero_point = step_.zero_point[step_.rows == 1 ? 0 : row / border_.height];
      Tables::fill(codes + row * border_.row_bytes, border_.row_bytes, static_cast<uint8_t>(zero_point),
                   tables + (row - from) * row_bytes);
    }
    return tables - from * row_bytes;
  }
#endif

  const bitstep_layer& layer_;
  const bitstep_map& map_;
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
