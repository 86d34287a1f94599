"""Calibrate, second half: activation ranges per (layer, timestep) from the recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitstep.calls import Pool, run
from bitstep.randomness import generator

VALUES_PER_STEP = 2048
"""Values kept of one layer's input at one timestep, the extremes among them: enough for a range, little to keep."""


@torch.no_grad()
def observe(
    denoiser: nn.Module,
    pool: Pool,
    names: Iterable[str],
    *,
    images: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Inputs of the named layers at every key timestep: float32 ``[T, VALUES_PER_STEP]`` each.

    The denoiser runs once per timestep, on the recorded calls of ``images`` trajectories.
    """
    names = list(names)
    steps = len(pool.timesteps)
    observed = {name: torch.empty(steps, VALUES_PER_STEP) for name in names}
    row = 0

    def keep(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        values = args[0].detach().float().flatten()
        places = torch.randint(len(values), (VALUES_PER_STEP,), generator=generator(0, name, row))
        kept = values[places.to(values.device)]
        kept[0], kept[1] = values.min(), values.max()
        observed[name][row] = kept

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
