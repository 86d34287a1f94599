"""Run any diffusers pipeline on seeded noise, image by image the same whatever the batch size."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, Unpack

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from bitstep.denoiser.calls import wrapped
from bitstep.errors import BitstepError, UsageError, first_line
from bitstep.randomness import generator
from bitstep.stages.pictures import MASK, PARAMETERS, picture_arguments

PROMPTS = (
    "a red fox sitting in the snow at dusk",
    "a bowl of ripe peaches on a wooden table",
    "a lighthouse on a cliff above a stormy sea",
    "portrait of an old fisherman with a grey beard",
    "a narrow street in an old town after rain, neon signs",
    "a steam train crossing a stone bridge in autumn",
    "an astronaut reading a newspaper, oil painting",
    "a glass of water with ice, studio photograph",
    "a herd of elephants crossing a river, aerial view",
    "a cosy library with a fireplace and tall shelves",
    "watercolour of a mountain lake in the morning mist",
    "a vintage bicycle leaning on a blue wall",
    "a plate of sushi with chopsticks, top view",
    "a robot watering flowers in a greenhouse",
    "a sailing boat under a full moon",
    "children flying kites on a wide beach",
)

DENOISERS = ("unet", "transformer")

_SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)(x[1-9]\d*)?")

FEW_STEPS = 4
"""For a look at what a pipeline computes: not all schedules can be done in one step (PNDM's and Mochi's cannot)."""


def read_prompts(path: str | Path | None) -> list[str] | None:
    """The lines of a text file that say something; None where no file is given."""
    if path is None:
        return None
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read prompts {path}: {getattr(error, 'strerror', None) or error}") from error
    if not any(lines):
        raise UsageError(f"{path} holds no prompts: expected one a line")
    return [line for line in lines if line]


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """The name of the pipeline's component that predicts noise: ``unet`` or ``transformer``."""
    for name in DENOISERS:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise BitstepError(
        f"{type(pipeline).__name__} has no denoiser: expected a component named {' or '.join(DENOISERS)}, "
        f"found {', '.join(pipeline.components)}"
    )


class Inputs(TypedDict):
    """What a user may give a pipeline: see :class:`Sampling`."""

    prompts: NotRequired[Sequence[str] | None]
    pictures: NotRequired[Sequence[str] | None]


class Sampling(Inputs):
    """What a picture depends on besides its number.

    Initial noise, noise added by the sampler, class label and prompt of an image depend on (seed, number) alone.
    ``prompts`` are taken in turn; without any a small built-in list serves. ``pictures`` are the files that pipelines
    start from which take one (:mod:`bitstep.stages.pictures`), in turn too. ``guidance_scale`` None is the pipeline's
    own. ``eta`` overrides the sampler's where it has one (DDIM); others keep their own noise. ``size`` is WIDTHxHEIGHT
    in pixels, of videos WIDTHxHEIGHTxFRAMES, and that of ``pictures``; None for the pipeline's own.
    """

    steps: int
    seed: int
    guidance_scale: NotRequired[float | None]
    eta: NotRequired[float | None]
    size: NotRequired[str | None]


def batches(images: int, batch_size: int, sampling: Sampling) -> list[range]:
    """Image numbers 0..images-1 in consecutive batches; of one where they start from pictures, since several are to
    some pipelines one for each image, to others (Flux 2, Qwen-Image-Edit) references of all."""
    size = 1 if sampling.get("pictures") else batch_size
    return [range(start, min(start + size, images)) for start in range(0, images, size)]


def read_size(size: str | None) -> dict[str, int]:
    """What a pipeline is told of a ``size``, by the names of its parameters."""
    if size is None:
        return {}
    if not isinstance(size, str) or not _SIZE.fullmatch(size):
        raise UsageError(f"a size is WIDTHxHEIGHT, or WIDTHxHEIGHTxFRAMES, in whole numbers above 0: got {size!r}")
    return dict(zip(("width", "height", "num_frames"), map(int, size.split("x")), strict=False))


def generate(
    pipeline: DiffusionPipeline, *, images: int, batch_size: int, **sampling: Unpack[Sampling]
) -> Iterator[Tensor]:
    """Pictures of image numbers 0..images-1, batch by batch: float ``[batch, channels, height, width]`` in [0, 1]."""
    for numbers in batches(images, batch_size, sampling):
        yield generate_batch(pipeline, numbers, output_type="pt", **sampling)


def generate_batch(
    pipeline: DiffusionPipeline, numbers: Sequence[int], *, output_type: str, **sampling: Unpack[Sampling]
) -> Tensor:
    """Images ``numbers`` of the endless list that ``sampling`` defines, from one call of the pipeline.

    With ``output_type`` "latent" pipelines that can do so leave the decoder out, with "pt" they return pictures.

    Raises UsageError for prompts, pictures, guidance or a size given to a pipeline that takes none, and for more steps
    than its schedule has, BitstepError for a pipeline that needs other input or fails.
    """
    name, parameters = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    _check(pipeline, parameters, sampling)
    generators = [generator(sampling["seed"], "noise", number) for number in numbers]
    arguments = _arguments(pipeline, parameters, numbers, sampling)
    arguments |= {"generator": generators, "output_type": output_type}
    with wrapped(pipeline.scheduler, "step", lambda step: _seeded(step, generators, sampling.get("eta"))):
        try:
            return _as_tensor(pipeline(**{key: value for key, value in arguments.items() if key in parameters})[0])
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            # by its signature a picture may be left out, but not every pipeline can do without
            lacks_pictures = set(PARAMETERS) & parameters.keys() and not sampling.get("pictures")
            advice = "; if it needs pictures, give it a folder of them: --pictures" if lacks_pictures else ""
            raise BitstepError(f"{name} failed, in {sampling['steps']} steps: {first_line(error)}{advice}") from error


