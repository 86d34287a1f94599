"""The slots of a method: what is rewritten, how weights and activations are quantized, what is trained on what."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, TypeVar

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)
from torch import Tensor, nn

from bitstep.denoiser.calls import Call
from bitstep.denoiser.steps import StepCursor
from bitstep.denoiser.structure import Block, Structure, blocks
from bitstep.numerics.uniform import RangeMethod
from bitstep.planning import Coverage, LayerPlan, Plan, Rule
from bitstep.quantizers.attention import AttentionQuantizer
from bitstep.quantizers.layers import FakeQuantized
from bitstep.quantizers.weights import DenseWeight, MergedLoRA, UniformWeight, WeightQuantizer, WeightSource
from bitstep.randomness import generator
from bitstep.slots import Slot, Variant
from bitstep.trajectories.images import TrainingImages
from bitstep.trajectories.pool import Pool

Effort = Literal["quick", "standard", "full"]
Quantizer = TypeVar("Quantizer", bound=WeightQuantizer)
Errors = Callable[[Mapping[str, Sequence[LayerPlan]]], Mapping[str, Sequence[float]]]
"""Measures what each of the plans that a layer might have would do to the denoiser's output
(:mod:`bitstep.stages.weight_errors`)."""


class Weights(Variant):
    """How a float weight becomes codes."""

    least_bits: ClassVar[int] = 2

    def trained(self) -> set[str]:
        """The roles (fields of :class:`LearningRates`) of the parameters that its quantizers have."""
        return {"weight", "weight_scale"}

    def check(self, training: Sequence[Phase]) -> None:
        """Raise ValueError where ``training`` leaves undone what these weights need."""

    @abstractmethod
    def layer_bits(self, bits: float) -> int:
        """The bits of an ordinary layer for an average of ``bits``; raises ValueError where that cannot be."""

    def refine(self, plan: Plan, structure: Structure, bits: float, errors: Errors) -> Plan:
        """The plan, with what this quantizer does to meet an average of ``bits``."""
        return plan

    @abstractmethod
    def build(self, weight: Tensor, layer: LayerPlan, seed: int = 0) -> WeightQuantizer:
        """The quantizer of one layer's weight ``[out, in, *kernel]``, its range initialised from the weight."""


class UniformWeights(Weights):
    """Uniform codes, per output channel; ``rank`` > 0 trains a merged low-rank adapter instead of the weight itself."""

    kind: Literal["uniform"] = "uniform"
    symmetric: bool = True
    range: RangeMethod = "mse"
    rank: NonNegativeInt = 0

    @model_validator(mode="after")
    def _range_is_there(self) -> Self:
        if self.range == "lsq" and not self.symmetric:
            raise ValueError("the lsq range is symmetric: set symmetric to true, or range to mse or minmax")
        return self

    def trained(self) -> set[str]:
        zero_points = set() if self.symmetric else {"weight_zero_point"}
        return {"adapter" if self.rank else "weight", "weight_scale"} | zero_points

    def check(self, training: Sequence[Phase]) -> None:
        if self.rank and not training:
            raise ValueError("weights.rank asks for adapters, and nothing is trained: leave it at 0")
        # an adapter takes the place of the weight: with its learning rate at 0, nothing would be trained but scales
        if self.rank and not any(phase.learning_rates.adapter for phase in training):
            raise ValueError(
                "weights.rank asks for adapters, whose learning rate is 0 in every phase: "
                "set training.0.learning_rates.adapter, or weights.rank to 0"
            )

    def layer_bits(self, bits: float) -> int:
        if bits not in range(2, 9):
            raise ValueError(f"uniform weights take 2 to 8 whole bits (1 to 2: recipe best), got {bits:g}")
        return int(bits)

    def build(self, weight: Tensor, layer: LayerPlan, seed: int = 0) -> WeightQuantizer:
        source: WeightSource = DenseWeight(weight)
        if self.rank:
            source = MergedLoRA(weight, self.rank, generator(seed, layer.name, 0))
        return UniformWeight(source, layer.weight_bits, symmetric=self.symmetric, method=self.range)


class Rewrite(Variant):
    """An exact change of a layer before it is quantized: ``Y = (X / s)(s W)``, one s per input channel."""

    @abstractmethod
    def scale(self, weight: Tensor, groups: int, channel_range: Tensor, parts: tuple[int, ...]) -> Tensor:
        """s, positive float32 ``[in]``.

        weight: ``[out, in / groups, *kernel]``
        channel_range: largest magnitude of every input channel over all timesteps, ``[in]``
        parts: channels of each tensor that was concatenated into the input; empty for any other input
        """


class Activations(Slot):
    """Activation quantizers: one row per key timestep or a single static one, ranges found per (layer, step).

    signed: codes symmetric around zero (LSQ), instead of a learned zero point.
    """

    per_step: bool = True
    signed: bool = False
    range: RangeMethod = "mse"

    @model_validator(mode="after")
    def _range_is_there(self) -> Self:
        if self.range == "lsq" and not self.signed:
            raise ValueError("the lsq range is symmetric: set signed to true, or range to mse or minmax")
        return self


