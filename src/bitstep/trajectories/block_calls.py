"""Calls of a part of a denoiser, kept on disk and read row by row, so that memory holds a batch of them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from bitstep.denoiser.calls import Call


class BlockCalls:
    """Recorded calls in a folder of their own, a file per tensor, read row by row at random places: plain reads, since
    the pages of a memory-mapped file would add up to all of it.

    ``one`` and ``two`` are calls with one and with two samples: a tensor whose first dimension they share has no batch
    dimension, and is kept in memory as it is.
    """

    def __init__(self, folder: Path, one: Call, two: Call) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._one = one
        self._files: dict[str, _RowFile] = {}
        small, large = one.tensors, two.tensors
        self._chunks = len(small["call.timestep"])
        for number, (name, tensor) in enumerate(small.items()):
            if tensor.shape != large[name].shape:
                shape = (len(tensor) // self._chunks, *tensor.shape[1:])  # attention may fold its heads into the batch
                self._files[name] = _RowFile(folder / f"{number}.bin", shape, tensor.dtype)

    def __len__(self) -> int:
        return len(self._files["call.timestep"])

    def append(self, call: Call) -> None:
        for name, tensor in call.tensors.items():
            if name in self._files:
                self._files[name].append(tensor.cpu())

    def batch(self, rows: Tensor) -> Call:
        """One call of the chosen rows."""
        return self._one.map(lambda name, tensor: self._files[name][rows] if name in self._files else tensor)


class _RowFile:
    """A tensor on disk, grown by appending along its first dimension in groups of ``shape[0]``; one group is a row."""

    def __init__(self, path: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._path, self._shape, self._dtype = path, tuple(shape), dtype
        self._bytes, self._length = prod(shape) * dtype.itemsize, 0
        path.write_bytes(b"")

    def __len__(self) -> int:
        return self._length

    def append(self, tensor: Tensor) -> None:
        data = tensor.contiguous().flatten().view(torch.uint8).numpy()
        with self._path.open("ab") as file:
            data.tofile(file)
        self._length += data.size // self._bytes

    def __getitem__(self, rows: Tensor) -> Tensor:
        buffer = bytearray(self._bytes * len(rows))
        with self._path.open("rb") as file:
            for place, row in enumerate(rows.tolist()):
                file.seek(row * self._bytes)
                file.readinto(memoryview(buffer)[place * self._bytes : (place + 1) * self._bytes])
        return torch.frombuffer(buffer, dtype=self._dtype).view(-1, *self._shape[1:])