def _check(pipeline: DiffusionPipeline, parameters: Mapping[str, inspect.Parameter], sampling: Sampling) -> None:
    """Raise UsageError for what the pipeline does not take."""
    name = type(pipeline).__name__
    if sampling.get("prompts") is not None and "prompt" not in parameters:
        raise UsageError(f"{name} takes no prompts: leave them out")
    if sampling.get("pictures") is not None and not set(PARAMETERS) & parameters.keys():
        raise UsageError(f"{name} takes no pictures: leave them out")
    if sampling.get("guidance_scale") is not None and "guidance_scale" not in parameters:
        raise UsageError(f"{name} takes no guidance scale: leave it out")
    taken = parameters.keys() | ({"width", "height"} if sampling.get("pictures") else set())
    if untaken := read_size(sampling.get("size")).keys() - taken:
        raise UsageError(f"{name} takes no {' and no '.join(sorted(untaken))}: leave that, or the whole size, out")
    longest = pipeline.scheduler.config.get("num_train_timesteps", sampling["steps"])
    if sampling["steps"] > longest:
        raise UsageError(f"{name} samples in at most {longest} steps: got {sampling['steps']}")
    if not {"generator", "num_inference_steps"} <= parameters.keys():
        raise BitstepError(f"cannot run {name}: it takes no generator or number of inference steps")


def _arguments(
    pipeline: DiffusionPipeline,
    parameters: Mapping[str, inspect.Parameter],
    numbers: Sequence[int],
    sampling: Sampling,
) -> dict[str, Any]:
    """What a call of the pipeline for images ``numbers`` is given besides their noise, if it takes it; BitstepError
    where it needs more."""
    texts = sampling.get("prompts") or PROMPTS
    size = read_size(sampling.get("size"))
    arguments: dict[str, Any] = {
        "batch_size": len(numbers),
        "prompt": [texts[number % len(texts)] for number in numbers],
        "num_inference_steps": sampling["steps"],
        "use_resolution_binning": False,  # images have the denoiser's native size: nothing to bin
        **size,
    }
    if files := sampling.get("pictures"):
        (number,) = numbers
        sides = (size["width"], size["height"]) if size else None
        arguments |= picture_arguments(files, number, sampling["seed"], sides)
    if classes := _classes(pipeline):
        arguments["class_labels"] = [_label(sampling["seed"], number, classes) for number in numbers]
    if (guidance_scale := sampling.get("guidance_scale")) is not None:
        arguments["guidance_scale"] = guidance_scale
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in arguments
    ]
    if missing:
        advice = " (pictures are given by --pictures)" if set(missing) <= {*PARAMETERS, MASK} else ""
        raise BitstepError(f"cannot run {type(pipeline).__name__}: it also needs {', '.join(missing)}{advice}")
    return arguments


def generate_latents(pipeline: DiffusionPipeline, numbers: Sequence[int], **sampling: Unpack[Sampling]) -> Tensor:
    """:func:`generate_batch` that ends where the denoiser does: no decoding where there is a decoder."""
    output_type = "latent" if "vae" in pipeline.components else "pt"
    return generate_batch(pipeline, numbers, output_type=output_type, **sampling)


def _seeded(step: Callable[..., Any], generators: list[torch.Generator], eta: float | None) -> Callable[..., Any]:
    """A scheduler's step that draws each image's noise from that image's generator, though the pipeline forgot it."""
    accepted = inspect.signature(step).parameters

    def seeded(*args: Any, **kwargs: Any) -> Any:
        rows = len(args[0] if args else kwargs["model_output"])
        if "generator" in accepted and kwargs.get("generator") is None:
            kwargs["generator"] = generators * (rows // len(generators))  # DiT steps both halves of a guided batch
        if eta is not None and "eta" in accepted:
            kwargs["eta"] = eta
        return step(*args, **kwargs)

    return seeded


def _label(seed: int, number: int, classes: int) -> int:
    return int(torch.randint(classes, (), generator=generator(seed, "label", number)))


def _classes(pipeline: DiffusionPipeline) -> int:
    """How many class labels the denoiser knows; 0 where it takes none."""
    config = getattr(pipeline, denoiser_name(pipeline)).config
    return config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 0


def _as_tensor(images: Any) -> Tensor:
    """Tensors as they are; numpy images ``[batch, height, width, channels]`` in tensor order."""
    if isinstance(images, np.ndarray):
        return torch.from_numpy(images).movedim(-1, 1)
    if not isinstance(images, Tensor):
        raise BitstepError(f"expected the pipeline to return images as a tensor, got {type(images).__name__}")
    return images