class AttentionOperands(Slot):
    """Whether scaled dot-product attention is quantized: query, key and value with the bits and ranges of activations,
    the probabilities with ``probability_bits``."""

    quantized: bool = False
    probability_bits: Annotated[int, Field(ge=2, le=8)] = 8


class Layers(Slot):
    """Which layers are quantized: a named coverage, then the user's rules, later ones winning."""

    coverage: Coverage = "full"
    rules: tuple[Rule, ...] = ()


class Output(Slot):
    """Whether the output is preconditioned: weighed against the noisy sample, by two numbers per timestep
    (:mod:`bitstep.denoiser.preconditioning`).

    averaged: steps over which errors are taken to average out; None measures it (:mod:`bitstep.stages.precondition`)
    """

    preconditioned: bool = False
    averaged: PositiveFloat | None = None


class Calibration(Slot):
    """The full-precision trajectories everything is fitted to: ``images`` of them, ``steps`` sampling steps each.

    bf16: record the trajectories with the teacher in bfloat16.
    eta: noise of a DDIM sampler, None for the pipeline's default. guidance_scale: likewise.
    size: of the pictures, WIDTHxHEIGHT, or of the videos, WIDTHxHEIGHTxFRAMES; None for the pipeline's default.
    range_images: how many of them, at most, set the activation ranges.
    """

    images: PositiveInt = 64
    steps: PositiveInt = 100
    batch_size: PositiveInt = 16
    bf16: bool = False
    eta: NonNegativeFloat | None = None
    guidance_scale: NonNegativeFloat | None = None
    size: str | None = None
    range_images: PositiveInt = 16


class LearningRates(Slot):
    """Peak learning rate per role; 0 freezes a role.

    ``adapter`` and ``weight`` are relative to the layer's mean weight step size (scale-aware: every layer then moves by
    the same fraction of its own step); the scales are learned as logarithms, so theirs are relative too; zero points
    are in codes.
    """

    adapter: NonNegativeFloat = 0.0
    weight: NonNegativeFloat = 0.0
    rounding: NonNegativeFloat = 0.0
    weight_scale: NonNegativeFloat = 0.0
    weight_zero_point: NonNegativeFloat = 0.0
    activation_scale: NonNegativeFloat = 0.0
    activation_zero_point: NonNegativeFloat = 0.0


class _Trained:
    layers: Mapping[str, FakeQuantized]
    attention: Mapping[str, AttentionQuantizer]

    @property
    def trained(self) -> Mapping[str, nn.Module]:
        """All modules with parameters to train."""
        return {**self.layers, **self.attention}


@dataclass(frozen=True)
class Context(_Trained):
    """What an objective sees: the two denoisers, the recorded calls, and a folder for what it must keep on disk.

    ``images`` are the training images that the user gave, if any. ``layers`` and ``attention`` are what is trained, by
    name. ``sensitivity`` is that of the pool's timesteps (:mod:`bitstep.stages.sensitivity`), where an objective's
    emphasis asks for it.
    """

    teacher: nn.Module
    student: nn.Module
    layers: Mapping[str, FakeQuantized]
    structure: Structure
    cursor: StepCursor
    pool: Pool
    folder: Path
    seed: int
    images: TrainingImages | None = None
    attention: Mapping[str, AttentionQuantizer] = field(default_factory=dict)
    sensitivity: Tensor | None = None

    def blocks(self) -> list[Block]:
        """The denoiser's blocks with layers to train, in execution order."""
        return [block for block in blocks(self.teacher, self.structure) if set(block.layers) & set(self.layers)]

    def within(self, *chosen: Block) -> tuple[dict[str, FakeQuantized], dict[str, AttentionQuantizer]]:
        """The layers and the attention to train in these blocks, by name."""
        names = {name for block in chosen for name in block.layers}
        prefixes = tuple(f"{block.name}." for block in chosen)
        return (
            {name: layer for name, layer in self.layers.items() if name in names},
            {name: site for name, site in self.attention.items() if f"{name}.".startswith(prefixes)},
        )

    def loss_weights(self, timestep: Tensor, emphasis: float) -> Tensor:
        """``s[t] ** emphasis``, divided by its mean over the pool's timesteps, for every ``timestep``; ``[batch]``."""
        if not emphasis:
            return torch.ones_like(timestep, dtype=torch.float32)
        assert self.sensitivity is not None
        weights = self.sensitivity**emphasis
        return (weights / weights.mean())[torch.searchsorted(self.pool.timesteps, timestep.cpu().double())]

    def batch(self, indices: Tensor) -> tuple[Call, Tensor]:
        """``pool.batch(indices)`` on the student's device; see :meth:`placed`."""
        call, target = self.pool.batch(indices)
        return self.placed(call), target.to(next(self.student.parameters()).device)

    def placed(self, call: Call) -> Call:
        """``call`` on the student's device, images channels-last (the faster layout of convolutions)."""
        device = next(self.student.parameters()).device
        return call.map(lambda _, tensor: _channels_last(tensor).to(device))


