"""Evaluate: a pipeline against another one on the same noise, or against real images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from bitstep.denoiser.calls import Call, by_name, first_tensor, run
from bitstep.errors import UsageError
from bitstep.metrics import SSIM_WINDOW, psnr, ssim
from bitstep.progress import Progress, silent
from bitstep.stages.calibrate import stream
from bitstep.stages.features import check_features, compare, load_features
from bitstep.stages.generate import FEW_STEPS, Sampling
from bitstep.stages.load import Source
from bitstep.stages.sample import sample

STEP_ERROR_IMAGES = 16  # trajectories behind ``step_error``: thousands of numbers each, so more would change nothing


def evaluate(
    model: Source,
    against: Source | Tensor,
    *,
    num: int,
    batch_size: int,
    features: str | Path | None = None,
    progress: Progress = silent,
    **sampling: Unpack[Sampling],
) -> dict[str, Any]:
    """Compare ``num`` images of ``model`` with those of ``against`` on the same noise, or with given images (uint8
    ``[N, H, W, 3]``).

    psnr, ssim: see :mod:`bitstep.metrics`; None against given images, and the PSNR of equal images is None
    step_error: relative squared error of the denoiser's output on the inputs that ``against`` computes for itself, in
        the order of sampling, at the timesteps in ``timesteps``; None against given images
    frechet_distance and more: see :func:`bitstep.stages.features.compare`; None without ``features``
    features: ``inception``, or the name of a network's file without its ending
    """
    network = None if features is None else load_features(features)
    if isinstance(against, Source):
        shape = check_comparable([model], against, **sampling)
    elif network is None:
        raise UsageError("given images can only be compared as a set, in the features of a network: add --features")
    elif len(against) < 2:
        raise UsageError("one image is no set to compare with: expected at least 2")
    else:
        check_features(network, against[:1])
        shape = _shapes(model, sampling)["picture"]
    if network is not None:
        check_features(network, torch.zeros(shape, dtype=torch.uint8))
    images = sample(model.pipeline, num=num, batch_size=batch_size, progress=progress, **sampling)
    numbers: dict[str, Any] = {
        "source": model.name,
        "num_images": num,
        "steps": sampling["steps"],
        "seed": sampling["seed"],
    }
    if isinstance(against, Source):
        reference = sample(against.pipeline, num=num, batch_size=batch_size, progress=progress, **sampling)
        (errors,) = step_error([model], against, images=min(num, STEP_ERROR_IMAGES), batch_size=batch_size, **sampling)
        numbers |= {"against": against.name} | paired(images, reference)
        numbers |= {"step_error": list(errors.values()), "timesteps": list(errors)}
    else:
        reference = against
        numbers |= {"against": f"{len(against)} images", "psnr": None, "ssim": None, "step_error": None}
    if network is None:
        return numbers | {"frechet_distance": None, "features": None}
    return numbers | compare(network, images, reference, batch_size) | {"features": Path(str(features)).stem}


def paired(images: Tensor, reference: Tensor) -> dict[str, float | None]:
    """PSNR in dB and SSIM between uint8 images ``[N, H, W, C]``; what is not defined is None (it goes into JSON)."""
    noise = psnr(images, reference)
    small = min(images.shape[1:3]) < SSIM_WINDOW
    return {"psnr": noise if math.isfinite(noise) else None, "ssim": None if small else ssim(images, reference)}


def check_comparable(models: Sequence[Source], reference: Source, **sampling: Unpack[Sampling]) -> list[int]:
    """The shape ``[1, H, W, C]`` of a picture of each; UsageError where a model's denoiser takes or makes other shapes
    than that of ``reference``."""
    expected = _shapes(reference, sampling)
    for model in models:
        found = _shapes(model, sampling)
        for name in expected | found:
            if found.get(name) != expected.get(name):
                ours, theirs = found.get(name, "nothing"), expected.get(name, "nothing")
                raise UsageError(
                    f"{model.name} cannot be compared with {reference.name}: "
                    f"its denoiser's {name} is {ours}, that of the other {theirs}"
                )
    return expected["picture"]


def _shapes(source: Source, sampling: Sampling) -> dict[str, list[int]]:
    """Of a picture, and of the tensors that the denoiser takes and returns for it."""
    shapes: dict[str, list[int]] = {}

    def called(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensors = {**Call(by_name(denoiser.forward, args, kwargs)).tensors, "call.output": first_tensor(output)}
        shapes.update({name.removeprefix("call."): list(x.shape) for name, x in tensors.items() if x.ndim})

    few: Sampling = {**sampling, "steps": min(FEW_STEPS, sampling["steps"])}
    with source.denoiser.register_forward_hook(called, with_kwargs=True):
        picture = sample(source.pipeline, num=1, batch_size=1, **few)
    return shapes | {"picture": list(picture.shape)}


@torch.no_grad()
def step_error(
    models: Sequence[Source], reference: Source, *, images: int, batch_size: int, **sampling: Unpack[Sampling]
) -> list[dict[float, float]]:
    """Of each model ``|model(x) - reference(x)|^2 / |reference(x)|^2`` of the denoisers' outputs, by timestep, in
    sampling order.

    x are the inputs on the trajectories of ``reference``, so the error of one step does not feed the next.
    """
    totals: list[dict[float, list[float]]] = [{} for _ in models]
    for pool in stream(reference, images=images, batch_size=batch_size, **sampling):
        for step, timestep in reversed(list(enumerate(pool.timesteps.tolist()))):
            for indices in pool.split(pool.indices_at(step), batch_size):
                call, expected = pool.batch(indices)
                for model, sums in zip(models, totals, strict=True):
                    output = run(model.denoiser, call.to(reference.pipeline.device)).cpu()
                    total = sums.setdefault(timestep, [0.0, 0.0])
                    total[0] += (output - expected).double().square().sum().item()
                    total[1] += expected.double().square().sum().item()
    return [{timestep: error / power for timestep, (error, power) in sums.items()} for sums in totals]
