"""Calibrate: activation ranges per (layer, timestep) from the recorded calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitstep.denoiser.attention import OPERANDS, attend, intercept
from bitstep.denoiser.calls import run
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


@dataclass(frozen=True)
class Observations:
    """layers: inputs of layers
    operands: of the attention that modules compute, by module and operand
    """

    layers: dict[str, Observed] = field(default_factory=dict)
    operands: dict[str, dict[str, Observed]] = field(default_factory=dict)


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
) -> Observations:
    """Inputs of the named layers at every key timestep, and the operands of the attention that the modules
    ``attention`` compute; of what runs several times in a forward pass, the first. Attention that is computed sample by
    sample is left out: it does not tell which sample's.

    The denoiser runs on the recorded calls of ``images`` trajectories, ``batch_size`` of them at a time.
    """
    steps, device = len(pool.timesteps), next(denoiser.parameters()).device
    observer = _Observer(steps)
    with ExitStack() as stack:
        for name in names:
            hook = partial(observer.layer, name)
            stack.enter_context(denoiser.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        for name in attention:
            instead = partial(attend, partial(observer.operand, name))
            stack.callback(intercept(denoiser.get_submodule(name), instead).remove)
        for row in range(steps):
            for indices in pool.split(pool.indices_at(row, images), batch_size):
                call, _ = pool.batch(indices)
                observer.expect(len(call.timestep))
                run(denoiser, call.to(device))
            observer.finish_row()
            progress(row + 1, steps)
    return observer.found()


class _Observer:
    """Keeps what layers and attention are given, forward pass by forward pass and timestep by timestep."""

    def __init__(self, steps: int) -> None:
        self._steps, self._row = steps, 0
        # by layer and "", or by module and operand
        self._rows: dict[tuple[str, str], list[Observed]] = {}
        self._parts: dict[tuple[str, str], list[Observed]] = {}  # of this row, a forward pass each
        self._runs: Counter[str] = Counter()  # in this forward pass
        self._samples = 0  # of it
        self._apart: set[str] = set()  # modules that compute attention sample by sample

    def expect(self, samples: int) -> None:
        """A forward pass follows."""
        self._runs.clear()
        self._samples = samples

    def layer(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._runs[name] += 1
        if self._runs[name] == 1:
            self._keep((name, ""), input_of(args, kwargs).float().movedim(channel_axis(layer), 0).flatten(1))

    def operand(self, name: str, operand: str, x: Tensor) -> Tensor:
        self._runs[name] += operand == OPERANDS[0]
        if len(x) % self._samples:
            self._apart.add(name)
        if self._runs[name] == 1:  # (probabilities may come in pieces)
            # of values the channels count: a layer that they go to may scale them
            by_channel = operand == "value" and x.ndim == 4
            rows = x.permute(1, 3, 0, 2).flatten(0, 1) if by_channel else x.reshape(1, -1)
            self._keep((name, operand), rows.float().flatten(1))
        return x

    def finish_row(self) -> None:
        for key, seen in self._parts.items():
            self._rows.setdefault(key, []).append(_together(seen))
        self._parts.clear()
        self._row += 1

    def found(self) -> Observations:
        observations = Observations()
        for (name, operand), rows in self._rows.items():
            if not operand:
                observations.layers[name] = _stacked(rows)
            elif name not in self._apart:
                observations.operands.setdefault(name, {})[operand] = _stacked(rows)
        return observations

    def _keep(self, key: tuple[str, str], x: Tensor) -> None:
        """``x``: ``[channels, n]``."""
        seen = self._parts.setdefault(key, [])
        random = generator(0, ".".join(filter(None, key)), self._row + len(seen) * self._steps)
        places = torch.randint(x.numel(), (VALUES_PER_STEP,), generator=random)
        channels = places // x.shape[1]
        values = x[channels.to(x.device), (places % x.shape[1]).to(x.device)]
        low, high = x.aminmax(dim=1)
        seen.append(Observed(values.cpu(), channels, low.cpu(), high.cpu()))


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
