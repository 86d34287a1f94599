"""Which layer gets how many bits.

A plan is made of rules over the layers that :mod:`bitstep.denoiser.structure` found by running the denoiser: first the
policy's own (sensitive layers at 8 bits, the named coverage), then the user's globs, later rules winning over earlier
ones. A rule that matches no layer is an error: a setting that silently does nothing is worse than none.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from torch import nn

from bitstep.denoiser.layers import QUANTIZABLE, refusal, weight_of
from bitstep.denoiser.structure import LayerInfo, Structure
from bitstep.errors import UsageError
from bitstep.numerics.allocation import allocate
from bitstep.slots import Slot

SENSITIVE_BITS = 8
WEIGHT_ONLY_BITS = 32
"""Activation bits that mean "leave activations in floating point"."""


ACTIVATION_WIDTHS = (*range(2, 9), WEIGHT_ONLY_BITS)
EXPECTED_WIDTHS = f"activations take 2 to 8 bits, or {WEIGHT_ONLY_BITS} to stay in floating point"


def _activation_width(bits: int) -> int:
    if bits not in ACTIVATION_WIDTHS:
        raise ValueError(f"{EXPECTED_WIDTHS}; got {bits}")
    return bits


class Rule(Slot):
    """Bits for the layers whose name matches a glob and whose class, or a base of it, is named ``type`` (if given).

    ``activation_bits`` 32 leaves activations in floating point.
    """

    match: str
    type: str | None = None
    weight_bits: Annotated[int, Field(ge=1, le=8)] | None = None
    activation_bits: Annotated[int, AfterValidator(_activation_width)] | None = None
    skip: bool = False

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not (self.weight_bits or self.activation_bits or self.skip):
            raise ValueError(f"{self.match!r} changes nothing: give weight_bits or activation_bits, or skip: true")
        return self


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer. ``activation_bits`` is None for floating-point activations.

    bases: sign bases of a weight of one bit, else 1. weights: number of entries of the weight.
    """

    name: str
    weight_bits: int
    activation_bits: int | None
    trained: bool
    macs: int
    weights: int
    bases: int = 1

    @property
    def size_bits(self) -> int:
        """Bits of all its weights."""
        return self.weights * self.weight_bits * self.bases


@dataclass(frozen=True)
class AttentionPlan:
    """What becomes of the attention that one module computes; see :class:`LayerPlan`."""

    name: str
    bits: int
    probability_bits: int
    macs: int


@dataclass(frozen=True)
class Plan:
    """The quantized layers and attention, the layers left alone with the reason, and the share of MACs covered."""

    layers: tuple[LayerPlan, ...]
    left_alone: Mapping[str, str]
    total_macs: int
    attention: tuple[AttentionPlan, ...] = ()

    @property
    def coverage(self) -> float:
        """Share of the denoiser's multiply-accumulates of which both factors are quantized, 0..1."""
        layers = sum(layer.macs for layer in self.layers if layer.activation_bits is not None)
        return (layers + sum(site.macs for site in self.attention)) / self.total_macs

    @property
    def average_weight_bits(self) -> float:
        """Bits a weight, over all weights of the quantized layers."""
        return sum(layer.size_bits for layer in self.layers) / sum(layer.weights for layer in self.layers)


Coverage = Literal["full", "efficientdm"]
_NOTHING_LEFT = "no layer is left to quantize: every layer is skipped by a rule or refused"


def plan_layers(
    denoiser: nn.Module,
    structure: Structure,
    *,
    weight_bits: int,
    activation_bits: int,
    coverage: Coverage,
    rules: tuple[Rule, ...] = (),
) -> Plan:
    """Decide for every layer of ``structure``.

    Time embedding, first and last layer get 8 bits and no training. The inputs of the first layer, the noisy sample
    itself, and of the last, whose rounding no later layer can make good, stay in floating point: at 8 bits each costs
    more than any other layer (docs/log.md), and together they are a percent of the multiply-accumulates.
    Skip connections read the residual stream, which no norm has evened out: their input gets 8 bits, their weight the
    target bits. ``coverage`` "full" quantizes all else at the target bits; "efficientdm" leaves the 1x1 convolutions
    of skip connections, downsampling convolutions and Conv1d attention in floating point, as that paper's models do.
    """
    layers: list[LayerPlan] = []
    left_alone = dict(structure.left_alone)
    unused = set(rules)
    for info in structure.layers:
        module = denoiser.get_submodule(info.name)
        layer = _planned(info, module, structure, weight_bits, _quantized_bits(activation_bits))
        reason = refusal(module)
        if reason is None and coverage == "efficientdm":
            reason = _outside_paper_coverage(info.name, module, structure)
        for rule in rules:
            if _matches(rule, info.name, module):
                unused.discard(rule)
                layer = _ruled(layer, rule)
                reason = refusal(module) or (f"rule {rule.match!r} skips it" if rule.skip else None)
        if reason:
            left_alone[info.name] = reason
        else:
            layers.append(layer)
    spared = _spared(denoiser, structure, layers)
    left_alone |= spared
    layers = [layer for layer in layers if layer.name not in spared]
    _refuse([rule for rule in rules if rule in unused], [info.name for info in structure.layers])
    if not layers:
        raise UsageError(_NOTHING_LEFT)
    return Plan(tuple(layers), left_alone, structure.total_macs)


