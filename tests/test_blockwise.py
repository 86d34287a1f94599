"""Block-wise distillation: a block of any denoiser is fed from disk what it would have been fed in the denoiser."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import source
from torch import Tensor, nn

from bitstep.denoiser.calls import Call, run
from bitstep.methods.base import Context, LearningRates, Method, Unit
from bitstep.methods.baselines import MSE
from bitstep.methods.dilatequant import DILATEQUANT
from bitstep.methods.objectives.blockwise import BlockwiseDistillation, of_every_step
from bitstep.methods.objectives.trajectory import TrajectoryDistillation
from bitstep.quantizers.activations import ActivationQuantizer
from bitstep.quantizers.weights import WeightQuantizer
from bitstep.stages.calibrate import record, stream
from bitstep.stages.finetune import TrainingState, finetune
from bitstep.stages.load import load
from bitstep.stages.prepare import prepare
from bitstep.trajectories.block_calls import BlockCalls
from bitstep.trajectories.pool import Pool

FAST = LearningRates(weight=0.1, weight_scale=5e-3, activation_scale=2e-2, activation_zero_point=5e-2)
PHASE = DILATEQUANT.training[0].model_copy(update={"batch_size": 3, "iterations": 4})


@functools.cache
def recorded(name: str) -> tuple[nn.Module, Pool]:
    given = source(name)
    given.denoiser.requires_grad_(False)
    return given.denoiser, next(stream(given, images=2, batch_size=2, steps=3, seed=0))


def context_of(teacher: nn.Module, pool: Pool, folder: Path, method: Method = DILATEQUANT, bits: int = 4) -> Context:
    student = prepare(teacher, pool, method, weight_bits=bits, activation_bits=bits)
    return student.context(teacher, pool, folder, seed=0)


def units_of(context: Context, start: int = 0) -> list[Unit]:
    return list(BlockwiseDistillation(samples=5).units(context, PHASE, start))


@pytest.mark.parametrize("name", ["ddim", "stable_diffusion", "dit", "pixart", "sd3", "flux", "z_image"])
def test_a_student_that_rounds_nothing_has_nothing_to_learn(name: str, tmp_path: Path) -> None:
    """Its blocks, called with what was recorded in batches that mix timesteps, return what the teacher's return."""
    context = context_of(*recorded(name), tmp_path)
    for module in (context.student, *context.attention.values()):
        for part in module.modules():
            if isinstance(part, WeightQuantizer | ActivationQuantizer):
                part.enabled = False
    units = BlockwiseDistillation(samples=5).units(context, PHASE, 0)  # each replaces the files of the one before
    losses = [float(unit.loss(0).detach()) for unit in units]
    assert max(losses) < 1e-9
    assert len(losses) > 2


def test_a_single_recorded_call_is_enough(tmp_path: Path) -> None:
    teacher = source("ddim")
    pool = next(stream(teacher, images=1, batch_size=1, steps=1, seed=0))
    unit, *_ = units_of(context_of(teacher.denoiser, pool, tmp_path))
    assert float(unit.loss(0).detach()) > 0


def test_every_trained_layer_and_attention_has_one_block(tmp_path: Path) -> None:
    context = context_of(*recorded("stable_diffusion"), tmp_path)
    units = units_of(context)
    for part in ("layers", "attention"):
        owned = [name for unit in units for name in getattr(unit, part)]
        assert sorted(owned) == sorted(getattr(context, part))
    assert [unit.name for unit in units_of(context, start=3)] == [unit.name for unit in units[3:]]
    assert {unit.of for unit in units_of(context, start=3)} == {len(units)}


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_samples_are_of_every_timestep(count: int) -> None:
    _, pool = recorded("ddim")
    chosen = of_every_step(pool, count, seed=0)
    times = pool.step_of[chosen].bincount(minlength=len(pool.timesteps))
    assert len(chosen.unique()) == count
    assert times.min() >= count // len(pool.timesteps)
    assert times.max() <= -(-count // len(pool.timesteps))


def test_the_input_is_what_the_trained_blocks_before_return(tmp_path: Path) -> None:
    """A block recorded again is asked the same, whatever became of its own weights, until a block before it changes."""
    context = context_of(*recorded("ddim"), tmp_path)
    first, second = (next(BlockwiseDistillation(samples=5).units(context, PHASE, number)) for number in (0, 1))
    weights = [next(iter(unit.layers.values())).weight_quantizer.source.weight for unit in (first, second)]

    def asked() -> Tensor:
        calls: list[Tensor] = []
        unit = next(BlockwiseDistillation(samples=5).units(context, PHASE, 1))
        module = context.student.get_submodule(unit.name)
        with module.register_forward_pre_hook(lambda _, args: calls.append(args[0])):
            unit.loss(0)
        return calls[0]

    before = asked()
    with torch.no_grad():
        weights[1].mul_(2)
        assert torch.equal(asked(), before)
        weights[0].mul_(2)
        assert not torch.equal(asked(), before)


def test_rows_come_back_whatever_their_batch_dimension(tmp_path: Path) -> None:
    """Two rows a sample (guidance), heads folded into the batch, a tensor without a batch, and nothing at all."""

    def call(samples: range) -> Call:
        rows = torch.tensor([[2 * i, 2 * i + 1] for i in samples]).flatten()
        folded = (rows[:, None] * 10 + torch.arange(3)).flatten()
        return Call(
            {
                "timestep": rows.double(),
                "args": (rows[:, None].expand(-1, 4).bfloat16(), None, folded),
                "kwargs": {"table": torch.arange(2), "mask": (rows % 2 == 0)},
                "output": rows,
            }
        )

    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "9.bin").write_bytes(b"of the block before")
    rows = BlockCalls(tmp_path / "block", call(range(1)), call(range(2)))
    assert not (tmp_path / "block" / "9.bin").exists()
    for start in range(0, 6, 2):
        rows.append(call(range(start, start + 2)))
    assert len(rows) == 12
    chosen = torch.tensor([7, 0, 11])
    found = rows.batch(chosen).arguments
    assert found["timestep"].tolist() == [7, 0, 11]
    assert found["args"][0].dtype == torch.bfloat16
    assert found["args"][0].tolist() == [[7.0] * 4, [0.0] * 4, [11.0] * 4]
    assert found["args"][1] is None
    assert found["args"][2].tolist() == [70, 71, 72, 0, 1, 2, 110, 111, 112]
    assert found["kwargs"]["table"].tolist() == [0, 1]
    assert found["kwargs"]["mask"].tolist() == [False, True, False]


