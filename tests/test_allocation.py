"""Allocation of bits: the least error within the budget, by errors that one backward pass a direction measures."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from pipelines import source
from pydantic import ValidationError
from torch import Tensor, nn

from bitstep.denoiser.calls import run
from bitstep.denoiser.layers import weight_of
from bitstep.methods.binarydm import BINARYDM, BinaryWeights
from bitstep.numerics.allocation import allocate
from bitstep.quantizers.weights import DenseWeight, UniformWeight
from bitstep.stages.calibrate import record, stream
from bitstep.stages.load import load
from bitstep.stages.prepare import Student, prepare
from bitstep.stages.weight_errors import weight_errors
from bitstep.trajectories.pool import Pool


def test_steps_are_taken_by_what_they_lower_for_their_cost() -> None:
    choices = {
        "steep": [(1, 10.0), (2, 4.0), (4, 1.0)],  # lowers 6 for 1, then 3 for 2
        "bent": [(1, 8.0), (2, 7.9), (3, 2.0)],  # nothing worth taking in the middle: 6 for 2
        "flat": [(1, 1.0), (2, 1.0), (3, 2.0)],  # more bits, no less error
    }
    expected = {0: (0, 0), 1: (1, 0), 2: (1, 0), 3: (1, 2), 4: (1, 2), 5: (2, 2), 99: (2, 2)}
    for room, places in expected.items():
        assert allocate(choices, room) == {"steep": places[0], "bent": places[1], "flat": 0}
    assert allocate(choices, -1) == dict.fromkeys(choices, 0)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_within_the_budget_is_better_by_more_than_the_best_step_refused(seed: int) -> None:
    generator = random.Random(seed)
    choices = {}
    for name in "abcdefg":  # whose errors differ by orders of magnitude
        errors = sorted((10 ** generator.uniform(-2, 2) * generator.random() for _ in range(3)), reverse=True)
        choices[name] = list(zip(map(float, sorted(generator.sample(range(9), 3))), errors, strict=True))
    room = generator.uniform(2, 15)

    def cost(places: tuple[int, ...]) -> float:
        return sum(pairs[place][0] - pairs[0][0] for pairs, place in zip(choices.values(), places, strict=True))

    def error(places: tuple[int, ...]) -> float:
        return sum(pairs[place][1] for pairs, place in zip(choices.values(), places, strict=True))

    found = tuple(allocate(choices, room).values())
    assert cost(found) <= room
    # from where each name ended: what a further step lowers per cost, and in all
    refused = [
        ((pairs[place][1] - lower) / (dearer - pairs[place][0]), pairs[place][1] - lower)
        for pairs, place in zip(choices.values(), found, strict=True)
        for dearer, lower in pairs[place + 1 :]
    ]
    best = min(error(places) for places in itertools.product(range(3), repeat=len(choices)) if cost(places) <= room)
    assert error(found) - best <= max(refused, default=(0, 0))[1]


def recorded(name: str) -> tuple[nn.Module, Pool]:
    given = source(name)
    given.denoiser.requires_grad_(False)
    return given.denoiser, next(stream(given, images=4, batch_size=4, steps=4, seed=0))


@pytest.mark.parametrize("name", ["ddim", "stable_diffusion", "dit"])
def test_probes_measure_what_trying_each_layer_does(name: str) -> None:
    """Squared error of the guided output with one layer's weight rounded, timesteps weighed; one of these is zero."""
    denoiser, pool = recorded(name)
    importance = torch.tensor([0.0, 1.0, 2.0, 3.0])
    layers = [path for path, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    rounded = {
        path: [UniformWeight(DenseWeight(weight_of(denoiser.get_submodule(path))), bits).codes() for bits in (5, 8)]
        for path in layers[4::7]
    }
    found = weight_errors(denoiser, pool, rounded, importance)
    call, _ = pool.batch(torch.arange(len(pool)))
    with torch.no_grad():
        output = pool.guided(run(denoiser, call))
    for path, choices in rounded.items():
        weight = weight_of(denoiser.get_submodule(path))
        kept = weight.detach().clone()
        for choice, estimate in zip(choices, found[path], strict=True):
            with torch.no_grad():
                weight.copy_(choice.dequantize())
                change = (pool.guided(run(denoiser, call)) - output).square().flatten(1).mean(1)
                weight.copy_(kept)
            direct = float((change * importance[pool.step_of]).mean())
            assert direct / 2.5 < estimate < direct * 2.5  # a mean of 32 squared normal numbers
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())


def binary(teacher: nn.Module, pool: Pool, weights: BinaryWeights, bits: float) -> Student:
    method = BINARYDM.model_copy(update={"weights": weights})
    return prepare(teacher, pool, method, weight_bits=bits, activation_bits=8)


def test_measured_bits_pay_on_the_bundled_model(tmp_path: Path) -> None:
    """W1.1, untrained: where errors were measured, the same bits leave a fraction of the error on other noise."""
    source = load("demo:fruits32", device="cpu")
    source.denoiser.requires_grad_(False)
    pool = record(source, tmp_path / "pool", images=2, batch_size=2, steps=6, seed=0)
    unseen = record(source, tmp_path / "unseen", images=2, batch_size=2, steps=6, seed=1)
    call, target = unseen.batch(torch.arange(len(unseen)))

    def error(weights: BinaryWeights) -> float:
        student = binary(source.denoiser, pool, weights, 1.1)
        assert 1.09 < student.plan.average_weight_bits <= 1.1
        with torch.no_grad():
            difference: Tensor = run(student.denoiser, call) - target
        return float(difference.square().mean())

    assert error(BinaryWeights(allocation="measured")) < 0.7 * error(BinaryWeights())


def test_layers_with_a_rule_and_the_first_and_last_keep_their_bits() -> None:
    denoiser, pool = recorded("ddim")
    plain = binary(denoiser, pool, BinaryWeights(), 1).plan
    found = binary(denoiser, pool, BinaryWeights(allocation="measured"), plain.average_weight_bits + 0.5).plan
    bits = {layer.weight_bits for layer in found.layers if layer.trained}
    assert bits <= {1, 4, 8}
    assert [layer for layer in found.layers if not layer.trained] == [
        layer for layer in plain.layers if not layer.trained
    ]
    assert plain.average_weight_bits + 0.4 < found.average_weight_bits <= plain.average_weight_bits + 0.5


def test_evolvable_bases_leave_nothing_to_measure() -> None:
    with pytest.raises(ValidationError, match="nothing to measure"):
        BinaryWeights(evolvable=True, allocation="measured")
