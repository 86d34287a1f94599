"""Fake quantization of rows in the native library: one pass over memory where tensor arithmetic takes ten.

Rows are the entries of the first dimension, each with a (scale, zero point) of its own, or all values together with
one. The values are those of tensor arithmetic bit for bit; gradients of scales are sums in another order.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from bitstep.library import check, library


class _Rows(ctypes.Structure):
    """``bitstep_rows``."""

    _fields_ = [
        ("count", c_int64),
        ("length", c_int64),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("top", c_int32),
    ]


@cache
def _kernels() -> ctypes.CDLL | None:
    lib = library()
    if lib is not None:
        lib.bitstep_fake_quantize.argtypes = [POINTER(_Rows), *[c_void_p] * 2, c_int]
        lib.bitstep_fake_quantize_backward.argtypes = [POINTER(_Rows), *[c_void_p] * 5, c_int]
        lib.bitstep_fake_quantize.errcheck = lib.bitstep_fake_quantize_backward.errcheck = check
    return lib


def in_rows(x: Tensor, scale: Tensor, zero_point: Tensor) -> bool:
    """Whether the native library is there and can work on these: float32 on the CPU, each row dense in memory."""
    by_row = scale.ndim == x.ndim and scale.numel() == len(scale) == len(x)
    if scale.shape != zero_point.shape or not (scale.numel() == 1 or by_row):
        return False
    if not all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in (x, scale, zero_point)):
        return False
    return _layout(x) is not None and _kernels() is not None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """x_hat of :func:`bitstep.numerics.uniform.fake_quantize`, codes 0 to ``top``."""
    y = torch.empty_like(x)
    _run("bitstep_fake_quantize", (x, scale, zero_point), top, (x, y))
    return y


def gradients(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """What ``grad``, the gradient of x_hat, makes of x, scale and zero point."""
    layout = _layout(x)
    assert layout is not None
    grad = grad.contiguous(memory_format=layout)
    of_x, of_scale, of_zero_point = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(zero_point)
    _run("bitstep_fake_quantize_backward", (x, scale, zero_point), top, (x, grad, of_x, of_scale, of_zero_point))
    return of_x, of_scale, of_zero_point


def _run(name: str, inputs: tuple[Tensor, Tensor, Tensor], top: int, addressed: tuple[Tensor, ...]) -> None:
    x, scale, zero_point = inputs[0], inputs[1].contiguous(), inputs[2].contiguous()
    rows = _Rows(scale.numel(), x.numel() // scale.numel(), scale.data_ptr(), zero_point.data_ptr(), top)
    function = getattr(_kernels(), name)
    function(ctypes.byref(rows), *(tensor.data_ptr() for tensor in addressed), torch.get_num_threads())


def _layout(x: Tensor) -> torch.memory_format | None:
    """The layout in which x is dense; None if it is in neither."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None
