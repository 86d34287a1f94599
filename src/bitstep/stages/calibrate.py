"""Record what the full-precision denoiser computes on the pipeline's own trajectories, from noise, without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from bitstep.denoiser.calls import wrapped
from bitstep.progress import Progress, silent
from bitstep.stages.generate import Sampling, batches, generate_latents
from bitstep.stages.load import Source
from bitstep.trajectories.pool import Pool, PoolWriter
from bitstep.trajectories.recording import Recorder, Shard


def record(
    source: Source,
    folder: str | Path,
    *,
    images: int,
    batch_size: int,
    bf16: bool = False,
    progress: Progress = silent,
    **sampling: Unpack[Sampling],
) -> Pool:
    """Trajectories of image numbers 0..images-1 in ``folder``.

    With ``bf16`` the denoiser computes in bfloat16. Interrupted and called again with the same arguments it continues,
    to the same bytes. ``progress(done, images)`` is called before every batch and at the end.

    Raises BitstepError for an output that is not finite, a pipeline that cannot be run or recorded, a full disk, and
    a folder that holds calls recorded with other settings.
    """
    given = {name: value for name, value in sampling.items() if value is not None}
    plan = {"source": source.name, "images": images, "batch_size": batch_size} | given
    if bf16:
        plan["bf16"] = True
    writer = PoolWriter(folder, plan, _train_timesteps(source))
    for numbers in batches(images, batch_size, sampling)[len(writer) :]:
        progress(numbers.start, images)
        writer.add(_trajectory(source, numbers, bf16, sampling, writer.examples))
    progress(images, images)
    return Pool.open(folder)


def stream(
    source: Source,
    *,
    images: int,
    batch_size: int,
    bf16: bool = False,
    **sampling: Unpack[Sampling],
) -> Iterator[Pool]:
    """What :func:`record` writes, a pool in memory for every pipeline batch, made when asked for."""
    shards: list[Shard] = []
    for numbers in batches(images, batch_size, sampling):
        shards = _trajectory(source, numbers, bf16, sampling, shards)
        yield Pool(shards, _train_timesteps(source))


def _trajectory(
    source: Source, numbers: range, bf16: bool, sampling: Sampling, earlier: Sequence[Shard]
) -> list[Shard]:
    recorder = Recorder(source.denoiser, source.pipeline.scheduler, numbers)
    with recorder, _in_bfloat16(source.denoiser) if bf16 else nullcontext():
        generate_latents(source.pipeline, numbers, **sampling)
    return recorder.shards(earlier)


def _train_timesteps(source: Source) -> int:
    return int(source.pipeline.scheduler.config.num_train_timesteps)


def _in_bfloat16(denoiser: nn.Module) -> AbstractContextManager[None]:
    """``denoiser`` computes in bfloat16 meanwhile; its pipeline still gets float32, which some cannot do without."""
    device = next(denoiser.parameters()).device.type

    def cast(forward: Callable[..., Any]) -> Callable[..., Any]:
        computed = torch.autocast(device, torch.bfloat16)(forward)
        return lambda *args, **kwargs: _in_float32(computed(*args, **kwargs))

    return wrapped(denoiser, "forward", cast)


def _in_float32(output: Any) -> Any:
    """What a denoiser returned, a tensor, a tuple, a list or an output object, its tensors as float32."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, tuple | list):
        return type(output)(map(_in_float32, output))
    return type(output)(**{name: _in_float32(value) for name, value in output.items()})
