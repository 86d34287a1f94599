"""Calibrate, on the side: what the rounding of single layers' weights does to the denoiser's output.

    |J_W dW|^2 = E <grad_W <v, f(x_t, t)>, dW>^2,   v white noise

To first order, rounding W to W + dW moves the output by J_W dW. One backward pass from a random direction v of the
output estimates that for all layers, and all ways to round them, at once, however many there are; trying them one after
another takes a forward pass for each. On the bundled model the logarithms of both agree to a correlation of 0.99.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bitstep.denoiser.calls import run
from bitstep.denoiser.layers import weight_of
from bitstep.numerics.packing import QuantizedWeight
from bitstep.progress import Progress, silent
from bitstep.randomness import draw, generator
from bitstep.trajectories.pool import Pool

PROBES = 32
SAMPLES = 8


def weight_errors(
    denoiser: nn.Module,
    pool: Pool,
    rounded: Mapping[str, Sequence[QuantizedWeight]],
    importance: Tensor,
    *,
    progress: Progress = silent,
) -> dict[str, list[float]]:
    """Mean squared error of the (guided) output for every weight in ``rounded``, by layer, all others as they are.

    importance: ``[T]``, what an error at each of the pool's timesteps counts
    """
    weights = {name: weight_of(denoiser.get_submodule(name)) for name in rounded}
    errors = {name: [0.0] * len(choices) for name, choices in rounded.items()}
    for probe in range(PROBES):
        gradients = _probed(denoiser, pool, list(weights.values()), importance, probe)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            gradient = gradient.double().flatten()
            kept = gradient @ weight.detach().double().flatten()
            for place, choice in enumerate(rounded[name]):
                change = gradient @ choice.dequantize().to(weight).double().flatten() - kept
                errors[name][place] += float(change.square()) / PROBES
        progress(probe + 1, PROBES)
    return errors


def _probed(
    denoiser: nn.Module, pool: Pool, weights: Sequence[Tensor], importance: Tensor, probe: int
) -> tuple[Tensor, ...]:
    """Gradients of ``<v, f>`` over samples of all timesteps, scaled to a mean over samples and values; they are taken
    one by one, so that memory holds what one of them keeps."""
    indices = draw(len(pool), min(SAMPLES, len(pool)), 0, "probes", probe)
    random = generator(0, "direction", probe)
    total = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for index in indices:
            call, _ = pool.batch(index[None])
            with torch.enable_grad():
                output = pool.guided(run(denoiser, call.to(weights[0].device)).float())
                direction = torch.randn(output.shape, generator=random).to(output.device)
                count = (importance[pool.step_of[index]] / output.numel() / len(indices)).sqrt()
                gradients = torch.autograd.grad((output * direction).sum() * count.to(output), list(weights))
            for gathered, gradient in zip(total, gradients, strict=True):
                gathered += gradient
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return tuple(total)
