"""BinaryDM (arXiv 2404.05662, v1 and the ICLR-2025 text): diffusion models with about one bit a weight.

    W_b = s_1 sign(W) [+ s_2 sign(W - s_1 sign(W))]          learnable multi-basis (LMB) where parameters are sparse
    L   = L_diffusion + weight * mean_i MSE(F_i^T E_i, F_i^S E_i)      low-rank representation mimicking (LRM)

Layers turn binary one by one, from the middle outward (progressive warm-up). The later text starts with two bases at
the model's head and tail and presses the second to nothing (evolvable basis, EBB). What no paper has is training
without data: then the diffusion loss is replaced by distillation on the teacher's own trajectories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor, nn

from bitstep.denoiser.calls import run
from bitstep.denoiser.structure import Structure, blocks
from bitstep.errors import BitstepError
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
from bitstep.numerics.lowrank import principal_basis
from bitstep.planning import LayerPlan, Plan, add_bases, add_bits
from bitstep.quantizers.activations import ActivationQuantizer
from bitstep.quantizers.binary import BinaryWeight
from bitstep.quantizers.layers import FakeQuantized
from bitstep.quantizers.weights import DenseWeight, WeightQuantizer

Share = Annotated[float, Field(ge=0, le=1)]
EVOLVABLE = 0.1
"""Share of all weights that start with a second basis: those at the model's head and tail that have one at W1.1."""
WIDER_BITS = (4, 8)
"""Uniform bits that a measured allocation may give a layer, besides a second basis."""
FEATURE_IMAGES = 16
"""Trajectories whose features, at every timestep, make the bases of low-rank mimicking."""


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


class Mimicking(Technique):
    """Low-rank representation mimicking: the student's block outputs follow the teacher's along their main directions.

    Of every residual, attention or transformer block with c output channels, the ``rank`` * c leading eigenvectors of
    F^T F, F being teacher features ``[samples and positions, c]`` over all timesteps, are found once and stay.
    """

    kind: Literal["mimicking"] = "mimicking"
    weight: NonNegativeFloat = 1e-4
    rank: Share = 0.25

    def check(self, weights: Weights, phase: Phase) -> None:
        if not phase.objective.whole:
            raise ValueError(f"mimicking needs an objective that runs the whole denoiser, not {phase.objective.kind}")

    def applied(self, unit: Unit, context: Context, phase: Phase) -> Unit:
        names = [block.name for block in blocks(context.teacher, context.structure) if len(block.layers) > 1]
        if not names:
            raise BitstepError(
                f"{type(context.teacher).__name__} has no blocks whose features could be mimicked: leave mimicking out "
                "of the recipe's techniques"
            )
        bases = {
            name: principal_basis(gram, max(1, round(self.rank * len(gram))))
            for name, gram in feature_grams(context, names, phase.batch_size).items()
        }

        def loss(iteration: int, part: slice = ALL) -> Tensor:
            with block_features(context.student, names) as student, _arguments(context.student) as calls:
                value = unit.loss(iteration, part)
            args, kwargs = calls[-1]
            with torch.no_grad(), block_features(context.teacher, names) as teacher:
                context.teacher(*args, **kwargs)
            terms = [((student[name] - teacher[name]) @ bases[name]).square().mean() for name in names]
            return value + self.weight * torch.stack(terms).mean()

        return replace(unit, loss=loss)


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

        def loss(iteration: int, part: slice = ALL) -> Tensor:
            for rank, quantizer in enumerate(quantizers):
                quantizer.enabled = iteration >= int(pace * rank)
            return unit.loss(iteration, part)

        return replace(unit, loss=loss)


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

        def loss(iteration: int, part: slice = ALL) -> Tensor:
            if iteration >= int(self.share * phase.iterations):
                for quantizer in quantizers:
                    quantizer.drop_second_basis()
                return unit.loss(iteration, part)
            second = torch.cat([quantizer.second_scale().flatten() for quantizer in quantizers])
            return unit.loss(iteration, part) + self.penalty * second.mean()

        return replace(unit, loss=loss)


def outward(layers: Mapping[str, FakeQuantized], structure: Structure) -> list[FakeQuantized]:
    """``layers`` from the middle of the denoiser outward: by distance, in execution order, from the centre of the
    layers at the lowest resolution (of a UNet its middle block, of a transformer the middle of all)."""
    place = {info.name: i for i, info in enumerate(structure.layers)}
    spatial = [info for info in structure.layers if info.sees_sample]
    lowest = [place[info.name] for info in spatial if info.positions == min(info.positions for info in spatial)]
    middle = sum(lowest) / len(lowest)
    return [layers[name] for name in sorted(layers, key=lambda name: abs(place[name] - middle))]


@torch.no_grad()
def feature_grams(context: Context, names: list[str], batch_size: int) -> dict[str, Tensor]:
    """F^T F ``[c, c]``, float64, of the teacher's output at each named block, summed over positions, samples and all
    timesteps of the recorded trajectories: one batch of features is in memory at a time."""
    grams: dict[str, Tensor] = {}
    steps = range(len(context.pool.timesteps))
    indices = torch.cat([context.pool.indices_at(step, FEATURE_IMAGES) for step in steps])
    for chosen in context.pool.split(indices, batch_size):
        call, _ = context.batch(chosen)
        with block_features(context.teacher, names) as features:
            run(context.teacher, call)
        for name, feature in features.items():
            rows = feature.reshape(-1, feature.shape[-1])
            gram = (rows.T @ rows).double()
            grams[name] = grams[name] + gram if name in grams else gram
    return grams


@contextmanager
def block_features(denoiser: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the named blocks, float32 ``[batch, ..., channels]``, of what runs under this context manager; of
    blocks that return the text's and the sample's, the sample's."""
    found: dict[str, Tensor] = {}

    def keep(name: str, block: nn.Module) -> Callable[..., None]:
        of_curves = any(isinstance(part, nn.Conv1d) for part in block.modules())

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            feature = output
            if not isinstance(output, Tensor):  # the text's and the sample's, in either order
                sample = args[0] if args else kwargs["hidden_states"]
                feature = next(x for x in output if x is not None and x.shape == sample.shape)
            maps = feature.ndim > 3 or of_curves  # else tokens, which have their channels last
            found[name] = (feature.movedim(1, -1) if maps else feature).float()

        return hook

    with ExitStack() as stack:
        for name in names:
            block = denoiser.get_submodule(name)
            stack.enter_context(block.register_forward_hook(keep(name, block), with_kwargs=True))
        yield found


@contextmanager
def _arguments(denoiser: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of the denoiser's calls under this context manager."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    with denoiser.register_forward_pre_hook(hook, with_kwargs=True):
        yield calls


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
            # over a hundred iterations the published penalty takes a tenth from the second scales
            effort: {**settings, "training.0.techniques.0.penalty": 9.0}
            for effort, settings in BINARY_BASELINE.efforts.items()
        },
    }
)
