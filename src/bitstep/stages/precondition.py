"""Calibrate, at the end: the two numbers per timestep that bring what the student returns to what the teacher does."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn

from bitstep.denoiser.calls import run, sample_name, stacked, wrapped
from bitstep.denoiser.preconditioning import Preconditioning, common_channels, fit, inner_products
from bitstep.errors import UsageError
from bitstep.progress import Progress, silent
from bitstep.stages.generate import Sampling, batches, generate_latents
from bitstep.stages.load import Source
from bitstep.stages.prepare import Student
from bitstep.trajectories.pool import Pool

IMAGES = 8
AVERAGED = (2.0, 4.0, 8.0, 16.0, 64.0)
"""Values of ``averaged`` that are compared on ``IMAGES`` trajectories, with one another and with no preconditioning."""


def check_preconditionable(denoiser: nn.Module, pool: Pool) -> None:
    """Raise UsageError where what ``denoiser`` returns cannot be added to its sample."""
    call, target = pool.batch([0])
    output, sample = common_channels(target, stacked(call.arguments[sample_name(denoiser)]))
    if output.shape != sample.shape:
        raise UsageError(
            f"the output of {type(denoiser).__name__} {list(target.shape)} does not have the shape of its sample "
            f"{list(sample.shape)}, so it cannot be preconditioned: --set output.preconditioned=false"
        )


@torch.no_grad()
def precondition(
    source: Source,
    student: Student,
    pool: Pool,
    *,
    images: int,
    batch_size: int,
    averaged: float | None,
    progress: Progress = silent,
    **sampling: Unpack[Sampling],
) -> Preconditioning:
    """Give the denoiser of ``student`` tables fitted to the recorded outputs of ``images`` trajectories, guided as the
    pipeline guides them.

    averaged: see :func:`bitstep.denoiser.preconditioning.fit`; None takes the one of ``AVERAGED`` with which ``IMAGES``
        whole trajectories end nearest to those of ``source`` in the mean of their PSNR, or leaves the output as it is.
        (How much errors average out depends on the model: over 2 steps on pictures of fruit, over 8 on photographs.)
    """
    denoiser = student.denoiser
    device, steps = next(denoiser.parameters()).device, len(pool.timesteps)
    total = steps * (1 if averaged is not None else 3 + len(AVERAGED))
    tables = Preconditioning(student.cursor).to(device)
    found = []
    for step in range(steps):
        products = torch.zeros(3, 3, dtype=torch.float64)
        for indices in pool.split(pool.indices_at(step, images), batch_size):
            call, target = pool.batch(indices)
            target, sample = common_channels(target, stacked(call.arguments[sample_name(denoiser)]))
            output, _ = common_channels(run(denoiser, call.to(device)).cpu(), sample)
            products += inner_products(*(pool.guided(rows) for rows in (output, sample, target)))
        found.append(products)
        progress(step + 1, total)
    tables.attach(denoiser)

    def put(averaged: float | None) -> None:
        for step, known in enumerate(found):
            tables.out[step], tables.skip[step] = (1.0, 0.0) if averaged is None else fit(known, averaged)

    if averaged is None:
        expected = finished(source, source.denoiser, batch_size, **sampling)
        errors: dict[float | None, float] = {}
        for candidate in (None, *AVERAGED):
            progress(steps * (2 + len(errors)), total)
            put(candidate)
            error = (finished(source, denoiser, batch_size, **sampling) - expected).square().flatten(1).mean(1)
            errors[candidate] = float(error.log().mean())
        averaged = min(errors, key=errors.__getitem__)
        progress(total, total)
    put(averaged)
    return tables


def finished(source: Source, denoiser: nn.Module, batch_size: int, **sampling: Unpack[Sampling]) -> Tensor:
    """What ``IMAGES`` trajectories of the pipeline end with when ``denoiser`` answers in the place of its own."""
    own = denoiser is source.denoiser
    with nullcontext() if own else wrapped(source.denoiser, "forward", lambda _: partial(denoiser)):
        return torch.cat(
            [generate_latents(source.pipeline, n, **sampling) for n in batches(IMAGES, batch_size, sampling)]
        )
