"""Low-rank representation mimicking (BinaryDM, arXiv 2404.05662)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from bitstep.denoiser.calls import run
from bitstep.denoiser.structure import blocks
from bitstep.errors import BitstepError
from bitstep.methods.base import ALL, Context, Phase, Share, Technique, Unit, Weights
from bitstep.numerics.lowrank import principal_basis

FEATURE_IMAGES = 16
"""Trajectories whose features, at every timestep, make the bases of low-rank mimicking."""


class Mimicking(Technique):
    """Low-rank representation mimicking: the student's block outputs follow the teacher's along their main directions.

    Of every residual, attention or transformer block with c output channels, the ``rank`` * c leading eigenvectors of
    F^T F, F being teacher features ``[samples and positions, c]`` over all timesteps, are found once and stay.
    """

    kind: Literal["mimicking"] = "mimicking"
    weight: NonNegativeFloat = 1e-4
    rank: Share = 0.25

    def check(self, weights: Weights, phase: Phase) -> None:
        if not phase.objective.whole:
            raise ValueError(f"mimicking needs an objective that runs the whole denoiser, not {phase.objective.kind}")

    def applied(self, unit: Unit, context: Context, phase: Phase) -> Unit:
        names = [block.name for block in blocks(context.teacher, context.structure) if len(block.layers) > 1]
        if not names:
            raise BitstepError(
                f"{type(context.teacher).__name__} has no blocks whose features could be mimicked: leave mimicking out "
                "of the recipe's techniques"
            )
        bases = {
            name: principal_basis(gram, max(1, round(self.rank * len(gram))))
            for name, gram in feature_grams(context, names, phase.batch_size).items()
        }

        def loss(iteration: int, part: slice = ALL) -> Tensor:
            with block_features(context.student, names) as student, _arguments(context.student) as calls:
                value = unit.loss(iteration, part)
            args, kwargs = calls[-1]
            with torch.no_grad(), block_features(context.teacher, names) as teacher:
                context.teacher(*args, **kwargs)
            terms = [((student[name] - teacher[name]) @ bases[name]).square().mean() for name in names]
            return value + self.weight * torch.stack(terms).mean()

        return replace(unit, loss=loss)


@torch.no_grad()
def feature_grams(context: Context, names: list[str], batch_size: int) -> dict[str, Tensor]:
    """F^T F ``[c, c]``, float64, of the teacher's output at each named block, summed over positions, samples and all
    timesteps of the recorded trajectories: one batch of features is in memory at a time."""
    grams: dict[str, Tensor] = {}
    steps = range(len(context.pool.timesteps))
    indices = torch.cat([context.pool.indices_at(step, FEATURE_IMAGES) for step in steps])
    for chosen in context.pool.split(indices, batch_size):
        call, _ = context.batch(chosen)
        with block_features(context.teacher, names) as features:
            run(context.teacher, call)
        for name, feature in features.items():
            rows = feature.reshape(-1, feature.shape[-1])
            gram = (rows.T @ rows).double()
            grams[name] = grams[name] + gram if name in grams else gram
    return grams


@contextmanager
def block_features(denoiser: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the named blocks, float32 ``[batch, ..., channels]``, of what runs under this context manager; of
    blocks that return the text's and the sample's, the sample's."""
    found: dict[str, Tensor] = {}

    def keep(name: str, block: nn.Module) -> Callable[..., None]:
        of_curves = any(isinstance(part, nn.Conv1d) for part in block.modules())

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            feature = output
            if not isinstance(output, Tensor):  # the text's and the sample's, in either order
                sample = args[0] if args else kwargs["hidden_states"]
                feature = next(x for x in output if x is not None and x.shape == sample.shape)
            maps = feature.ndim > 3 or of_curves  # else tokens, which have their channels last
            found[name] = (feature.movedim(1, -1) if maps else feature).float()

        return hook

    with ExitStack() as stack:
        for name in names:
            block = denoiser.get_submodule(name)
            stack.enter_context(block.register_forward_hook(keep(name, block), with_kwargs=True))
        yield found


@contextmanager
def _arguments(denoiser: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arguments of the denoiser's calls under this context manager."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    with denoiser.register_forward_pre_hook(hook, with_kwargs=True):
        yield calls