ALL = slice(None)


class Loss(Protocol):
    """The mean loss of the samples ``part`` of an iteration's batch: a pure function of these and the parameters, so
    that a resumed run repeats it exactly, and a batch may be taken in parts (:mod:`bitstep.stages.memory`)."""

    def __call__(self, iteration: int, part: slice = ALL, /) -> Tensor: ...


@dataclass(frozen=True)
class Unit(_Trained):
    """A part of the student trained on its own: its layers and attention, its loss, and what is done to it before each
    iteration, once however many parts the batch is taken in; it is one ``of`` so many."""

    name: str
    layers: Mapping[str, FakeQuantized]
    loss: Loss
    attention: Mapping[str, AttentionQuantizer] = field(default_factory=dict)
    begin: Callable[[int], None] = lambda iteration: None
    of: int = 1

    def weight_quantizers(self, kind: type[Quantizer]) -> list[Quantizer]:
        """Those of this kind among its layers'."""
        quantizers = (layer.weight_quantizer for layer in self.layers.values())
        return [quantizer for quantizer in quantizers if isinstance(quantizer, kind)]


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


class Objective(Variant):
    """What training minimises.

    emphasis: the loss at timestep t is weighted by its sensitivity to the power of this; 0 counts all timesteps alike
    """

    wants_images: ClassVar[bool] = False
    whole: ClassVar[bool] = True  # every loss runs the whole denoiser
    emphasis: NonNegativeFloat = 0.0

    @abstractmethod
    def units(self, context: Context, phase: Phase, start: int) -> Iterator[Unit]:
        """The units in training order from number ``start`` on; each is asked for when the one before is trained."""


Share = Annotated[float, Field(ge=0, le=1)]


class Technique(Variant):
    """Something that accompanies an objective: a term added to its loss, or a schedule that acts on the layers."""

    recomputable: ClassVar[bool] = True  # whether the backward pass, computing a block again, meets what the loss met

    def check(self, weights: Weights, phase: Phase) -> None:
        """Raise ValueError where the technique would do nothing, or cannot work."""

    @abstractmethod
    def applied(self, unit: Unit, context: Context, phase: Phase) -> Unit:
        """``unit`` with the technique in its loss, or in how its iterations begin."""


class Phase(Slot):
    """One stretch of training.

    techniques: applied to every unit of the objective, in this order
    ema: decay of the exponential moving average of the trained parameters that each unit ends with; 0 for none
    memory: gibibytes that a loss may keep for its gradients; what does not fit is taken in parts, and where one sample
        does not fit, computed again block by block in the backward pass (:mod:`bitstep.stages.memory`)
    """

    objective: SerializeAsAny[Objective]
    techniques: tuple[SerializeAsAny[Technique], ...] = ()
    iterations: PositiveInt
    batch_size: PositiveInt
    learning_rates: LearningRates
    decay: Literal["linear", "cosine"] = "linear"
    weight_decay: NonNegativeFloat = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    memory: PositiveFloat = 8.0


class Method(Slot):
    """A composition of slots.

    rewrites: applied one after another
    efforts: overrides (``slot.key`` -> value) per effort
    """

    name: str
    rewrites: tuple[SerializeAsAny[Rewrite], ...] = ()
    weights: SerializeAsAny[Weights] = UniformWeights()
    activations: Activations = Activations()
    attention: AttentionOperands = AttentionOperands()
    output: Output = Output()
    layers: Layers = Layers()
    calibration: Calibration = Calibration()
    training: tuple[Phase, ...] = ()
    efforts: Mapping[Effort, Mapping[str, Any]] = {}

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        """A setting that silently does nothing is worse than none."""
        for rule in self.layers.rules:
            if rule.weight_bits and rule.weight_bits < self.weights.least_bits:
                raise ValueError(
                    f"layers.rules: {rule.match!r} asks for {rule.weight_bits} bit, "
                    f"{self.weights.kind} weights take {self.weights.least_bits} or more"
                )
        self.weights.check(self.training)
        trained = self.weights.trained() | {"activation_scale", "activation_zero_point"}
        for number, phase in enumerate(self.training):
            for role, rate in phase.learning_rates:
                if rate and role not in trained:
                    raise ValueError(
                        f"training.{number}.learning_rates.{role} has nothing to train, set it to 0: "
                        f"{self.weights.kind} weights as set here have {', '.join(sorted(self.weights.trained()))}"
                    )
            for technique in phase.techniques:
                technique.check(self.weights, phase)
        return self
