"""What quantization costs in quality: a table of recipes x bits x seeds on one source.

Every row is quantized by the command line in a process of its own (so that its time and peak memory are its own),
sampled on noise that no quantization has seen, and compared with the full-precision model's images on that noise and
with real images. Rows are saved as they are finished; run again, the script goes on with those that are missing, and
writes the table into the page.

    python benchmarks/quality.py
    python benchmarks/quality.py --recipes efficientdm --bits W4A4 --seeds 0 1 2 --set weights.rank=8
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import diffusers
import torch
from host import memory_mb, processor
from pages import ROOT, markdown, put, write
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitstep
from bitstep.files import replacing
from bitstep.methods import BEST, METHODS
from bitstep.methods.best import BEST_ADAPTERS
from bitstep.metrics import frechet_distance, psnr, ssim
from bitstep.recipe import parse_bits
from bitstep.stages.features import extract, load_features
from bitstep.stages.sample import read, save

SHARED = ROOT.parent / "shared"
SAMPLE_SEED = 1_000_003  # quantization draws its trajectories from other seeds
BATCH = 64
FULL_PRECISION = "full precision"
TO_FULL_PRECISION, TO_REAL = "frechet_distance_full_precision", "frechet_distance_real"
RESNET = "_resnet56_cifar10_features"  # ends the keys of its distances, where it is not the only network

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "recipe": lambda row: row["recipe"],
    "bits": lambda row: row["bits"],
    "effort": lambda row: row["effort"],
    "seeds": lambda row: ", ".join("-" if seed is None else str(seed) for seed in row["seed"]),
    "images": lambda row: Path(row["data"]).name if row["data"] else "-",
    "overrides": lambda row: " ".join(f"`{override}`" for override in row["overrides"]),
    "PSNR (dB)": lambda row: _number(row["psnr"], 1),
    "SSIM": lambda row: _number(row["ssim"], 3),
    "Fréchet distance to full precision": lambda row: _number(row[TO_FULL_PRECISION], 1),
    "Fréchet distance to real images": lambda row: _number(row[TO_REAL], 1),
    "Fréchet distance to full precision (ResNet-56)": lambda row: _number(row.get(TO_FULL_PRECISION + RESNET, []), 2),
    "Fréchet distance to real images (ResNet-56)": lambda row: _number(row.get(TO_REAL + RESNET, []), 2),
    "quantized on": lambda row: ", ".join(sorted({name or "CPU" for name in row["gpu"]})) if any(row["gpu"]) else "-",
    "minutes": lambda row: _number(row["minutes"], 1),
    "peak memory (MB)": lambda row: _number(row["peak_memory_mb"], 0),
    "MB on disk": lambda row: _number(row["size_mb"], 2),
    "MACs quantized": lambda row: "-" if row["coverage"][0] is None else f"{row['coverage'][0]:.1%}",
}
CONSTANT = ("effort", "seeds", "images", "overrides")  # go into the caption where all rows agree


@dataclass(frozen=True)
class Quantization:
    """What a row is about: the arguments of ``bitstep quantize``; ``data`` is a folder of training images, and relative
    to the project."""

    source: str
    recipe: str
    bits: str
    effort: str
    seed: int
    overrides: list[str]
    data: str | None = None

    @property
    def name(self) -> str:
        """A folder's name."""
        data = [] if self.data is None else [Path(self.data).name]
        parts = (self.recipe, self.bits, self.effort, self.seed, *data, *self.overrides)
        return slug("-".join(str(part) for part in parts))

    def command(self, out: Path, device: str) -> list[str]:
        options = [f"--{name}={getattr(self, name)}" for name in ("recipe", "bits", "effort", "seed")]
        options.append(f"--device={device}")
        overrides = [f"--set={override}" for override in self.overrides]
        data = [] if self.data is None else [f"--data={self.data}"]
        return [sys.executable, "-m", "bitstep", "quantize", self.source, f"--out={out}", *options, *data, *overrides]


