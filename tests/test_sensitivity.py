"""How far errors carry: measured by disturbing real pipelines, at the end equal to the sampler's own coefficient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pipelines import BUILDERS, source

from bitstep.methods.base import Context
from bitstep.stages.calibrate import stream
from bitstep.stages.generate import generate_batch
from bitstep.stages.sensitivity import sensitivity


@pytest.mark.parametrize("name", BUILDERS)
def test_every_pipeline_is_measured_and_left_as_it_was(name: str) -> None:
    given = source(name)

    def sample() -> torch.Tensor:
        return generate_batch(given.pipeline, [0], output_type="pt", steps=2, seed=0)

    before = sample()
    found = sensitivity(given, torch.linspace(0, 1000, 5), steps=2, seed=0)
    assert found.shape == (5,)
    assert bool((found > 1e-11).all())  # not where it ends if the disturbance never arrives
    assert "forward" not in vars(given.denoiser)
    assert torch.equal(sample(), before)


def test_the_last_step_has_the_coefficient_of_the_sampler() -> None:
    given = source("stable_diffusion")
    found = sensitivity(given, torch.tensor([0.0]), steps=4, seed=0, guidance_scale=1.0)
    # x_0 = a' (x - sigma eps) / a + sigma' eps, from the last timestep (a, sigma) to the final one (a', sigma')
    scheduler = given.pipeline.scheduler
    products = scheduler.alphas_cumprod
    last, final = float(products[scheduler.timesteps[-1]]), float(products[0])
    coefficient = math.sqrt(1 - final) - math.sqrt(final * (1 - last) / last)
    assert float(found) == pytest.approx(coefficient**2, rel=1e-3)


def test_interpolation_is_between_measured_timesteps() -> None:
    given = source("ddim")
    two = sensitivity(given, torch.tensor([499.0, 999.0]), steps=2, seed=0)
    three = sensitivity(given, torch.tensor([499.0, 749.0, 999.0]), steps=2, seed=0)
    assert torch.equal(three[[0, 2]], two)
    assert float(three[1]) == pytest.approx(math.sqrt(float(two[0] * two[1])), rel=1e-4)


def test_weights_follow_the_sensitivity_of_each_sample() -> None:
    pool = next(stream(source("ddim"), images=2, batch_size=2, steps=2, seed=0))
    rest: dict[str, Any] = dict.fromkeys(("teacher", "student", "structure", "cursor", "folder"))
    context = Context(layers={}, pool=pool, seed=0, sensitivity=torch.tensor([1.0, 16.0]), **rest)
    late, early = pool.timesteps.float()
    weights = context.loss_weights(torch.stack([early, late, late]), 0.5)
    assert weights.tolist() == pytest.approx([4 / 2.5, 1 / 2.5, 1 / 2.5])
    assert context.loss_weights(torch.stack([early, late]), 0.0).tolist() == [1, 1]
