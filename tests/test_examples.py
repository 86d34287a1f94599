"""The scripts in examples/, which are no part of the package."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_teacher
from train_teacher import Settings, states, train

import bitstep

SETTINGS = Settings(steps=4, batch_size=2, channels=(32, 32))
PIXELS = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_killed_training_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, (_, loss) = train(PIXELS, SETTINGS, tmp_path / "whole")
    monkeypatch.setattr(train_teacher, "SECONDS_BETWEEN_STATES", -1)
    state = tmp_path / "killed.state"
    for step, _ in islice(train(PIXELS, SETTINGS, tmp_path / "killed"), 2):
        assert [path.name for path in states(state)] == [str(step)]
    (state / "3.tmp").mkdir()  # killed again, while it saved the third
    resumed = list(train(PIXELS, SETTINGS, tmp_path / "killed"))
    assert [step for step, _ in resumed] == [3, 4]
    assert torch.equal(resumed[-1][1], loss)
    whole, killed = (bitstep.load(tmp_path / name).denoiser for name in ("whole", "killed"))
    assert all(map(torch.equal, whole.parameters(), killed.parameters()))
    fresh = train_teacher.unet(SETTINGS.channels).half().float()
    assert not any(map(torch.equal, whole.parameters(), fresh.parameters()))


def test_what_it_saves_is_a_pipeline(tmp_path: Path) -> None:
    list(train(PIXELS, replace(SETTINGS, steps=1), tmp_path / "teacher"))
    images = bitstep.sample(tmp_path / "teacher", num=2, steps=2)
    assert images.shape == (2, 32, 32, 3)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [Settings(steps=300, learning_rate=1.0).learning_rate_at(step) for step in range(300)]
    assert rates[0] == pytest.approx(1 / 30)
    assert rates[29:200] == [1.0] * 171
    assert rates[299] == pytest.approx(0.01)
