"""What the papers say of one method beside another, and what the league's rows have.

    python benchmarks/papers.py

Ratios of means over the seeds that both rows have, from league.py's results; ratios of rows that are not measured yet
are left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from league import AS_LONG, EVERYTHING, PUBLISHED_RATES, SEVENFOLD, THIRTEENFOLD, WITHOUT_WARM_UP
from pages import markdown, put
from quality import load_results, parser, several_seeds

IMAGES = "../shared/data/fruits32"
DISTANCE, MINUTES = "frechet_distance_full_precision", "minutes"
IN_WORDS = {DISTANCE: "Fréchet distance", MINUTES: "minutes"}


@dataclass(frozen=True)
class Name:
    """What tells a row of several seeds from the others."""

    recipe: str
    bits: str
    effort: str = "standard"
    overrides: tuple[str, ...] = ()
    data: str | None = None

    def __str__(self) -> str:
        effort = [] if self.effort == "standard" else [self.effort]
        images = [] if self.data is None else ["on images"]
        return ", ".join([f"{self.recipe} {self.bits}", *effort, *images, *(f"`{text}`" for text in self.overrides)])


LSQ = Name("lsq", "W4A4", data=IMAGES)
LSQ_TIMED = Name("lsq", "W4A4", overrides=tuple(PUBLISHED_RATES), data=IMAGES)  # other rates, the same work
EFFICIENTDM = Name("efficientdm", "W4A4", overrides=tuple(EVERYTHING))
EFFICIENTDM_QUICK = Name("efficientdm", "W4A4", "quick")
BEST_QUICK = Name("best", "W4A4", "quick")
DILATEQUANT = Name("dilatequant", "W4A4")
BASELINE = Name("binary-baseline", "W1A4", data=IMAGES)
BASELINE_AS_LONG = Name("binary-baseline", "W1A4", overrides=tuple(AS_LONG), data=IMAGES)
BASELINE_SEVENFOLD = Name("binary-baseline", "W1A4", overrides=tuple(SEVENFOLD), data=IMAGES)
BINARYDM_SEVENFOLD = Name("binarydm", "W1.1A4", overrides=tuple(SEVENFOLD), data=IMAGES)
BASELINE_LONG = Name("binary-baseline", "W1A4", overrides=tuple(THIRTEENFOLD), data=IMAGES)
BINARYDM_LONG = Name("binarydm", "W1.1A4", overrides=tuple(THIRTEENFOLD), data=IMAGES)
UNWARMED_LONG = Name("binarydm", "W1.1A4", overrides=(*THIRTEENFOLD, *WITHOUT_WARM_UP), data=IMAGES)
BINARYDM = Name("binarydm", "W1.1A4", data=IMAGES)
WITHOUT_DATA = Name("binarydm", "W1.1A4")
BEST_BINARY = Name("best-binary", "W1.1A4")
RATIOS = (
    (LSQ_TIMED, EFFICIENTDM_QUICK, MINUTES, "16.2 (EfficientDM)"),
    (LSQ, EFFICIENTDM_QUICK, DISTANCE, ""),
    (LSQ_TIMED, BEST_QUICK, MINUTES, ""),
    (LSQ, BEST_QUICK, DISTANCE, ""),
    (LSQ_TIMED, EFFICIENTDM, MINUTES, ""),
    (LSQ, EFFICIENTDM, DISTANCE, ""),
    (EFFICIENTDM, DILATEQUANT, DISTANCE, "1.7 (DilateQuant, bedrooms)"),
    (EFFICIENTDM, DILATEQUANT, MINUTES, ""),
    *(
        (Name("efficientdm", bits), Name("dilatequant", bits), DISTANCE, "")
        for bits in ("W8A8", "W6A6", "W4A8", "W2A8")
    ),
    (BASELINE, BINARYDM, DISTANCE, "5.6 (BinaryDM, bedrooms)"),
    (BASELINE_SEVENFOLD, BINARYDM_SEVENFOLD, DISTANCE, "5.6 (BinaryDM, bedrooms)"),
    (BASELINE_LONG, BINARYDM_LONG, DISTANCE, "5.6 (BinaryDM, bedrooms)"),
    (UNWARMED_LONG, BINARYDM_LONG, DISTANCE, ""),
    (BASELINE_AS_LONG, BEST_BINARY, DISTANCE, ""),
    (BASELINE_SEVENFOLD, BEST_BINARY, DISTANCE, ""),
    (BINARYDM, WITHOUT_DATA, DISTANCE, ""),
)


def main() -> None:
    settings = parser(__doc__, "league").parse_args()
    put(settings.page, "papers", ratios(load_results(settings)["rows"]))
    photographs = settings.results.with_name(f"{settings.results.stem}-cifar10.json")
    put(settings.page, "papers-cifar10", ratios(json.loads(photographs.read_text())["rows"]))


def ratios(rows: list[dict[str, Any]]) -> str:
    found = {
        Name(row["recipe"], row["bits"], row["effort"], tuple(row["overrides"]), row["data"]): row
        for row in several_seeds(rows)
    }
    lines = []
    for above, below, of, published in RATIOS:
        if above in found and below in found and (pairs := common(found[above], found[below], of)):
            here = fmean(one for one, _ in pairs) / fmean(other for _, other in pairs)
            lines.append([str(above), str(below), IN_WORDS[of], published, f"{here:.2f}"])
    return markdown(["row", "over row", "in", "published", "here"], lines)


def common(above: dict[str, Any], below: dict[str, Any], of: str) -> list[tuple[float, float]]:
    """What both rows have of the seeds that both have."""
    first, second = (
        {seed: value for seed, value in zip(row["seed"], row[of], strict=True) if value is not None}
        for row in (above, below)
    )
    return [(first[seed], second[seed]) for seed in first if seed in second]


if __name__ == "__main__":
    main()
