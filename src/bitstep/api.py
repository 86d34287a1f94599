"""The verbs as functions: paths and plain values in, results out, files written where asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from bitstep.arguments import as_list, at_least, check_seed
from bitstep.errors import UsageError
from bitstep.files import check_path, write_atomically
from bitstep.progress import SILENT, Progress, Reporter, silent
from bitstep.run import quantize as quantize
from bitstep.runtime.dispatch import packed_layers, set_backend
from bitstep.stages.benchmark import benchmark as benchmark
from bitstep.stages.evaluate import check_comparable, paired
from bitstep.stages.evaluate import evaluate as _evaluate
from bitstep.stages.generate import Sampling, read_prompts
from bitstep.stages.inspect import inspect as inspect
from bitstep.stages.inspect import packed_manifest
from bitstep.stages.load import Source
from bitstep.stages.load import load as load
from bitstep.stages.pictures import find_pictures
from bitstep.stages.report import Reference, describe, page
from bitstep.stages.sample import SAVED, default_steps, grid, holds_images, read, save
from bitstep.stages.sample import sample as _sample


def sample(
    source: str | Path,
    *,
    out: str | Path | None = None,
    num: int = 16,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    prompts: str | Path | None = None,
    pictures: str | Path | None = None,
    size: str | None = None,
    backend: str | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Tensor:
    """Images number 0..num-1 of ``source``, uint8 ``[num, H, W, C]``, also written to ``out`` (.png grid or .npz).

    The same seed gives the same noise for every model, image by image. ``steps`` and ``size`` (WIDTHxHEIGHT, of
    videos WIDTHxHEIGHTxFRAMES) None are the pipeline's default; ``backend`` forces one kernel for every packed layer.
    """
    at_least(1, num=num, steps=steps, batch_size=batch_size)
    path = None if out is None else check_path(Path(out), "images", SAVED)
    model = _load(source, device, backend)
    images = _sample(
        model.pipeline,
        num=num,
        batch_size=batch_size,
        progress=progress,
        **_sampling(model, steps, seed, prompts, pictures, size),
    )
    if path:
        save(images, path)
    return images


def evaluate(
    source: str | Path,
    *,
    against: str | Path,
    num: int = 64,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    features: str | Path | None = None,
    tile: int | None = None,
    prompts: str | Path | None = None,
    pictures: str | Path | None = None,
    size: str | None = None,
    backend: str | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare ``source`` with another pipeline on the same noise, or with real images (an .npz file or a folder).

    See :func:`bitstep.stages.evaluate.evaluate` for what is measured, :func:`bitstep.stages.sample.read` for ``tile``.
    """
    at_least(2, num=num)
    at_least(1, steps=steps, batch_size=batch_size, tile=tile)
    real = holds_images(Path(against))
    if tile and not real:
        raise UsageError(f"--tile is for mosaics of real images, which {against} does not hold")
    reference = read(Path(against), tile) if real else load(against, device=device)
    model = _load(source, device, backend)
    return _evaluate(
        model,
        reference,
        num=num,
        batch_size=batch_size,
        features=features,
        progress=progress,
        **_sampling(model, steps, seed, prompts, pictures, size),
    )


def report(
    directories: str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    against: str | Path | None = None,
    num: int = 16,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    prompts: str | Path | None = None,
    pictures: str | Path | None = None,
    size: str | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Path:
    """Write one self-contained HTML page on the packed pipelines in ``directories``, and return its path.

    Size, operations, kernels, step sizes over time, pictures from the same noise; with ``against``, the pipeline they
    were made from, also PSNR, SSIM and the error at every timestep. ``steps`` None is the first pipeline's default.
    """
    at_least(2, num=num)
    at_least(1, steps=steps, batch_size=batch_size)
    path = check_path(Path(out), "a report", (".html",))
    models = [load(directory, device=device) for directory in as_list(directories)]
    if not models:
        raise UsageError("there is nothing to report on: give at least one packed folder")
    for model in models:
        packed_manifest(model)  # refuses what is not packed before anything is sampled
    sampling = _sampling(models[0], steps, seed, prompts, pictures, size)
    reference = None
    if against is not None:
        full = load(against, device=device)
        check_comparable(models, full, **sampling)
        reference = Reference(full, _sample(full.pipeline, num=num, batch_size=batch_size, **sampling))
    entries = describe(models, reference, num=num, batch_size=batch_size, progress=progress, **sampling)
    text = page(entries, reference, num=num, **sampling)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def demo(out: str | Path, *, overwrite: bool = False, progress: Reporter = SILENT) -> dict[str, Any]:
    """Quantize ``demo:fruits32`` to W4A4 by rounding and with ``best``, and compare both on the same noise.

    Returns ``rows`` (recipe, PSNR, SSIM, compression, minutes) and the path of the ``picture``.
    """
    source, bits, folder = "demo:fruits32", "W4A4", Path(out)
    seed = 1  # of the pictures that the README shows
    recipes: dict[str, tuple[str, ...]] = {"minmax": ("calibration.images=8",), "best": ()}
    reference = sample(source, seed=seed)
    panels, rows = {"full precision": reference}, []
    for recipe, overrides in recipes.items():
        start = time.monotonic()
        packed = quantize(
            source,
            recipe=recipe,
            bits=bits,
            out=folder / f"{recipe}-{bits.lower()}",
            effort="quick",
            overrides=overrides,
            overwrite=overwrite,
            progress=progress,
        )
        minutes = (time.monotonic() - start) / 60
        panels[f"{recipe} {bits}"] = images = sample(packed, seed=seed)
        compression = inspect(packed)["compression"]
        rows.append({"recipe": recipe, "bits": bits, **paired(images, reference)})
        rows[-1] |= {"compression": compression, "minutes": minutes}
    picture = folder / "demo.png"
    _side_by_side(panels, picture)
    return {"rows": rows, "picture": picture}


def _load(source: str | Path, device: str, backend: str | None) -> Source:
    model = load(source, device=device)
    if backend is not None:
        if not packed_layers(model.denoiser):
            raise UsageError(f"{source} has no packed layers whose kernel --backend could choose: leave it out")
        set_backend(model.denoiser, backend)
    return model


def _sampling(
    model: Source,
    steps: int | None,
    seed: int,
    prompts: str | Path | None,
    pictures: str | Path | None,
    size: str | None,
) -> Sampling:
    check_seed(seed)
    return {
        "steps": steps or default_steps(model.pipeline),
        "seed": seed,
        "prompts": read_prompts(prompts),
        "pictures": find_pictures(pictures),
        "size": size,
    }


def _side_by_side(panels: dict[str, Tensor], path: Path) -> None:
    figure = Figure(figsize=(4 * len(panels), 4.4), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(grid(images))
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(path, dpi=100)
