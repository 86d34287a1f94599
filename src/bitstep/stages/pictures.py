"""Pictures from files: those that a pipeline starts from, taken in turn, with masks drawn at random for inpainting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

from bitstep.errors import BitstepError, UsageError
from bitstep.randomness import generator

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

PARAMETERS = ("image", "control_image")
"""Those of pipelines that a picture is given to."""

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
    """RGB, the right way up."""
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except Exception as error:  # Pillow raises all kinds for a damaged file
        raise BitstepError(f"cannot read the picture {path}: {error}") from error


def picture_arguments(
    files: Sequence[str], number: int, seed: int, size: tuple[int, int] | None
) -> dict[str, Image.Image]:
    """What image ``number`` starts from, for every parameter that takes a picture or a mask.

    Pictures are cropped and scaled to ``size``, (width, height), or that of the first one. The mask, white where
    something new is to be painted, depends on (seed, number) alone.
    """
    size = size or read_picture(files[0]).size
    picture = ImageOps.fit(read_picture(files[number % len(files)]), size)
    return dict.fromkeys(PARAMETERS, picture) | {MASK: _mask(size, seed, number)}


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
