"""Low-rank algebra: the delta that a merged adapter adds to a weight, and the basis that mimicking projects on."""

from __future__ import annotations

from torch import Tensor


def merged_delta(down: Tensor, up: Tensor) -> Tensor:
    """``delta[o, ...] = sum_r up[o, r] * down[r, ...]``: the weight of ``down`` followed by the 1x1 ``up``.

    down: ``[rank, in, *kernel]``; up: ``[out, rank]``; returns ``[out, in, *kernel]``. For a linear layer the kernel
    is empty and this is the matrix product ``up @ down``.
    """
    delta: Tensor = up @ down.flatten(1)
    return delta.view(len(up), *down.shape[1:])
