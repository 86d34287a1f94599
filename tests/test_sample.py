"""Samples, on the kernel that was asked for, and images to files and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDIMScheduler
from PIL import Image
from pipelines import FRAMES, build
from torch import nn

from bitstep import api
from bitstep.errors import BitstepError, UsageError
from bitstep.runtime.dispatch import KERNELS
from bitstep.stages.generate import generate
from bitstep.stages.sample import default_steps, grid, holds_images, read, sample, save


def numbered(count: int) -> torch.Tensor:
    """Images 4 pixels wide and 3 high, each of one colour."""
    colours = torch.arange(1, 3 * count + 1, dtype=torch.uint8).reshape(count, 1, 1, 3)
    return colours.expand(count, 3, 4, 3).contiguous()


def test_samples_are_bytes_and_depend_on_the_seed() -> None:
    pipeline = build("ddpm")
    images = sample(pipeline, num=5, batch_size=2, steps=3, seed=7)
    assert images.dtype == torch.uint8
    assert images.shape == (5, 8, 8, 3)
    assert not torch.equal(images, sample(pipeline, num=5, batch_size=2, steps=3, seed=8))


def test_a_packed_pipeline_starts_from_the_same_noise(packed_pipeline: Path, plain_pipeline: Path) -> None:
    noise: dict[Path, torch.Tensor] = {}
    for folder in (packed_pipeline, plain_pipeline):
        model = api.load(folder)

        def keep_first(_: nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path = folder) -> None:
            noise.setdefault(folder, inputs[0].clone())

        model.denoiser.register_forward_pre_hook(keep_first)
        sample(model.pipeline, num=2, batch_size=2, steps=2, seed=0)
    assert torch.equal(noise[packed_pipeline], noise[plain_pipeline])


@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_the_forced_backend_is_the_one_that_runs(
    packed_pipeline: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # (pictures would not tell: where one value rounds the other way, a random model of 4 bits paints another)
    prepared: list[str] = []
    for name, kernel in KERNELS.items():

        def prepare(*args: Any, name: str = name, original: Any = kernel.prepare) -> Any:
            prepared.append(name)
            return original(*args)

        monkeypatch.setattr(kernel, "prepare", prepare)
    images = api.sample(packed_pipeline, num=2, steps=6, backend=backend)  # enough steps for passes to be replayed
    assert len(images) == 2
    # loading chose kernels already; once the forced one is asked, no other is
    assert prepared.index(backend) == len(prepared) - prepared.count(backend)


def test_an_unknown_backend_is_refused(packed_pipeline: Path) -> None:
    with pytest.raises(BitstepError, match="no backend named 'abacus'"):
        api.sample(packed_pipeline, num=1, steps=1, backend="abacus")


def test_a_backend_for_nothing_packed_is_refused(plain_pipeline: Path) -> None:
    with pytest.raises(UsageError, match="no packed layers whose kernel"):
        api.sample(plain_pipeline, num=1, steps=1, backend="reference")


def test_a_video_is_a_strip_of_its_frames() -> None:
    pipeline = build("animatediff")
    strips = sample(pipeline, num=2, batch_size=2, steps=2, seed=0)
    assert strips.shape == (2, 8, FRAMES * 8, 3)
    (video,) = generate(pipeline, images=1, batch_size=1, steps=2, seed=0)
    first, last = (video[0, frame].movedim(0, -1) * 255 for frame in (0, FRAMES - 1))
    for frame, columns in ((first, slice(8)), (last, slice(-8, None))):
        torch.testing.assert_close(strips[0, :, columns].float(), frame.round(), atol=1, rtol=0)
    assert grid(strips).size == (FRAMES * 8, 2 * 8)  # one below the other


@pytest.mark.parametrize(
    ("name", "size", "shape"), [("stable_diffusion", "16x24", (24, 16)), ("animatediff", "16x8x3", (8, 3 * 16))]
)
def test_sizes(name: str, size: str, shape: tuple[int, int]) -> None:
    assert sample(build(name), num=1, batch_size=1, steps=2, seed=0, size=size).shape == (1, *shape, 3)


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        (
            "stable_diffusion",
            "16",
            "a size is WIDTHxHEIGHT, or WIDTHxHEIGHTxFRAMES, in whole numbers above 0: got '16'",
        ),
        ("stable_diffusion", "16x0", "got '16x0'"),
        ("stable_diffusion", (16, 16), r"got \(16, 16\)"),
        ("stable_diffusion", "16x16x3", "StableDiffusionPipeline takes no num_frames"),
        ("ddim", "16x16", "DDIMPipeline takes no height and no width"),
    ],
)
def test_sizes_that_are_none(name: str, size: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        sample(build(name), num=1, batch_size=1, steps=2, seed=0, size=size)


def test_a_pipeline_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = build("ddim")
    monkeypatch.delattr(DDIMScheduler, "set_timesteps")
    with pytest.raises(BitstepError, match=r"DDIMPipeline failed, in 2 steps: .*set_timesteps"):
        sample(pipeline, num=1, batch_size=1, steps=2, seed=0)


def test_a_seed_that_is_none(plain_pipeline: Path) -> None:
    with pytest.raises(UsageError, match="seed -5 is out of range: expected 0 to"):
        api.sample(plain_pipeline, num=1, steps=1, seed=-5)


def test_sound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitstep.stages.sample.generate", lambda *_, **__: iter([torch.zeros(1, 2, 64)]))
    with pytest.raises(BitstepError, match=r"makes no pictures but \[1, 2, 64\]"):
        sample(build("ddim"), num=1, batch_size=1, steps=1, seed=0)


def test_class_labels_may_be_left_out_where_there_are_no_classes() -> None:
    pipeline = ConsistencyModelPipeline(build("ddim").unet, CMStochasticIterativeScheduler())
    pipeline.set_progress_bar_config(disable=True)
    assert sample(pipeline, num=1, batch_size=1, steps=2, seed=0).shape == (1, 8, 8, 3)


@pytest.mark.parametrize("numbers", [{"num": 0}, {"steps": 0}, {"batch_size": 0}])
def test_there_is_something_to_do(numbers: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=" 0 is too small: expected at least 1"):
        api.sample("a source that does not exist", **numbers)


def test_more_steps_than_there_are_timesteps() -> None:
    with pytest.raises(UsageError, match="DDIMPipeline samples in at most 1000 steps: got 1001"):
        sample(build("ddim"), num=1, batch_size=1, steps=1001, seed=0)


def test_steps_default_to_the_pipelines_own() -> None:
    assert default_steps(build("ddim")) == 50
    assert default_steps(build("ddpm")) == 1000


def test_a_grid_is_row_major_and_padded_with_white() -> None:
    picture = np.asarray(grid(numbered(5), columns=3))  # 2 rows
    assert picture.shape == (6, 12, 3)
    assert picture[0, 8].tolist() == [7, 8, 9]  # image 2
    assert picture[3, 4].tolist() == [13, 14, 15]  # image 4
    assert picture[3, 8].tolist() == [255, 255, 255]


def test_npz_round_trip(tmp_path: Path) -> None:
    images = numbered(4)
    save(images, tmp_path / "deep" / "images.npz")
    assert torch.equal(read(tmp_path / "deep" / "images.npz"), images)
    with pytest.raises(UsageError, match="leave --tile out"):
        read(tmp_path / "deep" / "images.npz", tile=2)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["images.npz"]


def test_mosaics_are_cut_row_by_row(tmp_path: Path) -> None:
    tiles = numbered(6)[:, :, :3]  # square
    grid(tiles, columns=3).save(tmp_path / "mosaic.webp", lossless=True)
    assert holds_images(tmp_path)
    (tmp_path / "model_index.json").touch()  # a pipeline may have a picture beside it
    assert not holds_images(tmp_path)
    assert torch.equal(read(tmp_path, tile=3), tiles)
    with pytest.raises(BitstepError, match="no mosaic of 4x4 tiles"):
        read(tmp_path, tile=4)


def test_pictures_of_different_sizes_are_refused(tmp_path: Path) -> None:
    for size in (4, 5):
        Image.new("RGB", (size, size)).save(tmp_path / f"{size}.png")
    with pytest.raises(BitstepError, match="differ in size"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"not an archive", b"PK\x03\x04 cut off", None])
def test_a_damaged_npz_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "images.npz"
    if content is None:
        np.savez(path, images=np.zeros((2, 3), np.float32))
    else:
        path.write_bytes(content)
    with pytest.raises(BitstepError, match=r"images\.npz"):
        read(path)


def test_an_unknown_ending_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.npz"):
        api.sample("a source that does not exist", out=tmp_path / "images.gif")


def test_a_place_that_takes_no_file_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for out, message in {"file/images.png": "file is a file", "folder.png": "it is a folder"}.items():
        with pytest.raises(UsageError, match=message):
            api.sample("a source that does not exist", out=tmp_path / out)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, who may run the tests, may write anywhere
    with pytest.raises(UsageError, match=f"{tmp_path} is not to be written to"):
        api.sample("a source that does not exist", out=tmp_path / "new" / "images.png")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        save(numbered(1), tmp_path / "images.npz")
    assert not list(tmp_path.iterdir())
