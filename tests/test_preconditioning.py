"""Output preconditioning: the fit, what is done to the outputs of every kind of denoiser, and that it pays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import BUILDERS, build
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bitstep
from bitstep.checkpoint.config import BitstepConfig
from bitstep.denoiser.calls import run, sample_name, stacked
from bitstep.denoiser.preconditioning import Preconditioning, fit, moments, shared
from bitstep.denoiser.steps import StepCursor, StepGrid
from bitstep.errors import BitstepError, UsageError
from bitstep.recipe import resolve
from bitstep.stages.calibrate import stream
from bitstep.stages.load import Source, load
from bitstep.stages.precondition import check_preconditionable, finished, precondition
from bitstep.stages.prepare import prepare


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_faithful_output_is_left_alone() -> None:
    target, sample = _noise(0, 4, 3, 16, 16), _noise(1, 4, 3, 16, 16)
    assert fit(moments(target, sample, target), averaged=2.0) == pytest.approx((1, 0), abs=1e-6)


@pytest.mark.parametrize("gain", [1.0, -3.0])
@pytest.mark.parametrize("averaged", [1.0, 2.0, 5.0])
def test_noise_is_weighed_against_what_the_sample_cannot_say(averaged: float, gain: float) -> None:
    """target = sample + 0.1 r, output = gain * (target + 0.2 n): of what the sample does not say a fifth is picture."""
    shape = (16, 3, 32, 32)
    sample, signal, noise = _noise(0, *shape), 0.1 * _noise(1, *shape), 0.2 * _noise(2, *shape)
    target = sample + signal
    output = gain * (target + noise)
    out, skip = fit(moments(output, sample, target), averaged)
    assert gain * out == pytest.approx(0.01 / (0.01 + 0.04 / averaged), rel=0.05)
    assert skip == pytest.approx(1 - gain * out, rel=0.05)
    if averaged == 1:  # least squares: nothing near it is closer

        def error(out: float, skip: float) -> float:
            return float((out * output + skip * sample - target).square().mean())

        for nearby in ((out + 0.02, skip), (out - 0.02, skip), (out, skip + 0.02), (out, skip - 0.02)):
            assert error(out, skip) < error(*nearby)


def test_an_output_of_zeros_is_fitted_by_the_sample_alone() -> None:
    sample = _noise(0, 2, 3, 8, 8)
    out, skip = fit(moments(torch.zeros_like(sample), sample, 0.5 * sample), averaged=2.0)
    assert out == 0
    assert skip == pytest.approx(0.5)


class _Denoiser(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (torch.ones(len(sample), self.channels, *sample.shape[2:]),)


def attached(denoiser: nn.Module) -> Preconditioning:
    cursor = StepCursor(StepGrid((0.2, 0.6), 10.0))
    tables = Preconditioning(cursor)
    tables.attach(denoiser)
    cursor.attach(denoiser)
    tables.out.copy_(torch.tensor([2.0, 4.0]))
    tables.skip.copy_(torch.tensor([0.0, 10.0]))
    return tables


def test_every_sample_has_the_numbers_of_its_timestep_and_between_keys_their_mean() -> None:
    denoiser = _Denoiser(3)
    attached(denoiser)
    sample = _noise(0, 3, 3, 4, 4)
    (output,) = denoiser(sample, torch.tensor([2.0, 4.0, 6.0]))
    for row, (out, skip) in enumerate([(2, 0), (3, 5), (4, 10)]):
        assert torch.allclose(output[row], out + skip * sample[row])


@pytest.mark.parametrize(("of_sample", "of_output"), [(2, 4), (4, 2)], ids=["learned variance", "inpainting"])
def test_channels_that_only_one_of_the_two_has_are_left_alone(of_sample: int, of_output: int) -> None:
    denoiser = _Denoiser(of_output)
    attached(denoiser)
    sample = _noise(0, 1, of_sample, 4, 4)
    (output,) = denoiser(timestep=torch.tensor(6.0), sample=sample)
    assert torch.allclose(output[:, :2], 4 + 10 * sample[:, :2])
    assert bool((output[:, 2:] == 1).all())


def preconditioned(source: Source, steps: int, averaged: float | None) -> tuple[nn.Module, Preconditioning]:
    """A W4A4 copy of the denoiser, and its tables."""
    source.denoiser.requires_grad_(False)
    pool = next(stream(source, images=4, batch_size=4, steps=steps, seed=0))
    method = resolve("mse", "W4A4", "quick", []).method
    student = prepare(source.denoiser, pool, method, weight_bits=4, activation_bits=4)
    tables = precondition(source, student, pool, images=4, batch_size=3, averaged=averaged, steps=steps, seed=0)
    return student.denoiser, tables


@pytest.mark.parametrize("name", BUILDERS)
def test_every_denoiser_comes_closer_to_its_teacher(name: str) -> None:
    pipeline = build(name)
    source = Source(name, pipeline)
    student, tables = preconditioned(source, 3, averaged=1)
    pool = next(stream(source, images=4, batch_size=4, steps=3, seed=0))

    def error() -> list[float]:
        found = []
        for step in range(len(pool.timesteps)):
            squares = []
            for indices in pool.split(pool.indices_at(step), 4):
                call, target = pool.batch(indices)
                with torch.no_grad():
                    error, _ = shared(run(student, call) - target, stacked(call.arguments[sample_name(student)]))
                squares.append(pool.guided(error).square().flatten())
            found.append(float(torch.cat(squares).mean()))
        return found

    after = error()
    tables.out.fill_(1.0)
    tables.skip.fill_(0.0)
    before = error()
    assert all(fitted <= plain for fitted, plain in zip(after, before, strict=True))
    assert min(fitted / plain for fitted, plain in zip(after, before, strict=True)) < 0.999


def test_a_denoiser_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = build("ddim")
    source = Source("ddim", pipeline)
    pool = next(stream(source, images=1, batch_size=1, steps=1, seed=0))
    check_preconditionable(source.denoiser, pool)
    call, target = pool.batch([0])
    monkeypatch.setattr(pool, "batch", lambda _: (call, target[..., :-1]))
    with pytest.raises(UsageError, match="cannot be preconditioned"):
        check_preconditionable(source.denoiser, pool)


def test_it_pays_on_the_bundled_model() -> None:
    """On noise that the fit has not seen, the error at the first steps falls to less than a third."""
    source = load("demo:fruits32", device="cpu")
    student, tables = preconditioned(source, 8, averaged=2)
    unseen = next(stream(source, images=4, batch_size=4, steps=8, seed=1))
    call, target = unseen.batch(unseen.indices_at(len(unseen.timesteps) - 2))
    with torch.no_grad():
        fitted = (run(student, call) - target).square().mean()
        tables.out.fill_(1.0)
        tables.skip.fill_(0.0)
        plain = (run(student, call) - target).square().mean()
    assert fitted < plain / 3


def test_trajectories_end_nearest_with_what_is_measured() -> None:
    source = load("demo:fruits32", device="cpu")
    errors = {}
    for averaged in (None, 2.0, 64.0):
        student, _ = preconditioned(source, 8, averaged)
        ends = partial(finished, source, batch_size=5, steps=8, seed=0)
        change = ends(student) - ends(source.denoiser)
        errors[averaged] = float(change.square().flatten(1).mean(1).log().mean())
    assert errors[None] == min(errors.values())
    assert errors[None] < errors[2.0] - 0.1


def test_what_would_only_do_harm_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitstep.stages.precondition.AVERAGED", (0.01,))  # all that is not the sample's, nearly removed
    _, tables = preconditioned(Source("ddim", build("ddim")), 3, averaged=None)
    assert bool((tables.out == 1).all() & (tables.skip == 0).all())


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small packed pipeline with a preconditioned output and three keys."""
    folder = tmp_path_factory.mktemp("preconditioned")
    build("ddim").save_pretrained(folder / "source")
    overrides = [
        "output.preconditioned=true",
        "calibration.images=4",
        "calibration.steps=3",
        "calibration.batch_size=4",
    ]
    return bitstep.quantize(folder / "source", out=folder / "packed", recipe="mse", overrides=overrides, device="cpu")


