"""AdaRound (arXiv 2004.10568), block after block: whether a weight is rounded up or down is learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from bitstep.methods.base import (
    ALL,
    Activations,
    Calibration,
    Context,
    LearningRates,
    Method,
    Phase,
    Technique,
    UniformWeights,
    Unit,
    Weights,
)
from bitstep.methods.objectives.blockwise import BlockwiseDistillation
from bitstep.numerics.uniform import RangeMethod
from bitstep.planning import LayerPlan
from bitstep.quantizers.rounding import AdaRoundWeight, relaxed, rounding_penalty
from bitstep.quantizers.weights import DenseWeight, WeightQuantizer


class AdaRoundWeights(Weights):
    """Symmetric uniform codes whose direction of rounding is learned; weights and scales stay as they are."""

    kind: Literal["adaround"] = "adaround"
    range: RangeMethod = "mse"

    def trained(self) -> set[str]:
        return {"rounding"}

    def layer_bits(self, bits: float) -> int:
        return UniformWeights().layer_bits(bits)

    def build(self, weight: Tensor, layer: LayerPlan, seed: int = 0) -> WeightQuantizer:
        return AdaRoundWeight(DenseWeight(weight), layer.weight_bits, method=self.range)


class SoftRounding(Technique):
    """Rounding is soft while it is learned; after ``warm_up`` of the iterations a penalty, ``weight`` times
    :func:`bitstep.quantizers.rounding.rounding_penalty`, presses it to a decision, its beta falling from 20 to 2.

    (The papers' weight is 1e-2, beside a loss that sums over channels; ours is their mean.)
    """

    kind: Literal["soft-rounding"] = "soft-rounding"
    recomputable: ClassVar[bool] = False  # soft only while the loss is computed
    weight: NonNegativeFloat = 1e-4
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.2

    def check(self, weights: Weights, phase: Phase) -> None:
        if not isinstance(weights, AdaRoundWeights):
            raise ValueError("soft-rounding needs weights of kind adaround")

    def applied(self, unit: Unit, context: Context, phase: Phase) -> Unit:
        quantizers = unit.weight_quantizers(AdaRoundWeight)

        def loss(iteration: int, part: slice = ALL) -> Tensor:
            with relaxed(quantizers):
                value = unit.loss(iteration, part)
            progress = (iteration / phase.iterations - self.warm_up) / (1 - self.warm_up)
            if progress < 0:
                return value
            beta = 20 - 18 * progress
            penalties = [rounding_penalty(quantizer.up(), beta) for quantizer in quantizers]
            return value + self.weight * torch.stack(penalties).sum()

        return replace(unit, loss=loss)


ADAROUND = Method(
    name="adaround",
    weights=AdaRoundWeights(),
    activations=Activations(per_step=False),
    calibration=Calibration(images=256, steps=100),
    training=(
        Phase(
            objective=BlockwiseDistillation(samples=5120),
            techniques=(SoftRounding(),),
            iterations=20_000,
            batch_size=32,
            learning_rates=LearningRates(rounding=1e-2, activation_scale=1e-3),
            decay="cosine",
        ),
    ),
    efforts={
        "quick": {
            "calibration.images": 16,
            "calibration.steps": 50,
            "training.0.objective.samples": 256,
            "training.0.batch_size": 16,
            "training.0.iterations": 60,
            "training.0.learning_rates.rounding": 5e-2,
        },
        "standard": {
            "calibration.images": 64,
            "calibration.steps": 50,
            "training.0.objective.samples": 1024,
            "training.0.batch_size": 16,
            "training.0.iterations": 200,
            "training.0.learning_rates.rounding": 5e-2,
        },
    },
)
"""Block reconstruction with learned rounding, as Q-Diffusion (arXiv 2302.04304) has it from BRECQ (2102.05426)."""
