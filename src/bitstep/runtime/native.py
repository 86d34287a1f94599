"""What the runtime calls in the native library, through ctypes: structures and functions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import POINTER, c_float, c_int, c_int32, c_void_p
from enum import IntEnum
from functools import cache
from typing import Any

import torch

from bitstep.errors import BitstepError
from bitstep.library import check, library
from bitstep.runtime.kernel import refuse_gradients

Call = Callable[[], object]
"""A call into the library with all its addresses; the tensors behind them must be kept alive."""

_listener: ContextVar[Callable[..., None] | None] = ContextVar("listener", default=None)


class Table(IntEnum):
    """``bitstep_table_kind``: what a layer's ``table`` makes of its weights.

    Nothing; or indices of four signs each into tables of sums, those for the four groups of a granule of 16 channels
    beside each other, or apart by the 16 output channels.
    """

    NONE = 0
    BESIDE = 1
    APART = 2


class Step(ctypes.Structure):
    """``bitstep_step``: how activations become codes."""

    _fields_ = [
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("rows", c_int32),
        ("top", c_int32),
        ("channel_reciprocal", c_void_p),
    ]


class Prologue(ctypes.Structure):
    """``bitstep_prologue``: what is done to activations before they become codes."""

    _fields_ = [
        ("normalization", c_int32),
        ("groups", c_int32),
        ("eps", c_float),
        ("gain", c_void_p),
        ("shift", c_void_p),
        ("rows", c_int32),
        ("activation", c_int32),
    ]


class Epilogue(ctypes.Structure):
    """``bitstep_epilogue``: what is done to a convolution's output."""

    _fields_ = [("bias", c_void_p), ("bias_rows", c_int32), ("gain", c_void_p), ("residual", c_void_p)]


class AttentionShape(ctypes.Structure):
    """``bitstep_attention_shape``."""

    _fields_ = [
        *((name, c_int32) for name in ("batch", "queries", "keys", "heads", "head_channels")),
        ("scale", c_float),
    ]


class Map(ctypes.Structure):
    """``bitstep_map``: the shape of an activation map and of its codes."""

    _fields_ = [
        *((name, c_int32) for name in ("batch", "height", "width", "channels", "padded_channels", "pad_h", "pad_w")),
        ("repeat", c_int32),
        ("rest", c_void_p),
        ("rest_channels", c_int32),
    ]


class Layer(ctypes.Structure):
    """``bitstep_layer``: a convolution with packed weights."""

    _fields_ = [
        *((name, c_int32) for name in ("out_channels", "padded_channels")),
        *((f"{name}_{side}", c_int32) for name in ("kernel", "stride", "dilation") for side in "hw"),
        *((name, c_int32) for name in ("bits", "bases", "panel", "table", "largest")),
        *((name, c_void_p) for name in ("weight", "zero", "sum", "scale")),
    ]


def run(bind: Callable[..., Call], y: torch.Tensor, *args: Any, in_parts: bool = False) -> None:
    """Run ``bind(y, *args)``, which reads the tensors among args (or in tuples among them) and writes y.

    in_parts: for the first of args it would take a tuple of the two tensors whose last dimensions are joined in it

    BitstepError for tensors that it cannot read, or that are to be differentiated. That shapes fit is for the caller to
    know.
    """
    tensors = list(_tensors((y, *args)))
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
            raise BitstepError(
                f"the native kernels take contiguous float32 tensors on the CPU, got {tensor.dtype} on {tensor.device}"
            )
    refuse_gradients(*tensors)
    bind(y, *args)()
    listener = _listener.get()
    if listener is not None:
        listener(bind, y, *args, in_parts=in_parts)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among values, or in tuples among them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


@contextmanager
def listening(listener: Callable[..., None]) -> Iterator[None]:
    """Hand the arguments of every :func:`run` meanwhile to ``listener`` too."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@cache
def kernels() -> ctypes.CDLL | None:
    """The library with the signatures of its kernels; None where it was not built."""
    lib = library()
    if lib is None:
        return None
    lib.bitstep_convolution.argtypes = [
        *(POINTER(struct) for struct in (Layer, Map, Prologue, Step)),
        c_void_p,
        POINTER(Epilogue),
        c_void_p,
        c_int,
    ]
    lib.bitstep_attention.argtypes = [POINTER(AttentionShape), *[c_void_p] * 4, c_int]
    lib.bitstep_coded_attention.argtypes = [POINTER(AttentionShape), POINTER(Step), *[c_void_p] * 4, c_int]
    for function in (lib.bitstep_convolution, lib.bitstep_attention, lib.bitstep_coded_attention):
        function.errcheck = check
    return lib


def table() -> Table:
    """How the instruction set in use runs one-bit weights under activations of up to 4 bits."""
    lib = kernels()
    return Table(lib.bitstep_table()) if lib else Table.NONE
