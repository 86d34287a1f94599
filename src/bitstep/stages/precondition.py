"""Calibrate, at the end: the two numbers per timestep that bring what the student returns to what the teacher does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bitstep.calls import run
from bitstep.errors import UsageError
from bitstep.pool import Pool
from bitstep.preconditioning import Preconditioning, fit, sample_name, shared
from bitstep.steps import StepCursor


def check(denoiser: nn.Module, pool: Pool) -> None:
    """Raise UsageError where what ``denoiser`` returns cannot be added to its sample."""
    call, target = pool.batch([0])
    output, sample = shared(target, call.arguments[sample_name(denoiser)])
    if output.shape != sample.shape:
        raise UsageError(
            f"the output of {type(denoiser).__name__} {list(target.shape)} does not have the shape of its sample "
            f"{list(sample.shape)}, so it cannot be preconditioned: --set output.preconditioned=false"
        )


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
    """Give the quantized ``denoiser`` tables fitted to the recorded outputs of ``images`` trajectories, guided as the
    pipeline guides them.

    averaged: see :func:`bitstep.preconditioning.fit`
    """
    device = next(denoiser.parameters()).device
    tables = Preconditioning(cursor).to(device)
    tables.attach(denoiser)
    for step in range(len(pool.timesteps)):
        call, target = pool.batch(pool.indices_at(step)[:images])
        target, sample = shared(target, call.arguments[sample_name(denoiser)])
        output, _ = shared(run(denoiser, call.to(device)).cpu(), sample)
        output, sample, target = (pool.guided(rows) for rows in (output, sample, target))
        tables.out[step], tables.skip[step] = fit(output, sample, target, averaged)
        progress(step + 1, len(pool.timesteps))
    return tables
