"""The Triton programs of :mod:`bitstep.runtime.cuda`: inputs, normalized and activated, to codes, and a layer as one
exact integer product.

Written for any GPU with 8-bit integer products; imported only where Triton is installed.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12_582_912.0)
"""1.5 * 2**23: added and taken away again, it rounds |v| < 2**22 to the nearest integer, ties to even."""
BEYOND = tl.constexpr(1_048_576.0)
"""Larger than any code; what lies beyond is clipped, rounded or not."""


# a program for all sizes: those that are 1 or divisible by 16 would else be compiled once more, and run no faster
@triton.jit(
    do_not_specialize=["height", "width", "padded_height", "padded_width", "affine_stride", "scale_stride"],
)
def code_inputs(
    x,  # floating point, at (sample, row, column, channel) * strides
    codes,  # int8 [samples, padded_height, padded_width, padded_channels]: code - 128
    gain,  # floating point [channels] or [samples, channels], or None
    shift,  # likewise
    reciprocal,  # float32 [channels], or None
    scale,  # float32 [1] or [samples]
    zero_point,  # float32 [1] or [samples], integers
    channels,
    height,  # of the map that is coded: every pixel of x stands for REPEAT x REPEAT of it
    width,
    padded_height,
    padded_width,
    padded_channels,
    sample_stride,
    height_stride,
    width_stride,
    channel_stride,
    affine_stride,  # channels where every sample has gains and shifts of its own, else 0
    scale_stride,  # 1 where every sample has a scale of its own, else 0
    eps,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    REPEAT: tl.constexpr,
    NORMALIZED: tl.constexpr,  # over the channels, all of them in one block
    ACTIVATION: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``clip(round(v * reciprocal * (1 / s)) + z, 0, TOP) - 128`` with ``v = activation(normalize(x) * gain + shift)``,
    channels last; the zero point around the map, and 0, which adds nothing to a product, in the channels that fill the
    last tile."""
    sample = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    h, w = p // padded_width - PADDING_H, p % padded_width - PADDING_W
    within = (h >= 0) & (h < height) & (w >= 0) & (w < width)
    rows = x + sample * sample_stride + ((h // REPEAT).to(tl.int64) * height_stride)[:, None]
    rows += ((w // REPEAT).to(tl.int64) * width_stride)[:, None]
    known = within[:, None] & (c < channels)[None, :]
    v = tl.load(rows + c.to(tl.int64)[None, :] * channel_stride, mask=known, other=0.0).to(tl.float32)
    if NORMALIZED:
        v = tl.where(known, v - (tl.sum(v, 1) / channels)[:, None], 0.0)
        v = v * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(v * v, 1) / channels + eps))[:, None]
    places = sample * affine_stride + c
    if gain is not None:
        v = v * tl.load(gain + places, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        v = v + tl.load(shift + places, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "silu":
        v = v * tl.sigmoid(v)
    elif ACTIVATION == "gelu":  # 1 + tanh(u) is 2 sigmoid(2 u)
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == "geglu":
        gates = rows + (c + channels).to(tl.int64)[None, :] * channel_stride
        gate = tl.load(gates, mask=known, other=0.0).to(tl.float32)
        v = v * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    v = tl.where(known, v, 0.0)
    if reciprocal is not None:
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


@triton.jit(do_not_specialize=["pixels", "width"])
def channel_moments(
    x,  # floating point, at (sample, row, column, channel) * strides
    moments,  # float32 [samples, blocks of pixels, 2, channels]
    pixels,
    width,
    channels,
    sample_stride,
    height_stride,
    width_stride,
    channel_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The mean of BLOCK_P pixels, and the sum of their squared deviations from it, channel by channel."""
    sample, block = tl.program_id(2).to(tl.int64), tl.program_id(0)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = x + sample * sample_stride + ((p // width).to(tl.int64) * height_stride)[:, None]
    rows += ((p % width).to(tl.int64) * width_stride)[:, None]
    known = (p < pixels)[:, None] & (c < channels)[None, :]
    v = tl.load(rows + c.to(tl.int64)[None, :] * channel_stride, mask=known, other=0.0).to(tl.float32)
    mean = tl.sum(v, 0) / tl.minimum(pixels - block * BLOCK_P, BLOCK_P)
    deviation = tl.where(known, v - mean[None, :], 0.0)
    places = moments + (sample * tl.num_programs(0) + block) * 2 * channels + c
    tl.store(places, mean, mask=c < channels)
    tl.store(places + channels, tl.sum(deviation * deviation, 0), mask=c < channels)


@triton.jit
def of_blocks(moments, b, blocks, c, own, channels, pixels, BLOCK_P: tl.constexpr):
    """Where the means of the blocks b lie, which of them there are, and how many pixels each has."""
    places = moments + b[:, None] * 2 * channels + c[None, :]
    return (
        places,
        (b < blocks)[:, None] & own[None, :],
        tl.minimum(pixels - b * BLOCK_P, BLOCK_P).to(tl.float32)[:, None],
    )


@triton.jit(do_not_specialize=["pixels", "blocks", "width"])
def group_affine(
    moments,  # of ``channel_moments``
    gain,  # floating point [channels], or None
    shift,  # likewise
    affine,  # float32 [2, samples, channels]
    pixels,
    blocks,
    channels,
    width,  # of a group
    eps,
    BLOCK_P: tl.constexpr,  # of ``channel_moments``
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Group normalization as a gain and a shift for every channel: ``normalize(x) * gain + shift = x * a + b``."""
    group, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = group * width + tl.arange(0, BLOCK_C)
    own = tl.arange(0, BLOCK_C) < width
    count = 1.0 * pixels * width
    mean, squares = 0.0, 0.0
    moments += sample * blocks * 2 * channels
    for begin in range(0, blocks, BLOCK_B):
        b = begin + tl.arange(0, BLOCK_B)
        places, known, held = of_blocks(moments, b, blocks, c, own, channels, pixels, BLOCK_P)
        mean += tl.sum(tl.where(known, held * tl.load(places, mask=known, other=0.0), 0.0)) / count
    for begin in range(0, blocks, BLOCK_B):
        b = begin + tl.arange(0, BLOCK_B)
        places, known, held = of_blocks(moments, b, blocks, c, own, channels, pixels, BLOCK_P)
        away = tl.load(places, mask=known, other=0.0) - mean
        squares += tl.sum(tl.where(known, tl.load(places + channels, mask=known, other=0.0) + held * away * away, 0.0))
    a = tl.div_rn(1.0, tl.sqrt_rn(squares / count + eps))
    a = tl.where(own, a, 0.0)
    if gain is not None:
        a = a * tl.load(gain + c, mask=own, other=0.0).to(tl.float32)
    b = -mean * a
    if shift is not None:
        b = b + tl.load(shift + c, mask=own, other=0.0).to(tl.float32)
    tl.store(affine + sample * channels + c, a, mask=own)
    tl.store(affine + (tl.num_programs(1) + sample) * channels + c, b, mask=own)


@triton.jit
def unpack_weight(
    packed,  # uint8 [rows, bytes, BLOCK_K]
    weight,  # int8 [rows, steps, BLOCK_K]
    size,  # of ``packed``
    bytes,
    steps,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes of 1, 2 or 4 bits to the signed bytes they stand for: +-1, or the code less the middle of its range."""
    PER_BYTE: tl.constexpr = 8 // BITS
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = place < size
    held = tl.load(packed + place, mask=known, other=0)
    byte, k = place // BLOCK_K, place % BLOCK_K
    row, first = byte // bytes, byte % bytes * PER_BYTE
    for i in tl.static_range(PER_BYTE):
        code = ((held >> (i * BITS)) & ((1 << BITS) - 1)).to(tl.int8)
        value = 2 * code - 1 if BITS == 1 else code - (1 << (BITS - 1))
        tl.store(weight + (row * steps + first + i) * BLOCK_K + k, value, mask=known & (first + i < steps))


@triton.jit
def add_and_store(result, residual, y, m, n, rows, columns):
    """A part of y ``[rows, columns]``, the residual added to it."""
    places = m.to(tl.int64)[:, None] * columns + n[None, :]
    stored = (m < rows)[:, None] & (n < columns)[None, :]
    result += tl.load(residual + places, mask=stored, other=0.0).to(tl.float32)
    tl.store(y + places, result.to(y.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["samples", "height", "width", "out_height", "out_width", "scale_stride"])
def multiply(
    codes,  # int8 [samples, height, width, channels]: code - 128, padded
    weight,  # int8 [BASES, out, steps, BLOCK_K]
    y,  # floating point [samples, out_height, out_width, out]; int32 [SPLITS, BASES, rows of y, out] if SPLITS > 1
    bias,  # floating point [out], or [samples, out] if BIASES
    gain,  # floating point [samples, out], or None
    residual,  # floating point, as y, or None
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
    BIASES: tl.constexpr,
    ALONE: tl.constexpr,  # whether the rows of a tile are all of one sample
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
    SPLITS: tl.constexpr,
):
    """A convolution as the product of gathered codes and weights.

        y = residual + gain (s_x s_w (sum (a - 128) w + (128 - z) sum w) + bias)

    The channels of all taps are worked on in steps of BLOCK_K. Where there are few rows and columns, programs share
    the steps of one result: SPLITS partial sums, which ``add_up`` turns into it. No load of a sum is masked: rows and
    columns beyond the last repeat it, and are not stored.
    """
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
    stored = (m < outputs)[:, None] & (n < out)[None, :]
    places = m.to(tl.int64)[:, None] * out + n[None, :]
    share = tl.cdiv(steps, SPLITS)
    begin = tl.program_id(2) * share
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for basis in tl.static_range(BASES):
        rows = weight + (basis * out + column).to(tl.int64) * (steps * BLOCK_K)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for step in range(begin, tl.minimum(begin + share, steps)):
            tap, start = step // steps_of_tap, step % steps_of_tap * BLOCK_K
            shift = (tap // KERNEL_W * DILATION_H * width + tap % KERNEL_W * DILATION_W) * channels + start
            a = tl.load(pixels[:, None] + (shift + k)[None, :])
            b = tl.load(rows[None, :] + (step * BLOCK_K + k)[:, None])
            total = tl.dot(a, b, acc=total, out_dtype=tl.int32)
        if SPLITS > 1:
            part = (tl.program_id(2) * BASES + basis).to(tl.int64) * outputs * out
            tl.store(y + part + places, total, mask=stored)
        else:
            zero = tl.load(input_zero_point + sample * scale_stride).to(tl.int32) - 128
            total -= zero[:, None] * tl.load(weight_sum + basis * out + column)[None, :]
            result += total.to(tl.float32) * tl.load(weight_scale + basis * out + column)[None, :]
    if SPLITS == 1:
        result *= tl.load(input_scale + sample * scale_stride)[:, None]
        of_tile = tl.minimum(tl.program_id(0) * BLOCK_M, outputs - 1) // (out_height * out_width)
        of_sample = (of_tile if ALONE else sample[:, None]) * out + column[None, :]
        result += tl.load(bias + (of_sample if BIASES else column[None, :])).to(tl.float32)
        if gain is not None:
            result *= tl.load(gain + of_sample).to(tl.float32)
        if residual is None:
            tl.store(y + places, result.to(y.dtype.element_ty), mask=stored)
        else:  # by halves: with all of it in registers, fewer programs would run at a time
            halves = tl.permute(tl.reshape(result, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left_half, right_half = tl.split(halves)
            half = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N // 2)
            add_and_store(left_half, residual, y, m, half, outputs, out)
            add_and_store(right_half, residual, y, m, half + BLOCK_N // 2, outputs, out)


@triton.jit(do_not_specialize=["rows", "rows_of_sample", "scale_stride"])
def add_up(
    parts,  # int32 [SPLITS, BASES, rows, out], of ``multiply``
    y,  # floating point [rows, out]
    bias,
    gain,
    residual,
    input_scale,
    input_zero_point,
    weight_scale,
    weight_sum,
    rows,
    rows_of_sample,
    out,
    scale_stride,
    BIASES: tl.constexpr,
    BASES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The end of ``multiply``, bit for bit, for sums in parts."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = rows.to(tl.int64) * out  # (of one channel, out is a constant without a type)
    known = place < size
    sample, column = place // out // rows_of_sample, place % out
    zero = tl.load(input_zero_point + sample * scale_stride, mask=known, other=0.0).to(tl.int32) - 128
    result = tl.zeros((BLOCK,), tl.float32)
    for basis in tl.static_range(BASES):
        total = tl.zeros((BLOCK,), tl.int32)
        for split in tl.static_range(SPLITS):
            total += tl.load(parts + (split * BASES + basis) * size + place, mask=known, other=0)
        total -= zero * tl.load(weight_sum + basis * out + column, mask=known, other=0)
        result += total.to(tl.float32) * tl.load(weight_scale + basis * out + column, mask=known, other=0.0)
    result *= tl.load(input_scale + sample * scale_stride, mask=known, other=0.0)
    of_sample = sample * out + column
    result += tl.load(bias + (of_sample if BIASES else column), mask=known, other=0.0).to(tl.float32)
    if gain is not None:
        result *= tl.load(gain + of_sample, mask=known, other=0.0).to(tl.float32)
    if residual is not None:
        result += tl.load(residual + place, mask=known, other=0.0).to(tl.float32)
    tl.store(y + place, result.to(y.dtype.element_ty), mask=known)
