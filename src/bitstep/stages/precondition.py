"""Calibrate, at the end: the two numbers per timestep that bring what the student returns to what the teacher does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bitstep.calls import Pool, run
from bitstep.preconditioning import Preconditioning, fit
from bitstep.steps import StepCursor


@torch.no_grad()
def precondition(
    denoiser: nn.Module,
    cursor: StepCursor,
    pool: Pool,
    *,
    images: int,
    averaged: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Preconditioning:
    """Give the quantized ``denoiser`` tables fitted to the recorded outputs of ``images`` trajectories.

    averaged: see :func:`bitstep.preconditioning.fit`
    """
    device = next(denoiser.parameters()).device
    tables = Preconditioning(cursor).to(device)
    tables.attach(denoiser)
    for step in range(len(pool.timesteps)):
        call, target = pool.batch(pool.indices_at(step)[:images])
        output, sample = tables.shared(run(denoiser, call.to(device)).cpu(), tables.sample((), call.arguments).cpu())
        tables.out[step], tables.skip[step] = fit(output, sample, tables.shared(target, sample)[0], averaged)
        progress(step + 1, len(pool.timesteps))
    return tables
