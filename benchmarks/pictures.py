"""Rows of quality.py or league.py side by side: the first pictures of each, from the same noise.

    python benchmarks/pictures.py --out docs/images/binary.png full-precision binarydm-W1.1A4-standard-0-fruits32

Rows go by the names of the pictures that those scripts leave in their work folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from pages import ROOT
from PIL import Image
from quality import slug

SIDE = 4  # pictures in a row and in a column of each panel


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tile", type=int, default=32)
    settings = options.parse_args()
    figure = Figure(figsize=(3 * len(settings.rows), 3.4), layout="constrained")
    panels = figure.subplots(1, len(settings.rows), squeeze=False)[0]
    for axes, name, title in zip(panels, settings.rows, settings.titles or settings.rows, strict=True):
        axes.set_title(title)
        axes.axis("off")
        with Image.open(settings.work / slug(settings.source) / f"{name}.png") as picture:
            axes.imshow(picture.crop((0, 0, SIDE * settings.tile, SIDE * settings.tile)), interpolation="nearest")
    figure.savefig(settings.out, dpi=100)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a script that draws rows: which, from where, under which titles, into which file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="NAME")
    parser.add_argument("--titles", nargs="+", help="instead of the names")
    parser.add_argument("--source", default="demo:fruits32")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
