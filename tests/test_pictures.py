"""Pipelines that start from pictures: editing, inpainting, ControlNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import ExifTags, Image
from pipelines import build

from bitstep import api
from bitstep.errors import BitstepError, UsageError
from bitstep.stages.generate import generate
from bitstep.stages.pictures import find_pictures, picture_arguments, read_picture
from bitstep.stages.sample import sample


def editing() -> StableDiffusionImg2ImgPipeline:
    return StableDiffusionImg2ImgPipeline(**build("stable_diffusion").components)


def inpainting() -> StableDiffusionInpaintPipeline:
    return StableDiffusionInpaintPipeline(**build("stable_diffusion").components)


def control() -> StableDiffusionControlNetPipeline:
    components = build("stable_diffusion").components
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(8,)).eval()
    for starts_at_zero in (controlnet.controlnet_cond_embedding.conv_out, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(starts_at_zero.weight)
    return StableDiffusionControlNetPipeline(**components, controlnet=controlnet)


PIPELINES = {"editing": editing, "inpainting": inpainting, "control": control}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 36)).save(pictures / f"{number}.png")
    return pictures


@pytest.mark.parametrize("kind", PIPELINES)
def test_images_start_from_pictures_taken_in_turn(kind: str, folder: Path) -> None:
    pipeline: DiffusionPipeline = PIPELINES[kind]()
    pictures = find_pictures(folder)
    assert pictures is not None
    images = sample(pipeline, num=4, batch_size=2, steps=3, seed=0, size="8x8", pictures=pictures)
    assert images.shape == (4, 8, 8, 3)
    # the same noise and text, other pictures
    other = sample(pipeline, num=4, batch_size=2, steps=3, seed=0, size="8x8", pictures=pictures[::-1])
    assert [bool((a != b).any()) for a, b in zip(images, other, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_pipeline_that_starts_from_pictures_is_quantized(kind: str, folder: Path, tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    PIPELINES[kind]().save_pretrained(plain)
    settings = ("calibration.images=4", "calibration.steps=4", "calibration.batch_size=2", "calibration.size=8x8")
    api.quantize(plain, recipe="mse", bits="W8A8", out=packed, overrides=settings, pictures=folder, device="cpu")
    numbers = api.evaluate(packed, against=plain, num=4, steps=4, pictures=folder, size="8x8")
    assert numbers["psnr"] > 20
    if kind == "control":  # (once will do: it starts processes)
        assert api.benchmark(packed, against="fp32", rounds=1, pictures=folder, size="8x8")["rows"]


def test_masks_depend_on_seed_and_number_alone(folder: Path) -> None:
    files = find_pictures(folder)
    assert files is not None

    def mask(number: int, seed: int = 0) -> bytes:
        found = picture_arguments(files, number, seed, (16, 12))["mask_image"]
        assert found.size == (16, 12)
        assert 1 / 16 <= np.asarray(found, dtype=float).mean() / 255 <= 9 / 16
        return found.tobytes()

    assert mask(1) == mask(1)
    assert len({mask(0), mask(1), mask(2), mask(0, seed=1)}) == 4


def test_pictures_come_in_one_size_and_the_right_way_up(folder: Path) -> None:
    lying = Image.open(folder / "1.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter
    lying.resize((36, 48)).save(folder / "1.png", exif=exif)
    files = find_pictures(folder)
    assert files is not None
    assert {picture_arguments(files, number, 0, None)["image"].size for number in range(4)} == {(48, 36)}
    turned = read_picture(folder / "1.png")
    assert turned.size == (48, 36)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(lying.resize((36, 48))), -1))


def test_pictures_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere holds no pictures: expected a folder"):
        find_pictures(tmp_path / "nowhere")
    (folder / "0.png").write_bytes(b"no picture")
    with pytest.raises(BitstepError, match=r"cannot read the picture .*0\.png"):
        next(generate(editing(), images=1, batch_size=1, steps=2, seed=0, pictures=find_pictures(folder)))
