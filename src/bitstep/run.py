"""One quantization from source to packed folder: the stages in order, in a run folder that survives being killed.

OUT.partial/           while the run is under way
    run.json           source, seed, resolved recipe, library versions: what a resumed run must agree with
    pool/              recorded full-precision trajectories
    sensitivity.safetensors  how far errors at each timestep carry, where the recipe asks
    state.safetensors  trained tensors and optimizer moments (the position in its metadata)
    loss.csv           the loss curve
OUT/                   appears whole, by a rename, when all is done; run.json, plan.json and loss.csv go to OUT/run/
"""

from __future__ import annotations

import csv
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitstep
from bitstep.checkpoint import pack_model
from bitstep.errors import BitstepError, UsageError
from bitstep.images import TrainingImages, enlargement
from bitstep.methods.base import Context, Effort, Phase
from bitstep.numerics.dilation import summary
from bitstep.pool import INDEX, Pool
from bitstep.recipe import Recipe, resolve
from bitstep.runtime import dispatch
from bitstep.stages.calibrate import record, stream
from bitstep.stages.finetune import (
    TrainingState,
    finetune,
    load_trained_tensors,
    moments,
    trained_tensors,
)
from bitstep.stages.generate import Sampling, read_prompts
from bitstep.stages.load import Source, load
from bitstep.stages.pack import packed_attention, packed_layers
from bitstep.stages.precondition import check, precondition
from bitstep.stages.prepare import Student, prepare
from bitstep.stages.sample import holds_images, read
from bitstep.stages.sensitivity import sensitivity
from bitstep.surgery import check_rules

SAVE_EVERY_SECONDS = 60.0
CALIBRATION_SEED = 1 << 20
"""Added to the seed of the recorded trajectories, so that `evaluate` with the same seed sees noise of its own."""
RUN, STATE, LOSS, PLAN = "run.json", "state.safetensors", "loss.csv", "plan.json"
POOL, SENSITIVITY = "pool", "sensitivity.safetensors"


