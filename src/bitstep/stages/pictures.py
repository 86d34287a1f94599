"""Pictures from files: those that a pipeline starts from, taken in turn, with masks drawn at random for inpainting."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageOps

from bitstep.errors import BitstepError, UsageError
from bitstep.randomness import generator

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

STARTS = ("image", "control_image")
"""Parameters of pipelines that a picture is given to."""

MASK = "mask_image"


def picture_files(folder: Path) -> list[Path]:
    """The pictures in ``folder``, in the order of names."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def find_pictures(folder: str | Path | None) -> list[str] | None:
    """Paths of the pictures in ``folder``; None where none is given."""
    if folder is None:
        return None
    found = picture_files(Path(folder)) if Path(folder).is_dir() else []
    if not found:
        raise UsageError(f"{folder} holds no pictures: expected a folder of files that end in {', '.join(SUFFIXES)}")
    return [str(file) for file in found]


def read_picture(path: str | Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except Exception as error:  # Pillow raises all kinds for a damaged file
        raise BitstepError(f"cannot read the picture {path}: {error}") from error


def starts(
    parameters: Container[str], files: Sequence[str], numbers: Sequence[int], *, seed: int, size: Sequence[int] | None
) -> dict[str, Any]:
    """What images ``numbers`` start from, for those of a pipeline's ``parameters`` that take a picture or a mask.

    Pictures are cropped and scaled to ``size``, (width, height), where it is given. A mask, white where something new
    is to be painted, depends on (seed, number) alone.
    """
    pictures = [read_picture(files[number % len(files)]) for number in numbers]
    if size is not None:
        pictures = [ImageOps.fit(picture, (size[0], size[1])) for picture in pictures]
    if len(sizes := {picture.size for picture in pictures}) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes)[:3])
        raise UsageError(f"pictures that start a batch have one size, found {shown}: give them all one, WIDTHxHEIGHT")
    masks = [_mask(picture.size, seed, number) for picture, number in zip(pictures, numbers, strict=True)]
    given = dict.fromkeys(STARTS, pictures) | {MASK: masks}
    # (not all pipelines take a list)
    return {name: all_[0] if len(all_) == 1 else all_ for name, all_ in given.items() if name in parameters}


def _mask(size: tuple[int, int], seed: int, number: int) -> Image.Image:
    """A rectangle of a quarter to three quarters of the width and of the height."""
    shares = torch.rand(4, generator=generator(seed, "mask", number)).tolist()
    mask = Image.new("L", size)
    spans = []
    for side, share, place in zip(size, shares[:2], shares[2:], strict=True):
        length = round(side * (1 + 2 * share) / 4)
        start = round((side - length) * place)
        spans.append((start, start + length - 1))
    (left, right), (top, bottom) = spans
    ImageDraw.Draw(mask).rectangle((left, top, right, bottom), fill=255)
    return mask
