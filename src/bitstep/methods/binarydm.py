"""BinaryDM (arXiv 2404.05662, v1 and the ICLR-2025 text): diffusion models with about one bit a weight.

    W_b = s_1 sign(W) [+ s_2 sign(W - s_1 sign(W))]          learnable multi-basis (LMB) where parameters are sparse
    L   = L_diffusion + weight * mean_i MSE(F_i^T E_i, F_i^S E_i)      low-rank representation mimicking (LRM)

Layers turn binary one by one, from the middle outward (progressive warm-up). The later text starts with two bases at
the model's head and tail and presses the second to nothing (evolvable basis, EBB). What no paper has is training
without data: then the diffusion loss is replaced by distillation on the teacher's own trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor

from bitstep.denoiser.structure import Structure
from bitstep.methods.base import (
    ALL,
    Activations,
    AttentionOperands,
    Calibration,
    Context,
    Errors,
    LearningRates,
    Method,
    Phase,
    Technique,
    UniformWeights,
    Unit,
    Weights,
)
from bitstep.methods.objectives.diffusion import DiffusionLoss
from bitstep.methods.techniques.mimicking import Mimicking
from bitstep.methods.techniques.warm_up import WarmUp
from bitstep.planning import LayerPlan, Plan, add_bases, add_bits
from bitstep.quantizers.binary import BinaryWeight
from bitstep.quantizers.weights import DenseWeight, WeightQuantizer

EVOLVABLE = 0.1
"""Share of all weights that start with a second basis, at the model's head and tail."""
WIDER_BITS = (4, 8)
"""Uniform bits that a measured allocation may give a layer, besides a second basis."""


class BinaryWeights(Weights):
    """One bit a weight. What is asked beyond one bit on average buys second bases (LMB, :func:`add_bases`).

    evolvable: the layers that would be the first to get a second basis start with one, which :class:`EvolvableBasis`
        takes away: a share ``EVOLVABLE`` of all weights
    allocation: "resolution" is the paper's; "measured" buys what lowers the error of the output most for its bits, a
        second basis here, four or eight uniform bits there
    Layers that get, or that a rule gives, more than one bit are uniform.
    """

    least_bits: ClassVar[int] = 1
    kind: Literal["binary"] = "binary"
    evolvable: bool = False
    allocation: Literal["resolution", "measured"] = "resolution"

    @model_validator(mode="after")
    def _has_something_to_allocate(self) -> Self:
        if self.evolvable and self.allocation == "measured":
            raise ValueError("evolvable bases are where the resolution is: there is nothing to measure")
        return self

    def check(self, training: Sequence[Phase]) -> None:
        kinds = {technique.kind for phase in training for technique in phase.techniques}
        if self.evolvable and "evolvable-basis" not in kinds:
            raise ValueError("weights.evolvable gives second bases that only the technique evolvable-basis takes away")

    def layer_bits(self, bits: float) -> int:
        most = 1 if self.evolvable else 2
        if not 1 <= bits <= most:
            raise ValueError(f"binary weights take {'1 bit' if self.evolvable else '1 to 2 bits'}, got {bits:g}")
        return 1

    def refine(self, plan: Plan, structure: Structure, bits: float, errors: Errors) -> Plan:
        if self.allocation == "resolution":
            return add_bases(plan, structure, plan.average_weight_bits + EVOLVABLE if self.evolvable else bits)
        choices = {
            layer.name: [layer, replace(layer, bases=2), *(replace(layer, weight_bits=wider) for wider in WIDER_BITS)]
            for layer in plan.layers
            if layer.weight_bits == 1
        }
        return add_bits(plan, bits, choices, errors(choices))

    def build(self, weight: Tensor, layer: LayerPlan, seed: int = 0) -> WeightQuantizer:
        if layer.weight_bits > 1:
            return UniformWeights().build(weight, layer)
        return BinaryWeight(DenseWeight(weight), layer.bases)


class EvolvableBasis(Technique):
    """Evolvable basis: the penalty presses the second scales towards zero, ``penalty`` * mean |s_2|; after ``share`` of
    the iterations the second bases are dropped, however large they still are, and training goes on with one."""

    kind: Literal["evolvable-basis"] = "evolvable-basis"
    penalty: NonNegativeFloat = 9e-2
    share: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def check(self, weights: Weights, phase: Phase) -> None:
        if not (isinstance(weights, BinaryWeights) and weights.evolvable):
            raise ValueError("evolvable-basis takes away second bases, which only weights.evolvable=true gives")

    def applied(self, unit: Unit, context: Context, phase: Phase) -> Unit:
        binary = unit.weight_quantizers(BinaryWeight)
        quantizers = [quantizer for quantizer in binary if quantizer.second_scale().numel()]
        if not quantizers:
            return unit

        last = int(self.share * phase.iterations)

        def begin(iteration: int) -> None:
            unit.begin(iteration)
            if iteration == last:
                for quantizer in quantizers:
                    quantizer.drop_second_basis()

        def loss(iteration: int, part: slice = ALL) -> Tensor:
            value = unit.loss(iteration, part)
            if iteration >= last:
                return value
            second = torch.cat([quantizer.second_scale().flatten() for quantizer in quantizers])
            return value + self.penalty * second.mean()

        return replace(unit, begin=begin, loss=loss)


_SHORT = {
    # signs flip only where a weight has travelled its own size: a few hundred iterations need large steps
    "calibration.steps": 50,
    "training.0.objective.emphasis": 0.5,
    "training.0.batch_size": 8,
    "training.0.ema": 0.0,
    "training.0.learning_rates": {"weight": 2e-2, "weight_scale": 1e-2, "activation_scale": 1e-2},
}
_QUICK = {**_SHORT, "calibration.images": 32, "training.0.iterations": 250}
_STANDARD = {**_SHORT, "calibration.images": 64, "training.0.iterations": 1_200}


def _trained_with(*techniques: Technique) -> tuple[Phase, ...]:
    return (
        Phase(
            objective=DiffusionLoss(),
            techniques=techniques,
            iterations=200_000,
            batch_size=64,
            learning_rates=LearningRates(weight=3e-4, weight_scale=3e-4, activation_scale=3e-4),
            ema=0.9999,
        ),
    )


BINARY_BASELINE = Method(
    name="binary-baseline",
    weights=BinaryWeights(),
    activations=Activations(per_step=False, signed=True, range="lsq"),
    attention=AttentionOperands(quantized=True),
    calibration=Calibration(images=256, steps=100),
    training=_trained_with(),
    efforts={"quick": _QUICK, "standard": _STANDARD},
)
"""One basis (at W1) and the plain loss: what the paper improves on."""

BINARYDM = BINARY_BASELINE.model_copy(
    update={
        "name": "binarydm",
        "training": _trained_with(WarmUp(share=1e-3), Mimicking()),
        "efforts": {
            effort: {**settings, "training.0.techniques.0.share": 0.1}
            for effort, settings in BINARY_BASELINE.efforts.items()
        },
    }
)

BINARYDM_EBB = BINARY_BASELINE.model_copy(
    update={
        "name": "binarydm-ebb",
        "weights": BinaryWeights(evolvable=True),
        "training": _trained_with(EvolvableBasis(), Mimicking()),
        "efforts": {
            # over a hundred iterations the published penalty takes a tenth from the second scales, this one half, and
            # no penalty more than their learning rate lets it; pressed to nothing, they end as well (docs/log.md)
            effort: {**settings, "training.0.techniques.0.penalty": 9.0}
            for effort, settings in BINARY_BASELINE.efforts.items()
        },
    }
)
