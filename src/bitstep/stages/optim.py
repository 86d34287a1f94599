"""Adam for per-timestep tables: a batch visits few timesteps, and only the rows it visited may move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # as everywhere


class RowSparseAdam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) over tables ``[T]`` in which every row keeps its own step count.

    Dense Adam moves a row by its stale momentum at every step, also when its timestep was not in the batch. Here a
    row whose gradient is zero is left untouched: value, moments and count. (torch's SparseAdam wants sparse gradients,
    and counts the steps of a table, not of a row.) The tables of a group have equal length; their state is kept
    stacked, ``[tables, T]``, so that a step costs a few operations however many layers there are.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every group from the ``grad`` of its tables (a table without one stays as it is)."""
        if closure is not None:
            raise ValueError("RowSparseAdam takes no closure")
        for group in self.param_groups:
            tables: list[Tensor] = group["params"]
            if not tables:
                continue
            grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in tables])
            state = self.state[tables[0]]
            if not state:
                state.update({name: torch.zeros_like(grad) for name in ("count", "exp_avg", "exp_avg_sq")})
            visited = grad != 0
            count = state["count"].add_(visited)
            mean = state["exp_avg"].copy_(torch.where(visited, grad.lerp(state["exp_avg"], BETA1), state["exp_avg"]))
            square = state["exp_avg_sq"]
            square.copy_(torch.where(visited, (grad * grad).lerp(square, BETA2), square))
            count = count.clamp(min=1)
            denominator = (square / (1 - BETA2**count)).sqrt_().add_(EPSILON)
            update = visited * mean / (1 - BETA1**count) / denominator
            torch._foreach_sub_(tables, list((group["lr"] * update).unbind()))
