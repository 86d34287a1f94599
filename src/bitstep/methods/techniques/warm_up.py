"""Progressive warm-up (BinaryDM, arXiv 2404.05662)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from bitstep.denoiser.structure import Structure
from bitstep.methods.base import Context, Phase, Share, Technique, Unit
from bitstep.quantizers.activations import ActivationQuantizer
from bitstep.quantizers.layers import FakeQuantized
from bitstep.quantizers.weights import WeightQuantizer

MIDDLE_BLOCK = "mid_block"
"""What diffusers' UNets call it."""


class WarmUp(Technique):
    """Progressive warm-up: weights turn binary layer by layer, from the middle of the denoiser outward, then
    activations are quantized in the same order, attention last; all are after ``share`` of the iterations. A layer is
    trained from the iteration on at which it turns binary. (In the paper it takes about half as many iterations as
    there are modules, next to nothing of 200,000; short runs with their large steps need a larger share.)"""

    kind: Literal["warm-up"] = "warm-up"
    share: Share = 0.1

    def applied(self, unit: Unit, context: Context, phase: Phase) -> Unit:
        layers = outward(unit.layers, context.structure)
        quantizers: list[WeightQuantizer | ActivationQuantizer] = [layer.weight_quantizer for layer in layers]
        for module in [*layers, *unit.attention.values()]:
            quantizers += [part for part in module.modules() if isinstance(part, ActivationQuantizer)]
        pace = self.share * phase.iterations / len(quantizers)  # iterations from one to the next

        def begin(iteration: int) -> None:
            unit.begin(iteration)
            for rank, quantizer in enumerate(quantizers):
                quantizer.enabled = iteration >= int(pace * rank)

        return replace(unit, begin=begin)


def outward(layers: Mapping[str, FakeQuantized], structure: Structure) -> list[FakeQuantized]:
    """``layers`` from the middle of the denoiser outward: by distance, in execution order, from the centre of a UNet's
    middle block, elsewhere of the layers at the lowest resolution (of a transformer all)."""
    place = {info.name: i for i, info in enumerate(structure.layers)}
    spatial = [info for info in structure.layers if info.sees_sample]
    lowest = [info.name for info in spatial if info.positions == min(info.positions for info in spatial)]
    inner = [name for name in lowest if name.startswith(f"{MIDDLE_BLOCK}.")] or lowest
    middle = sum(place[name] for name in inner) / len(inner)
    return [layers[name] for name in sorted(layers, key=lambda name: abs(place[name] - middle))]
