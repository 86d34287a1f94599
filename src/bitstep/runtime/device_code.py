"""The Triton programs of :mod:`bitstep.runtime.cuda`: inputs to codes, and a layer as one exact integer product.

Written for any GPU with 8-bit integer products; imported only where Triton is installed.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12_582_912.0)
"""1.5 * 2**23: added and taken away again, it rounds |v| < 2**22 to the nearest integer, ties to even."""
BEYOND = tl.constexpr(1_048_576.0)
"""Larger than any code; what lies beyond is clipped, rounded or not."""


@triton.jit
def code_inputs(
    x,  # floating point, at (sample, channel, row, column) * strides
    codes,  # int8 [samples, padded_height, padded_width, padded_channels]: code - 128
    reciprocal,  # float32 [channels], if DILATED
    scale,  # float32 [1] or [samples]
    zero_point,  # float32 [1] or [samples], integers
    channels,
    height,
    width,
    padded_height,
    padded_width,
    padded_channels,
    sample_stride,
    channel_stride,
    height_stride,
    width_stride,
    scale_stride,  # 1 where every sample has a scale of its own, else 0
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    TOP: tl.constexpr,
    DILATED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``clip(round(x * reciprocal * (1 / s)) + z, 0, TOP) - 128``, channels last; the zero point around the map, and 0,
    which adds nothing to a product, in the channels that fill the last tile."""
    sample = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    h, w = p // padded_width - PADDING_H, p % padded_width - PADDING_W
    within = (h >= 0) & (h < height) & (w >= 0) & (w < width)
    places = (h.to(tl.int64) * height_stride + w.to(tl.int64) * width_stride)[:, None]
    places += c.to(tl.int64)[None, :] * channel_stride
    known = within[:, None] & (c < channels)[None, :]
    v = tl.load(x + sample * sample_stride + places, mask=known, other=0.0).to(tl.float32)
    if DILATED:
        v = v * tl.load(reciprocal + c, mask=c < channels, other=0.0)[None, :]
    v = v * tl.div_rn(1.0, tl.load(scale + sample * scale_stride))
    # these bounds also stand between a product and a sum that would round differently if they were fused
    v = tl.minimum(tl.maximum(v, -BEYOND), BEYOND)
    v = (v + ROUNDER) - ROUNDER + tl.load(zero_point + sample * scale_stride)
    v = tl.minimum(tl.maximum(v, 0.0), TOP) - 128.0
    v = tl.where((c < channels)[None, :], v, 0.0)
    places = (sample * padded_height * padded_width + p)[:, None] * padded_channels + c[None, :]
    inside = (p < padded_height * padded_width)[:, None] & (c < padded_channels)[None, :]
    tl.store(codes + places, v.to(tl.int8), mask=inside)


# a program for all sizes: those that are 1 or divisible by 16 would else be compiled once more, and run no faster
@triton.jit(do_not_specialize=["samples", "height", "width", "out_height", "out_width", "scale_stride"])
def multiply(
    codes,  # int8 [samples, height, width, channels]: code - 128, padded
    weight,  # uint8 [BASES, out, steps / codes a byte, BLOCK_K]
    y,  # floating point [samples, out_height, out_width, out]
    bias,  # float32 [out]
    input_scale,  # float32 [1] or [samples]
    input_zero_point,  # float32 [1] or [samples]
    weight_scale,  # float32 [BASES, out]
    weight_sum,  # int32 [BASES, out]: the signed weights of an output channel, added up
    samples,
    height,
    width,
    channels,
    out_height,
    out_width,
    out,
    scale_stride,
    BITS: tl.constexpr,
    BASES: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A convolution as the product of gathered codes and weights that are unpacked on the way.

        y = s_x s_w (sum (a - 128) w + (128 - z) sum w) + bias

    The channels of all taps are worked on in steps of BLOCK_K. A byte holds the weights of one place in as many steps
    as fit, so that unpacking moves no value to another thread. No load is masked: rows and columns beyond the last
    repeat it, and are not stored.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    outputs = samples * out_height * out_width
    row, column = tl.minimum(m, outputs - 1), tl.minimum(n, out - 1)
    sample = row // (out_height * out_width)
    top = row // out_width % out_height * STRIDE_H
    left = row % out_width * STRIDE_W
    pixels = codes + ((sample.to(tl.int64) * height + top) * width + left) * channels
    steps_of_tap = channels // BLOCK_K
    steps = KERNEL_H * KERNEL_W * steps_of_tap
    row_bytes = tl.cdiv(steps, PER_BYTE) * BLOCK_K
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for basis in tl.static_range(BASES):
        rows = weight + (basis * out + column).to(tl.int64) * row_bytes
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for step in range(steps):
            tap, start = step // steps_of_tap, step % steps_of_tap * BLOCK_K
            shift = (tap // KERNEL_W * DILATION_H * width + tap % KERNEL_W * DILATION_W) * channels + start
            a = tl.load(pixels[:, None] + (shift + k)[None, :])
            b = tl.load(rows[None, :] + (step // PER_BYTE * BLOCK_K + k)[:, None])
            if BITS < 8:
                b = (b >> tl.full((1, 1), step % PER_BYTE * BITS, tl.uint8)) & ((1 << BITS) - 1)
                b = 2 * b - 1 if BITS == 1 else b - (1 << (BITS - 1))
            total = tl.dot(a, b.to(tl.int8, bitcast=True), acc=total, out_dtype=tl.int32)
        zero = tl.load(input_zero_point + sample * scale_stride).to(tl.int32) - 128
        total -= zero[:, None] * tl.load(weight_sum + basis * out + column)[None, :]
        result += total.to(tl.float32) * tl.load(weight_scale + basis * out + column)[None, :]
    result *= tl.load(input_scale + sample * scale_stride)[:, None]
    result += tl.load(bias + column)[None, :]
    places = m.to(tl.int64)[:, None] * out + n[None, :]
    tl.store(y + places, result.to(y.dtype.element_ty), mask=(m < outputs)[:, None] & (n < out)[None, :])
