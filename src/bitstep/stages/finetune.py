"""Fine-tune: the only training loop. It reads slots, yields after every step, and can stop and go on anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from bitstep.errors import BitstepError
from bitstep.methods.base import Context, LearningRates, Phase, Unit
from bitstep.quantizers.layers import FakeQuantized
from bitstep.stages.memory import parts, recomputed, samples_at_once
from bitstep.stages.optim import RowSparseAdam

TABLES = ("activation_scale", "activation_zero_point")


@dataclass(frozen=True)
class Step:
    """One finished training step, of a unit that is one of so many ``units`` of its phase."""

    phase: int
    unit: int
    units: int
    name: str
    iteration: int
    iterations: int
    loss: float


@dataclass
class TrainingState:
    """Where training stands: the next iteration to run, and the optimizers of the unit being trained.

    ``moments`` are the optimizers' saved tensors, waiting to be taken up when that unit's optimizers are built;
    ``average`` is the moving average of the unit's trained tensors, if its phase keeps one. ``at_once`` is how many
    samples of a batch the unit is trained on together (:mod:`bitstep.stages.memory`), None until that is known.
    """

    phase: int = 0
    unit: int = 0
    iteration: int = 0
    at_once: int | None = None
    optimizers: tuple[Optimizer, ...] = ()
    moments: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)


def finetune(context: Context, phases: Sequence[Phase], state: TrainingState) -> Iterator[Step]:
    """Train ``context.student`` through ``phases`` from ``state`` on; ``state`` and the student change in place.

    Raises :class:`BitstepError` when a loss is not finite.
    """
    while state.phase < len(phases):
        phase = phases[state.phase]
        for unit in phase.objective.units(context, phase, state.unit):
            yield from _train(unit, context, phase, state)
            state.unit, state.iteration, state.at_once = state.unit + 1, 0, None
            state.optimizers, state.average = (), {}
        state.phase, state.unit = state.phase + 1, 0


def _train(unit: Unit, context: Context, phase: Phase, state: TrainingState) -> Iterator[Step]:
    for technique in phase.techniques:
        unit = technique.applied(unit, context, phase)
    if state.at_once is None:  # before an iteration begins: at a warm-up's first, layers keep less
        state.at_once = samples_at_once(unit, phase)
    state.optimizers = optimizers(unit.trained, phase)
    restore_moments(state)
    if phase.ema and not state.average:
        state.average = {name: p.detach().clone() for name, p in trained_tensors(unit.trained).items()}
    with nullcontext() if state.at_once else recomputed(context, phase):
        while state.iteration < phase.iterations:
            loss = _step(unit, phase, state)
            state.iteration += 1
            yield Step(state.phase, state.unit, unit.of, unit.name, state.iteration, phase.iterations, loss)
    if phase.ema:
        load_trained_tensors(unit.trained, state.average)


def _step(unit: Unit, phase: Phase, state: TrainingState) -> float:
    """One iteration; returns its loss."""
    unit.begin(state.iteration)
    for module in unit.trained.values():
        module.zero_grad()  # what no optimizer holds gets gradients too
    loss = _backward(unit, phase, state)
    schedule = _decay(phase, state.iteration)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule
        optimizer.step()
    if phase.ema:
        _average(state, unit.trained, phase.ema)
    return loss


def _backward(unit: Unit, phase: Phase, state: TrainingState) -> float:
    """The loss of this iteration's batch, and its gradients, part by part."""
    assert state.at_once is not None
    value = 0.0
    for part in parts(phase.batch_size, state.at_once):
        loss = unit.loss(state.iteration, part) * ((part.stop - part.start) / phase.batch_size)
        value += float(loss.detach())
        if not math.isfinite(value):
            raise BitstepError(
                f"the loss became {value} in {unit.name} at iteration {state.iteration}; "
                "lower the learning rates (--set training.N.learning_rates...)"
            )
        loss.backward()
    return value


def optimizers(modules: Mapping[str, nn.Module], phase: Phase) -> tuple[Optimizer, ...]:
    """AdamW for weights and scales, row-sparse Adam for per-timestep tables."""
    dense: list[dict[str, Any]] = []
    tables: dict[tuple[str, int], list[nn.Parameter]] = {}
    for module in modules.values():
        for role, parameters in roles(module).items():
            rate = getattr(phase.learning_rates, role)
            if not rate or not parameters:
                continue
            if role in TABLES:
                tables.setdefault((role, len(parameters[0])), []).extend(parameters)
                continue
            relative = role in ("adapter", "weight")
            peak = rate * float(_weight_step(module)) if relative else rate
            decay = phase.weight_decay if relative else 0.0  # decaying a log scale would pull every step size to 1
            dense.append({"params": parameters, "peak_lr": peak, "lr": peak, "weight_decay": decay})
    sparse = []
    for (role, _), parameters in tables.items():
        rate = getattr(phase.learning_rates, role)
        sparse.append({"params": parameters, "peak_lr": rate, "lr": rate})
    built: list[Optimizer] = []
    if dense:
        built.append(AdamW(dense, fused=True))
    if sparse:
        built.append(RowSparseAdam(sparse))
    return tuple(built)


def roles(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of a layer or of attention by role (the fields of :class:`LearningRates`), which the
    quantizers declare."""
    found: dict[str, list[nn.Parameter]] = {role: [] for role in LearningRates.model_fields}
    part: Any
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.requires_grad:
                found[part.ROLES[name]].append(parameter)
    return found


def _weight_step(module: nn.Module) -> Tensor:
    assert isinstance(module, FakeQuantized)  # attention has no weights
    return module.weight_quantizer.step_size()


def moments(state: TrainingState) -> dict[str, Tensor]:
    """The optimizers' state as flat tensors.

    Peak learning rates belong to it: they follow the step sizes that the unit started with, which training changes.
    """
    return {
        f"{number}.{index}.{key}": value
        for number, optimizer in enumerate(state.optimizers)
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    } | {
        f"{number}.{index}.peak_lr": torch.tensor(group["peak_lr"], dtype=torch.float64)
        for number, optimizer in enumerate(state.optimizers)
        for index, group in enumerate(optimizer.param_groups)
    }


def restore_moments(state: TrainingState) -> None:
    """Give saved moments back to freshly built optimizers."""
    if not state.moments:
        return
    for number, optimizer in enumerate(state.optimizers):
        saved = optimizer.state_dict()
        saved["state"] = {}
        for name, value in state.moments.items():
            owner, index, key = name.split(".")
            if int(owner) != number:
                continue
            if key == "peak_lr":
                saved["param_groups"][int(index)][key] = float(value)
            else:
                saved["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(saved)
    state.moments = {}


@torch.no_grad()
def _average(state: TrainingState, modules: Mapping[str, nn.Module], decay: float) -> None:
    # early on the average follows quickly, or it would remember the untrained start
    decay = min(decay, (1 + state.iteration) / (10 + state.iteration))
    current = trained_tensors(modules)
    torch._foreach_lerp_(list(state.average.values()), [current[name] for name in state.average], 1 - decay)


def _decay(phase: Phase, iteration: int) -> float:
    left = 1 - iteration / phase.iterations
    return left if phase.decay == "linear" else 0.5 * (1 + math.cos(math.pi * (1 - left)))


def trained_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters that training may have changed, by name; what a saved state holds besides the moments."""
    return {
        f"{name}.{key}": parameter
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def load_trained_tensors(modules: Mapping[str, nn.Module], saved: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`trained_tensors`."""
    for name, parameter in trained_tensors(modules).items():
        parameter.copy_(saved[name])
