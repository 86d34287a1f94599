"""Random packed layers and models: what training would hand over, without the training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from math import prod
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from bitstep.checkpoint import PackedLayer, pack_model
from bitstep.denoiser.steps import StepCursor, StepGrid
from bitstep.methods.base import Method
from bitstep.numerics.packing import QuantizedWeight
from bitstep.recipe import parse_bits
from bitstep.runtime.layers import PackedModule, packed_like
from bitstep.runtime.tables import StepRows

GRID = StepGrid((0.05, 0.3, 0.55, 0.9), 1000.0)

LAYERS: dict[str, tuple[Callable[[], nn.Linear | nn.Conv1d | nn.Conv2d], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(33, 17), (6, 5, 33)),
    "vector": (lambda: nn.Linear(7, 1, bias=False), (6, 7)),
    "tokens": (lambda: nn.Linear(16, 8), (6, 2, 3, 16)),
    "conv1d": (lambda: nn.Conv1d(5, 7, 3, padding=2, dilation=2), (6, 5, 11)),
    "conv1d grouped": (lambda: nn.Conv1d(6, 4, 4, stride=3, groups=2, bias=False), (6, 6, 13)),
    "conv2d": (lambda: nn.Conv2d(5, 7, 3, padding=1), (6, 5, 9, 8)),
    "odd": (lambda: nn.Conv2d(3, 5, (1, 5), stride=(1, 2), padding=(0, 2), bias=False), (6, 3, 7, 9)),
    "pointwise": (lambda: nn.Conv2d(19, 3, 1), (6, 19, 3, 5)),
    "patches": (lambda: nn.Conv2d(4, 24, 4, stride=4), (6, 4, 8, 8)),
    "wide padding": (lambda: nn.Conv2d(4, 6, 3, padding=3, dilation=2), (6, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (6, 8, 6, 6)),
    "grouped": (lambda: nn.Conv2d(12, 6, 3, stride=2, padding=1, groups=3), (6, 12, 7, 7)),
}
"""A layer and the shape of its input, every kind and geometry."""


def random_weight(
    shape: tuple[int, ...], bits: int, *, bases: int = 1, symmetric: bool = True, seed: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (bases, shape[0], prod(shape[1:])), generator=generator, dtype=torch.uint8)
    scale = torch.rand(bases, shape[0], generator=generator) / 2**bits + 0.01
    if bits == 1:
        return QuantizedWeight(codes, scale, None, bits, shape)
    zero_point = torch.full(shape[:1], 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zero_point = torch.randint(2**bits, shape[:1], generator=generator, dtype=torch.uint8)
        zero_point[0] = 0
    return QuantizedWeight(codes, scale, zero_point, bits, shape)


def random_layer(
    layer: nn.Module,
    bits: int = 4,
    activation_bits: int | None = 4,
    *,
    bases: int = 1,
    symmetric: bool = True,
    steps: int = 1,
    dilated: bool = False,
    seed: int = 0,
) -> PackedLayer:
    """Random codes, scales and input tables for ``layer`` (a Linear, Conv1d or Conv2d), with its own bias."""
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
    generator = torch.Generator().manual_seed(seed)
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    if activation_bits is not None:
        # ranges of about [-2, 2], off-centre, so that zero points differ and some values clip
        scale = (3 + torch.rand(steps, generator=generator)) / 2**activation_bits
        zero_point = (2**activation_bits * (0.3 + 0.3 * torch.rand(steps, generator=generator))).floor()
    return PackedLayer(
        weight=random_weight(tuple(layer.weight.shape), bits, bases=bases, symmetric=symmetric, seed=seed),
        bias=None if layer.bias is None else layer.bias.detach().clone(),
        input_scale=scale,
        input_zero_point=zero_point,
        activation_bits=activation_bits,
        channel_reciprocal=0.5 + torch.rand(channels, generator=generator) if dilated else None,
        macs=layer.weight.numel(),
    )


def filled(layer: nn.Module, packed: PackedLayer, cursor: StepCursor | None = None) -> PackedModule:
    """The packed layer that takes the place of ``layer``, holding ``packed``."""
    module = packed_like(layer, packed.entry().layer_format(), None if cursor is None else StepRows(cursor))
    module.load_state_dict(packed.state())
    return module


def without_replay(model: nn.Module) -> nn.Module:
    """A copy whose forward passes run layer by layer."""
    plain = copy.deepcopy(model)
    del plain.forward
    return plain


def random_model(model: ModelMixin, bits: int = 4, activation_bits: int | None = 4, **options: Any) -> ModelMixin:
    """``model`` with every Linear and convolution packed at random."""
    layers = {
        name: random_layer(module, bits, activation_bits, seed=seed, **options)
        for seed, (name, module) in enumerate(model.named_modules())
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    total = sum(layer.macs for layer in layers.values())
    return pack_model(model, layers, grid=GRID, modules_to_not_convert={}, total_macs=total, recipe={"name": "random"})


def some_bits(method: Method) -> str:
    """Bits that suit ``method``."""
    for bits in ("W4A4", "W1.1A4", "W1A4"):
        with suppress(ValueError):
            method.weights.layer_bits(parse_bits(bits)[0])
            return bits
    raise AssertionError(f"no bits suit {method.name}")
