"""The rows of per-timestep tables that a forward pass uses, for everything packed that has such tables.

A table called ``input`` is the buffers ``input_scale`` (float32) and ``input_zero_point`` (uint8) of a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from bitstep.denoiser.steps import Position, Standing, StepCursor, interpolate, interpolate_scale, per_sample

Table = tuple[nn.Module, str]


class _Found(Standing):
    """What was looked up at the position where the thread stands."""

    rows: Mapping[Table, tuple[Tensor, Tensor]] = MappingProxyType({})


class StepRows:
    """Scale and zero point of every table of a model at the cursor's position, looked up once for all of them.

    (One by one the lookups would take longer than many a layer.)
    """

    def __init__(self, cursor: StepCursor) -> None:
        self.cursor = cursor
        self.tables: list[Table] = []
        self._found = _Found()

    def of(self, table: Table) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 ``[rows]``; StepError outside a forward pass of the denoiser."""
        position, found = self.cursor.position, self._found
        if position is not found.position:
            found.position, found.rows = position, {}
        if table not in found.rows:
            found.rows = {**found.rows, **self._look_up(position, _buffers(table)[0].device)}
        return found.rows[table]

    def forget(self) -> None:
        """Drop what was found, because a table changed."""
        self._found = _Found()

    def _look_up(self, position: Position, device: torch.device) -> dict[Table, tuple[Tensor, Tensor]]:
        beside = {table: buffers for table in self.tables if (buffers := _buffers(table))[0].device == device}
        position = position.to(device)
        scale, zero_point = (torch.stack(buffers, 1) for buffers in zip(*beside.values(), strict=True))
        scale = interpolate_scale(scale, position).T.contiguous()
        zero_point = interpolate(zero_point, position).round().T.contiguous()
        return dict(zip(beside, zip(scale, zero_point, strict=True), strict=True))


def rows_of(table: Table, rows: StepRows | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point for ``x``: contiguous float32 ``[1]`` or ``[batch]``; a static table has no ``rows``."""
    if rows is None:
        scale, zero_point = _buffers(table)
        return scale, zero_point.float()
    scale, zero_point = rows.of(table)
    if len(scale) not in (1, len(x)):
        scale, zero_point = (per_sample(row, x).flatten() for row in (scale, zero_point))
    return scale, zero_point


def _buffers(table: Table) -> tuple[Tensor, Tensor]:
    module, name = table
    return module.get_buffer(f"{name}_scale"), module.get_buffer(f"{name}_zero_point")
