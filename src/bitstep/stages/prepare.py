"""Calibrate, last part: a student whose layers are fake-quantized, its ranges set from the recorded calls."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitstep.denoiser.attention import OPERANDS, attend, intercept
from bitstep.denoiser.layers import groups_of, weight_of
from bitstep.denoiser.origins import divide
from bitstep.denoiser.steps import StepCursor, StepGrid
from bitstep.denoiser.structure import Structure, trace
from bitstep.methods.base import Context, Errors, Method, UniformWeights
from bitstep.numerics.dilation import stretched
from bitstep.numerics.uniform import RangeMethod
from bitstep.planning import WEIGHT_ONLY_BITS, AttentionPlan, LayerPlan, Plan, add_attention, plan_layers
from bitstep.progress import SILENT, Reporter
from bitstep.quantizers.activations import ActivationQuantizer
from bitstep.quantizers.attention import AttentionQuantizer
from bitstep.quantizers.layers import FakeQuantized
from bitstep.stages.ranges import Observations, Observed, observe
from bitstep.stages.rewrite import Rewritten, rewrite
from bitstep.stages.weight_errors import weight_errors
from bitstep.trajectories.pool import Pool

NOTABLY_MORE = 1.1
"""Times the bits that were asked for: an average beyond it is worth a line before the work begins."""


@dataclass(frozen=True)
class Student:
    """A fake-quantized copy of the teacher, ready to train or to pack.

    attention: quantizers of attention operands, by the module that computes it
    rewritten: what the method's rewrites did
    """

    denoiser: nn.Module
    layers: dict[str, FakeQuantized]
    plan: Plan
    structure: Structure
    cursor: StepCursor
    attention: dict[str, AttentionQuantizer]
    rewritten: Rewritten

    def context(self, teacher: nn.Module, pool: Pool, folder: Path, seed: int, **more: Any) -> Context:
        """What its training sees; ``more`` are the optional fields of :class:`Context`."""
        layers = {layer.name: self.layers[layer.name] for layer in self.plan.layers if layer.trained}
        return Context(
            teacher=teacher,
            student=self.denoiser,
            layers=layers,
            attention=self.attention,
            structure=self.structure,
            cursor=self.cursor,
            pool=pool,
            folder=folder,
            seed=seed,
            **more,
        )


def prepare(
    teacher: nn.Module,
    pool: Pool,
    method: Method,
    *,
    weight_bits: float,
    activation_bits: int,
    seed: int = 0,
    importance: Tensor | None = None,
    progress: Reporter = SILENT,
) -> Student:
    """Decide the plan, observe the teacher's activations on ``pool``, and replace the layers of a copy of it.

    importance: ``[T]``, what errors at each timestep count where bits are allocated by them; None for all alike
    """
    device = next(teacher.parameters()).device
    structure = trace(teacher, pool.batch(pool.indices_at(0)[:1])[0].to(device))
    errors = partial(_errors, teacher, pool, method, importance, progress)
    plan = _decide(teacher, structure, method, weight_bits, activation_bits, errors)
    if plan.average_weight_bits > NOTABLY_MORE * weight_bits:
        average = f"{plan.average_weight_bits:.4g} bits a weight"
        progress.line(f"layers that keep more bits make it {average} on average, not {weight_bits:g}")
    names = [x.name for x in plan.layers if x.activation_bits is not None or (x.trained and method.rewrites)]
    sites = [site.name for site in plan.attention]
    observed = Observations()
    if names or sites:
        with progress.stage("calibrate activation ranges") as update:
            observed = observe(
                teacher,
                pool,
                names,
                attention=sites,
                images=method.calibration.range_images,
                batch_size=method.calibration.batch_size,
                progress=update,
            )
        plan = _with_known_attention(plan, observed)
    rewritten = rewrite(teacher, structure, method.rewrites, observed.layers)
    cursor = StepCursor(StepGrid.from_timesteps(pool.timesteps, pool.unit))

    student = copy.deepcopy(teacher)
    builder = _Builder(method, seed, cursor, observed, rewritten)
    for origin, scale in rewritten.divisors():
        divide(student, origin, scale)
    layers = _replace_layers(student, plan, builder.layer)
    attention = {}
    for site in plan.attention:
        attention[site.name] = builder.attention(site).to(device)
        intercept(student.get_submodule(site.name), partial(attend, attention[site.name]))
    cursor.attach(student)
    return Student(student, layers, plan, structure, cursor, attention, rewritten)


def _replace_layers(
    denoiser: nn.Module, plan: Plan, build: Callable[[LayerPlan, nn.Module], FakeQuantized]
) -> dict[str, FakeQuantized]:
    """Replace every planned layer of ``denoiser`` by ``build(its plan, the layer)``; everything else stops training."""
    denoiser.requires_grad_(False)
    layers = {}
    for layer in plan.layers:
        quantized = build(layer, denoiser.get_submodule(layer.name))
        if not layer.trained:
            quantized.requires_grad_(False)
        denoiser.set_submodule(layer.name, quantized)
        layers[layer.name] = quantized
    return layers


def _with_known_attention(plan: Plan, observed: Observations) -> Plan:
    """``plan`` without the attention whose operands could not be observed."""
    known = tuple(site for site in plan.attention if site.name in observed.operands)
    if left := len(plan.attention) - len(known):
        warnings.warn(f"{left} modules compute attention sample by sample: it stays in floating point", stacklevel=2)
    return replace(plan, attention=known)


def _decide(
    teacher: nn.Module, structure: Structure, method: Method, weight_bits: float, activation_bits: int, errors: Errors
) -> Plan:
    """What becomes of every layer, and of attention."""
    plan = plan_layers(
        teacher,
        structure,
        weight_bits=method.weights.layer_bits(weight_bits),
        activation_bits=activation_bits,
        coverage=method.layers.coverage,
        rules=method.layers.rules,
    )
    plan = method.weights.refine(plan, structure, weight_bits, errors)
    if not method.attention.quantized or activation_bits == WEIGHT_ONLY_BITS:
        return plan
    return add_attention(plan, structure, bits=activation_bits, probability_bits=method.attention.probability_bits)


def _errors(
    teacher: nn.Module,
    pool: Pool,
    method: Method,
    importance: Tensor | None,
    progress: Reporter,
    choices: Mapping[str, Sequence[LayerPlan]],
) -> Mapping[str, Sequence[float]]:
    """What each of the plans that a layer might have would do to the teacher's output."""
    weights = {name: weight_of(teacher.get_submodule(name)) for name in choices}
    rounded = {
        name: [method.weights.build(weights[name], choice).codes() for choice in found]
        for name, found in choices.items()
    }
    counts = torch.ones(len(pool.timesteps)) if importance is None else importance
    with progress.stage("measure what bits are worth") as update:
        return weight_errors(teacher, pool, rounded, counts, progress=update)


