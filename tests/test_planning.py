"""The plan: which layer gets how many bits, on every kind of denoiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import BUILDERS, source
from torch import Tensor, nn

from bitstep.denoiser.calls import Call
from bitstep.denoiser.structure import Structure, trace
from bitstep.errors import UsageError
from bitstep.planning import Plan, Rule, check_rules, plan_layers
from bitstep.stages.calibrate import stream


def _traced(name: str) -> tuple[nn.Module, Structure]:
    given = source(name)
    pool = next(stream(given, images=2, batch_size=2, steps=2, seed=0))
    return given.denoiser, trace(given.denoiser, pool.batch(pool.split(pool.indices_at(0), 2)[0])[0])


def _plan(denoiser: nn.Module, structure: Structure, **changes: Any) -> Plan:
    settings: dict[str, Any] = {"weight_bits": 4, "activation_bits": 4, "coverage": "full"}
    return plan_layers(denoiser, structure, **(settings | changes))


@pytest.mark.parametrize("name", BUILDERS)
def test_sensitive_layers_get_eight_bits_on_every_architecture(name: str) -> None:
    denoiser, structure = _traced(name)
    layers = {layer.name: layer for layer in _plan(denoiser, structure).layers}
    if name == "sd3":  # its norms have no parameters: one layer keeps its own
        assert structure.first not in layers
        layers[structure.first] = layers[structure.last]
    first, last = layers[structure.first], layers[structure.last]
    assert (first.weight_bits, first.activation_bits) == (8, None)
    assert (last.weight_bits, last.activation_bits) == (8, None)
    assert all(layers[name].weight_bits == 8 and not layers[name].trained for name in structure.time_embedding)
    assert all((layers[name].weight_bits, layers[name].activation_bits) == (4, 8) for name in structure.skip)
    others = set(layers) - {structure.first, structure.last, *structure.time_embedding, *structure.skip}
    assert {(layers[name].weight_bits, layers[name].activation_bits) for name in others} == {(4, 4)}


def test_a_rule_can_leave_activations_in_floating_point_or_quantize_them_again() -> None:
    denoiser, structure = _traced("ddim")
    rules = (Rule(match="*", activation_bits=32), Rule(match="*.conv2", activation_bits=8))
    layers = {layer.name: layer for layer in _plan(denoiser, structure, rules=rules).layers}
    floating = {name for name, layer in layers.items() if layer.activation_bits is None}
    assert {name for name in layers if not name.endswith(".conv2")} == floating
    with pytest.raises(ValueError, match="2 to 8 bits, or 32"):
        Rule(match="*", activation_bits=16)


def test_full_coverage_leaves_only_attention_products() -> None:
    denoiser, structure = _traced("ddim")
    decided = _plan(denoiser, structure)
    attention = sum(site.macs for site in structure.attention)
    assert sum(layer.macs for layer in decided.layers) == decided.total_macs - attention
    assert 0.9 < decided.coverage < 1


def test_the_papers_coverage_leaves_skips_and_downsampling() -> None:
    denoiser, structure = _traced("ddim")
    narrow = _plan(denoiser, structure, coverage="efficientdm")
    assert {*structure.skip, *structure.downsample} <= set(narrow.left_alone)
    assert narrow.coverage < _plan(denoiser, structure).coverage


def test_later_rules_win_and_unmatched_rules_are_errors() -> None:
    denoiser, structure = _traced("ddim")
    rules = (Rule(match="*", type="Conv2d", weight_bits=6), Rule(match="*.conv2", weight_bits=3, activation_bits=8))
    layers = {layer.name: layer for layer in _plan(denoiser, structure, rules=rules).layers}
    for name, layer in layers.items():
        if isinstance(denoiser.get_submodule(name), nn.Conv2d):
            assert layer.weight_bits == (3 if name.endswith(".conv2") else 6)
    with pytest.raises(UsageError, match="'nothing_like_it' matches no layer"):
        _plan(denoiser, structure, rules=(Rule(match="nothing_like_it", skip=True),))
    with pytest.raises(UsageError, match=r"of the names, '\S*attentions\.0\.to_q' is the nearest"):
        check_rules(denoiser, (Rule(match="*.attention.*.to_q", skip=True),))
    with pytest.raises(UsageError, match="no layer is left"):
        check_rules(denoiser, (Rule(match="*", skip=True),))
    with pytest.raises(UsageError, match="no layer is left"):
        _plan(denoiser, structure, rules=(Rule(match="*", skip=True),))


def test_a_layer_that_cannot_be_handled_is_left_alone_with_the_reason() -> None:
    given = source("ddim")
    old = given.denoiser.get_submodule("conv_in")
    assert isinstance(old, nn.Conv2d)
    reflecting = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, padding_mode="reflect")
    given.denoiser.set_submodule("conv_in", reflecting)
    pool = next(stream(given, images=2, batch_size=2, steps=2, seed=0))
    structure = trace(given.denoiser, pool.batch(pool.split(pool.indices_at(0), 2)[0])[0])
    assert "reflect" in _plan(given.denoiser, structure).left_alone["conv_in"]


class _AsksForADtype(nn.Module):
    """As Wan's transformer does."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 4))
        self.input, self.output = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4)) if scaled else 1

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        assert next(self.parameters()).dtype == torch.float32
        time = timestep[:, None].to(next(iter(self.time.parameters())).dtype)
        return self.output(self.input(sample) + self.time(time)) * self.scale  # type: ignore[no-any-return]


@pytest.mark.parametrize("scaled", [True, False])
def test_where_a_denoiser_looks_for_a_parameter_one_is_left(scaled: bool) -> None:
    denoiser = _AsksForADtype(scaled)
    call = Call({"sample": torch.randn(2, 4), "timestep": torch.tensor([3.0, 500.0])})
    structure = trace(denoiser, call)
    assert structure.asked == ("", "time")
    decided = _plan(denoiser, structure)
    (reason,) = decided.left_alone.values()
    assert "asked for a parameter" in reason
    assert {layer.name for layer in decided.layers} == {"time.2", "input", "output"}  # the smallest is left


def test_weight_only_plans_have_no_input_quantizers() -> None:
    denoiser, structure = _traced("dit")
    layers = _plan(denoiser, structure, activation_bits=32).layers
    assert {layer.activation_bits for layer in layers} == {None}
