"""Uniform quantization with an integer zero point: forward, LSQ gradients, range search.

    q = clip(round(x * (1 / s)) + z, 0, N - 1),   N = 2**bits
    x_hat = s * (q - z)

The division is a multiplication by the float32 reciprocal, here and in every kernel, so that all of them agree
on ties. Rounding is to nearest even.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from bitstep.numerics import native

RangeMethod = Literal["minmax", "mse", "lsq"]

_CACHED = 2**17
"""Values that range search works on at once on a CPU: a thousand passes over what stays in the second-level cache."""


def levels(bits: int) -> int:
    """Number of codes, N."""
    return 1 << bits


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes of ``x`` as uint8; ``scale`` and ``zero_point`` (integer-valued) broadcast against ``x``."""
    return (x * scale.reciprocal()).round_().add_(zero_point).clamp_(0, levels(bits) - 1).to(torch.uint8)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize, differentiably (LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576).

    ``scale`` (positive) and ``zero_point`` (integer-valued floats in [0, N-1]) broadcast against ``x``. With
    v = x/s, and a value called clipped when round(v) + z falls outside [0, N-1]:

        d x_hat / d x = 1 in range,            0 clipped
        d x_hat / d s = round(v) - v in range, -z clipped low, N-1-z clipped high
        d x_hat / d z = 0 in range,            -s clipped
    """
    return _FakeQuantize.apply(x, scale, zero_point, bits)  # type: ignore[no-any-return, no-untyped-call]


def rounded(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The values of :func:`fake_quantize`, computed by operations of torch alone: packed models call this one, so that
    whoever records their passes sees all of it."""
    return _level(x * scale.reciprocal(), zero_point, levels(bits) - 1) * scale


def round_zero_point(zero_point: Tensor, bits: int) -> Tensor:
    """Nearest integer in [0, N-1] with a straight-through gradient, so that zero stays exactly representable."""
    clamped = zero_point.clamp(0, levels(bits) - 1)
    return clamped + (clamped.round() - clamped).detach()


class _FakeQuantize(torch.autograd.Function):
    """Keeps x alone for the backward pass. Rows of float32 on a CPU are worked on by :mod:`bitstep.numerics.native`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.top = levels(bits) - 1
        if native.in_rows(x, scale, zero_point):
            return native.fake_quantize(x, scale, zero_point, ctx.top)
        return rounded(x, scale, zero_point, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, scale, zero_point = ctx.saved_tensors
        if native.in_rows(x, scale, zero_point):
            return *native.gradients(grad, x, scale, zero_point, ctx.top), None
        # In range |u - v| <= 1/2; clipped, u is the bound that the gradient equations name. Masks are floats made by
        # arithmetic: boolean masks, where and clamping to tensors take several times as long on a CPU.
        # (v is bounded where it is far out of range anyway: of a scale near 0 it would be too large to subtract from)
        v = (x * scale.reciprocal()).clamp_(-2 * ctx.top - 2, 2 * ctx.top + 2)
        u = _level(v, zero_point, ctx.top)
        residual = u - v
        clipped = residual.abs().sub_(0.5).ceil_().clamp_(0, 1)
        lost = grad * clipped
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:
            # residual in range; where clipped, residual + v = u
            grad_scale = residual.addcmul_(v, clipped).mul_(grad).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            grad_zero_point = lost.mul(scale).sum_to_size(zero_point.shape).neg_()
        return grad - lost, grad_scale, grad_zero_point, None


def _level(v: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """The signed code u = clip(round(v), -z, N-1-z) of v = x/s, so that x_hat = s * u."""
    return v.round().add_(zero_point).clamp_(0, top).sub_(zero_point)


def search_range(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool,
    method: RangeMethod = "mse",
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point for every row of ``x`` ``[rows, n]``: two float32 ``[rows]``, zero points integer-valued.

    ``minmax`` covers the whole range, from ``low`` to ``high`` ``[rows]`` where ``x`` is but a sample of the values.
    ``mse`` shrinks that range by 80 factors, 1 to 0.21, and keeps per row the one with the least
    ``sum |x - x_hat|**2.4``, the grid and the norm that the field uses. ``lsq``, for symmetric ranges only, is the
    start of LSQ, ``2 mean|x| / sqrt(N/2 - 1)``. Symmetric ranges have zero point N/2; a range always contains zero.
    """
    x = x.detach().float()
    if method == "lsq":
        if not symmetric:
            raise ValueError("the LSQ range is symmetric")
        scale = 2 * x.abs().mean(1) / math.sqrt(levels(bits) // 2 - 1)
        return scale.clamp(min=_smallest_scale(bits)), torch.full_like(scale, levels(bits) // 2)
    low = (x.amin(1) if low is None else low).clamp(max=0)
    high = (x.amax(1) if high is None else high).clamp(min=0)
    if method == "minmax":
        return _affine(low, high, bits, symmetric)
    together = max(1, _CACHED // x.shape[1]) if x.device.type == "cpu" else len(x)
    parts = zip(x.split(together), low.split(together), high.split(together), strict=True)
    found = [_least_error(*part, bits=bits, symmetric=symmetric) for part in parts]
    scales, zero_points = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zero_points)


def _least_error(x: Tensor, low: Tensor, high: Tensor, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    best_scale, best_zero = _affine(low, high, bits, symmetric)
    best_error = torch.full_like(low, torch.inf)
    for percent in range(100, 20, -1):
        shrink = percent / 100
        scale, zero = _affine(low * shrink, high * shrink, bits, symmetric)
        x_hat = fake_quantize(x, scale[:, None], zero[:, None], bits)
        # |e|**2.4 = exp(2.4 log |e|), five times as fast as pow; the floor keeps log finite
        error = x_hat.sub_(x).abs_().clamp_(min=1e-20).log_().mul_(2.4).exp_().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _affine(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    n, tiny = levels(bits), _smallest_scale(bits)
    if symmetric:
        scale = (torch.maximum(-low, high) / (n / 2 - 0.5)).clamp(min=tiny)
        return scale, torch.full_like(scale, n / 2)
    scale = ((high - low) / (n - 1)).clamp(min=tiny)
    return scale, (-low / scale).round().clamp(0, n - 1)


def _smallest_scale(bits: int) -> float:
    """What an all-zero row gets: positive, with a finite reciprocal."""
    return torch.finfo(torch.float32).tiny * levels(bits)
