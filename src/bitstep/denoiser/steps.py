"""Time: which row of a per-timestep table a forward pass uses. The only file that turns timesteps into rows.

A table has one row per key, the keys being timesteps divided by the schedule's length (Flux already passes t/1000;
then the unit is 1). The denoiser's own ``timestep`` argument selects the rows: calls are never counted, so guidance
in two passes, solvers with two evaluations a step, reordered or interrupted sampling, and batches that mix timesteps
all find their rows. Between two keys a table is interpolated, so that one table serves any number of steps.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from bitstep.errors import BitstepError

TIMESTEP_NAMES = ("timestep", "timesteps", "t")
_MARGIN = 1e-4  # schedulers in float16 may pass 1.0002


class StepError(BitstepError):
    """A per-timestep table was used without a timestep, or with one that the schedule cannot contain."""


@dataclass(frozen=True)
class Position:
    """Where timesteps lie in a grid: between rows ``lower`` and ``upper``, at ``fraction`` of the way; each ``[rows]``.

    ``fraction`` is None when all are known to lie on their lower row.
    """

    lower: Tensor
    upper: Tensor
    fraction: Tensor | None

    def to(self, device: torch.device) -> Position:
        """The same on the device of a table: pipelines may keep their timesteps elsewhere."""
        if self.lower.device == device:
            return self
        # a GPU need not have finished what it does: memory that is not pinned has been read when the call returns
        move = partial(Tensor.to, device=device, non_blocking=device.type == "cuda")
        fraction = None if self.fraction is None else move(self.fraction)
        return Position(move(self.lower), move(self.upper), fraction)


@dataclass(frozen=True)
class StepGrid:
    """The keys of a per-timestep table, ascending, and the timestep that counts as 1.

    A schedule's timesteps lie in [0, unit]; of one that has others (EDM: a logarithm of the noise level), keys do too.
    """

    keys: tuple[float, ...]
    unit: float

    def __post_init__(self) -> None:
        if not self.keys or any(b <= a for a, b in zip(self.keys, self.keys[1:], strict=False)):
            raise ValueError("a step grid needs at least one key, strictly ascending")
        if not all(map(math.isfinite, self.keys)) or not 0 < self.unit < math.inf:
            raise ValueError("step grid keys are finite timesteps divided by a finite, positive unit")

    @classmethod
    def from_timesteps(cls, timesteps: Tensor, unit: float) -> StepGrid:
        """The grid whose keys are the distinct values of ``timesteps`` (any order)."""
        return cls(tuple((timesteps.double().unique() / unit).tolist()), unit)

    def __len__(self) -> int:
        return len(self.keys)

    def locate(self, timestep: Tensor | float) -> Position:
        """Rows for one timestep (scalar), one per sample ``[batch]``, or several of each (:func:`of_samples`); outside
        the keys the nearest row is used.

        On an accelerator the check that the schedule can contain them is left out: it would wait for the device.
        """
        t = of_samples(torch.as_tensor(timestep)).reshape(-1).double() / self.unit
        least, most = min(0.0, self.keys[0]), max(1.0, self.keys[-1])
        if t.device.type == "cpu" and bool(((t < least - _MARGIN) | (t > most + _MARGIN) | t.isnan()).any()):
            raise StepError(f"timestep {timestep} lies outside [{least * self.unit:g}, {most * self.unit:g}]")
        keys = _tensor(self.keys, t.device)
        upper = torch.searchsorted(keys, t).clamp(max=len(self) - 1)
        lower = (upper - 1).clamp(min=0)
        span = (keys[upper] - keys[lower]).clamp(min=1e-12)
        fraction = ((t - keys[lower]) / span).clamp(0, 1)
        # on a key, or beyond the last one, both ends are that row: its table entry is then used as it is
        lower, upper = torch.where(fraction == 1, upper, lower), torch.where(fraction == 0, lower, upper)
        if t.device.type == "cpu" and torch.equal(lower, upper):
            return Position(lower, upper, None)
        return Position(lower, upper, torch.where(lower == upper, 0.0, fraction).float())


def timestep_name(names: Container[str]) -> str:
    """Which of a denoiser's arguments, by their names, is its timestep."""
    name = next((name for name in TIMESTEP_NAMES if name in names), None)
    if name is None:
        raise StepError(f"expected a denoiser with an argument named {' or '.join(TIMESTEP_NAMES)}")
    return name