@dataclass(frozen=True)
class _Builder:
    """Makes the quantized parts of a student from what was observed of its teacher."""

    method: Method
    seed: int
    cursor: StepCursor
    observed: Observations
    rewritten: Rewritten

    def layer(self, plan: LayerPlan, module: nn.Module) -> FakeQuantized:
        assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
        weight, seen, input_quantizer = module.weight.detach(), self.observed.layers.get(plan.name), None
        scale = self.rewritten.scales.get(plan.name)
        if scale is not None:
            assert seen is not None
            weight, seen = stretched(weight, scale, groups_of(module)), seen.divided(scale)
        if plan.activation_bits is not None:
            assert seen is not None
            how = self.method.activations
            input_quantizer = self._quantizer(seen, plan.activation_bits, how.range, signed=how.signed)
        # what is not trained needs no adapters, and no rounding to be learned
        weights = self.method.weights if plan.trained or plan.weight_bits == 1 else UniformWeights()
        quantized = FakeQuantized(
            module, weights.build(weight, plan, self.seed), input_quantizer, self.rewritten.reciprocal(plan.name)
        )
        return quantized.to(module.weight.device)

    def attention(self, plan: AttentionPlan) -> AttentionQuantizer:
        return AttentionQuantizer({operand: self._operand(plan, operand) for operand in OPERANDS})

    def _operand(self, plan: AttentionPlan, operand: str) -> ActivationQuantizer:
        seen, how = self.observed.operands[plan.name][operand], self.method.activations
        for origin, scale in self.rewritten.divisors():
            if operand == "value" and origin.attention == plan.name:
                seen = seen.divided(scale)
        if operand != "probability":
            return self._quantizer(seen, plan.bits, how.range, signed=how.signed)
        # from 0 to the largest, whatever the recipe: most are next to nothing, and what counts are the rare large ones
        return self._quantizer(seen, plan.probability_bits, "minmax", signed=False)

    def _quantizer(self, seen: Observed, bits: int, how: RangeMethod, *, signed: bool) -> ActivationQuantizer:
        scale, zero_point = seen.range(bits, how, per_step=self.method.activations.per_step, signed=signed)
        return ActivationQuantizer(bits, scale, zero_point, self.cursor, signed=signed)
