"""How much of a batch is trained on at once, so that what its loss keeps for the gradients fits into memory.

The gradients of a batch are the sum of those of its parts. Where even one sample keeps too much, a denoiser computes
its blocks again in the backward pass (gradient checkpointing), which changes no gradient. What a loss keeps is counted
before training: it depends on the model and not on the machine, so that every machine trains alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import cast

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from bitstep.methods.base import Context, Phase, Unit


def samples_at_once(unit: Unit, phase: Phase) -> int:
    """The largest part of a batch whose loss keeps at most ``phase.memory``; 0 where a single sample keeps more."""
    room = phase.memory * 2**30
    one = kept(unit, 1)
    of_a_sample = kept(unit, 2) - one if phase.batch_size > 1 else one  # (quantized weights are kept once for all)
    if one + (phase.batch_size - 1) * of_a_sample <= room:
        return phase.batch_size
    return int((room - one) // of_a_sample) + 1 if one <= room else 0


def parts(batch_size: int, at_once: int) -> Iterator[slice]:
    """Slices of a batch, as even as can be, of at most ``at_once`` samples."""
    count = -(-batch_size // max(at_once, 1))
    bounds = [batch_size * number // count for number in range(count + 1)]
    yield from map(slice, bounds, bounds[1:])


def kept(unit: Unit, samples: int) -> int:
    """Bytes of all tensors that the loss of so many samples keeps for its backward pass, each storage once.

    They are let go as they are counted, so that counting itself needs little memory.
    """
    found: dict[int, StorageWeakRef] = {}
    total, nothing = 0, torch.empty(0)

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        known = found.get(storage.data_ptr())
        if known is None or known.expired():  # (its place may have been taken by another)
            found[storage.data_ptr()] = StorageWeakRef(storage)
            total += storage.nbytes()
        return nothing

    with saved_tensors_hooks(count, lambda tensor: tensor):
        unit.loss(0, slice(samples))
    return total


@contextmanager
def recomputed(context: Context, phase: Phase) -> Iterator[None]:
    """The student's blocks are computed again in the backward pass, if the whole denoiser is trained and it can."""
    student = cast(ModelMixin, context.student)
    if phase.objective.whole and all(technique.recomputable for technique in phase.techniques):
        with suppress(ValueError):  # diffusers' for a model that cannot
            student.enable_gradient_checkpointing(context.cursor.checkpoint)
    try:
        yield
    finally:
        student.disable_gradient_checkpointing()