def of_samples(timestep: Tensor) -> Tensor:
    """Of several timesteps a sample ``[batch, n]`` (Wan 2.2 has one for every token) the largest: those of pictures
    that are given are 0. Other shapes as they are."""
    return timestep.flatten(1).amax(1) if timestep.ndim > 1 else timestep


@lru_cache(maxsize=64)
def _tensor(keys: tuple[float, ...], device: torch.device) -> Tensor:
    """The keys of a grid on a device, float64: kept there, since a copy would make a GPU wait at every forward pass."""
    with torch.inference_mode(False):
        return torch.tensor(keys, dtype=torch.float64, device=device)


class Standing(threading.local):
    """Where the calling thread stands; a copy stands nowhere."""

    position: Position | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class StepCursor:
    """The position of the forward pass under way, shared by every quantizer of a model; each thread has its own.

    :meth:`attach` hooks it to the denoiser. It deep-copies with the model: the copy's quantizers share the copy's
    cursor.
    """

    def __init__(self, grid: StepGrid) -> None:
        self.grid = grid
        self._now = Standing()
        self._argument: tuple[int, str] | None = None

    @property
    def position(self) -> Position:
        """Where we are; raises :class:`StepError` outside a forward pass of the denoiser."""
        position = self._now.position
        if position is None:
            raise StepError(
                "no timestep is set: run the layer inside its denoiser's forward, or under StepCursor.at(timestep)"
            )
        return position

    def attach(self, denoiser: nn.Module) -> None:
        """Set the position from the ``timestep`` argument of every forward of ``denoiser``, and clear it after."""
        names = list(inspect.signature(denoiser.forward).parameters)
        name = timestep_name(names)
        self._argument = (names.index(name), name)
        denoiser.register_forward_pre_hook(self._enter, with_kwargs=True)
        denoiser.register_forward_hook(self._leave, always_call=True)

    def at(self, timestep: Tensor | float) -> AbstractContextManager[None]:
        """Hold the position of ``timestep`` for code that runs parts of a denoiser."""
        return self.hold(self.grid.locate(timestep))

    def checkpoint(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Gradient checkpointing that recomputes at the position of the first computation.

        Pass it to diffusers' ``enable_gradient_checkpointing``. The recomputation runs during backward, when the
        forward pass is over and the cursor is clear or elsewhere. (Reentrant checkpointing would lose the gradient
        of the tables, which are no inputs of the block.)
        """

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self.hold(self.position)

        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    @contextmanager
    def hold(self, position: Position) -> Iterator[None]:
        """Hold a position that was located before."""
        previous, self._now.position = self._now.position, position
        try:
            yield
        finally:
            self._now.position = previous

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._argument is not None
        index, name = self._argument
        timestep = kwargs[name] if name in kwargs else args[index]
        self._now.position = self.grid.locate(timestep)

    def _leave(self, *_: Any) -> None:
        self._now.position = None


def interpolate_scale(scale: Tensor, position: Position) -> Tensor:
    """Rows of a table of positive scales ``[T, ...]`` -> ``[rows, ...]``, linear in log scale, exact on the keys.

    The power is taken in float64: in float32 its last bit depends on how many rows are computed together.
    """
    low = scale[position.lower]
    if position.fraction is None:
        return low
    return low * ((scale[position.upper] / low).double() ** per_sample(position.fraction, low)).to(scale.dtype)


def interpolate(table: Tensor, position: Position) -> Tensor:
    """Rows of a table ``[T, ...]`` -> float32 ``[rows, ...]``, linear, exact on the keys; zero points are rounded after
    it."""
    low = table[position.lower].float()
    if position.fraction is None:
        return low
    return low + (table[position.upper].float() - low) * per_sample(position.fraction, low)


def per_sample(rows: Tensor, x: Tensor) -> Tensor:
    """Shape ``[rows]`` to broadcast against ``x`` ``[batch, ...]``.

    One row serves the whole batch. With one row per sample, a batch that is a multiple of the samples (attention
    with its heads folded in) repeats each row for its consecutive entries. One that is not (the tokens of texts of
    several lengths) is of samples at one timestep.
    """
    if len(rows) != 1 and len(rows) != len(x):
        if len(x) % len(rows) == 0:
            rows = rows.repeat_interleave(len(x) // len(rows))
        elif bool((rows == rows[0]).all()):
            rows = rows[:1]
        else:
            raise StepError(f"a batch of {len(x)} cannot be shared among the timesteps of {len(rows)} samples")
    return rows.reshape(-1, *[1] * (x.ndim - 1))
