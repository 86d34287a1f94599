"""Record what the full-precision denoiser computes on the pipeline's own trajectories, from noise, without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Unpack

from bitstep.calls import Pool, PoolWriter, Recorder, Shard
from bitstep.stages.generate import Sampling, batches, generate_batch, latent_type
from bitstep.stages.load import Source


def record(
    source: Source,
    folder: str | Path,
    *,
    images: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    **sampling: Unpack[Sampling],
) -> Pool:
    """Trajectories of image numbers 0..images-1, one shard per pipeline batch, in ``folder``.

    Interrupted and called again with the same arguments it continues, to the same bytes. ``progress(done, images)``
    is called before every batch and at the end.

    Raises BitstepError for an output that is not finite, a pipeline that cannot be run or recorded, a full disk, and
    a folder that holds calls recorded with other settings.
    """
    given = {name: value for name, value in sampling.items() if value is not None}
    plan = {"source": source.name, "images": images, "batch_size": batch_size} | given
    writer = PoolWriter(folder, plan, _train_timesteps(source))
    for numbers in batches(images, batch_size)[len(writer) :]:
        if progress:
            progress(numbers.start, images)
        writer.add(_trajectory(source, numbers, sampling, writer.batched))
    if progress:
        progress(images, images)
    return Pool.open(folder)


def stream(
    source: Source, *, images: int, batch_size: int, first_batch: int = 0, **sampling: Unpack[Sampling]
) -> Iterator[Pool]:
    """The shards of :func:`record` from batch number ``first_batch`` on, each a pool in memory, made when asked for."""
    batched: tuple[str, ...] | None = None
    for numbers in batches(images, batch_size)[first_batch:]:
        shard = _trajectory(source, numbers, sampling, batched)
        batched = shard.batched
        yield Pool([shard], _train_timesteps(source))


def _trajectory(source: Source, numbers: range, sampling: Sampling, batched: tuple[str, ...] | None) -> Shard:
    with Recorder(source.denoiser, source.pipeline.scheduler, len(numbers)) as recorder:
        generate_batch(source.pipeline, numbers, output_type=latent_type(source.pipeline), **sampling)
    return recorder.shard(batched)


def _train_timesteps(source: Source) -> int:
    return int(source.pipeline.scheduler.config.num_train_timesteps)
