"""Block-wise distillation: one block after another learns to return what it returns in full precision.

    block k:  minimise || B_k^fp(x_k^fp) - B_k^q(x_k^q) ||^2  over the parameters of block k

x_k^fp is what the full-precision denoiser hands to the block, x_k^q what the student does, its earlier blocks being
quantized and trained: a block learns to undo the errors made before it (DilateQuant, arXiv 2409.14307; BRECQ, arXiv
2102.05426). Only one block at a time holds gradients and optimizer state.

What goes into the block and what should come out is computed once per block for a fixed set of recorded calls and kept
on disk, so that memory holds no more than one batch of it; the disk holds one block's inputs and outputs, ``samples``
of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from bitstep.denoiser.calls import Call, run
from bitstep.denoiser.structure import Block
from bitstep.methods.base import ALL, Context, Objective, Phase, Unit
from bitstep.randomness import draw
from bitstep.trajectories.block_calls import BlockCalls
from bitstep.trajectories.pool import Pool


class BlockwiseDistillation(Objective):
    """Every block of :func:`bitstep.denoiser.structure.blocks` with trained layers is a unit, in order of execution.

    samples: recorded calls, as many of every timestep, that the blocks are fitted to; where there are calls of several
        forms, of the commonest. A block that runs several times in one forward pass is fitted to the first.
    full_resolution: only the blocks that see as many positions as any
    leave: so many last blocks, which another phase trains
    """

    whole: ClassVar[bool] = False
    kind: Literal["blockwise"] = "blockwise"
    samples: PositiveInt = 5120
    full_resolution: bool = False
    leave: NonNegativeInt = 0

    def units(self, context: Context, phase: Phase, start: int) -> Iterator[Unit]:
        indices = of_every_step(context.pool, self.samples, context.seed)
        blocks = context.blocks()
        blocks = blocks[: max(0, len(blocks) - self.leave)]
        if self.full_resolution:
            positions = {layer.name: layer.positions for layer in context.structure.layers}
            most = max(positions.values())
            blocks = [block for block in blocks if max(positions[name] for name in block.layers) == most]
        for block in blocks[start:]:
            yield replace(_unit(block, context, phase, indices, self.emphasis), of=len(blocks))


def of_every_step(pool: Pool, count: int, seed: int) -> Tensor:
    """``count`` samples of one form, as the files of a block hold inputs of one shape, at random, but of every timestep
    one before there is a second: what is trained per timestep is trained at all."""
    alike = pool.commonest
    shuffled = alike[draw(len(alike), len(alike), seed, "blockwise", 0)]
    steps = pool.step_of[shuffled]
    nth = functional.one_hot(steps).cumsum(0).gather(1, steps[:, None]).flatten()  # of its timestep
    return shuffled[nth.argsort(stable=True)[:count]]


def _unit(block: Block, context: Context, phase: Phase, indices: Tensor, emphasis: float) -> Unit:
    recorded = _record(block.name, context, indices, phase.batch_size)
    module = context.student.get_submodule(block.name)

    def loss(iteration: int, part: slice = ALL) -> Tensor:
        chosen = draw(len(recorded), phase.batch_size, context.seed, f"blockwise.{block.name}", iteration)[part]
        call = context.placed(recorded.batch(chosen))
        args, kwargs, target = (call.arguments[key] for key in ("args", "kwargs", "output"))
        with context.cursor.at(call.arguments["timestep"]):
            output = module(*args, **kwargs)
        weights = context.loss_weights(call.arguments["timestep"], emphasis)
        pairs = zip(_tensors(output), _tensors(target), strict=True)
        return torch.stack([_distance(a, b, weights) for a, b in pairs]).sum()

    layers, attention = context.within(block)
    return Unit(block.name, layers, loss, attention)


def _distance(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean squared error, weighted per sample ``[n]``; a sample may be several rows (heads) of the tensors."""
    error = (output.float() - target.float()).square()
    per_sample = error.reshape(len(weights), -1).mean(1)
    return (per_sample * weights.to(error)).mean()


@torch.no_grad()
def _record(name: str, context: Context, indices: Tensor, batch_size: int) -> BlockCalls:
    """The student's calls of the block ``name``, beside what the teacher's block returns."""

    def calls(chosen: Tensor) -> Call:
        call, _ = context.batch(chosen)
        args, kwargs = _inputs(context.student, name, call)
        output = _output(context.teacher, name, call)
        return Call({"timestep": call.timestep, "args": args, "kwargs": kwargs, "output": output})

    recorded = BlockCalls(context.folder / "block", calls(indices[:1]), calls(indices[[0, -1]]))
    for chosen in indices.split(batch_size):
        recorded.append(calls(chosen))
    return recorded


class _Reached(Exception):
    """Ends a forward pass where nothing more is wanted of it."""


def _inputs(denoiser: nn.Module, name: str, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the first call of the block ``name`` in ``call``."""
    register = denoiser.get_submodule(name).register_forward_pre_hook
    _, args, kwargs = _told(denoiser, call, partial(register, with_kwargs=True))
    return args, kwargs


def _output(denoiser: nn.Module, name: str, call: Call) -> Any:
    """What the first call of the block ``name`` returns in ``call``."""
    return _told(denoiser, call, denoiser.get_submodule(name).register_forward_hook)[-1]


def _told(denoiser: nn.Module, call: Call, register: Callable[..., RemovableHandle]) -> tuple[Any, ...]:
    """What a hook is told when it first runs in ``call``; nothing after it is computed."""
    found: list[tuple[Any, ...]] = []

    def stop(*told: Any) -> None:
        found.append(told)
        raise _Reached

    with register(stop), suppress(_Reached):
        run(denoiser, call)
    return found[0]


def _tensors(output: Any) -> list[Tensor]:
    return list(Call({"output": output}).tensors.values())
