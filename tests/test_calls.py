"""Recorded calls: what was seen is what the denoiser computes, whatever the pipeline, in any mixture of timesteps."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from pipelines import BUILDERS, build, source
from torch import Tensor, nn

from bitstep.denoiser.calls import Call, run, wrapped
from bitstep.denoiser.steps import StepGrid
from bitstep.errors import BitstepError
from bitstep.stages.calibrate import record, stream
from bitstep.stages.generate import generate_batch
from bitstep.stages.load import Source
from bitstep.trajectories.pool import Pool, PoolWriter
from bitstep.trajectories.recording import Recorder, Shard, fit_guidance

# weights of the chunks of an output, in the pipeline's own order, at guidance scale 3
GUIDANCE = {
    "stable_diffusion": [-2.0, 3.0],
    "dit": [3.0, -2.0],
    "pixart": [-2.0, 3.0],
    "sd3": [-2.0, 3.0],
}


class Scheduler:
    def step(self, model_output: Tensor) -> Tensor:
        return model_output


def in_memory(name: str, guidance_scale: float | None = None) -> tuple[Source, Pool]:
    given = source(name)
    return given, next(stream(given, images=3, batch_size=3, steps=3, seed=0, guidance_scale=guidance_scale))


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_the_denoiser_repeats_its_recorded_outputs_on_batches_that_mix_timesteps(name: str, tmp_path: Path) -> None:
    given = source(name)
    pool = record(given, tmp_path, images=4, batch_size=3, steps=3, seed=0)
    assert len(pool) == 4 * 3 * (2 if name == "z_image" else 1)  # guidance of a pair of unlike texts is two samples
    assert len(pool.timesteps) == 3
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    batches = pool.split(order, 7)
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(len(pool)))
    for indices in batches:
        call, target = pool.batch(indices)
        torch.testing.assert_close(run(given.denoiser, call), target, rtol=1e-4, atol=1e-4)
        chunks = 1 if pool.guidance is None else len(pool.guidance)
        assert torch.equal(call.timestep.double(), pool.timesteps[pool.step_of[indices]].repeat(chunks))
    assert any(len(pool.step_of[indices].unique()) > 1 for indices in batches)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", ["ddim", "flux", "animatediff"])
@torch.no_grad()
def test_small_batches_tell_what_has_a_batch_dimension(name: str, images: int) -> None:
    """Where most lengths are multiples of the batch: of position ids, and of a text repeated for every frame."""
    given = source(name)
    guidance_scale = 1.0 if name == "animatediff" else None
    pool = next(stream(given, images=images, batch_size=images, steps=3, seed=0, guidance_scale=guidance_scale))
    call, target = pool.batch(range(3))
    torch.testing.assert_close(run(given.denoiser, call), target, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_sample_may_have_a_timestep_for_every_token() -> None:
    """As in Wan 2.2; those of a first picture that is given are 0."""

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(1))

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample * timestep

    denoiser, scheduler, x = Denoiser(), Scheduler(), torch.randn(2, 3)
    with Recorder(denoiser, scheduler, range(2)) as recorder:
        for t in (8.0, 4.0):
            scheduler.step(denoiser(x, torch.tensor([[0.0, t, t]] * 2)))
    pool = Pool(recorder.shards(), 10)
    assert pool.timesteps.tolist() == [4, 8]
    call, target = pool.batch([0, 3])
    assert call.timestep.tolist() == [8, 4]
    assert torch.equal(run(denoiser, call), target)
    assert StepGrid((0.4, 0.8), 10.0).locate(call.arguments["timestep"]).lower.tolist() == [1, 0]


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_is_read_off_the_pipeline(name: str) -> None:
    _, pool = in_memory(name, guidance_scale=3.0)
    assert pool.guidance is not None
    torch.testing.assert_close(pool.guidance, torch.tensor(GUIDANCE[name]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ddim", "flux"])
def test_no_guidance_where_the_pipeline_has_none(name: str) -> None:
    assert in_memory(name)[1].guidance is None


@pytest.mark.parametrize(
    ("name", "expected"), [("ddim", None), ("dit", [3.0, -2.0]), ("stable_diffusion", [-2.0, 3.0])]
)
def test_a_bfloat16_teacher_is_recorded_as_it_is(name: str, expected: list[float] | None) -> None:
    given = source(name)
    given.pipeline.to(torch.bfloat16)
    scale = 3.0 if expected else None
    pool = next(stream(given, images=3, batch_size=3, steps=3, seed=0, guidance_scale=scale))
    _, target = pool.batch([0, 4, 8])
    assert target.dtype == torch.bfloat16
    if expected is None:
        assert pool.guidance is None
    else:
        torch.testing.assert_close(pool.guidance, torch.tensor(expected), rtol=1e-2, atol=1e-2)


def test_guided_samples_hold_the_chunks_of_one_image() -> None:
    _, pool = in_memory("dit", guidance_scale=3.0)
    call, _ = pool.batch([1, 7])
    latents, labels = call.arguments["hidden_states"], call.arguments["class_labels"]
    assert torch.equal(latents[:2], latents[2:])  # conditional and unconditional rows share the latent
    assert labels[2:].tolist() == [1000, 1000]
    assert labels[0] == labels[1]  # samples 1 and 7 are image 1 at the first and the last step
    assert call.timestep[0] > call.timestep[1]


def test_guidance_that_is_not_linear_leaves_every_row_a_sample_of_its_own() -> None:
    given = source("stable_diffusion")
    with Recorder(given.denoiser, given.pipeline.scheduler, range(2)) as recorder:
        given.pipeline(
            prompt=["a", "b"], num_inference_steps=2, guidance_scale=9.0, guidance_rescale=0.9, output_type="latent"
        )
    pool = Pool(recorder.shards(), 1000)
    assert pool.guidance is None
    assert len(pool) == 2 * 2 * 2


def test_guidance_in_two_passes_is_two_independent_calls() -> None:
    given = source("flux")
    with Recorder(given.denoiser, given.pipeline.scheduler, range(2)) as recorder:
        given.pipeline(
            prompt=["a", "b"],
            negative_prompt=["c", "c"],
            true_cfg_scale=3.0,
            num_inference_steps=2,
            output_type="latent",
        )
    pool = Pool(recorder.shards(), 1000)
    assert pool.guidance is None
    assert len(pool) == 2 * 2 * 2
    assert [len(pool.indices_at(step)) for step in range(2)] == [4, 4]


def test_a_fit_over_all_calls_finds_weights_that_no_single_call_could() -> None:
    generator = torch.Generator().manual_seed(0)
    grams = []
    for _ in range(32):
        first = torch.randn(100, generator=generator)
        second = first + 1e-4 * torch.randn(100, generator=generator)  # nearly the same: guidance early on a trajectory
        vectors = torch.stack([first, second, -2 * first + 3 * second]).double()
        grams.append(vectors @ vectors.T)
    eps = torch.finfo(torch.float32).eps
    weights = fit_guidance(grams, eps)
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([-2.0, 3.0]), rtol=1e-2, atol=1e-2)
    assert fit_guidance([*grams, None], eps) is None
    unrelated = torch.randn(3, 100, generator=generator).double()
    assert fit_guidance([*grams, unrelated @ unrelated.T], eps) is None


def test_flux_counts_time_in_fractions_and_passes_position_ids_through() -> None:
    _, pool = in_memory("flux")
    assert pool.unit == 1
    assert pool.timesteps.max() <= 1
    call, _ = pool.batch([0, 4, 8, 1])
    tokens = call.arguments["hidden_states"].shape[1]
    assert call.arguments["img_ids"].shape == (tokens, 3)
    assert in_memory("sd3")[1].unit == 1000


@torch.no_grad()
def test_position_ids_are_told_from_a_batch_of_the_same_length() -> None:
    given = source("flux")
    tokens = 16  # of the tiny pipeline's image
    pool = next(stream(given, images=tokens, batch_size=tokens, steps=1, seed=0))
    call, target = pool.batch(range(tokens - 1))
    assert call.arguments["img_ids"].shape == (tokens, 3)
    torch.testing.assert_close(run(given.denoiser, call), target, rtol=1e-4, atol=1e-4)


def test_a_call_keeps_its_nested_arguments() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(
            self, sample: Tensor, timestep: Tensor, added: dict[str, Tensor | None], scale: tuple[float, str]
        ) -> tuple[Tensor]:
            assert added["nothing"] is None
            assert scale == (0.5, "linear")
            assert added["embeds"] is not None
            return (self.weight * sample + added["embeds"] * scale[0] + timestep[:, None],)

    denoiser, scheduler = Denoiser(), Scheduler()
    with Recorder(denoiser, scheduler, range(4)) as recorder, torch.no_grad():
        for timestep in (8.0, 4.0):
            x = torch.randn(4, 3)
            scheduler.step(denoiser(x, torch.full((4,), timestep), {"embeds": x, "nothing": None}, (0.5, "linear"))[0])
    pool = Pool(recorder.shards(), 10)
    call, target = pool.batch([7, 0, 3])
    torch.testing.assert_close(run(denoiser, call), target)
    assert call.to("meta").arguments["added"]["embeds"].device.type == "meta"
    assert "step" not in vars(scheduler)


@pytest.mark.parametrize("stepped", [True, False])
@torch.no_grad()
def test_schedulers_may_be_stepped_for_others_or_not_at_all(stepped: bool) -> None:
    class Denoiser(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample * timestep[:, None]

    denoiser, scheduler, x = Denoiser(), Scheduler(), torch.randn(2, 3)
    denoiser.register_buffer("weight", torch.ones(1))
    with Recorder(denoiser, scheduler, range(2)) as recorder:
        if stepped:
            scheduler.step(x[:, :1])  # the output of another denoiser
        denoiser(x, torch.full((2,), 8.0))
    pool = Pool(recorder.shards(), 10)
    assert torch.equal(pool.guided(pool.batch([0, 1])[1]), 8 * x)


@pytest.mark.parametrize(("packed", "change"), [(True, 0.2), (True, 0.9), (False, 0.2)])
@torch.no_grad()
def test_a_row_by_itself_may_round_to_other_codes(packed: bool, change: float) -> None:
    """As in a packed model of four bits: what is batched is what changes least, if that is not everything."""

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(1))

        def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, places: Tensor) -> Tensor:
            if len(text) != len(sample):
                raise BitstepError("what the kernel of attention says of such shapes")
            return (sample + text + places.sum(0)) * (1 - change * (len(sample) == 1)) + 0 * timestep[:, None]

    denoiser, rows = Denoiser(), torch.rand(4, 3) + 1
    with Recorder(denoiser, Scheduler(), range(4)) as recorder:
        denoiser(rows, torch.full((4,), 8.0), rows, rows)
    if packed:
        vars(denoiser)["hf_quantizer"] = "what loading a packed model leaves there"
    if change > 0.5 or not packed:
        with pytest.raises(BitstepError, match="can be computed by itself"):
            recorder.shards()
    else:
        (shard,) = recorder.shards()
        assert shard.batched == {"call.sample": 1, "call.timestep": 1, "call.text": 1}


@torch.no_grad()
def test_calls_that_cannot_be_recorded_are_clear_errors() -> None:
    class Denoiser(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor | int, extra: object = None) -> Tensor:
            return sample

    def recorder() -> Recorder:
        return Recorder(denoiser, Scheduler(), range(2))

    denoiser = Denoiser()
    x = torch.randn(2, 3)
    with recorder(), pytest.raises(BitstepError, match=r"argument call\.extra: a object is no tensor or value"):
        denoiser(x, 1, object())
    with recorder(), pytest.raises(BitstepError, match=r"one timestep per sample of the batch of 2, got \[3\]"):
        denoiser(x, torch.ones(3))
    with recorder() as idle, pytest.raises(BitstepError, match="never called its Denoiser"):
        idle.shards()


def test_the_scheduler_is_left_as_it_was() -> None:
    scheduler = build("ddim").scheduler
    before = inspect.signature(scheduler.step)
    with wrapped(scheduler, "step", lambda step: lambda *args: step(*args)):
        assert "step" in vars(scheduler)
        assert inspect.signature(scheduler.step) == before  # pipelines look for eta and generator in it
    assert "step" not in vars(scheduler)


def shards() -> list[Shard]:
    pipeline = build("ddim")
    with Recorder(pipeline.unet, pipeline.scheduler, range(2)) as recorder:
        generate_batch(pipeline, range(2), steps=2, seed=0, output_type="latent")
    return recorder.shards()


def test_a_shard_that_the_index_does_not_list_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = PoolWriter(tmp_path, {"seed": 0}, 1000)
    writer.add(shards())

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.add(shards())
    assert len(PoolWriter(tmp_path, {"seed": 0}, 1000)) == 1
    assert len(Pool.open(tmp_path)) == 4


def test_a_full_disk_is_a_clear_error_and_leaves_the_pool_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = PoolWriter(tmp_path, {}, 1000)
    writer.add(shards())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bitstep.trajectories.pool.save_file", full)
    with pytest.raises(BitstepError, match="No space left"):
        writer.add(shards())
    assert len(Pool.open(tmp_path)) == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_damaged_pools_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(BitstepError, match="holds no pool"):
        Pool.open(tmp_path)
    PoolWriter(tmp_path, {}, 1000).add(shards())
    file = tmp_path / "calls-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BitstepError, match="cannot read"):
        Pool.open(tmp_path)
    (tmp_path / "pool.json").write_text('{"format_version": 99}')
    with pytest.raises(BitstepError, match="format version"):
        Pool.open(tmp_path)


def test_map_names_every_tensor() -> None:
    call = Call({"timestep": torch.ones(2), "extra": [torch.zeros(1), {"deep": torch.zeros(1)}]})
    names: list[str] = []
    call.map(lambda name, tensor: names.append(name) or tensor)  # type: ignore[func-returns-value]
    assert names == ["call.timestep", "call.extra.0", "call.extra.1.deep"]
