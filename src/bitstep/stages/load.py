"""Load a diffusers pipeline, full precision or packed, from wherever a SOURCE may point."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from bitstep.arguments import check_device
from bitstep.checkpoint.config import QuantMethod
from bitstep.errors import BitstepError, first_line
from bitstep.stages.generate import DENOISERS, denoiser_name

_DEMOS = (
    Path(__file__).parents[1] / "demo",
    Path(__file__).parents[3] / "models",  # larger ones, in a checkout of the repository only
)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_VARIANT = re.compile(r"\.([^.-]+)(?:-\d+-of-\d+)?\.safetensors$")  # model.fp16.safetensors


@dataclass(frozen=True)
class Source:
    """A loaded pipeline; ``name`` is what it was addressed by, ``folder`` where its files are (None: nowhere)."""

    name: str
    pipeline: DiffusionPipeline
    folder: Path | None = None

    @property
    def component(self) -> str:
        """The denoiser's name."""
        return denoiser_name(self.pipeline)

    @property
    def denoiser(self) -> nn.Module:
        """The component that predicts noise."""
        denoiser: nn.Module = getattr(self.pipeline, self.component)
        return denoiser


def load(source: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Source:
    """The pipeline at ``source``: a diffusers pipeline folder, a component folder, a Hub id, or ``demo:NAME``.

    A component folder is given the simplest pipeline that can run it. ``dtype`` is for full precision: a pipeline with
    a packed denoiser is loaded in float32, the type of its scales. Weights are read from safetensors files only.

    Raises BitstepError when nothing is there, it is no pipeline with a denoiser, or its files are damaged, UsageError
    when there is no such ``device``.
    """
    check_device(device)
    name = str(source)
    folder = _demo(name.removeprefix("demo:")) if name.startswith("demo:") else _locate(name)
    try:
        with without_progress_bars():
            if (folder / "model_index.json").is_file():
                pipeline = _load_pipeline(folder, dtype)
            else:
                pipeline = _load_component(folder, dtype)
        denoiser_name(pipeline)  # refuses a pipeline without one
        pipeline.to(device)
    except BitstepError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise all kinds for a damaged folder
        raise BitstepError(f"cannot load {name}: {_without_safetensors(folder) or first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return Source(name, pipeline, folder)


@torch.no_grad()
def as_stored(module: nn.Module, folder: Path) -> None:
    """Give the tensors of ``module`` the floating-point types that they have in ``folder``, where it was loaded from;
    those that have other names there, the type that holds all."""
    stored: dict[str, torch.dtype] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (no mapping)
    floating = {name: dtype for name, dtype in stored.items() if dtype.is_floating_point}
    widest = reduce(torch.promote_types, floating.values(), next(iter(floating.values()), torch.float32))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(floating.get(name, widest))


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """diffusers and transformers show them for reading and writing files of a second; a download has its own."""
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def demos() -> list[str]:
    """Names that ``demo:NAME`` accepts."""
    return sorted(_demo_folders())


def _demo(name: str) -> Path:
    folders = _demo_folders()
    if name not in folders:
        raise BitstepError(f"there is no demo:{name}: choose among {', '.join(f'demo:{demo}' for demo in demos())}")
    return folders[name]


def _demo_folders() -> dict[str, Path]:
    return {index.parent.name: index.parent for folder in _DEMOS for index in folder.glob("*/model_index.json")}


def _locate(name: str) -> Path:
    """The folder itself, or the Hub's copy in the local cache, downloaded where needed."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise BitstepError(f"{name} is a file: expected the folder of a diffusers pipeline")
    if not _HUB_ID.fullmatch(name):
        raise BitstepError(f"{name} does not exist: expected a pipeline folder, a Hub id (owner/name) or demo:NAME")
    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:  # offline, not found, gated, no safetensors: each has its own exception
        raise BitstepError(
            f"{name} is no folder here and cannot be had from the Hugging Face Hub "
            f"(offline, unknown or private?): {first_line(error).partition(' (')[0].rstrip('.')}"
        ) from error


def _load_pipeline(folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    packed = any(_packed(folder / component) for component in DENOISERS)
    pipeline: DiffusionPipeline = DiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, dtype=torch.float32 if packed else dtype
    )
    return pipeline


def _load_component(folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    config = _config(folder)
    kind = config.get("_class_name")
    if kind is None:
        raise BitstepError(
            f"{folder} is no diffusers pipeline: expected model_index.json, or the config.json of a UNet2DModel"
        )
    conditional = config.get("class_embed_type") or config.get("num_class_embeds")
    if kind != UNet2DModel.__name__ or conditional:
        what = "class-conditional UNet2DModel" if kind == UNet2DModel.__name__ else kind
        raise BitstepError(
            f"{folder} holds a single {what}, which does not run without its pipeline: give the pipeline's folder"
        )
    unet = UNet2DModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32 if _packed(folder) else dtype)
    return DDIMPipeline(unet, DDIMScheduler())


def _packed(folder: Path) -> bool:
    """Whether bitstep packed the component in ``folder``; BitstepError where somebody else quantized it."""
    config = _config(folder)
    if "quantization_config" not in config:
        return False
    quantization = config["quantization_config"]
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is None:
        raise BitstepError(f"{folder / 'config.json'} is damaged: quantization_config does not say its quant_method")
    if method != QuantMethod.BITSTEP:
        raise BitstepError(f"{folder} is quantized by {method}: expected full precision, or what bitstep packed")
    return True


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise BitstepError(f"{path} is not valid JSON: {error}") from error
    return config


def _without_safetensors(folder: Path) -> str | None:
    """What to do where a component has weights, but none in plain safetensors files."""
    for component in (folder, *sorted(folder.iterdir())):
        names = [file.name for file in component.glob("*.safetensors")]
        variants = [found[1] for found in map(_VARIANT.search, names) if found]
        if len(variants) == len(names) and (variants or any(component.glob("*.bin"))):
            options = f"variant={variants[0]!r}" if variants else "use_safetensors=False"
            return (
                f"{component} has no plain safetensors files: load it with "
                f"DiffusionPipeline.from_pretrained(FOLDER, {options}) and save_pretrained it to another folder"
            )
    return None
