"""The baselines: learned rounding beats rounding to the nearest, and leaves nothing soft behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitstep.numerics import uniform
from bitstep.quantizers.rounding import AdaRoundWeight, relaxed, rounding_penalty
from bitstep.quantizers.weights import DenseWeight, UniformWeight


def problem() -> tuple[Tensor, Tensor]:
    """A weight, and inputs whose channels go together, so that rounding errors can cancel."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 24, generator=generator)
    x = torch.randn(256, 4, generator=generator) @ torch.randn(4, 24, generator=generator)
    return weight, x + 0.1 * torch.randn(256, 24, generator=generator)


def test_it_starts_at_the_weight_when_soft_and_at_the_nearest_code_when_hard() -> None:
    weight, _ = problem()
    learned, nearest = AdaRoundWeight(DenseWeight(weight), 4), UniformWeight(DenseWeight(weight), 4)
    assert torch.equal(learned.codes().codes, nearest.codes().codes)
    assert torch.equal(learned.fake(), learned.codes().dequantize())
    with relaxed([learned]):
        inside = (nearest.fake() - weight).abs() <= nearest.step_size()  # not clipped
        assert bool(((learned.fake() - weight).abs() < 5e-3)[inside].float().mean() > 0.9)
    assert torch.equal(learned.fake(), nearest.fake())


def test_weights_that_are_codes_start_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way their quotient by the step is rounded."""
    codes = torch.arange(-128, 128).repeat(512, 1)
    scale = torch.rand(512, generator=torch.Generator().manual_seed(0)) + 0.01
    monkeypatch.setattr(uniform, "search_range", lambda *_, **__: (scale, torch.full((512,), 128.0)))
    quantizer = AdaRoundWeight(DenseWeight(codes * scale[:, None]), 8)
    assert torch.equal(quantizer.codes().codes[0].int() - 128, codes.int())


def test_learned_rounding_beats_the_nearest() -> None:
    weight, x = problem()
    quantizer = AdaRoundWeight(DenseWeight(weight), 3)

    def error() -> Tensor:
        return (x @ (quantizer.fake() - weight).T).square().mean()

    nearest = float(error())
    optimizer = torch.optim.Adam([quantizer.rounding], lr=2e-2)
    for iteration in range(400):
        optimizer.zero_grad()
        with relaxed([quantizer]):
            pressure = 1.0 if iteration >= 80 else 0.0
            loss = error() + pressure * rounding_penalty(quantizer.up(), 20 - iteration / 400 * 18)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        up = quantizer.up()
        assert float(((up > 0.01) & (up < 0.99)).float().mean()) < 0.05
        assert float(error()) < 0.5 * nearest
