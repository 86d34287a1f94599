"""Report: packed pipelines on one self-contained page, beside what they were made from."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Unpack

import matplotlib
import torch
import yaml
from jinja2 import Environment
from matplotlib.figure import Figure
from torch import Tensor

from bitstep import __version__
from bitstep.progress import Progress, silent
from bitstep.runtime.dispatch import packed_layers
from bitstep.stages.evaluate import STEP_ERROR_IMAGES, paired, step_error
from bitstep.stages.generate import Sampling
from bitstep.stages.inspect import facts, packed_manifest
from bitstep.stages.load import Source
from bitstep.stages.sample import grid, sample

SMALL = 128
"""Pictures narrower than this are shown with their pixels, as enlarging would blur them."""


@dataclass(frozen=True)
class Entry:
    """One pipeline of the report.

    facts: see :func:`bitstep.stages.inspect.facts`
    images: uint8 ``[num, H, W, C]``
    psnr, ssim: to the reference; None where there is none, or they are not defined
    errors: of the denoiser by timestep, see :func:`bitstep.stages.evaluate.step_error`; empty without a reference
    step_sizes: a picture of the activations' step sizes over time, as a data URI; None where there is one for all times
    """

    name: str
    facts: dict[str, Any]
    recipe: str
    images: Tensor
    psnr: float | None
    ssim: float | None
    errors: dict[float, float]
    step_sizes: str | None

    @property
    def kernels(self) -> str:
        """How many layers each kernel runs, in words."""
        counts = Counter(layer["kernel"] for layer in self.facts["layers"])
        return ", ".join(f"{kernel} ({count})" for kernel, count in counts.items())


@dataclass(frozen=True)
class Reference:
    """What the pipelines were made from, and its images from the same noise."""

    source: Source
    images: Tensor


def describe(
    models: Sequence[Source],
    reference: Reference | None,
    *,
    num: int,
    batch_size: int,
    progress: Progress = silent,
    **sampling: Unpack[Sampling],
) -> list[Entry]:
    """What the page says of each model; BitstepError where one is not packed."""
    errors: list[dict[float, float]] = [{} for _ in models]
    if reference is not None:
        count = min(num, STEP_ERROR_IMAGES)
        errors = step_error(models, reference.source, images=count, batch_size=batch_size, **sampling)
    entries = []
    for model, by_timestep in zip(models, errors, strict=True):
        images = sample(model.pipeline, num=num, batch_size=batch_size, **sampling)
        distances = {"psnr": None, "ssim": None} if reference is None else paired(images, reference.images)
        entries.append(
            Entry(
                name=model.name,
                facts=facts(model),
                recipe=yaml.safe_dump(packed_manifest(model).recipe, sort_keys=False),
                images=images,
                errors=by_timestep,
                step_sizes=_step_sizes(model),
                **distances,
            )
        )
        progress(len(entries), len(models))
    return entries


def page(entries: Sequence[Entry], reference: Reference | None, *, num: int, **sampling: Unpack[Sampling]) -> str:
    """The page as HTML that needs no other file. Names are escaped: they may come from anybody's checkpoint."""
    images = {} if reference is None else {f"{reference.source.name}, full precision": reference.images}
    images |= {entry.name: entry.images for entry in entries}
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (files(__package__) / "report.html").read_text(encoding="utf-8")
    )
    return template.render(
        entries=entries,
        against=reference and reference.source.name,
        num=num,
        seed=sampling["seed"],
        steps=sampling["steps"],
        version=__version__,
        pictures=[(title, _png(each)) for title, each in images.items()],
        small=entries[0].images.shape[2] < SMALL,
        errors=_errors({entry.name: entry.errors for entry in entries if entry.errors}),
    )


def _errors(curves: dict[str, dict[float, float]]) -> str | None:
    if not curves:
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, errors in curves.items():
        axes.plot(list(errors), list(errors.values()), label=name, linewidth=1.8)
    axes.set(xlabel="timestep", ylabel="relative squared error", yscale="log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for label in axes.legend(frameon=False).get_texts():
        label.set_parse_math(False)  # a dollar sign in a name is one
    return _svg(figure)


def _step_sizes(model: Source) -> str | None:
    """log2 of every layer's step size at every timestep of the table, relative to the layer's mean logarithm."""
    layers = [layer for layer in packed_layers(model.denoiser).values() if layer.rows is not None]
    if not layers:
        return None
    assert layers[0].rows is not None
    steps = layers[0].rows.cursor.grid
    timesteps = [key * steps.unit for key in steps.keys]
    table = torch.stack([layer.get_buffer("input_scale").cpu().log2() for layer in layers])
    table -= table.mean(1, keepdim=True)
    figure = Figure(figsize=(9, min(6.0, 1.2 + 0.06 * len(layers))), layout="constrained")
    axes = figure.subplots()
    limit = max(0.5, float(table.abs().quantile(0.99)))
    picture = axes.pcolormesh(
        timesteps, range(len(layers)), table, cmap="RdBu_r", vmin=-limit, vmax=limit, shading="nearest", rasterized=True
    )
    axes.invert_yaxis()
    axes.set(xlabel="timestep", ylabel="layer")
    bar = figure.colorbar(picture, format=lambda octaves, _: f"{2**octaves:.2g}x")
    bar.outline.set_visible(False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "bitstep", "svg.fonttype": "none"}):  # the same bytes every time
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _data_uri("image/svg+xml", file.getvalue())


def _png(images: Tensor) -> str:
    file = io.BytesIO()
    grid(images).save(file, "PNG")
    return _data_uri("image/png", file.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