def test_packed_models_keep_it(packed: Path, tmp_path: Path) -> None:
    denoiser: Any = load(packed, device="cpu").denoiser
    tables = denoiser.get_submodule("preconditioning")
    assert isinstance(tables, Preconditioning)
    denoiser.save_pretrained(tmp_path / "again")
    saved, again = (next(folder.glob("*.safetensors")) for folder in (packed / "unet", tmp_path / "again"))
    assert saved.read_bytes() == again.read_bytes()

    grid, sample = tables.cursor.grid, _noise(0, 2, 3, 16, 16)
    timestep, out_, skip = torch.tensor(grid.keys[-1] * grid.unit), float(tables.out[-1]), float(tables.skip[-1])
    assert skip != 0
    with torch.no_grad():
        passes = [denoiser(sample, timestep).sample for _ in range(5)]  # recorded, proven and replayed
        tables.out.fill_(1.0)
        tables.skip.fill_(0.0)
        plain = denoiser(sample, timestep).sample
    assert all(torch.equal(passes[0], other) for other in passes[1:])
    assert torch.allclose(passes[0], out_ * plain + skip * sample, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("preconditioning.out", lambda table: table / 0, "not every value is finite"),
        ("preconditioning.skip", lambda table: table * torch.nan, "not every value is finite"),
        ("preconditioning.skip", lambda table: table[:2], "expected the shape"),
        ("preconditioning.out", lambda table: table.double(), "expected torch.float32"),
        ("preconditioning.out", None, "the weights lack 1 tensors"),
    ],
    ids=["infinite", "not a number", "short", "float64", "missing"],
)
def test_damaged_tables_are_refused(
    packed: Path, tmp_path: Path, name: str, damage: Callable[[Tensor], Tensor] | None, why: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(packed, folder)
    weights = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    table = tensors.pop(name)
    save_file(tensors | ({} if damage is None else {name: damage(table).contiguous()}), weights, {"format": "pt"})
    with pytest.raises(BitstepError, match=why):
        load(folder, device="cpu")


def test_it_needs_a_step_grid(packed: Path) -> None:
    fields = json.loads((packed / "unet" / "config.json").read_text())["quantization_config"]
    static = {name: entry | {"steps": min(1, entry["steps"])} for name, entry in fields["layers"].items()}
    with pytest.raises(BitstepError, match="needs a step grid"):
        BitstepConfig(**fields | {"step_grid": None, "layers": static})