def _spared(denoiser: nn.Module, structure: Structure, layers: Sequence[LayerPlan]) -> dict[str, str]:
    """The smallest layer of every module that would be asked for a parameter and have none, and why it is left alone.

    Packed layers have no parameters. Some denoisers learn a dtype from one, and accelerate asks the whole denoiser.
    """
    packed = {layer.name: layer.weights for layer in layers}
    spared: dict[str, str] = {}
    for name in (*structure.asked, ""):
        holders = {key.rpartition(".")[0] for key, _ in denoiser.get_submodule(name).named_parameters(name)}
        if holders and holders <= packed.keys():
            smallest = min((layer for layer in packed if layer in holders), key=packed.__getitem__)
            del packed[smallest]
            spared[smallest] = f"{name or 'the denoiser'} is asked for a parameter, and packed layers have none"
    return spared


def _planned(
    info: LayerInfo, module: nn.Module, structure: Structure, weight_bits: int, activation_bits: int | None
) -> LayerPlan:
    """What becomes of a layer where no rule says otherwise."""
    layer = LayerPlan(info.name, weight_bits, activation_bits, True, info.macs, weight_of(module).numel())
    outer = info.name in (structure.first, structure.last)
    if outer or info.name in structure.time_embedding:
        wide = None if outer or activation_bits is None else SENSITIVE_BITS
        return replace(layer, weight_bits=SENSITIVE_BITS, activation_bits=wide, trained=False)
    if info.name in structure.skip and activation_bits is not None:
        return replace(layer, activation_bits=SENSITIVE_BITS)
    return layer


def _ruled(layer: LayerPlan, rule: Rule) -> LayerPlan:
    if rule.weight_bits:
        layer = replace(layer, weight_bits=rule.weight_bits)
    if rule.activation_bits:
        layer = replace(layer, activation_bits=_quantized_bits(rule.activation_bits))
    return layer


def check_rules(denoiser: nn.Module, rules: Sequence[Rule]) -> None:
    """UsageError for rules that match no layer of ``denoiser``, executed or not, or skip all of them: known before
    anything is run."""
    layers = {name: module for name, module in denoiser.named_modules() if isinstance(module, QUANTIZABLE)}
    unused = [rule for rule in rules if not any(_matches(rule, name, layer) for name, layer in layers.items())]
    _refuse(unused, list(layers))
    matching = ([rule for rule in rules if _matches(rule, name, layer)] for name, layer in layers.items())
    if all(found and found[-1].skip for found in matching):
        raise UsageError(_NOTHING_LEFT)


def _matches(rule: Rule, name: str, module: nn.Module) -> bool:
    return fnmatchcase(name, rule.match) and (rule.type is None or rule.type in _type_names(module))


def _refuse(unused: Sequence[Rule], names: Sequence[str]) -> None:
    if unused:
        globs = ", ".join(repr(rule.match) for rule in unused)
        near = next(iter(difflib.get_close_matches(unused[0].match, names, n=1, cutoff=0)), "none")
        raise UsageError(f"layer rule {globs} matches no layer; of the names, {near!r} is the nearest")


def _quantized_bits(activation_bits: int) -> int | None:
    return None if activation_bits == WEIGHT_ONLY_BITS else activation_bits


def add_attention(plan: Plan, structure: Structure, *, bits: int, probability_bits: int) -> Plan:
    """Quantize the operands of every attention in ``structure`` too."""
    sites = (AttentionPlan(site.name, bits, probability_bits, site.macs) for site in structure.attention)
    return replace(plan, attention=tuple(sites))


def add_bases(plan: Plan, structure: Structure, average: float) -> Plan:
    """Give layers of one bit a second basis, as many as an average of ``average`` bits a weight has room for.

    They go where parameters are sparse and resolution is high: the layers with the most positions first (the two ends
    of a UNet, before and after its middle), among equals (the layers of a transformer) the smallest first.
    """
    positions = {info.name: info.positions for info in structure.layers}
    binary = [layer for layer in plan.layers if layer.weight_bits == 1]
    room = (average - plan.average_weight_bits) * sum(layer.weights for layer in plan.layers)
    doubled = set()
    for layer in sorted(binary, key=lambda layer: (-positions[layer.name], layer.weights)):
        if layer.weights <= room:
            room -= layer.weights
            doubled.add(layer.name)
    return replace(plan, layers=tuple(replace(p, bases=2) if p.name in doubled else p for p in plan.layers))


def add_bits(
    plan: Plan, average: float, choices: Mapping[str, Sequence[LayerPlan]], errors: Mapping[str, Sequence[float]]
) -> Plan:
    """Give every named layer one of its ``choices``, bits ascending and the first what it is in ``plan``, so that the
    sum of their ``errors`` is least within an average of ``average`` bits a weight."""
    room = (average - plan.average_weight_bits) * sum(layer.weights for layer in plan.layers)
    priced = {
        name: [(choice.size_bits, error) for choice, error in zip(found, errors[name], strict=True)]
        for name, found in choices.items()
    }
    chosen = {name: choices[name][place] for name, place in allocate(priced, room).items()}
    return replace(plan, layers=tuple(chosen.get(layer.name, layer) for layer in plan.layers))


def _outside_paper_coverage(name: str, module: nn.Module, structure: Structure) -> str | None:
    if name in structure.skip:
        return "coverage 'efficientdm' leaves skip connections in floating point"
    if name in structure.downsample:
        return "coverage 'efficientdm' leaves downsampling in floating point"
    if isinstance(module, nn.Conv1d):
        return "coverage 'efficientdm' leaves Conv1d attention in floating point"
    return None


def _type_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}
