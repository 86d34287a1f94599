"""Calibrate, of the output: two numbers per timestep that bring the student closest to the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bitstep.calls import Pool, run
from bitstep.preconditioning import Preconditioning, fit


@torch.no_grad()
def precondition(
    student: nn.Module,
    tables: Preconditioning,
    pool: Pool,
    *,
    images: int,
    averaged: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fit ``tables``, attached to ``student``, to the recorded outputs of ``images`` trajectories, in place.

    averaged: see :func:`bitstep.preconditioning.fit`
    """
    tables.out.fill_(1.0)
    tables.skip.fill_(0.0)
    device = next(student.parameters()).device
    for step in range(len(pool.timesteps)):
        call, target = pool.batch(pool.indices_at(step)[:images])
        output, sample = tables.shared(run(student, call.to(device)).cpu(), tables.sample((), call.arguments).cpu())
        tables.out[step], tables.skip[step] = fit(output, sample, tables.shared(target, sample)[0], averaged)
        progress(step + 1, len(pool.timesteps))
