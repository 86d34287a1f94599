"""Calibrate, second half: activation ranges per (layer, timestep) from the recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitstep.calls import Pool, run
from bitstep.numerics.uniform import RangeMethod, search_range
from bitstep.randomness import generator
from bitstep.structure import channel_axis

VALUES_PER_STEP = 1024
"""Values kept of one layer's input at one timestep: enough to weigh rounding against clipping, and little to keep."""


@dataclass(frozen=True)
class Observed:
    """A layer's input at T timesteps: a random sample of its values ``[T, n]`` with the channel of each, int64
    ``[T, n]``, and the true extremes of every channel ``[T, channels]``."""

    values: Tensor
    channels: Tensor
    low: Tensor
    high: Tensor

    @property
    def channel_range(self) -> Tensor:
        """The largest magnitude of every channel, ``[channels]``."""
        return torch.maximum(-self.low, self.high).amax(0)

    def divided(self, scale: Tensor) -> Observed:
        """What would have been observed with every channel divided by its ``scale`` ``[channels]``, all positive."""
        return Observed(self.values / scale[self.channels], self.channels, self.low / scale, self.high / scale)

    def range(self, bits: int, method: RangeMethod, *, per_step: bool, signed: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero point, ``[T]``, or ``[1]`` for all timesteps together."""
        values, low, high = self.values, self.low.amin(1), self.high.amax(1)
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
    layers = {name: denoiser.get_submodule(name) for name in names}
    observed: dict[str, list[Observed]] = {name: [] for name in names}
    row = 0

    def keep(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if len(observed[name]) > row:
            return
        x = args[0].detach().float().movedim(channel_axis(layer), 0).flatten(1)
        places = torch.randint(x.numel(), (VALUES_PER_STEP,), generator=generator(0, name, row))
        channels = places // x.shape[1]
        values = x[channels.to(x.device), (places % x.shape[1]).to(x.device)]
        low, high = x.aminmax(dim=1)
        observed[name].append(Observed(values.cpu(), channels, low.cpu(), high.cpu()))

    handles = [layer.register_forward_pre_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        for row in range(steps):
            call, _ = pool.batch(pool.indices_at(row)[:images])
            run(denoiser, call)
            progress(row + 1, steps)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _stacked(rows) for name, rows in observed.items()}


def _stacked(rows: list[Observed]) -> Observed:
    return Observed(*(torch.stack([getattr(row, field.name) for row in rows]) for field in fields(Observed)))
