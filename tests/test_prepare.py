"""Students: what they compute is what is packed, on any schedule, however few trajectories fit in memory at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler
from pipelines import source

from bitstep.denoiser.attention import attend, intercept
from bitstep.denoiser.calls import run
from bitstep.denoiser.layers import weight_of
from bitstep.recipe import resolve
from bitstep.runtime.dispatch import set_backend
from bitstep.stages.calibrate import stream
from bitstep.stages.load import Source
from bitstep.stages.pack import pack
from bitstep.stages.prepare import Student, prepare
from bitstep.stages.ranges import VALUES_PER_STEP, observe
from bitstep.trajectories.pool import Pool


def frozen(name: str) -> Source:
    given = source(name)
    given.denoiser.requires_grad_(False)
    return given


def prepared(teacher: Source, recipe: str, bits: str, *overrides: str) -> tuple[Student, Pool]:
    pool = next(stream(teacher, images=2, batch_size=2, steps=3, seed=0))
    resolved = resolve(recipe, bits, "quick", overrides)
    widths: Any = {"weight_bits": resolved.weight_bits, "activation_bits": resolved.activation_bits}
    return prepare(teacher.denoiser, pool, resolved.method, **widths), pool


def packed_error(student: Student, pool: Pool) -> float:
    """Relative error of the packed model, on the reference kernel, against the student, on all recorded calls."""
    call, _ = pool.batch(torch.arange(len(pool)))
    with torch.no_grad():
        expected = run(student.denoiser, call)
        packed = pack(student, {})
        set_backend(packed, "reference")
        return float((run(packed, call) - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("recipe", "bits", "rule"),
    [
        ("binarydm", "W1.3A32", "{match: conv_in, weight_bits: 1}"),  # elsewhere it has 8 bits, and is not trained
        ("binarydm", "W1.3A32", "{match: conv_in, weight_bits: 3}"),
        ("adaround", "W4A32", "{match: mid_block.*, weight_bits: 2}"),
        ("dilatequant", "W4A32", "{match: mid_block.*, activation_bits: 8}"),
        ("dilatequant", "W4A8", "{match: '*', activation_bits: 32}"),
    ],
)
def test_packed_equals_the_student_under_rules(recipe: str, bits: str, rule: str) -> None:
    student, pool = prepared(frozen("ddim"), recipe, bits, f"layers.rules=[{rule}]")
    assert packed_error(student, pool) == 0


def test_weights_alone_are_dilated_too() -> None:
    student, pool = prepared(source("ddim"), "dilatequant", "W4A32")
    assert len(student.rewritten.scales) > 20
    assert packed_error(student, pool) == 0


@pytest.mark.parametrize("recipe", ["binarydm", "dilatequant"])
def test_probabilities_reach_from_nothing_to_the_largest(recipe: str) -> None:
    teacher = source("ddim")
    student, pool = prepared(teacher, recipe, "W1.3A8" if recipe == "binarydm" else "W4A4")
    name, *_ = student.attention
    seen: list[torch.Tensor] = []

    def keep(operand: str, x: torch.Tensor) -> torch.Tensor:
        if operand == "probability":
            seen.append(x.amax())
        return x

    interception = intercept(teacher.denoiser.get_submodule(name), partial(attend, keep))
    with torch.no_grad():
        for step in range(len(pool.timesteps)):
            run(teacher.denoiser, pool.batch(pool.indices_at(step))[0])
    interception.remove()
    largest = torch.stack(seen)
    scale, zero_point = student.attention[name].tables()["probability"]
    torch.testing.assert_close(255 * scale, largest if len(scale) > 1 else largest.amax()[None])
    assert not zero_point.any()


def test_attention_in_floating_point_stays_so_whatever_rules_say_of_layers() -> None:
    rule = "layers.rules=[{match: mid_block.*, activation_bits: 8}]"
    assert not prepared(frozen("ddim"), "dilatequant", "W4A32", rule)[0].plan.attention
    assert prepared(frozen("ddim"), "dilatequant", "W4A4", rule)[0].plan.attention[0].bits == 4


def test_where_rounding_is_learned_weights_are_not() -> None:
    student, _ = prepared(frozen("ddim"), "adaround", "W4A4")
    layer = student.layers["mid_block.resnets.0.conv1"]
    assert {name for name, p in layer.weight_quantizer.named_parameters() if p.requires_grad} == {"rounding"}


def test_timesteps_may_be_any_numbers() -> None:
    teacher = frozen("stable_diffusion")
    teacher.pipeline.scheduler = EDMEulerScheduler(num_train_timesteps=1000)  # logarithms of noise levels
    student, pool = prepared(teacher, "efficientdm", "W4A4")
    assert pool.timesteps[0] < -1
    assert student.cursor.grid.unit == 1
    assert packed_error(student, pool) == 0


@pytest.mark.parametrize("name", ["ddim", "stable_diffusion"])
def test_ranges_do_not_depend_on_how_many_trajectories_run_at_a_time(name: str) -> None:
    teacher = frozen(name)
    pool = next(stream(teacher, images=3, batch_size=3, steps=2, seed=0))
    layers = [n for n, m in teacher.denoiser.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)][1:]
    together, apart = (observe(teacher.denoiser, pool, layers, images=3, batch_size=size) for size in (3, 2))
    for layer, whole in together.layers.items():
        part = apart.layers[layer]
        assert whole.values.shape == part.values.shape == (len(pool.timesteps), VALUES_PER_STEP)
        torch.testing.assert_close(part.low, whole.low, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(part.high, whole.high, rtol=1e-4, atol=1e-4)
        assert bool((part.values >= part.low.amin(1, keepdim=True)).all())
        assert float(part.values.std()) == pytest.approx(float(whole.values.std()), rel=0.2)


def test_layers_may_be_called_like_operands() -> None:
    teacher = frozen("ddim")
    pool = next(stream(teacher, images=1, batch_size=1, steps=2, seed=0))
    site = "mid_block.attentions.0"
    attention = teacher.denoiser.get_submodule(site)
    attention.register_module("query", attention.get_submodule("to_q"))
    found = observe(teacher.denoiser, pool, [f"{site}.query"], attention=[site], images=1, batch_size=1)
    channels = len(weight_of(attention.get_submodule("to_q")))
    assert found.layers[f"{site}.query"].low.shape == (2, channels)
    assert found.operands[site]["query"].low.shape == (2, 1)
    assert found.operands[site]["value"].low.shape == (2, channels)  # a layer that reads them may scale them


def test_adapters_start_from_the_seed_and_their_layer_alone() -> None:
    teacher = frozen("ddim")
    pool = next(stream(teacher, images=2, batch_size=2, steps=3, seed=0))

    def starts(seed: int, *overrides: str) -> dict[str, torch.Tensor]:
        method = resolve("efficientdm", "W4A4", "quick", overrides).method
        student = prepare(teacher.denoiser, pool, method, weight_bits=4, activation_bits=4, seed=seed)
        return {name: tensor for name, tensor in student.denoiser.named_parameters() if name.endswith("down")}

    state = torch.get_rng_state()
    first = starts(0)
    assert torch.equal(torch.get_rng_state(), state)
    without = starts(0, "layers.rules=[{match: down_blocks.0.resnets.0.conv1, skip: true}]")
    assert 0 < len(without) < len(first)
    assert all(torch.equal(tensor, first[name]) for name, tensor in without.items())
    assert not any(torch.equal(tensor, first[name]) for name, tensor in starts(1).items())