def test_the_blocks_at_full_resolution_but_the_last(tmp_path: Path) -> None:
    context = context_of(*recorded("ddim"), tmp_path)
    every = [unit.name for unit in units_of(context)]

    def names(**chosen: Any) -> list[str]:
        return [unit.name for unit in BlockwiseDistillation(samples=2, **chosen).units(context, PHASE, 0)]

    assert names(leave=2) == every[:-2]
    assert names(leave=100) == []
    full = [
        "down_blocks.0.resnets.0",
        "up_blocks.0.upsamplers.0.conv",
        "up_blocks.1.resnets.0",
        "up_blocks.1.resnets.1",
    ]
    assert names(full_resolution=True) == full
    assert names(full_resolution=True, leave=2) == full[:2]


@pytest.mark.parametrize("name", ["ddim", "stable_diffusion"])
def test_the_last_blocks_train_as_in_training_of_all(name: str, tmp_path: Path) -> None:
    """The same loss and the same gradients as without ``last``, and none for what comes before."""
    context = context_of(*recorded(name), tmp_path)
    everything, end = (next(TrajectoryDistillation(last=last).units(context, PHASE, 0)) for last in (None, 2))
    assert everything.trained.keys() == context.trained.keys()
    assert 0 < len(end.layers) < len(context.layers)
    assert [name for block in context.blocks()[-2:] for name in block.layers if name in context.layers] == [*end.layers]
    parameters = {
        f"{name}.{key}": parameter
        for name, module in context.trained.items()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }

    def gradients(unit: Unit) -> tuple[Tensor, dict[str, Tensor]]:
        for parameter in parameters.values():
            parameter.grad = None
        loss = unit.loss(0)
        loss.backward()
        return loss.detach(), {key: p.grad for key, p in parameters.items() if p.grad is not None}

    (loss, some), (whole_loss, all_of_them) = gradients(end), gradients(everything)
    assert torch.equal(loss, whole_loss)
    assert all(parameter.requires_grad for parameter in parameters.values())
    assert some.keys() == {key for key in all_of_them if key.startswith(tuple(f"{name}." for name in end.trained))}
    for key, gradient in some.items():
        torch.testing.assert_close(gradient, all_of_them[key])


def test_distillation_beats_rounding_on_the_bundled_model(tmp_path: Path) -> None:
    source = load("demo:fruits32", device="cpu")
    source.denoiser.requires_grad_(False)
    pool = record(source, tmp_path / "pool", images=6, batch_size=6, steps=4, seed=0)
    held_out = record(source, tmp_path / "other", images=4, batch_size=4, steps=4, seed=1)

    def error(denoiser: nn.Module) -> float:
        """Squared, relative."""
        call, target = held_out.batch(torch.arange(len(held_out)))
        with torch.no_grad():
            difference: Tensor = run(denoiser, call) - target
        return float(difference.square().sum() / target.square().sum())

    rounded = context_of(source.denoiser, pool, tmp_path, MSE)
    context = context_of(source.denoiser, pool, tmp_path)
    phase = PHASE.model_copy(update={"batch_size": 8, "iterations": 8, "learning_rates": FAST})
    for _ in finetune(context, [phase], TrainingState()):
        pass
    assert error(context.student) < 0.85 * error(rounded.student)
