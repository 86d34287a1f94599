"""Calibrate, on the side: how far an error that the denoiser makes at one step shows in the finished sample.

    s[t] = |x_0(eps_t + d) - x_0(eps_t)|^2 / |d|^2,   d white noise

At high noise an error is carried through all the steps that follow, which build their picture on it; late ones only
remain. On a trained model s falls by three orders of magnitude from the first steps to the last, while the loss that
distillation usually minimises counts all steps alike.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from statistics import fmean
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from bitstep.denoiser.calls import first_tensor, timestep_of, unwrapped, wrapped
from bitstep.progress import Progress, silent
from bitstep.randomness import generator
from bitstep.stages.generate import Sampling, batches, generate_latents
from bitstep.stages.load import Source

IMAGES = 4
STEPS = 16
DISTURBANCE = 0.03
"""Size of d beside the output that it is added to, as a ratio of root mean squares."""


@torch.no_grad()
def sensitivity(
    source: Source,
    timesteps: Tensor,
    *,
    batch_size: int = IMAGES,
    progress: Progress = silent,
    **sampling: Unpack[Sampling],
) -> Tensor:
    """s at each of ``timesteps`` (ascending), float32 ``[len(timesteps)]``.

    Measured on ``IMAGES`` trajectories of at most ``STEPS`` steps, ``batch_size`` at a time, and between their
    timesteps interpolated in log s. The steps before the disturbed one are answered from memory.
    """
    sampling["steps"] = min(STEPS, sampling["steps"])
    found: dict[float, list[float]] = {}
    parts = batches(IMAGES, batch_size, sampling)
    for part, numbers in enumerate(parts):
        sample = partial(generate_latents, source.pipeline, numbers, **sampling)
        recording = _Recording()
        with _answering(source.denoiser, recording):
            undisturbed = sample()
        calls = len(recording.timesteps)
        for number, timestep in enumerate(recording.timesteps):
            progress(part * calls + number, len(parts) * calls)
            disturbing = _Disturbing(recording.outputs, number, sampling["seed"])
            with _answering(source.denoiser, disturbing):
                change = sample() - undisturbed
            ratios = change.square().flatten(1).mean(1) / disturbing.size
            found.setdefault(timestep, []).extend(ratios.tolist())
        progress((part + 1) * calls, len(parts) * calls)
    known = sorted(found)
    logs = [math.log(max(fmean(found[timestep]), 1e-12)) for timestep in known]
    return torch.from_numpy(np.exp(np.interp(timesteps.double().numpy(), known, logs))).float()


class _Recording:
    """Answers calls with the denoiser itself, and keeps what it said."""

    def __init__(self) -> None:
        self.timesteps: list[float] = []
        self.outputs: list[Any] = []

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        self.timesteps.append(float(timestep_of(forward, args, kwargs).flatten()[0]))
        self.outputs.append(copy.deepcopy(output))  # pipelines work in place
        return output


class _Disturbing:
    """Answers the calls before ``number`` from memory, and adds noise to the output of that one."""

    def __init__(self, outputs: list[Any], number: int, seed: int) -> None:
        self._outputs, self._number, self._seed = outputs, number, seed
        self._calls = 0
        self.size = 0.0

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number, self._calls = self._calls, self._calls + 1
        if number < self._number:
            return copy.deepcopy(self._outputs[number])
        output = forward(*args, **kwargs)
        if number == self._number:
            tensor = first_tensor(output)
            noise = torch.randn(tensor.shape, generator=generator(self._seed, "disturbance", number)).to(tensor)
            noise *= DISTURBANCE * tensor.square().mean().sqrt()
            for row, change in zip(unwrapped(output), noise, strict=True):  # of a tensor, or of a list
                row.add_(change)
            self.size = float(noise.square().mean())
        return output


def _answering(denoiser: nn.Module, answer: Callable[..., Any]) -> AbstractContextManager[None]:
    """Has ``answer(forward, args, kwargs)`` answer the calls of ``denoiser`` meanwhile."""
    return wrapped(denoiser, "forward", lambda forward: lambda *args, **kwargs: answer(forward, args, kwargs))
