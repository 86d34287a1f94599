"""Low-rank algebra: the delta that a merged adapter adds to a weight, and the basis that mimicking projects on."""

from __future__ import annotations

import torch
from torch import Tensor


def merged_delta(down: Tensor, up: Tensor) -> Tensor:
    """``delta[o, ...] = sum_r up[o, r] * down[r, ...]``: the weight of ``down`` followed by the 1x1 ``up``.

    down: ``[rank, in, *kernel]``; up: ``[out, rank]``; returns ``[out, in, *kernel]``. For a linear layer the kernel
    is empty and this is the matrix product ``up @ down``.
    """
    delta: Tensor = up @ down.flatten(1)
    return delta.view(len(up), *down.shape[1:])


def principal_basis(gram: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading eigenvectors of a symmetric matrix ``[c, c]``, as float32 columns ``[c, rank]``, the
    largest eigenvalue first. With gram = F^T F they span what explains most of the features F ``[samples, c]``."""
    vectors: Tensor = torch.linalg.eigh(gram.double()).eigenvectors
    return vectors.flip(1)[:, :rank].float()