def quantize(
    source: str | Path,
    *,
    out: str | Path,
    recipe: str | Path = "best",
    bits: str = "W4A4",
    effort: Effort = "standard",
    overrides: Sequence[str] = (),
    data: str | Path | None = None,
    prompts: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Quantize ``source`` and write the packed pipeline to the folder ``out``; returns ``out``.

    A run that was killed goes on with ``resume`` and ends in the same bytes. Raises UsageError for input that cannot
    work and BitstepError for what fails on the way; ``out`` then does not exist.
    """
    source, out = str(source), Path(out)
    resolved = resolve(recipe, bits, effort, overrides)
    texts = read_prompts(prompts)
    if data is not None and not any(phase.objective.wants_images for phase in resolved.method.training):
        raise UsageError(f"recipe {resolved.method.name!r} is trained without images: leave --data out")
    if data is not None and not holds_images(Path(data)):
        raise UsageError(f"{data} holds no images: expected a folder of pictures")
    identity = {
        "source": source,
        "seed": seed,
        "effort": effort,
        "prompts": texts,
        "data": None if data is None else str(Path(data).resolve()),
        "recipe": resolved.model_dump(mode="json"),
    }
    work = _claim(out, identity, resume=resume, overwrite=overwrite)
    if work is None:
        return out
    report = _Report(progress)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded = load(source, device=device)
        if dispatch.packed_layers(loaded.denoiser):
            raise UsageError(f"{source} is packed already: give the full-precision pipeline that it was made from")
        check_rules(loaded.denoiser, resolved.method.layers.rules)
        loaded.denoiser.requires_grad_(False).eval()
        torch.manual_seed(seed)
        student = _fit(loaded, resolved, work, seed, texts, data, report)
        _pack(loaded, student, resolved, work, out, report)
    except (OSError, SafetensorError) as error:
        place, why = getattr(error, "filename", None) or work, getattr(error, "strerror", None) or error
        raise BitstepError(f"cannot write {place}: {why}; --resume goes on from here") from error
    finally:
        if not (work / POOL / INDEX).exists():
            shutil.rmtree(work, ignore_errors=True)  # nothing was recorded: nothing to go on with
    return out


def _fit(
    source: Source,
    recipe: Recipe,
    work: Path,
    seed: int,
    prompts: list[str] | None,
    data: str | Path | None,
    report: _Report,
) -> Student:
    """Record, calibrate, train."""
    method, calibration = recipe.method, recipe.method.calibration
    sampling: Sampling = {
        "steps": calibration.steps,
        "seed": seed + CALIBRATION_SEED,
        "prompts": prompts,
        "guidance_scale": calibration.guidance_scale,
        "eta": calibration.eta,
    }
    teacher, batch_size, bf16 = source.denoiser, calibration.batch_size, calibration.bf16
    amount: dict[str, Any] = {"images": calibration.images, "batch_size": batch_size, "bf16": bf16}
    with report.bar("record trajectories") as update:
        pool = record(source, work / POOL, progress=update, **amount, **sampling)
    if method.output.preconditioned:
        check(teacher, pool)
    found = importance = None
    distilled = [p.objective for p in method.training if data is None or not p.objective.wants_images]
    if emphasis := max((objective.emphasis for objective in distilled), default=0.0):
        with report.bar("measure how far errors carry") as update:
            found = _once(work / SENSITIVITY, lambda: sensitivity(source, pool.timesteps, progress=update, **sampling))
        importance = found**emphasis
    with report.bar("calibrate activation ranges") as update:
        student = prepare(
            teacher,
            pool,
            method,
            weight_bits=recipe.weight_bits,
            activation_bits=recipe.activation_bits,
            importance=importance,
            progress=update,
        )

    @lru_cache(maxsize=1)
    def streamed(number: int) -> Pool:
        images = (number + 1) * batch_size
        batches = stream(source, images=images, batch_size=batch_size, bf16=bf16, first_batch=number, **sampling)
        return next(batches)

    context = Context(
        teacher=teacher,
        student=student.denoiser,
        layers={layer.name: student.layers[layer.name] for layer in student.plan.layers if layer.trained},
        attention=student.attention,
        structure=student.structure,
        cursor=student.cursor,
        pool=pool,
        stream=streamed,
        folder=work,
        seed=seed,
        images=None if data is None else _read_images(Path(data), source, pool),
        sensitivity=found,
    )
    if method.training:
        _train(context, method.training, work, report)
    if method.output.preconditioned:
        images, averaged = calibration.range_images, method.output.averaged
        with report.bar("precondition the output") as update:
            precondition(student.denoiser, student.cursor, pool, images=images, averaged=averaged, progress=update)
    return student


def _train(context: Context, phases: Sequence[Phase], work: Path, report: _Report) -> None:
    if any(phase.gradient_checkpointing for phase in phases):
        cast(ModelMixin, context.student).enable_gradient_checkpointing(context.cursor.checkpoint)
    state = _load_state(work / STATE, context)
    losses = _LossCurve(work / LOSS, state)
    saved = time.monotonic()
    with report.bar("fine-tune") as update:
        for step in finetune(context, phases, state):
            losses.add(step.phase, step.unit, step.iteration, step.loss)
            update(step.iteration, step.iterations, f"{step.name} loss {step.loss:.5f}")
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                losses.flush()
                _save_state(work / STATE, context, state)
                saved = time.monotonic()
    losses.flush()
    _save_state(work / STATE, context, state)


def _pack(source: Source, student: Student, recipe: Recipe, work: Path, out: Path, report: _Report) -> None:
    """Write the packed pipeline beside the run and rename it into place."""
    packed = pack_model(
        student.denoiser,
        packed_layers(student.layers, student.plan),
        grid=student.cursor.grid,
        modules_to_not_convert=student.plan.left_alone,
        total_macs=student.plan.total_macs,
        recipe=recipe.model_dump(mode="json"),
        attention=packed_attention(student.attention, student.plan),
    )
    setattr(source.pipeline, source.component, packed)
    source.pipeline.register_modules(**{source.component: packed})
    folder = work / "packed"
    shutil.rmtree(folder, ignore_errors=True)
    source.pipeline.save_pretrained(folder)
    (folder / "run").mkdir()
    for name in (RUN, LOSS):
        if (work / name).exists():
            shutil.copy(work / name, folder / "run" / name)
    plan = {
        "coverage": student.plan.coverage,
        "layers": [asdict(layer) for layer in student.plan.layers],
        "attention": [asdict(site) for site in student.plan.attention],
        "left_alone": dict(student.plan.left_alone),
        "rewritten": {name: asdict(statistics) for name, statistics in student.rewritten.items()},
        "folded": student.folded,
    }
    _write_json(folder / "run" / PLAN, plan)
    if out.exists():
        out.rename(work / "replaced")
    folder.rename(out)
    shutil.rmtree(work)
    report.line(f"{student.plan.coverage:.1%} of the multiply-accumulates quantized, {len(student.plan.layers)} layers")
    if student.rewritten:
        folded = sum(len(readers) for readers in student.folded.values())
        report.line(f"{summary(student.rewritten.values())}; in {folded} of them by the norm before")


def _claim(out: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
    """The run folder for ``out``, new or to be resumed; None when a resumed run is already finished."""
    work = out.with_name(out.name + ".partial")
    identity = json.loads(json.dumps(identity))
    if resume and not work.exists() and _read_identity(out / "run" / RUN) == identity:
        return None
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise UsageError(f"{out} is not empty: choose another folder, or give --overwrite")
    if work.exists() and not (resume or overwrite):
        raise UsageError(
            f"{work} holds an unfinished run: give --resume to go on with it, or --overwrite to discard it"
        )
    if work.exists() and resume:
        if _read_identity(work / RUN) != identity:
            raise UsageError(
                f"{work} holds a run with another source, seed or recipe: repeat its options, or --overwrite"
            )
        return work
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        _write_json(work / RUN, identity | {"versions": _versions()})
    except OSError as error:
        raise BitstepError(f"cannot write {work}: {error.strerror}") from error
    return work


def _read_identity(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    content.pop("versions", None)
    return content


def _versions() -> dict[str, str]:
    return {
        "bitstep": bitstep.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": platform.machine(),
    }


def _once(path: Path, find: Callable[[], Tensor]) -> Tensor:
    """``find()``, or what it found before the run was interrupted."""
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        save_file({path.stem: find()}, temporary)
        temporary.replace(path)
    return load_file(path)[path.stem]


def _save_state(path: Path, context: Context, state: TrainingState) -> None:
    tensors = {f"trained.{name}": tensor for name, tensor in trained_tensors(context.trained).items()}
    tensors |= {f"moments.{name}": tensor for name, tensor in moments(state).items()}
    tensors |= {f"average.{name}": tensor for name, tensor in state.average.items()}
    position = {"phase": state.phase, "unit": state.unit, "iteration": state.iteration}
    temporary = path.with_suffix(".tmp")
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, temporary, {key: str(value) for key, value in position.items()})
    temporary.replace(path)


def _load_state(path: Path, context: Context) -> TrainingState:
    if not path.exists():
        return TrainingState()
    try:
        with safe_open(path, "pt") as file:
            position = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        load_trained_tensors(context.trained, _under("trained.", tensors))
        phase, unit, iteration = (int(position[key]) for key in ("phase", "unit", "iteration"))
        return TrainingState(
            phase, unit, iteration, moments=_under("moments.", tensors), average=_under("average.", tensors)
        )
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise BitstepError(f"the saved state {path} is damaged ({error}): start again with --overwrite") from error


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class _LossCurve:
    """The losses so far, written whenever the state is; rows past the state that a run resumes from are dropped."""

    HEADER = ("phase", "unit", "iteration", "loss")

    def __init__(self, path: Path, state: TrainingState) -> None:
        self._path = path
        self._rows: list[tuple[int, int, int, float]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [(int(p), int(u), int(i), float(x)) for p, u, i, x in list(csv.reader(file))[1:]]
            self._rows = [row for row in rows if row[:3] <= (state.phase, state.unit, state.iteration)]

    def add(self, phase: int, unit: int, iteration: int, loss: float) -> None:
        self._rows.append((phase, unit, iteration, loss))

    def flush(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.HEADER)
            writer.writerows(self._rows)
        temporary.replace(self._path)


class _Report:
    """Progress bars on stderr, or silence."""

    def __init__(self, shown: bool) -> None:
        self._console = Console(stderr=True, quiet=not shown)

    def line(self, text: str) -> None:
        self._console.print(text)

    @contextmanager
    def bar(self, title: str) -> Iterator[Any]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(title, total=None, note="")

            def update(done: int, total: int, note: str = "") -> None:
                progress.update(task, completed=done, total=total, note=note)

            yield update


def _read_images(folder: Path, source: Source, pool: Pool) -> TrainingImages:
    """Pictures of the denoiser's size, or mosaics of such."""
    call, _ = pool.batch([0])
    sample = next(value for value in call.arguments.values() if isinstance(value, torch.Tensor) and value.ndim == 4)
    pixels = read(folder, tile=sample.shape[-1] * enlargement(source.pipeline))
    return TrainingImages.of_pipeline(pixels, source.pipeline)


def _write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
