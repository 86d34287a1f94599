"""The native library: where it is, and which of its instruction sets is in use."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_void_p
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch  # noqa: F401  loads the OpenMP runtime that the library works on

from bitstep.errors import UsageError

LIBRARY = "bitstep_cpu.so"
LIBRARY_VARIABLE = "BITSTEP_NATIVE_LIBRARY"  # another build of it
INSTRUCTION_SET_VARIABLE = "BITSTEP_INSTRUCTION_SET"


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where it was not built. It works on torch's own OpenMP threads."""
    # an editable install has two folders: that of the sources, and that of what was built
    folders = import_module("bitstep").__path__
    path = os.environ.get(LIBRARY_VARIABLE) or next((p for f in folders if (p := Path(f) / LIBRARY).exists()), None)
    if path is None:
        return None
    lib = ctypes.CDLL(str(path))
    lib.bitstep_instruction_sets.restype = POINTER(c_char_p)
    # torch loads libgomp into the global namespace; without one (macOS) the kernels run in the calling thread
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    openmp = [getattr(ctypes.CDLL(None), name, None) for name in names]
    lib.bitstep_set_threads(*(ctypes.cast(function, c_void_p) if function else None for function in openmp))
    _use(lib, os.environ.get(INSTRUCTION_SET_VARIABLE) or _names(lib)[0])
    return lib


def check(status: Any, function: Any, _: Any) -> Any:
    """The ctypes ``errcheck`` of a kernel: MemoryError where it ran out of scratch memory."""
    if status:
        raise MemoryError(f"{function.__name__} is out of memory")


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
