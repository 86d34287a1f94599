"""Training losses of rows of quality.py or league.py in one picture, as moving means over the iterations.

    python benchmarks/curves.py --out docs/images/warm-up.png binarydm-W1.1A4-quick-0-training.0.techniques=_

Rows go by the names of the folders that those scripts leave in their work folder.
"""

from __future__ import annotations

import csv

import numpy as np
from matplotlib.figure import Figure
from pictures import parser
from quality import slug

AVERAGED = 25  # iterations


def main() -> None:
    settings = parser(__doc__).parse_args()
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, title in zip(settings.rows, settings.titles or settings.rows, strict=True):
        with (settings.work / slug(settings.source) / name / "run" / "loss.csv").open() as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        axes.plot(np.convolve(losses, np.full(AVERAGED, 1 / AVERAGED), mode="valid"), label=title, linewidth=1.2)
    axes.set(xlabel="iteration", ylabel=f"loss, mean of {AVERAGED}", yscale="log")
    axes.legend()
    figure.savefig(settings.out, dpi=100)


if __name__ == "__main__":
    main()
