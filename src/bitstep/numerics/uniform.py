"""Uniform quantization with an integer zero point: forward, LSQ gradients, range search.

    q = clip(round(x * (1 / s)) + z, 0, N - 1),   N = 2**bits
    x_hat = s * (q - z)

The division is a multiplication by the float32 reciprocal, here and in every kernel, so that all of them agree
on ties. Rounding is to nearest even.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

RangeMethod = Literal["minmax", "mse"]


def levels(bits: int) -> int:
    """Number of codes, N."""
    return 1 << bits


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes of ``x`` as uint8; ``scale`` and ``zero_point`` (integer-valued) broadcast against ``x``."""
    return _codes(x, scale, zero_point, bits).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``s * (q - z)`` in float32."""
    return scale * (codes.to(torch.float32) - zero_point)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize, differentiably (LSQ, arXiv 1902.08153; LSQ+, arXiv 2004.09576).

    ``scale`` (positive) and ``zero_point`` (integer-valued floats in [0, N-1]) broadcast against ``x``. With
    v = x/s, and a value called clipped when round(v) + z falls outside [0, N-1]:

        d x_hat / d x = 1 in range,            0 clipped
        d x_hat / d s = round(v) - v in range, -z clipped low, N-1-z clipped high
        d x_hat / d z = 0 in range,            -s clipped
    """
    return _FakeQuantize.apply(x, scale, zero_point, bits)  # type: ignore[no-any-return, no-untyped-call]


def round_zero_point(zero_point: Tensor, bits: int) -> Tensor:
    """Nearest integer in [0, N-1] with a straight-through gradient, so that zero stays exactly representable."""
    clamped = zero_point.clamp(0, levels(bits) - 1)
    return clamped + (clamped.round() - clamped).detach()


def _codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return (x * scale.reciprocal()).round_().add_(zero_point).clamp_(0, levels(bits) - 1)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        ctx.save_for_backward(x, scale, zero_point)
        return _codes(x, scale, zero_point, bits).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, scale, zero_point = ctx.saved_tensors
        v = x * scale.reciprocal()
        lowest, highest = -zero_point, levels(ctx.bits) - 1 - zero_point
        rounded = v.round()
        clipped = rounded.clamp(lowest, highest)
        inside = rounded == clipped
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[1]:
            # in range: round(v) - v; clipped: the bound itself
            grad_scale = clipped.sub_(v.mul_(inside)).mul_(grad).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            grad_zero_point = -(scale * (grad * ~inside)).sum_to_size(zero_point.shape)
        return grad_x, grad_scale, grad_zero_point, None


def search_range(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool,
    method: RangeMethod = "mse",
    candidates: int = 80,
    norm: float = 2.4,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point for every row of ``x`` ``[rows, n]``: two float32 ``[rows]``, zero points integer-valued.

    ``minmax`` covers the whole range. ``mse`` shrinks it by ``candidates`` factors and keeps, per row, the one with
    the least ``sum |x - x_hat|**norm``. Symmetric ranges have zero point N/2 and reach from -N/2*s to (N/2-1)*s; a
    range always contains zero.
    """
    x = x.detach().float()
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    best_scale, best_zero = _affine(low, high, bits, symmetric)
    if method == "minmax":
        return best_scale, best_zero
    best_error = torch.full_like(low, torch.inf)
    for i in range(candidates):
        shrink = 1 - i / candidates
        scale, zero = _affine(low * shrink, high * shrink, bits, symmetric)
        x_hat = _codes(x, scale[:, None], zero[:, None], bits).sub_(zero[:, None]).mul_(scale[:, None])
        error = x_hat.sub_(x).abs_().pow_(norm).sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _affine(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    n = levels(bits)
    tiny = torch.finfo(torch.float32).tiny * n  # an all-zero row still needs a positive scale with a finite reciprocal
    if symmetric:
        scale = (torch.maximum(-low, high) / (n / 2 - 0.5)).clamp(min=tiny)
        return scale, torch.full_like(scale, n / 2)
    scale = ((high - low) / (n - 1)).clamp(min=tiny)
    return scale, (-low / scale).round().clamp(0, n - 1)
