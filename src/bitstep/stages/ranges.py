"""Calibrate, second half: activation ranges per (layer, timestep) from the recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitstep.calls import Pool, run
from bitstep.numerics.uniform import RangeMethod, search_range
from bitstep.randomness import generator

VALUES_PER_STEP = 1024
"""Values kept of one layer's input at one timestep: enough to weigh rounding against clipping, and little to keep."""


@dataclass(frozen=True)
class Observed:
    """A layer's input at T timesteps: a random sample of its values ``[T, n]``, and its true extremes ``[T]``."""

    values: Tensor
    low: Tensor
    high: Tensor

    def range(self, bits: int, method: RangeMethod, *, per_step: bool, signed: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero point, ``[T]``, or ``[1]`` for all timesteps together."""
        values, low, high = self.values, self.low, self.high
        if not per_step:
            values, low, high = values.reshape(1, -1), low.amin(0, keepdim=True), high.amax(0, keepdim=True)
        return search_range(values, bits, symmetric=signed, method=method, low=low, high=high)


@torch.no_grad()
def observe(
    denoiser: nn.Module,
    pool: Pool,
    names: Iterable[str],
    *,
    images: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Observed]:
    """Inputs of the named layers at every key timestep.

    The denoiser runs once per timestep, on the recorded calls of ``images`` trajectories.
    """
    names = list(names)
    steps = len(pool.timesteps)
    observed = {
        name: Observed(torch.empty(steps, VALUES_PER_STEP), torch.empty(steps), torch.empty(steps)) for name in names
    }
    row = 0

    def keep(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        values, kept = args[0].detach().float().flatten(), observed[name]
        places = torch.randint(len(values), (VALUES_PER_STEP,), generator=generator(0, name, row))
        kept.values[row] = values[places.to(values.device)]
        kept.low[row], kept.high[row] = values.aminmax()

    handles = [denoiser.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in names]
    try:
        for row in range(steps):
            call, _ = pool.batch(pool.indices_at(row)[:images])
            run(denoiser, call)
            progress(row + 1, steps)
    finally:
        for handle in handles:
            handle.remove()
    return observed
