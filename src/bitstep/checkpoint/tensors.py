"""Which tensors a packed layer accepts from a file, and which float32 tensors go into one as float16."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from bitstep.denoiser.preconditioning import Preconditioning
from bitstep.runtime.attention import PackedAttention
from bitstep.runtime.layers import PackedModule


def refusal(layer: PackedModule | PackedAttention | Preconditioning, name: str, tensor: Tensor) -> str | None:
    """Why ``tensor`` cannot be the buffer ``name`` of ``layer``, or None when it can."""
    expected = layer.get_buffer(name)
    if tensor.shape != expected.shape:
        return f"expected the shape {list(expected.shape)}, got {list(tensor.shape)}"
    dtypes = (torch.float32, torch.float16) if name == "bias" else (expected.dtype,)
    if tensor.dtype not in dtypes:
        return f"expected {expected.dtype}, got {tensor.dtype}"
    if isinstance(layer, Preconditioning):
        return _finite(tensor)
    if isinstance(layer, PackedAttention):
        operand, _, table = name.partition("_")
        return _positive(tensor) if table == "scale" else _within(tensor, layer.format.bits_of(operand))
    layer_format = layer.format
    match name:
        case "weight_packed":
            used = prod(layer.weight_shape[1:]) * layer_format.weight_bits % 8
            if used and bool((tensor[..., -1] >> used).any()):
                return "the bits after the last code of a row are not zero"
        case "weight_zero_point":
            return _within(tensor, layer_format.weight_bits)
        case "input_zero_point":
            return _within(tensor, layer_format.activation_bits or 0)
        case "weight_scale" | "bias":
            return _finite(tensor)
        case "input_scale" | "input_channel_reciprocal" | "input_divisor" | "output_divisor":
            return _positive(tensor)
    return None


def _within(zero_point: Tensor, bits: int) -> str | None:
    return f"a zero point exceeds {bits} bits" if int(zero_point.max()) >= 2**bits else None


def _finite(tensor: Tensor) -> str | None:
    return None if bool(tensor.isfinite().all()) else "not every value is finite"


def _positive(tensor: Tensor) -> str | None:
    if bool(((tensor > 0) & tensor.isfinite() & tensor.reciprocal().isfinite()).all()):
        return None
    return "not every value is positive and finite, with a finite reciprocal"


def narrow(tensor: Tensor) -> Tensor:
    """``tensor`` as float16 where that loses nothing (the usual case when the source model was float16)."""
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor
