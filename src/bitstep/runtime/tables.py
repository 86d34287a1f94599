"""The rows of per-timestep tables that a forward pass uses, for everything packed that has such tables.

A table called ``input`` is the buffers ``input_scale`` (float32) and ``input_zero_point`` (uint8) of a module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitstep.denoiser.steps import Position, StepCursor, interpolate, interpolate_scale, per_sample

Table = tuple[nn.Module, str]


class StepRows:
    """Scale and zero point of every table of a model at the cursor's position, looked up once for all of them.

    (One by one the lookups would take longer than many a layer.)
    """

    def __init__(self, cursor: StepCursor) -> None:
        self.cursor = cursor
        self.tables: list[Table] = []
        self._position: Position | None = None
        self._found: dict[Table, tuple[Tensor, Tensor]] = {}

    def of(self, table: Table) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 ``[rows]``; StepError outside a forward pass of the denoiser."""
        position = self.cursor.position
        if position is not self._position:
            self._position, self._found = position, {}
        if table not in self._found:
            self._found |= self._look_up(position, _buffers(table)[0].device)
        return self._found[table]

    def forget(self) -> None:
        """Drop what was found, because a table changed."""
        self._position = None

    def _look_up(self, position: Position, device: torch.device) -> dict[Table, tuple[Tensor, Tensor]]:
        beside = {table: buffers for table in self.tables if (buffers := _buffers(table))[0].device == device}
        position = position.to(device)
        fraction = None if position.fraction is None else position.fraction[:, None]
        position = Position(position.lower, position.upper, fraction)
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
