"""b-bit codes <-> bytes, and the one form in which every quantized weight leaves training.

Codes are unsigned. Code ``i`` of a row occupies bits ``[i*b, (i+1)*b)`` of the row's little-endian bit
stream: bit ``k`` of the stream is bit ``k % 8`` of byte ``k // 8``. Rows start on a byte boundary and the
bits after the last code are zero. The layout knows no kernel; kernels re-lay weights out when they load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``[..., n]`` (integers in ``[0, 2**bits)``) into uint8 ``[..., ceil(n*bits/8)]``."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in 1..8, got {bits}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes must lie in [0, {2**bits - 1}] for {bits} bits")
    # eight codes make one word of `bits` bytes
    count, device = codes.shape[-1], codes.device
    groups = pad(codes.to(torch.int64), (0, -count % 8)).unflatten(-1, (-1, 8))
    words = (groups << torch.arange(0, 8 * bits, bits, device=device)).sum(-1, keepdim=True)
    packed: Tensor = (words >> torch.arange(0, 8 * bits, 8, device=device)).to(torch.uint8).flatten(-2)
    return packed[..., : packed_size(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack`: uint8 ``[..., bytes]`` -> uint8 codes ``[..., count]``."""
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_size(count, bits):
        raise ValueError(
            f"expected uint8 rows of {packed_size(count, bits)} bytes for {count} codes of {bits} bits, "
            f"got {packed.dtype} rows of {packed.shape[-1]}"
        )
    device = packed.device
    if 8 % bits == 0:  # no code straddles two bytes: eight times the speed of the general case
        words = packed.unsqueeze(-1)
        places = torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
    else:
        groups = pad(packed.to(torch.int64), (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
        words = (groups << torch.arange(0, 8 * bits, 8, device=device)).sum(-1, keepdim=True)
        places = torch.arange(0, 8 * bits, bits, device=device)
    codes = (words >> places).to(torch.uint8).bitwise_and_(2**bits - 1)
    return codes.flatten(-2)[..., :count].contiguous()


def packed_size(count: int, bits: int) -> int:
    """Bytes of one packed row."""
    return (count * bits + 7) // 8


def keeping_dtype(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``model.half()`` or ``model.to(...)`` does to a tensor, but for its dtype: those of a packed model are its
    format, and kernels read their memory as such."""

    def moved(tensor: Tensor) -> Tensor:
        result = move(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes: ``W = sum_p scale[p] * value(codes[p])`` over ``p`` in the bases.

    ``value(c) = c - zero_point`` for two bits and more; ``value(c) = 2c - 1`` (a sign) for one bit.

    codes: uint8 ``[bases, out, n]``, ``n`` the product of the remaining weight dimensions
    scale: float32 ``[bases, out]``
    zero_point: uint8 ``[out]``, or None for one bit
    shape: the weight's shape, ``(out, ...)``
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    shape: tuple[int, ...]

    def integers(self) -> Tensor:
        """``value(codes)``, int16 ``[bases, out, n]``."""
        codes = self.codes.to(torch.int16)
        return 2 * codes - 1 if self.zero_point is None else codes - self.zero_point[:, None]

    def dequantize(self) -> Tensor:
        """The floating-point weight, float32 ``shape``."""
        signed = self.integers().to(torch.float32)
        weight = self.scale[0, :, None] * signed[0]
        for scale, plane in zip(self.scale[1:], signed[1:], strict=True):
            weight = weight + scale[:, None] * plane
        return weight.reshape(self.shape)
