"""A batch is trained on in parts that fit into memory: the same gradients, and what was counted is what is kept."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import source
from torch import Tensor, nn

from bitstep.methods.base import Context, LearningRates, Objective, Phase, Unit
from bitstep.methods.efficientdm import EFFICIENTDM
from bitstep.methods.objectives.blockwise import BlockwiseDistillation
from bitstep.methods.objectives.diffusion import DiffusionLoss
from bitstep.methods.objectives.trajectory import TrajectoryDistillation
from bitstep.stages.calibrate import stream
from bitstep.stages.finetune import TrainingState, finetune, trained_tensors
from bitstep.stages.load import Source
from bitstep.stages.memory import kept, parts, samples_at_once
from bitstep.stages.prepare import prepare
from bitstep.trajectories.images import TrainingImages

RATES = LearningRates(adapter=0.1, activation_scale=1e-2, activation_zero_point=1e-2)
GIB = 2**30


@functools.cache
def frozen(name: str) -> Source:
    given = source(name)
    given.denoiser.requires_grad_(False)
    return given


def context_of(name: str, folder: Path) -> Context:
    given = frozen(name)
    pool = next(stream(given, images=4, batch_size=4, steps=3, seed=0))
    torch.manual_seed(0)
    context = prepare(given.denoiser, pool, EFFICIENTDM, weight_bits=4, activation_bits=4).context(
        given.denoiser, pool, folder, seed=0
    )
    pictures = torch.rand(6, 8, 8, 3) * 255
    return replace(context, images=TrainingImages.of_pipeline(pictures.byte(), given.pipeline))


def phase_of(objective: Objective, memory: float = 8.0) -> Phase:
    return Phase(objective=objective, iterations=2, batch_size=5, learning_rates=RATES, memory=memory)


def unit_of(context: Context, phase: Phase) -> Unit:
    return next(iter(phase.objective.units(context, phase, 0)))


def checkpoints(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def gradients(unit: Unit, slices: list[slice]) -> dict[str, Tensor]:
    for module in unit.trained.values():
        module.zero_grad(set_to_none=True)
    for part in slices:
        (unit.loss(1, part) * ((part.stop - part.start) / 5)).backward()
    tensors = trained_tensors(unit.trained)
    return {name: tensor.grad.clone() for name, tensor in tensors.items() if tensor.grad is not None}


@pytest.mark.parametrize(("batch", "at_once"), [(8, 8), (8, 5), (5, 2), (3, 1), (7, 0)])
def test_parts_are_even_and_cover_the_batch(batch: int, at_once: int) -> None:
    slices = list(parts(batch, at_once))
    sizes = [part.stop - part.start for part in slices]
    assert [i for part in slices for i in range(batch)[part]] == list(range(batch))
    assert max(sizes) <= max(at_once, 1)
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-batch // max(at_once, 1))


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("ddim", TrajectoryDistillation()),
        ("stable_diffusion", TrajectoryDistillation()),  # a guided sample is two rows
        ("dit", TrajectoryDistillation(last=1)),
        ("ddim", DiffusionLoss()),
        ("stable_diffusion", BlockwiseDistillation(samples=6)),
    ],
)
def test_the_gradients_of_the_parts_are_those_of_the_batch(name: str, objective: Objective, tmp_path: Path) -> None:
    context = context_of(name, tmp_path)
    unit = unit_of(context, phase_of(objective))
    whole, divided = gradients(unit, [slice(0, 5)]), gradients(unit, list(parts(5, 2)))
    assert whole
    assert whole.keys() == divided.keys()
    for key, gradient in whole.items():
        torch.testing.assert_close(divided[key], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-9)


def test_as_many_samples_as_fit(tmp_path: Path) -> None:
    context = context_of("ddim", tmp_path)
    unit = unit_of(context, phase_of(TrajectoryDistillation()))
    sizes = [kept(unit, samples) for samples in range(1, 6)]
    steps = {b - a for a, b in itertools.pairwise(sizes)}
    assert max(steps) - min(steps) < 0.01 * min(steps)  # linear, so two counts tell all
    for samples, size in enumerate(sizes, 1):
        assert samples_at_once(unit, phase_of(TrajectoryDistillation(), (size + 64) / GIB)) == samples
    assert samples_at_once(unit, phase_of(TrajectoryDistillation(), (sizes[0] - 64) / GIB)) == 0


def test_what_a_loss_keeps_is_counted_once_and_let_go() -> None:
    x = torch.randn(4, 1000, requires_grad=True)

    def loss(_: int, part: slice = slice(None)) -> Tensor:
        y = x[part] * 2.0
        return (y.exp() + y.sin()).sum()  # keeps y, once for sin, and exp(y)

    unit = Unit("toy", {}, loss)
    assert [kept(unit, samples) for samples in (1, 2, 4)] == [2 * 4000, 4 * 4000, 8 * 4000]


@pytest.mark.parametrize("name", ["ddim", "dit"])
def test_computing_blocks_again_changes_nothing(name: str, tmp_path: Path) -> None:
    """Samples one by one, their blocks computed once and computed again."""
    trained, losses = [], []
    for memory in (0.0, 1e-9):
        context = context_of(name, tmp_path)
        objective = TrajectoryDistillation()
        phase = phase_of(objective, memory or kept(unit_of(context, phase_of(objective)), 1) / GIB)
        checkpointed = []
        for step in finetune(context, [phase], TrainingState()):
            losses.append(step.loss)
            checkpointed.append(checkpoints(context.student))
        assert checkpointed == [memory > 0] * 2
        assert not checkpoints(context.student)
        trained.append({key: value.detach().clone() for key, value in trained_tensors(context.trained).items()})
    assert losses[:2] == losses[2:]
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])


def test_a_model_that_cannot_compute_blocks_again_is_trained_as_it_is(tmp_path: Path) -> None:
    context = context_of("ddim", tmp_path)
    context.student._supports_gradient_checkpointing = False  # type: ignore[assignment]
    phase = phase_of(TrajectoryDistillation(), 1e-9)
    checkpointed = [checkpoints(context.student) for _ in finetune(context, [phase], TrainingState())]
    assert checkpointed == [False, False]
