"""Time: grids, cursors on real forward passes, interpolation, checkpointing."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitstep.denoiser.steps import StepCursor, StepError, StepGrid, interpolate, interpolate_scale, per_sample
from bitstep.quantizers.activations import ActivationQuantizer

UNIT = 1000.0


def _trailing(steps: int) -> Tensor:
    """DDIM's trailing timesteps, as diffusers spaces them."""
    return torch.arange(1000, 0, -1000 / steps).round() - 1


class Denoiser(nn.Module):
    """Two quantized stages; keeps the scale that each sample was quantized with."""

    def __init__(self, grid: StepGrid) -> None:
        super().__init__()
        self.cursor = StepCursor(grid)
        rows = torch.arange(1.0, len(grid) + 1)
        self.first = ActivationQuantizer(8, rows * 1e-3, torch.zeros(len(grid)), self.cursor)
        self.second = ActivationQuantizer(8, rows, torch.zeros(len(grid)), self.cursor)
        self.cursor.attach(self)
        self.checkpointed = False

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        if self.checkpointed:
            hidden: Tensor = self.cursor.checkpoint(self.first, sample)
        else:
            hidden = self.first(sample)
        return hidden + interpolate_scale(self.second.tables()[0], self.cursor.position).detach().reshape(-1, 1)


def test_rows_are_exact_on_the_keys_in_any_order() -> None:
    timesteps = _trailing(100)
    grid = StepGrid.from_timesteps(timesteps, UNIT)
    table = torch.rand(100) + 0.1
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    expected = table[torch.argsort(torch.argsort(timesteps))]  # ascending keys
    for i in order.tolist():
        position = grid.locate(timesteps[i])
        assert position.fraction is None
        assert interpolate_scale(table, position).item() == expected[i].item()


def test_a_position_follows_its_table_to_another_device() -> None:
    grid = StepGrid((0.1, 0.9), UNIT)
    between = grid.locate(500)
    assert between.to(torch.device("cpu")) is between
    moved = between.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.lower, moved.upper, moved.fraction) if tensor is not None} == {
        "meta"
    }
    assert grid.locate(900).to(torch.device("meta")).fraction is None


@pytest.mark.parametrize("steps", [20, 37])
def test_a_table_of_100_steps_serves_other_schedules(steps: int) -> None:
    """Log-linear tables are reproduced exactly by interpolation; strides of the grid hit its rows."""
    grid = StepGrid.from_timesteps(_trailing(100), UNIT)
    keys = torch.tensor(grid.keys)
    scale, zero_point = torch.exp(2 * keys), 100 * keys
    for timestep in _trailing(steps):
        position = grid.locate(timestep)
        if steps == 20:
            assert position.fraction is None
        assert interpolate_scale(scale, position).item() == pytest.approx(
            float(torch.exp(2 * timestep / UNIT)), rel=1e-5
        )
        assert interpolate(zero_point, position).item() == pytest.approx(float(timestep / 10), rel=1e-4)


def test_outside_the_keys_the_nearest_row_serves() -> None:
    grid = StepGrid((0.2, 0.4), UNIT)
    table = torch.tensor([1.0, 2.0])
    assert interpolate_scale(table, grid.locate(0)).item() == 1
    assert interpolate_scale(table, grid.locate(999)).item() == 2


@pytest.mark.parametrize("timestep", [-1.0, 1500.0, float("nan")])
def test_impossible_timesteps_are_refused(timestep: float) -> None:
    with pytest.raises(StepError, match="outside"):
        StepGrid((0.2, 0.4), UNIT).locate(timestep)


def test_fractional_timesteps_have_unit_one() -> None:
    grid = StepGrid.from_timesteps(torch.tensor([0.1, 0.5, 1.0]), 1.0)
    assert interpolate_scale(torch.tensor([1.0, 2.0, 4.0]), grid.locate(0.5)).item() == 2


def test_a_batch_mixes_timesteps_and_each_sample_gets_its_row() -> None:
    timesteps = _trailing(10)
    model = Denoiser(StepGrid.from_timesteps(timesteps, UNIT))
    x = torch.rand(10, 6)
    mixed = model(x, timesteps)
    alone = torch.cat([model(x[i : i + 1], timesteps[i]) for i in range(10)])
    assert torch.equal(mixed, alone)


def test_guidance_in_one_pass_or_two_gives_the_same() -> None:
    model = Denoiser(StepGrid.from_timesteps(_trailing(10), UNIT))
    x = torch.rand(4, 6)
    together = model(torch.cat([x, x]), timestep=torch.tensor(499))
    assert torch.equal(together, torch.cat([model(x, torch.tensor(499)), model(x, 499)]))


def test_folded_heads_repeat_the_row_of_their_sample() -> None:
    rows = torch.tensor([1.0, 2.0])
    assert per_sample(rows, torch.zeros(6, 5, 5)).flatten().tolist() == [1, 1, 1, 2, 2, 2]
    with pytest.raises(StepError, match="cannot be shared"):
        per_sample(rows, torch.zeros(5, 2))


def test_outside_a_forward_pass_there_is_no_position() -> None:
    model = Denoiser(StepGrid.from_timesteps(_trailing(10), UNIT))
    with pytest.raises(StepError, match="no timestep is set"):
        model.first(torch.rand(2, 3))
    model(torch.rand(2, 3), 99)
    with pytest.raises(StepError, match="no timestep is set"):
        model.first(torch.rand(2, 3))
    with pytest.raises(IndexError):
        model(torch.rand(2, 3, 4)[:, :, 0][0:0].reshape(1, 0)[:, 5], 99)
    with pytest.raises(StepError):  # cleared although the forward pass failed
        _ = model.cursor.position


def test_a_model_without_a_timestep_argument_is_refused() -> None:
    with pytest.raises(StepError, match="with an argument named timestep"):
        StepCursor(StepGrid((0.5,), 1.0)).attach(nn.Linear(2, 2))


def test_threads_have_positions_of_their_own() -> None:
    cursor = StepCursor(StepGrid((0.2, 0.6), 1.0))
    with cursor.at(0.2), ThreadPoolExecutor() as threads, pytest.raises(StepError, match="no timestep is set"):
        threads.submit(lambda: cursor.position).result()


def test_a_deep_copy_has_a_cursor_of_its_own() -> None:
    model = Denoiser(StepGrid.from_timesteps(_trailing(10), UNIT))
    twin = copy.deepcopy(model)
    assert twin.cursor is not model.cursor
    assert twin.first.cursor is twin.cursor is twin.second.cursor
    x = torch.rand(2, 3)
    assert torch.equal(twin(x, 99), model(x, 99))


def test_gradient_checkpointing_recomputes_at_the_first_position() -> None:
    """Two forward passes at different timesteps before one backward: a stale cursor would mix up their rows."""
    timesteps = _trailing(10)
    model = Denoiser(StepGrid.from_timesteps(timesteps, UNIT))
    x = torch.rand(4, 6) * 3

    def gradient(checkpointed: bool) -> Tensor:
        model.checkpointed = checkpointed
        model.zero_grad()
        first, second = model(x, timesteps[2]), model(x, timesteps[7])
        (first.square().sum() + second.square().sum()).backward()
        assert model.first.log_scale.grad is not None
        return model.first.log_scale.grad.clone()

    plain = gradient(False)
    assert plain.count_nonzero() == 2
    assert torch.equal(plain, gradient(True))