class Judge:
    """Holds what every row is compared with: full-precision samples and real images, and their features."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self._settings, self.device = settings, settings.device
        self._networks = {file.stem: load_features(file) for file in settings.features}
        samples = f"full-precision-{settings.num}x{settings.steps}"
        self.full_precision = self._once(samples, lambda: self.sample(settings.source))
        self._full_precision = self._extract(samples, lambda: self.full_precision)
        self._real = self._extract(settings.real.name, lambda: read(settings.real, settings.tile))

    def sample(self, source: str | Path) -> Tensor:
        settings = self._settings
        return bitstep.sample(
            source,
            num=settings.num,
            steps=settings.steps,
            seed=SAMPLE_SEED,
            batch_size=BATCH,
            device=self.device,
        )

    def judge(self, images: Tensor) -> dict[str, Any]:
        features = [extract(network, images, BATCH) for network in self._networks.values()]
        return {
            "psnr": psnr(images, self.full_precision),
            "ssim": ssim(images, self.full_precision),
            **self._distances(TO_FULL_PRECISION, features, self._full_precision),
            **self._distances(TO_REAL, features, self._real),
        }

    def judge_full_precision(self) -> dict[str, Any]:
        unknown = dict.fromkeys(("psnr", "ssim", TO_FULL_PRECISION))
        return unknown | self._distances(TO_REAL, self._full_precision, self._real)

    def _distances(self, key: str, features: list[Tensor], others: list[Tensor]) -> dict[str, float]:
        """By every network; but for the first, its name ends the key."""
        keys = [key if place == 0 else f"{key}_{name}" for place, name in enumerate(self._networks)]
        return dict(zip(keys, map(frechet_distance, features, others), strict=True))

    def _extract(self, name: str, images: Callable[[], Tensor]) -> list[Tensor]:
        """The features of every network; ``images`` are had once, where they are needed."""
        images = cache(images)

        def features(network: torch.nn.Module) -> Tensor:
            return extract(network, images(), BATCH)

        return [self._once(f"{name}-{stem}", partial(features, net)) for stem, net in self._networks.items()]

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """``make()``, or what it made for the same settings in an earlier run."""
        path = self._settings.work / f"{name}.safetensors"
        if not path.exists():
            print(f"{path.stem} ...", flush=True)
            with replacing(path) as temporary:
                save_file({"tensor": make().contiguous()}, temporary)
        return load_file(path)["tensor"]


def main(argv: Sequence[str] | None = None) -> None:
    settings = parser(__doc__, "quality").parse_args(argv)
    rows = [
        Quantization(settings.source, recipe, bits, settings.effort, seed, settings.overrides)
        for bits in settings.bits
        for recipe in settings.recipes
        for seed in settings.seeds
    ]
    measure_all(settings, rows)


def measure_all(settings: argparse.Namespace, quantizations: Sequence[Quantization]) -> None:
    """The rows that the results file lacks, one by one, full precision first."""
    settings.work = settings.work.resolve() / slug(settings.source)
    settings.work.mkdir(parents=True, exist_ok=True)
    results = load_results(settings)
    judge = Judge(settings)
    done = [{field.name: row[field.name] for field in fields(Quantization)} for row in results["rows"]]

    def finish(row: dict[str, Any]) -> None:
        results["rows"].append(row)
        write(settings.results, json.dumps(results, indent=2) + "\n")
        write_table(settings.page, settings.results, results)
        (shown,) = several_seeds([row])
        print(" | ".join(column(shown) for column in COLUMNS.values()), flush=True)

    if not done:
        finish(full_precision_row(settings.source, judge, settings.work))
    for quantization in quantizations:
        if asdict(quantization) not in done:
            finish(measure(quantization, judge, settings.work))


def measure(quantization: Quantization, judge: Judge, work: Path) -> dict[str, Any]:
    """One row: quantize (unless an earlier run got that far), sample, compare."""
    out = work / quantization.name
    cost_file = work / f"{quantization.name}.cost.json"
    if not cost_file.exists():
        shutil.rmtree(out, ignore_errors=True)
        write(cost_file, json.dumps(run(quantization.command(out, judge.device))))
    cost: dict[str, float] = json.loads(cost_file.read_text())
    facts = bitstep.inspect(out)
    images = judge.sample(out)
    save(images[:64], work / f"{quantization.name}.png")
    weight = {"size_mb": facts["size_bytes"] / 1e6, "coverage": facts["macs_quantized"]}
    gpu = None if judge.device == "cpu" else torch.cuda.get_device_name(judge.device)
    return {**asdict(quantization), "gpu": gpu, **judge.judge(images), **cost, **weight}


def full_precision_row(source: str, judge: Judge, work: Path) -> dict[str, Any]:
    save(judge.full_precision[:64], work / "full-precision.png")
    named: dict[str, Any] = {
        "source": source,
        "recipe": FULL_PRECISION,
        "bits": "W32A32",
        "effort": "-",
        "seed": None,
        "overrides": [],
        "data": None,
        "gpu": None,
    }
    size = sum(4 * parameter.numel() for parameter in bitstep.load(source).denoiser.parameters())
    unknown = dict.fromkeys(("minutes", "peak_memory_mb", "coverage"))
    return named | judge.judge_full_precision() | unknown | {"size_mb": size / 1e6}


def run(command: list[str]) -> dict[str, float]:
    """Wall-clock minutes and peak resident memory of ``command --overwrite``; stops the script when it fails."""
    start, peak = time.monotonic(), 0.0
    process = subprocess.Popen([*command, "--overwrite"], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = memory_mb("VmHWM", process.pid) or peak
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return {"minutes": (time.monotonic() - start) / 60, "peak_memory_mb": peak}


def load_results(settings: argparse.Namespace) -> dict[str, Any]:
    """What earlier runs with the same settings found, else a fresh page."""
    fixed = {
        "source": settings.source,
        "num_images": settings.num,
        "steps": settings.steps,
        "sample_seed": SAMPLE_SEED,
        "features": ", ".join(file.stem for file in settings.features),
        "real_images": settings.real.name,
    }
    if settings.results.exists():
        results: dict[str, Any] = json.loads(settings.results.read_text())
        if results["settings"] != fixed:
            sys.exit(f"{settings.results} was measured with other settings: give another --results")
        return results
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    versions = {"bitstep": bitstep.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    return {"settings": fixed, "machine": machine, "versions": versions, "rows": []}


def write_table(page: Path, file: Path, results: dict[str, Any]) -> None:
    """Put the table between the page's markers that are named for the results file."""
    rows = several_seeds(results["rows"])
    quantized = [row for row in rows if row["recipe"] != FULL_PRECISION]
    values = {name: {COLUMNS[name](row) for row in quantized} for name in CONSTANT}
    same = {name: found.pop() for name, found in values.items() if len(found) == 1}
    settings, machine, versions = results["settings"], results["machine"], results["versions"]
    caption = (
        f"`{settings['source']}`, {settings['num_images']} images of {settings['steps']} steps each; "
        + "".join(f"{name} {value}; " for name, value in same.items() if value not in ("", "-"))
        + f"distances in the "
        f"features of `{settings['features']}`; on {machine['processor']} ({machine['cores']} cores, "
        f"{machine['threads']} used), " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    )
    empty = {name for name, column in COLUMNS.items() if all(column(row) == "-" for row in rows)}
    shown = [name for name in COLUMNS if name not in same and name not in empty]
    put(page, file.stem, f"{table(rows, shown)}\n\n{caption}")


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table of rows as :func:`several_seeds` makes them."""
    return markdown(columns, [[COLUMNS[name](row) for name in columns] for row in rows])


def several_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in order; those that differ in the seed alone as one, with lists of seeds and of what was measured."""
    named = [field.name for field in fields(Quantization) if field.name != "seed"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=_place):
        groups.setdefault(json.dumps([row[name] for name in named]), []).append(row)
    return [
        {key: value if key in named else [row[key] for row in group] for key, value in group[0].items()}
        for group in groups.values()
    ]


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options of a script that writes ``results/NAME.json``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="demo:fruits32")
    parser.add_argument("--recipes", nargs="+", default=["minmax", "mse", "efficientdm"])
    parser.add_argument("--bits", nargs="+", default=["W8A8", "W4A8", "W4A4", "W2A8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--set", nargs="+", dest="overrides", default=[], metavar="SLOT.KEY=VALUE")
    parser.add_argument("--num", type=int, default=512, help="images per row")
    parser.add_argument("--steps", type=int, default=50)
    network = SHARED / "features" / "mobilenetv2_imagenet_features.pt"
    parser.add_argument("--features", type=Path, nargs="+", default=[network])
    parser.add_argument("--device", default="cpu", help="where to quantize and to sample")
    parser.add_argument("--real", type=Path, default=SHARED / "data" / "fruits32", help="folder of images, or .npz")
    parser.add_argument("--tile", type=int, default=32, help="the real images are mosaics of such tiles")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "quality", help="packed models and samples")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / f"{name}.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    return parser


def slug(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", text)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Most bits first; within the same bits by recipe, settings and seed."""
    if row["recipe"] == FULL_PRECISION:
        return ()
    weight, activation = parse_bits(row["bits"])
    name = BEST_ADAPTERS.name if row["recipe"] == BEST else row["recipe"]
    recipe = [*METHODS, name].index(name)
    return -weight, -activation, recipe, row["effort"], row["data"] or "", row["overrides"], row["seed"]


def _number(values: Sequence[float | None], digits: int) -> str:
    """The value; of several seeds the mean, and from where to where they lie."""
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    low, mean, high = (f"{value:,.{digits}f}" for value in (min(found), fmean(found), max(found)))
    return mean if low == high else f"{mean} ({low} to {high})"


if __name__ == "__main__":
    main()
