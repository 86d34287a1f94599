"""Calibrate, last part: a student whose layers are fake-quantized, its ranges set from the recorded calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bitstep.attention import OPERANDS, attend, intercept
from bitstep.calls import Pool
from bitstep.layers import FakeQuantized, groups_of, weight_of
from bitstep.methods.base import Method, UniformWeights
from bitstep.numerics.dilation import StretchStatistics, statistics, stretched
from bitstep.quantizers.activations import ActivationQuantizer
from bitstep.quantizers.attention import AttentionQuantizer
from bitstep.stages.ranges import Observed, observe
from bitstep.stages.rewrite import fold, rewrite
from bitstep.stages.weight_errors import weight_errors
from bitstep.steps import StepCursor, StepGrid
from bitstep.structure import Structure, trace
from bitstep.surgery import AttentionPlan, LayerPlan, Plan, add_attention, operate, plan


@dataclass(frozen=True)
class Student:
    """A fake-quantized copy of the teacher, ready to train or to pack.

    attention: quantizers of attention operands, by the module that computes it
    rewritten: what the method's rewrites did to every layer that they changed
    folded: norms whose gains hold 1 / s, and the layers that read them
    """

    denoiser: nn.Module
    layers: dict[str, FakeQuantized]
    plan: Plan
    structure: Structure
    cursor: StepCursor
    attention: dict[str, AttentionQuantizer]
    rewritten: dict[str, StretchStatistics]
    folded: dict[str, list[str]]


def prepare(
    teacher: nn.Module,
    pool: Pool,
    method: Method,
    *,
    weight_bits: float,
    activation_bits: int,
    importance: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Student:
    """Decide the plan, observe the teacher's activations on ``pool``, and replace the layers of a copy of it.

    importance: ``[T]``, what errors at each timestep count where bits are allocated by them; None for all alike
    """
    device = next(teacher.parameters()).device
    structure = trace(teacher, pool.batch(pool.indices_at(0)[:2])[0].to(device))
    decided = plan(
        teacher,
        structure,
        weight_bits=method.weights.layer_bits(weight_bits),
        activation_bits=activation_bits,
        per_step=method.activations.per_step,
        coverage=method.layers.coverage,
        rules=method.layers.rules,
    )

    def errors(choices: Mapping[str, Sequence[LayerPlan]]) -> Mapping[str, Sequence[float]]:
        weights = {name: weight_of(teacher.get_submodule(name)) for name in choices}
        rounded = {
            name: [method.weights.build(weights[name], choice).codes() for choice in found]
            for name, found in choices.items()
        }
        counts = torch.ones(len(pool.timesteps)) if importance is None else importance
        return weight_errors(teacher, pool, rounded, counts, progress=progress)

    decided = method.weights.refine(decided, structure, weight_bits, errors)
    names = [layer.name for layer in decided.layers if layer.activation_bits is not None]
    observed = {}
    if names:
        if method.attention.quantized:
            decided = add_attention(
                decided,
                structure,
                bits=activation_bits,
                probability_bits=method.attention.probability_bits,
                per_step=method.activations.per_step,
            )
        sites = [site.name for site in decided.attention]
        images = method.calibration.range_images
        observed = observe(teacher, pool, names, attention=sites, images=images, progress=progress)
    signed = method.activations.signed
    cursor = StepCursor(StepGrid.from_timesteps(pool.timesteps, pool.unit))
    stretches, folded = rewrite(teacher, structure, method.rewrites, observed)
    readers = {name for names in folded.values() for name in names}
    rewritten = {name: statistics(stretch, observed[name].channel_range) for name, stretch in stretches.items()}

    def quantizer(seen: Observed, bits: int, per_step: bool) -> ActivationQuantizer:
        scale, zero_point = seen.range(bits, method.activations.range, per_step=per_step, signed=signed)
        return ActivationQuantizer(bits, scale, zero_point, cursor, signed=signed)

    def build(layer: LayerPlan, module: nn.Module) -> FakeQuantized:
        assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
        weights = method.weights if layer.trained else UniformWeights()
        if layer.activation_bits is None:
            return FakeQuantized(module, weights.build(module.weight, layer), None).to(device)
        weight, seen, reciprocal = module.weight.detach(), observed[layer.name], None
        if layer.name in stretches:
            stretch = stretches[layer.name]
            weight, seen = stretched(weight, stretch, groups_of(module)), seen.divided(stretch)
            reciprocal = None if layer.name in readers else 1 / stretch
        input_quantizer = quantizer(seen, layer.activation_bits, layer.per_step)
        return FakeQuantized(module, weights.build(weight, layer), input_quantizer, reciprocal).to(device)

    def build_attention(site: AttentionPlan) -> AttentionQuantizer:
        bits = dict.fromkeys(OPERANDS, site.bits) | {"probability": site.probability_bits}
        return AttentionQuantizer(
            {
                operand: quantizer(observed[f"{site.name}.{operand}"], bits[operand], site.per_step)
                for operand in OPERANDS
            }
        ).to(device)

    student = copy.deepcopy(teacher)
    layers = operate(student, decided, build)
    for norm, names in folded.items():
        fold(student.get_submodule(norm), stretches[names[0]])
    attention = {}
    for site in decided.attention:
        attention[site.name] = build_attention(site)
        intercept(student.get_submodule(site.name), partial(attend, attention[site.name]))
    cursor.attach(student)
    return Student(student, layers, decided, structure, cursor, attention, rewritten, folded)
