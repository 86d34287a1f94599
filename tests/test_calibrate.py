"""Calibration: trajectories that depend on the seed alone, and survive being killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)
from pipelines import BUILDERS, FRAMES, build, source

from bitstep.errors import BitstepError, UsageError
from bitstep.stages.calibrate import record, stream
from bitstep.stages.generate import generate, generate_batch
from bitstep.trajectories.pool import Pool, PoolWriter


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_an_interrupted_recording_continues_to_the_same_bytes(tmp_path: Path) -> None:
    settings = {"images": 5, "batch_size": 2, "steps": 3, "seed": 7, "guidance_scale": 2.0}
    record(source("dit"), tmp_path / "whole", **settings)  # type: ignore[arg-type]

    def kill(done: int, images: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(source("dit"), tmp_path / "killed", progress=kill, **settings)  # type: ignore[arg-type]
    first = tmp_path / "killed" / "calls-00000.safetensors"
    written = first.stat().st_mtime_ns
    record(source("dit"), tmp_path / "killed", **settings)  # type: ignore[arg-type]
    assert first.stat().st_mtime_ns == written
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_pool_with_other_settings_is_refused(tmp_path: Path) -> None:
    record(source("ddim"), tmp_path, images=2, batch_size=2, steps=2, seed=0)
    with pytest.raises(BitstepError, match="recorded with other settings"):
        record(source("ddim"), tmp_path, images=2, batch_size=2, steps=2, seed=1)


@torch.no_grad()
def test_texts_of_other_lengths_are_batched_by_themselves(tmp_path: Path) -> None:
    """Of two batches of prompts, each padded to its longest."""
    (pool,) = stream(source("stable_diffusion"), images=2, batch_size=2, steps=2, seed=0, guidance_scale=1.0)
    (shard,) = pool._shards
    text = "call.encoder_hidden_states"
    longer = replace(shard, tensors={**shard.tensors, text: torch.cat([shard.tensors[text]] * 2, 1)}, images=(2, 3))
    writer = PoolWriter(tmp_path, {}, 1000)
    for shards in ([shard], [longer], [shard]):
        writer.add(shards)
    pool = Pool.open(tmp_path)
    lengths = shard.tensors[text].shape[1] * torch.tensor([1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1])
    assert pool.commonest.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    batches = pool.split(torch.arange(12), 5)
    assert [len(batch) for batch in batches] == [5, 3, 4]
    drawn = [pool.draw(3, 0, "test", iteration) for iteration in range(40)]
    for indices in (*batches, *drawn):
        call, _ = pool.batch(indices)
        assert {call.arguments["encoder_hidden_states"].shape[1]} == set(lengths[indices].tolist())
    assert set(torch.cat(drawn).tolist()) == set(range(12))
    assert [lengths[indices[0]] for indices in drawn].count(lengths[4]) < 20
    assert pool.indices_at(0, images=3).tolist() == [2, 3, 6, 10, 11]
    assert torch.equal(pool.indices_at(0, images=0), pool.indices_at(0))  # rather those of others than none
    with pytest.raises(ValueError, match="one form"):
        pool.batch([0, 4])


def test_streaming_gives_the_calls_that_recording_stores(tmp_path: Path) -> None:
    pool = record(source("ddim"), tmp_path, images=4, batch_size=2, steps=2, seed=0)
    _, second = stream(source("ddim"), images=4, batch_size=2, steps=2, seed=0)
    (stored, target), (call, output) = pool.batch([4, 5, 6, 7]), second.batch([0, 1, 2, 3])
    assert torch.equal(call.arguments["sample"], stored.arguments["sample"])
    assert torch.equal(call.timestep, stored.timestep)
    assert torch.equal(output, target)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch's own, of RMSNorm
@pytest.mark.parametrize("name", BUILDERS)
def test_only_the_denoiser_computes_in_bfloat16(name: str) -> None:
    settings: dict[str, Any] = {"images": 2, "batch_size": 2, "steps": 2, "seed": 0}
    whole, half = (next(stream(source(name), bf16=bf16, **settings)) for bf16 in (False, True))
    first = whole.commonest[:2]  # of the denoiser's first call: all that it is given the rest of the pipeline computed
    (call, output), (half_call, half_output) = whole.batch(first), half.batch(first)
    given: dict[str, torch.Tensor] = {}
    call.map(lambda path, tensor: given.setdefault(path, tensor))
    half_call.map(lambda path, tensor: torch.testing.assert_close(tensor, given[path], rtol=0, atol=0) or tensor)
    assert 0 < (half_output - output).norm() < 0.1 * output.norm()
    assert half.batch(half.commonest[2:4])[0].arguments.keys() == call.arguments.keys()


@pytest.mark.parametrize(("name", "unit"), [("ddim", 1000), ("dit", 1000), ("flux", 1)])
def test_a_single_step_counts_as_any_other(name: str, unit: float) -> None:
    assert next(stream(source(name), images=1, batch_size=1, steps=1, seed=0)).unit == unit


@pytest.mark.parametrize("name", BUILDERS)
def test_an_image_is_the_same_in_every_batch(name: str) -> None:
    pipeline = build(name)
    together = torch.cat(list(generate(pipeline, images=3, batch_size=3, steps=2, seed=1)))
    frames = [FRAMES] if name == "animatediff" else []
    assert together.shape == (3, *frames, 3, 8, 8)
    assert 0 <= together.min() <= together.max() <= 1
    assert not torch.equal(together[0], together[1])
    apart = torch.cat(list(generate(pipeline, images=3, batch_size=2, steps=2, seed=1)))
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "scheduler", "eta"),
    [
        ("ddim", DDIMScheduler, 1.0),
        ("latent_vq", DDIMScheduler, 1.0),  # this pipeline does not hand its generator to the scheduler
        ("dit", DDIMScheduler, 1.0),  # nor this one, which also steps both halves of a guided batch
        ("dit", DDPMScheduler, None),
        ("stable_diffusion", EulerAncestralDiscreteScheduler, None),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, with NumPy 2
def test_added_noise_depends_on_the_image_alone(name: str, scheduler: type[DDIMScheduler], eta: float | None) -> None:
    pipeline = build(name)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)

    def images(numbers: range, **options: float | None) -> torch.Tensor:
        return generate_batch(pipeline, numbers, steps=3, seed=0, output_type="pt", **options)  # type: ignore[arg-type]

    together = images(range(3), eta=eta)
    torch.testing.assert_close(images(range(1, 2), eta=eta), together[1:2], rtol=1e-3, atol=1e-3)
    assert torch.equal(images(range(3), eta=eta), together)
    if eta is not None:
        assert not torch.allclose(images(range(3), eta=0.0), together, atol=1e-3)


def test_class_labels_and_prompts_belong_to_images() -> None:
    pool = next(stream(source("dit"), images=6, batch_size=6, steps=1, seed=0, guidance_scale=1.0))
    labels = pool.batch(range(6))[0].arguments["class_labels"]
    assert len(labels.unique()) > 1
    _, again = stream(source("dit"), images=6, batch_size=3, steps=1, seed=0, guidance_scale=1.0)
    assert torch.equal(again.batch(range(3))[0].arguments["class_labels"], labels[3:])

    text = next(
        stream(source("sd3"), images=4, batch_size=4, steps=1, seed=0, guidance_scale=1.0, prompts=["a c", "t o b"])
    )
    embeddings = text.batch(range(4))[0].arguments["pooled_projections"]
    torch.testing.assert_close(embeddings[:2], embeddings[2:])
    assert not torch.allclose(embeddings[0], embeddings[1])


def test_a_teacher_that_yields_nan_is_refused(tmp_path: Path) -> None:
    broken = source("ddim")
    broken.pipeline.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(BitstepError, match="at timestep 999 is not finite"):
        record(broken, tmp_path, images=2, batch_size=2, steps=2, seed=0)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_the_scheduler_is_not_given_does_not_count() -> None:
    pool = next(stream(source("dit"), images=2, batch_size=2, steps=2, seed=0, guidance_scale=4.0))
    _, target = pool.batch(range(4))  # chunk by chunk, with a learned variance
    epsilon = target[:, :4]
    torch.testing.assert_close(pool.guided(target), 4 * epsilon[:4] - 3 * epsilon[4:], rtol=1e-4, atol=1e-4)


def test_a_pipeline_that_needs_an_image_after_all_is_refused() -> None:
    edits = StableDiffusionImg2ImgPipeline(**build("stable_diffusion").components)
    with pytest.raises(BitstepError, match=r"Img2ImgPipeline failed, in 2 steps: .*; if it needs .*--pictures"):
        next(generate(edits, images=1, batch_size=1, steps=2, seed=0))


def test_settings_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="takes no prompts"):
        next(generate(build("ddim"), images=1, batch_size=1, steps=1, seed=0, prompts=["a cat"]))
    with pytest.raises(UsageError, match="DDIMPipeline takes no pictures"):
        next(generate(build("ddim"), images=1, batch_size=1, steps=1, seed=0, pictures=["a.png"]))
    with pytest.raises(UsageError, match="takes no guidance"):
        next(generate(build("ddim"), images=1, batch_size=1, steps=1, seed=0, guidance_scale=2.0))


def test_a_pipeline_that_needs_an_image_is_refused() -> None:
    pipeline = build("ddim")

    class Editing(type(pipeline)):  # type: ignore[misc]
        def __call__(self, image, num_inference_steps=1, generator=None):  # type: ignore[no-untyped-def]
            raise AssertionError

    with pytest.raises(BitstepError, match="also needs image"):
        next(generate(Editing(pipeline.unet, pipeline.scheduler), images=1, batch_size=1, steps=1, seed=0))
