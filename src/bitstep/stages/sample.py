"""Sample: uint8 images from a pipeline on noise that the seed alone decides, and images to and from files."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import IO, Unpack
from zipfile import BadZipFile

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

from bitstep.errors import BitstepError, UsageError
from bitstep.files import check_path, write_atomically
from bitstep.progress import Progress, silent
from bitstep.stages.generate import Sampling, generate
from bitstep.stages.pictures import picture_files, read_picture

SAVED = (".png", ".npz")


def sample(
    pipeline: DiffusionPipeline,
    *,
    num: int,
    batch_size: int,
    progress: Progress = silent,
    **sampling: Unpack[Sampling],
) -> Tensor:
    """Images number 0..num-1 of the endless list that ``sampling`` defines, uint8 ``[num, H, W, C]`` on the CPU.

    ``batch_size`` changes no image beyond float rounding. A video is one image, its frames side by side. BitstepError
    for a pipeline of neither, of sound say.
    """
    images: list[Tensor] = []
    with torch.no_grad():
        for batch in generate(pipeline, images=num, batch_size=batch_size, **sampling):
            if batch.ndim == 5:
                batch = batch.movedim(1, 3).flatten(3)  # [n, frames, C, H, W]
            if batch.ndim != 4:
                raise BitstepError(
                    f"{type(pipeline).__name__} makes no pictures but {list(batch.shape)}: expected a pipeline of "
                    "pictures or videos; call this one with plain diffusers"
                )
            images += (batch.float().clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).cpu()
            progress(len(images), num)
    return torch.stack(images)


def default_steps(pipeline: DiffusionPipeline) -> int:
    """The number of sampling steps that the pipeline takes when it is not told."""
    return int(inspect.signature(type(pipeline).__call__).parameters["num_inference_steps"].default)


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """uint8 ``[N, H, W, C]`` as one picture, row by row, as square as it goes if ``columns`` is not given."""
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count * height / width)))
    rows = -(-count // columns)
    blank = images.new_full((rows * columns - count, height, width, channels), 255)
    tiles = torch.cat([images, blank]).reshape(rows, columns, height, width, channels)
    return _picture(tiles.permute(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels))


def save(images: Tensor, path: Path) -> None:
    """Write uint8 ``[N, H, W, C]`` as a ``.png`` grid or a ``.npz`` under ``images``; files appear when complete."""
    write: dict[str, Callable[[IO[bytes]], object]] = {
        ".png": lambda file: grid(images).save(file, "PNG"),
        ".npz": lambda file: np.savez_compressed(file, images=images.numpy()),
    }
    write_atomically(path, write[check_path(path, "images", SAVED).suffix])


def holds_images(path: Path) -> bool:
    """Whether :func:`read` would find images there: an ``.npz`` file, or a folder of pictures that is no pipeline."""
    if any((path / name).exists() for name in ("model_index.json", "config.json")):
        return False
    return path.suffix == ".npz" or (path.is_dir() and bool(picture_files(path)))


def read(path: Path, tile: int | None = None, *, fit: bool = False) -> Tensor:
    """uint8 ``[N, H, W, 3]`` from an ``.npz`` file (key ``images``) or the pictures in a folder, in the order of names.

    With ``tile``, each picture is a mosaic of square tiles that many pixels wide, row by row; with ``fit``, one that is
    none is cropped and scaled to a tile.
    """
    if path.suffix == ".npz":
        if tile:
            raise UsageError(f"{path} holds single images, no mosaics: leave --tile out")
        return _read_npz(path)
    images: list[Tensor] = []
    for file in picture_files(path):
        picture = read_picture(file)
        if tile and fit and (picture.width % tile or picture.height % tile):
            picture = ImageOps.fit(picture, (tile, tile))
        pixels = torch.from_numpy(np.array(picture))
        images.extend(_tiles(pixels, tile) if tile else pixels[None])
    sizes = {tuple(image.shape[:2]) for image in images}
    if len(sizes) != 1:
        raise BitstepError(f"the pictures in {path} differ in size: expected one size, found {sorted(sizes)[:3]}")
    return torch.stack(images)


def _read_npz(path: Path) -> Tensor:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            images = file["images"]
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise BitstepError(f"cannot read images from {path}: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise BitstepError(f"{path} holds {images.dtype} {images.shape}: expected uint8 [N, H, W, 3]")
    return torch.from_numpy(images)


def _tiles(mosaic: Tensor, size: int) -> Tensor:
    height, width, channels = mosaic.shape
    if height % size or width % size:
        raise BitstepError(f"a picture of {width}x{height} pixels is no mosaic of {size}x{size} tiles")
    return mosaic.reshape(height // size, size, width // size, size, channels).transpose(1, 2).flatten(0, 1)


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.squeeze(-1).numpy())  # one channel: a grey picture
