"""The league table: every method beside the others at every width, with the ablations, on one source.

    python benchmarks/league.py                                   # every row that the results file lacks
    python benchmarks/league.py --recipes best --bits W4A4        # only those of them
    python benchmarks/league.py --effort quick --seeds 0 --num 256 --source demo:cifar10 \\
        --real ../shared/data/cifar10 --features ../shared/features/*.pt \\
        --results benchmarks/results/league-cifar10.json          # another teacher

The W4A4 and W1.1A4 rows have three seeds. Rows, columns and resuming are those of quality.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pages import ROOT, put
from quality import FULL_PRECISION, Quantization, load_results, measure_all, parser, several_seeds, table

METHODS = ("minmax", "mse", "adaround", "lsq", "efficientdm", "dilatequant", "best")
BITS = ("W8A8", "W6A6", "W4A8", "W4A4", "W2A8")
BINARY = ("W1A32", "W1A8", "W1A4")
SEVERAL = ("W4A4", "W1A4", "W1.1A4")  # of these the table shows the spread
EVERYTHING = ["attention.quantized=true"]  # what makes efficientdm's coverage that of dilatequant
SMOOTHING = "rewrites=[{kind: smoothing}]"  # without dilation
SYMMETRIC = "rewrites=[{kind: smoothing}, {kind: dilation, symmetric: true}]"
OF_WIDE = "rewrites=[{kind: smoothing, strength: 0.65}, {kind: dilation, symmetric: true}]"  # of best-wide
FEW_BLOCKS = [  # by themselves, and the last six together for longer
    "training.0.objective.full_resolution=true",
    "training.0.objective.leave=6",
    "training.0.iterations=200",
    "training.1.iterations=2100",
]
ABLATIONS = (
    ("efficientdm", "W4A4", ["layers.coverage=efficientdm"]),
    ("efficientdm", "W4A4", ["training.0.objective.emphasis=0"]),
    ("efficientdm", "W4A4", EVERYTHING),
    ("efficientdm", "W4A4", ["output.preconditioned=true"]),
    ("efficientdm", "W4A4", [*EVERYTHING, "output.preconditioned=true"]),
    ("dilatequant", "W4A4", [SMOOTHING]),
    *(("dilatequant", bits, FEW_BLOCKS) for bits in BITS),
    ("dilatequant", "W4A4", [SMOOTHING, *FEW_BLOCKS]),
    ("dilatequant", "W4A4", [SYMMETRIC]),
    ("best", "W8A8", [SMOOTHING]),
    ("best", "W6A6", [SMOOTHING]),
    ("best", "W4A8", [SMOOTHING]),
    *(("best", bits, [OF_WIDE]) for bits in ("W4A8", "W4A4")),
    ("best", "W4A8", FEW_BLOCKS),
    ("dilatequant", "W4A4", ["training.1.iterations=1"]),  # without the last blocks' training together
    ("mse", "W4A4", ["output.preconditioned=true"]),
    ("dilatequant", "W4A4", ["output.preconditioned=true"]),
)
PUBLISHED_RATES = [
    "training.0.learning_rates="
    "{weight: 0.001, weight_scale: 0.0001, activation_scale: 0.0001, activation_zero_point: 0.001}"
]  # of lsq, whose short efforts move ten times as fast
WITHOUT_WARM_UP = ["training.0.techniques=[{kind: mimicking}]"]
TECHNIQUES: tuple[list[str], ...] = (
    ["training.0.techniques=[]"],
    WITHOUT_WARM_UP,
    ["training.0.techniques=[{kind: mimicking, rank: 1.0}]"],
    ["training.0.techniques=[{kind: warm-up, share: 0.1}]"],
    [],
)
PUBLISHED_PENALTY = [
    "training.0.techniques.0.penalty=0.09"
]  # of binarydm-ebb, whose short efforts have a hundred times it
AS_LONG = ["training.0.iterations=2400"]  # the baseline's, to be compared with best-binary
SEVENFOLD = ["training.0.batch_size=32", "training.0.iterations=2000"]  # samples, where what counts are these
THIRTEENFOLD = ["training.0.batch_size=32", "training.0.iterations=4000"]
SUMMARY = (
    f"{FULL_PRECISION} W32A32",
    "lsq W4A4",
    "efficientdm W4A4",
    "best W8A8",
    "best W4A8",
    "best W4A4",
    "best W2A8",
    "binarydm W1.1A4",
    "best-binary W1.1A4",
)  # for the README
SUMMARY_COLUMNS = (
    "recipe",
    "bits",
    "images",
    "PSNR (dB)",
    "Fréchet distance to full precision",
    "MB on disk",
    "minutes",
)


def league(images: str) -> Iterator[tuple[str, str, list[str], str | None]]:
    """Recipe, bits, overrides, training images."""
    for bits in BITS:
        for method in METHODS:
            yield method, bits, [], images if method == "lsq" else None
    for recipe, bits, overrides in ABLATIONS:
        yield recipe, bits, overrides, None
    for bits in ("W8A8", "W4A8", "W4A4", "W2A8"):
        yield "lsq", bits, PUBLISHED_RATES, images
    for bits in BINARY:
        yield "binary-baseline", bits, [], images
        yield "binarydm", bits.replace("W1", "W1.1"), [], images
        yield "binarydm-ebb", bits, [], images
    for bits in BINARY:
        yield "binary-baseline", bits, [], None
        for overrides in TECHNIQUES:
            yield "binarydm", bits.replace("W1", "W1.1"), overrides, None
        yield "binarydm-ebb", bits, [], None
        yield "binarydm-ebb", bits, PUBLISHED_PENALTY, None
    yield "best-binary", "W1.1A4", [], None
    yield "best-binary", "W1.1A4", ["weights.allocation=resolution"], None
    yield "binary-baseline", "W1A4", AS_LONG, images
    for longer in (SEVENFOLD, THIRTEENFOLD):
        yield "binary-baseline", "W1A4", longer, images
        yield "binarydm", "W1.1A4", longer, images
    yield "binarydm", "W1.1A4", [*THIRTEENFOLD, *WITHOUT_WARM_UP], images
    yield "binarydm-ebb", "W1A4", THIRTEENFOLD, images


def main() -> None:
    options = parser(__doc__, "league")
    options.set_defaults(recipes=None, bits=None, seeds=[0, 1, 2])
    settings = options.parse_args()
    rows = [
        Quantization(settings.source, recipe, bits, settings.effort, seed, overrides, data)
        for recipe, bits, overrides, data in league(f"../shared/data/{settings.real.name}")
        for seed in (settings.seeds if bits in SEVERAL else settings.seeds[:1])
        if recipe in (settings.recipes or [recipe]) and bits in (settings.bits or [bits])
    ]
    measure_all(settings, rows)
    if settings.source == options.get_default("source"):
        summarize(load_results(settings))


def summarize(results: dict[str, Any]) -> None:
    """Write the README's few rows."""
    chosen = [
        row
        for row in several_seeds(results["rows"])
        if f"{row['recipe']} {row['bits']}" in SUMMARY and row["effort"] in ("standard", "-") and not row["overrides"]
    ]
    put(ROOT / "README.md", "summary", table(chosen, SUMMARY_COLUMNS))


if __name__ == "__main__":
    main()
