"""Calibrate, second half: activation ranges per (layer, timestep) from the recorded calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bitstep.denoiser.attention import OPERANDS, Interception, attend, intercept
from bitstep.denoiser.calls import Call, run
from bitstep.denoiser.layers import channel_axis, input_of
from bitstep.numerics.uniform import RangeMethod, search_range
from bitstep.progress import Progress, silent
from bitstep.randomness import generator
from bitstep.trajectories.pool import Pool

VALUES_PER_STEP = 1024
"""Values kept of one layer's input at one timestep: enough to weigh rounding against clipping, and little to keep."""


@dataclass(frozen=True)
class Observed:
    """A tensor, say a layer's input, at T timesteps: a random sample of its values ``[T, n]`` with the channel of each,
    int64 ``[T, n]``, and the true extremes of every channel ``[T, channels]``."""

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
    attention: Iterable[str] = (),
    images: int,
    batch_size: int,
    progress: Progress = silent,
) -> dict[str, Observed]:
    """Inputs of the named layers at every key timestep, and under ``MODULE.OPERAND`` the operands of the attention that
    the modules ``attention`` compute; of what runs several times in a forward pass, the first. Attention that is
    computed sample by sample is left out: it does not tell which sample's.

    The denoiser runs on the recorded calls of ``images`` trajectories, ``batch_size`` of them at a time.
    """
    steps, device = len(pool.timesteps), next(denoiser.parameters()).device
    observed: dict[str, list[Observed]] = {}
    parts: dict[str, list[Observed]] = {}  # of one timestep
    runs: Counter[str] = Counter()  # in one forward pass
    row = 0
    call: Call
    apart: set[str] = set()  # modules that compute attention sample by sample

    def keep(name: str, x: Tensor) -> None:
        """``x``: ``[channels, n]``."""
        seen = parts.setdefault(name, [])
        places = torch.randint(x.numel(), (VALUES_PER_STEP,), generator=generator(0, name, row + len(seen) * steps))
        channels = places // x.shape[1]
        values = x[channels.to(x.device), (places % x.shape[1]).to(x.device)]
        low, high = x.aminmax(dim=1)
        seen.append(Observed(values.cpu(), channels, low.cpu(), high.cpu()))

    def keep_input(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runs[name] += 1
        if runs[name] == 1:
            keep(name, input_of(args, kwargs).float().movedim(channel_axis(layer), 0).flatten(1))

    def keep_operand(name: str, operand: str, x: Tensor) -> Tensor:
        runs[name] += operand == OPERANDS[0]
        if len(x) % len(call.timestep):
            apart.add(name)
        if runs[name] == 1:  # (probabilities may come in pieces)
            keep(f"{name}.{operand}", x.float().reshape(1, -1))
        return x

    handles: list[RemovableHandle | Interception] = []
    for name in names:
        hook = partial(keep_input, name)
        handles.append(denoiser.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    for name in attention:
        handles.append(intercept(denoiser.get_submodule(name), partial(attend, partial(keep_operand, name))))
    try:
        for row in range(steps):
            for indices in pool.split(pool.indices_at(row, images), batch_size):
                runs.clear()
                call, _ = pool.batch(indices)
                run(denoiser, call.to(device))
            for name, seen in parts.items():
                observed.setdefault(name, []).append(_together(seen))
            parts.clear()
            progress(row + 1, steps)
    finally:
        for handle in handles:
            handle.remove()
    left_out = {f"{name}.{operand}" for name in apart for operand in OPERANDS}
    return {name: _stacked(rows) for name, rows in observed.items() if name not in left_out}


def _together(parts: list[Observed]) -> Observed:
    """What was observed of one timestep batch by batch, with an equal share of the values of each."""
    share = -(-VALUES_PER_STEP // len(parts))
    values, channels = (
        torch.cat([getattr(part, name)[:share] for part in parts])[:VALUES_PER_STEP] for name in ("values", "channels")
    )
    low, high = (torch.stack([getattr(part, name) for part in parts]) for name in ("low", "high"))
    return Observed(values, channels, low.amin(0), high.amax(0))


def _stacked(rows: list[Observed]) -> Observed:
    return Observed(*(torch.stack([getattr(row, field.name) for row in rows]) for field in fields(Observed)))
