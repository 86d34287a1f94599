"""The layers of a denoiser that can be quantized, and what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

QUANTIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)


def refusal(layer: nn.Module) -> str | None:
    """Why ``layer`` cannot be quantized, or None when it can."""
    if not isinstance(layer, QUANTIZABLE):
        return f"{type(layer).__name__} is not a Linear, Conv1d or Conv2d"
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.padding_mode != "zeros":
            return f"padding_mode {layer.padding_mode!r} (only zeros)"
        if isinstance(layer.padding, str):
            return f"padding given as {layer.padding!r} (only numbers)"
    return None


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a Linear, Conv1d or Conv2d, ``[out, in / groups, *kernel]``."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def groups_of(layer: nn.Module) -> int:
    """Groups of a convolution's channels; 1 for a Linear."""
    return int(getattr(layer, "groups", 1))


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input in the arguments of a layer's call; some models name it."""
    x = args[0] if args else kwargs["input"]
    assert isinstance(x, Tensor)
    return x


def channel_axis(layer: nn.Module) -> int:
    """The axis of a layer's input along which its input channels lie."""
    return -1 if isinstance(layer, nn.Linear) else 1
