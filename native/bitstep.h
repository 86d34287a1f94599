// The C interface of the native CPU runtime, and of what training rounds with.
//
// Activations are fp32 NHWC [batch, height, width, channels]. A linear layer is a 1x1 convolution of height 1. One
// (scale, zero point) serves the batch (rows 1) or each sample has its own (rows = batch).
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BITSTEP_API __attribute__((visibility("default")))

// How activations become codes: clip(round(x * channel_reciprocal * (1 / scale)) + zero_point, 0, top).
typedef struct {
  const float* scale;               // [rows]
  const float* zero_point;          // [rows], integral
  int32_t rows;                     // 1 or batch
  int32_t top;                      // 2**bits - 1
  const float* channel_reciprocal;  // [channels] or null
} bitstep_step;

// What is done to activations before they become codes: normalization, then activation(x * gain + shift).
typedef struct {
  int32_t normalization;  // to mean 0 and variance 1: 0 none, 1 each pixel's channels, 2 each group of a sample's channels
  int32_t groups;
  float eps;              // added to that variance
  const float* gain;      // [rows][channels] or null (1)
  const float* shift;     // [rows][channels] or null (0)
  int32_t rows;           // 1 or batch; 1 with groups
  int32_t activation;     // 0 none, 1 SiLU, 2 GELU (tanh), 3 GEGLU: in memory each pixel's channels are followed by a
                          // gate for each, and become channel * GELU(gate), GELU exact; nothing else is done to them
} bitstep_prologue;

// What is done to a convolution's output: residual + gain * (y + bias).
typedef struct {
  const float* bias;      // [bias_rows][out_channels] or null
  int32_t bias_rows;      // 1 or batch
  const float* gain;      // [batch][out_channels] or null (1)
  const float* residual;  // the output's shape, or null; may be the output itself
} bitstep_epilogue;

// The layer's input. Its codes are u8 [batch, height + 2 pad_h, width + 2 pad_w, padded_channels]; the border and the
// padding channels hold the zero point.
typedef struct {
  int32_t batch, height, width, channels;
  int32_t padded_channels;  // channels rounded up to the layer's granule
  int32_t pad_h, pad_w;
  int32_t repeat;           // every pixel in memory stands for repeat x repeat pixels; height and width are multiples
  const float* rest;        // the last rest_channels channels of every pixel lie in this map of their own; or null
  int32_t rest_channels;
} bitstep_map;

// A convolution with packed weights. Weight codes form columns of 16 output channels; with two bases the columns of
// the first and second basis alternate. Columns form panels of `panel` (the last may be narrower). A panel is a
// sequence of 64-byte blocks, in order [kernel_h][kernel_w][padded_channels / granule][column]; block byte 4 c + i is
// input channel i of the granule for output channel c. `8 / bits` consecutive blocks share 64 bytes of memory: block j
// has the bits [bits j, bits j + bits) of each byte.
//
// Without table, granule is 4 and a byte is a code: weight = code - zero (2 code - 1 for one bit, zero 1).
// With a table, granule is 16, bits is 4, and a byte holds the signs of input channels 4 i .. 4 i + 3: byte 4 c + i, with
// zero -16 i, if the table takes them beside, and byte 16 i + c, with zero 0, if apart.
enum bitstep_table_kind { BITSTEP_TABLE_NONE, BITSTEP_TABLE_BESIDE, BITSTEP_TABLE_APART };
typedef struct {
  int32_t out_channels, padded_channels;
  int32_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  int32_t bits;     // 1, 2, 4 or 8: bits of memory per byte of a block
  int32_t bases;    // 1 or 2
  int32_t panel;    // columns per panel
  int32_t table;    // a bitstep_table_kind: whether the weight is an index into tables of signed sums
  int32_t largest;  // absolute value of a weight, at most
  const uint8_t* weight;
  const int8_t* zero;       // [columns][64]
  const int32_t* sum;       // [columns][16]: the sum of a channel's weights
  const float* scale;       // [columns][16]
} bitstep_layer;

// Attention between tokens: q and y are [batch, queries, heads, head_channels], k and v [batch, keys, ...].
typedef struct {
  int32_t batch, queries, keys, heads, head_channels;
  float scale;
} bitstep_attention_shape;

// Rows of values, each with a step of its own.
typedef struct {
  int64_t count, length;
  const float* scale;       // [count]
  const float* zero_point;  // [count], integral
  int32_t top;              // 2**bits - 1
} bitstep_rows;

// Share work by the functions at these addresses: GOMP_parallel, omp_get_thread_num and omp_get_num_threads. Without the
// first, everything runs in the calling thread.
BITSTEP_API void bitstep_set_threads(void* fork, void* thread_number, void* team_size);
// The instruction sets this build and machine offer, best first, as a null-terminated list.
BITSTEP_API const char* const* bitstep_instruction_sets(void);
// Use one of them from now on; nonzero if it is not offered.
BITSTEP_API int bitstep_use(const char* instruction_set);

// What the instruction set in use makes of one-bit weights under activations of up to 4 bits: a layer's `table`.
BITSTEP_API int bitstep_table(void);

// What follows returns 0, or 1 where there was no memory for what is kept meanwhile: the results are then undefined.

// x -> codes -> y [batch, out_h, out_w, out_channels]; prologue may be null.
BITSTEP_API int bitstep_convolution(const bitstep_layer* layer, const bitstep_map* map,
                                    const bitstep_prologue* prologue, const bitstep_step* step, const float* x,
                                    const bitstep_epilogue* epilogue, float* y, int threads);
// y = softmax(scale q k^T) v, per head.
BITSTEP_API int bitstep_attention(const bitstep_attention_shape* shape, const float* q, const float* k, const float* v,
                                  float* y, int threads);
// The same of operands that are rounded first, the probabilities too; steps of queries, keys, values and probabilities.
BITSTEP_API int bitstep_coded_attention(const bitstep_attention_shape* shape, const bitstep_step* steps,
                                        const float* q, const float* k, const float* v, float* y, int threads);
// y = scale (clip(round(x * (1 / scale)) + zero_point, 0, top) - zero_point), all [count][length].
BITSTEP_API int bitstep_fake_quantize(const bitstep_rows* rows, const float* x, float* y, int threads);
// The gradients of LSQ: grad_x [count][length], grad_scale and grad_zero_point [count].
BITSTEP_API int bitstep_fake_quantize_backward(const bitstep_rows* rows, const float* x, const float* grad,
                                               float* grad_x, float* grad_scale, float* grad_zero_point, int threads);

#ifdef __cplusplus
}
#endif
