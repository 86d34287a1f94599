"""The native library through ctypes: its structures, its functions, and which instruction set it uses."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_void_p
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch  # loads the OpenMP runtime that the library works on

from bitstep.errors import UsageError

LIBRARY = "bitstep_cpu.so"
LIBRARY_VARIABLE = "BITSTEP_NATIVE_LIBRARY"  # another build of it
INSTRUCTION_SET_VARIABLE = "BITSTEP_INSTRUCTION_SET"

Call = Callable[[], object]
"""A call into the library with all its addresses; the tensors behind them must be kept alive."""

_listener: ContextVar[Callable[..., None] | None] = ContextVar("listener", default=None)


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
        *((name, c_int32) for name in ("bits", "bases", "panel", "table")),
        *((name, c_void_p) for name in ("weight", "zero", "sum", "scale")),
    ]


def run(bind: Callable[..., Call], y: torch.Tensor, *args: Any, in_parts: bool = False) -> None:
    """Run ``bind(y, *args)``, which reads the tensors among args (or in tuples among them) and writes y.

    in_parts: for the first of args it would take a tuple of the two tensors whose last dimensions are joined in it
    """
    bind(y, *args)()
    listener = _listener.get()
    if listener is not None:
        listener(bind, y, *args, in_parts=in_parts)


@contextmanager
def listening(listener: Callable[..., None]) -> Iterator[None]:
    """Hand the arguments of every :func:`run` meanwhile to ``listener`` too."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built. It works on torch's own OpenMP threads."""
    # an editable install has two folders: that of the sources, and that of what was built
    folders = import_module("bitstep.runtime").__path__
    path = os.environ.get(LIBRARY_VARIABLE) or next((p for f in folders if (p := Path(f) / LIBRARY).exists()), None)
    if path is None:
        return None
    lib = ctypes.CDLL(str(path))
    lib.bitstep_instruction_sets.restype = POINTER(c_char_p)
    lib.bitstep_convolution.argtypes = [
        *(POINTER(struct) for struct in (Layer, Map, Prologue, Step)),
        c_void_p,
        POINTER(Epilogue),
        c_void_p,
        c_int,
    ]
    lib.bitstep_attention.argtypes = [POINTER(AttentionShape), *[c_void_p] * 4, c_int]
    # torch loads libgomp into the global namespace; without one (macOS) the kernels run in the calling thread
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    openmp = [getattr(ctypes.CDLL(None), name, None) for name in names]
    lib.bitstep_set_threads(*(ctypes.cast(function, c_void_p) if function else None for function in openmp))
    _use(lib, os.environ.get(INSTRUCTION_SET_VARIABLE) or _names(lib)[0])
    return lib


def instruction_sets() -> list[str]:
    """The instruction sets that the library has and this machine runs, best first; empty without the library."""
    lib = library()
    return _names(lib) if lib else []


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Use one instruction set meanwhile. A kernel must run under the set that it was prepared under."""
    lib = library()
    before = current_instruction_set()
    if lib is None or before is None:
        raise UsageError("the native library is not built: there is no instruction set to choose")
    _use(lib, name)
    try:
        yield
    finally:
        _use(lib, before)


def current_instruction_set() -> str | None:
    """The instruction set in use; None without the library."""
    return _current if library() else None


def has_tables() -> bool:
    """Whether the instruction set in use runs one-bit weights on tables."""
    return current_instruction_set() == "avx512"


_current: str | None = None


def _use(lib: ctypes.CDLL, name: str) -> None:
    global _current
    if lib.bitstep_use(name.encode()):
        raise UsageError(f"no instruction set {name!r} here: expected one of {', '.join(_names(lib))}")
    _current = name


def _names(lib: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    for name in lib.bitstep_instruction_sets():
        if name is None:
            break
        names.append(name.decode())
    return names
