"""Calibrate: the scales that a method's rewrites move from the inputs of layers to their weights, and where 1 / s goes.

    Y = (X / s) (s W)

Dividing the input by s is exact where its channels come from (:mod:`bitstep.denoiser.origins`): in the gains and shifts
of a norm whose output nothing but such layers read, which then share one s, and in the layer of attention's values or
of a gated unit's. Everywhere else 1 / s is a vector that the layer multiplies its input by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch
from torch import Tensor, nn

from bitstep.denoiser.layers import QUANTIZABLE, groups_of, weight_of
from bitstep.denoiser.origins import Origin
from bitstep.denoiser.structure import Structure, blocks
from bitstep.methods.base import Rewrite
from bitstep.numerics.dilation import stretched
from bitstep.stages.ranges import Observed


@dataclass(frozen=True)
class Stretch:
    """What a rewrite did to one layer.

    share: of input channels whose weights were stretched
    median: of s, over all input channels
    range_shrink: range of the input after, over range before; 1 when nothing is gained
    """

    share: float
    median: float
    range_shrink: float


@dataclass(frozen=True)
class Rewritten:
    """scales: s ``[in]``, the product of all rewrites', of every layer that they change
    folded: what takes 1 / s, and the layers that read it
    stretches: of every rewrite in turn, its kind, and what it did, after those before it, to every layer
    """

    scales: dict[str, Tensor]
    folded: dict[Origin, list[str]]
    stretches: list[tuple[str, dict[str, Stretch]]]

    def reciprocal(self, layer: str) -> Tensor | None:
        """1 / s where the layer itself has to multiply its input by it."""
        return 1 / self.scales[layer] if layer in self.scales and self.input_divisor(layer) is None else None

    def input_divisor(self, layer: str) -> Tensor | None:
        """s where the layer is given x / s instead of x, by what takes the division."""
        return self.scales[layer] if any(layer in readers for readers in self.folded.values()) else None

    def output_divisor(self, layer: str, channels: int) -> Tensor | None:
        """What the layer's ``channels`` outputs are divided by, where it takes the division for those that read it."""
        taken = [(origin, scale) for origin, scale in self.divisors() if origin.module == layer]
        divisor = torch.ones(channels)
        for origin, scale in taken:
            divisor[origin.start : origin.stop] = scale
        return divisor if taken else None

    def divisors(self) -> Iterator[tuple[Origin, Tensor]]:
        """What takes 1 / s, and s ``[channels]``."""
        for origin, (reader, *_) in self.folded.items():
            yield origin, self.scales[reader]


def rewrite(
    teacher: nn.Module, structure: Structure, rewrites: Sequence[Rewrite], observed: Mapping[str, Observed]
) -> Rewritten:
    """What ``rewrites`` make of all observed layers. On the CPU, as what was observed is."""
    parts = {info.name: info.parts for info in structure.layers}
    found = Rewritten({}, {}, [(change.kind, {}) for change in rewrites])
    for names, origin in _together(teacher, structure, observed):
        layers = [teacher.get_submodule(name) for name in names]
        weight = torch.cat([weight_of(layer).detach().cpu() for layer in layers])
        channel_range = observed[names[0]].channel_range
        scale = torch.ones_like(channel_range)
        scales = scales_of(rewrites, weight, groups_of(layers[0]), channel_range, parts[names[0]])
        for (_, stretches), own in zip(found.stretches, scales, strict=True):
            stretches.update(dict.fromkeys(names, stretch_of(own, channel_range / scale)))
            scale = scale * own
        if bool((scale != 1).any()):
            found.scales.update(dict.fromkeys(names, scale))
            if origin is not None:
                found.folded[origin] = names
    return found


def stretch_of(scale: Tensor, channel_range: Tensor) -> Stretch:
    """What dividing an input of that ``channel_range`` ``[in]`` by ``scale`` ``[in]`` gains."""
    before = channel_range.max()
    after = (channel_range / scale).max()
    return Stretch(
        share=float((scale > 1).float().mean()),
        median=float(scale.median()),
        range_shrink=float(after / before) if before > 0 else 1.0,
    )


def summary(stretches: Iterable[Stretch]) -> str:
    """One line about all layers, each counting once."""
    layers = list(stretches)
    if not layers:
        return "no layer to stretch"
    return (
        f"{mean(layer.share for layer in layers):.0%} of the input channels of {len(layers)} layers stretched, "
        f"median s {median(layer.median for layer in layers):.2f}, "
        f"median input range {median(layer.range_shrink for layer in layers):.2f} of what it was"
    )


def scales_of(
    rewrites: Iterable[Rewrite], weight: Tensor, groups: int, channel_range: Tensor, parts: tuple[int, ...]
) -> Iterator[Tensor]:
    """The scale ``[in]`` of every rewrite, each seeing what those before it made of the layer."""
    for change in rewrites:
        scale = change.scale(weight, groups, channel_range, parts)
        yield scale
        weight, channel_range = stretched(weight, scale, groups), channel_range / scale


def _together(
    teacher: nn.Module, structure: Structure, observed: Mapping[str, Observed]
) -> Iterator[tuple[list[str], Origin | None]]:
    """Layers that share one s, with what takes 1 / s: all that read an origin, a norm or a layer that is observed too,
    where all of them are observed, of one shape, and in its block if it is in one: what a block returns stays the same.
    Every other layer by itself."""
    paths = [block.name for block in blocks(teacher, structure)]

    def block_of(name: str) -> str | None:
        return next((path for path in paths if f"{name}.".startswith(f"{path}.")), None)

    def takes(origin: Origin, names: list[str]) -> bool:
        layers = [teacher.get_submodule(name) for name in names]
        alike = len({(groups_of(layer), weight_of(layer).shape[1:]) for layer in layers}) == 1
        is_norm = not isinstance(teacher.get_submodule(origin.module), QUANTIZABLE)
        known = observed.keys() >= {*names} and (is_norm or origin.module in observed)
        inside = {block_of(origin.module)} in ({None}, {*map(block_of, names)})
        return alike and groups_of(layers[0]) == 1 and known and inside

    readers: dict[Origin | str, list[str]] = {}
    for info in structure.layers:
        readers.setdefault(info.origin or info.name, []).append(info.name)
    for origin, names in readers.items():
        if isinstance(origin, Origin) and takes(origin, names):
            yield names, origin
        else:
            yield from (([name], None) for name in names if name in observed)
