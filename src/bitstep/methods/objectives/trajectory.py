"""Distillation along the full-precision model's own trajectories, without data (EfficientDM, arXiv 2310.03270)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from bitstep.denoiser.calls import run
from bitstep.methods.base import ALL, Context, Objective, Phase, Unit
from bitstep.quantizers.layers import frozen


class TrajectoryDistillation(Objective):
    """End-to-end distillation of the denoiser's output along full-precision trajectories.

    The loss is on what the pipeline hands to its scheduler: guided, and without a learned variance that nobody uses.
    x_{t-1} never depends on the student, so the trajectories are recorded ahead, and batches mix timesteps.

    last: only the last so many blocks are trained, and gradients and their memory end there; None trains all
    """

    kind: Literal["trajectory"] = "trajectory"
    last: PositiveInt | None = None

    def units(self, context: Context, phase: Phase, start: int) -> Iterator[Unit]:
        layers, attention, pool = context.layers, context.attention, context.pool
        if self.last is not None:
            layers, attention = context.within(*context.blocks()[-self.last :])
        others = [module for name, module in context.trained.items() if name not in {*layers, *attention}]

        def loss(iteration: int, part: slice = ALL) -> Tensor:
            indices = pool.draw(phase.batch_size, context.seed, "trajectory", iteration)[part]
            call, target = context.batch(indices)
            weights = context.loss_weights(pool.timesteps[pool.step_of[indices]], self.emphasis)
            with frozen(others):
                output = run(context.student, call)
            error = pool.guided(output.float() - target.float())
            return (error.square().flatten(1).mean(1) * weights.to(error)).mean()

        if start == 0:
            yield Unit("denoiser", layers, loss, attention)
