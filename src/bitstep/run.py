"""One quantization from source to packed folder: the stages in order, in a run folder that survives being killed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from bitstep.arguments import as_list, check_seed
from bitstep.errors import BitstepError, UsageError
from bitstep.methods.base import Calibration, Context, Effort, Phase
from bitstep.planning import check_rules
from bitstep.progress import SILENT, Reporter
from bitstep.recipe import Recipe, resolve
from bitstep.run_folder import RunFolder
from bitstep.runtime import dispatch
from bitstep.stages.calibrate import record, stream
from bitstep.stages.finetune import finetune
from bitstep.stages.generate import FEW_STEPS, Inputs, Sampling, read_prompts
from bitstep.stages.load import Source, as_stored, load, without_progress_bars
from bitstep.stages.pack import pack
from bitstep.stages.pictures import find_pictures
from bitstep.stages.precondition import check_preconditionable, precondition
from bitstep.stages.prepare import Student, prepare
from bitstep.stages.rewrite import summary
from bitstep.stages.sample import holds_images, read
from bitstep.stages.sensitivity import sensitivity
from bitstep.trajectories.images import TrainingImages, enlargement, unconditional
from bitstep.trajectories.pool import Pool

SAVE_EVERY_SECONDS = 60.0
CALIBRATION_SEED = 1 << 20
"""Added to the seed of the recorded trajectories, so that `evaluate` with the same seed sees noise of its own."""


def quantize(
    source: str | Path,
    *,
    out: str | Path,
    recipe: str | Path = "best",
    bits: str = "W4A4",
    effort: Effort = "standard",
    overrides: str | Sequence[str] = (),
    data: str | Path | None = None,
    prompts: str | Path | None = None,
    pictures: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Reporter = SILENT,
) -> Path:
    """Quantize ``source`` and write the packed pipeline to the folder ``out``; returns ``out``.

    A run that was killed goes on with ``resume`` and ends in the same bytes; one that was to ``overwrite`` a result,
    with both. ``progress`` is told of every stage; the command line's :class:`bitstep.cli.Bars` is one. Raises
    UsageError for input that cannot work and BitstepError for what fails on the way; ``out`` is then as it was.
    """
    source, out = str(source), Path(out)
    resolved = resolve(recipe, bits, effort, as_list(overrides))
    inputs: Inputs = {"prompts": read_prompts(prompts), "pictures": find_pictures(pictures)}
    check_seed(seed)
    if data is not None:
        _check_data(Path(data), resolved)
    identity = {
        "source": str(Path(source).resolve()) if Path(source).exists() else source,
        "seed": seed,
        "effort": effort,
        **inputs,
        "data": None if data is None else str(Path(data).resolve()),
        "recipe": resolved.model_dump(mode="json"),
    }
    keep = [
        Path(path) for path in (source, recipe, data, prompts, pictures) if path is not None and Path(path).exists()
    ]
    work = RunFolder.claim(out, identity, keep=keep, resume=resume, overwrite=overwrite)
    if work is None:
        progress.line(f"{out} was finished before: there is nothing to go on with")
        return out
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _in_one_line(device, work, progress):
        loaded = load(source, device=device)
        if dispatch.packed_layers(loaded.denoiser):
            raise UsageError(f"{source} is packed already: give the full-precision pipeline that it was made from")
        check_rules(loaded.denoiser, resolved.method.layers.rules)
        loaded.denoiser.requires_grad_(False).eval()
        for name, component in loaded.pipeline.components.items():
            if name != loaded.component and type(component) is type(loaded.denoiser):
                progress.line(f"{name} is another {type(component).__name__}: it is left in full precision")
        images = None if data is None else _read_images(Path(data), loaded, inputs, progress)
        _say_what_is_learned_from(resolved, images, progress)
        student = _fit(loaded, resolved, work, seed, inputs, images, progress)
        _publish(loaded, student, resolved, work, progress)
    return out


def _check_data(data: Path, recipe: Recipe) -> None:
    """Raise UsageError where nothing could be learned from it."""
    if not any(phase.objective.wants_images for phase in recipe.method.training):
        raise UsageError(f"recipe {recipe.method.name!r} is trained without images: leave --data out")
    if not holds_images(data):
        raise UsageError(f"{data} holds no images: expected a folder of pictures, or an .npz file")


@contextmanager
def _in_one_line(device: str, work: RunFolder, progress: Reporter) -> Iterator[None]:
    """Full memories and disks are errors of one line; the run folder is free when everything is over."""
    try:
        yield
    except KeyboardInterrupt:
        if work.can_go_on:
            progress.line(f"{work.path} is kept: --resume goes on from here")
        raise
    except torch.OutOfMemoryError as error:
        raise BitstepError(
            f"{device} ran out of memory: with --set lower calibration.batch_size, training.N.batch_size and "
            "training.N.memory (GiB)"
        ) from error
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "deserializing" in str(error):
            raise BitstepError(f"a file in {work.path} is damaged ({error}): start again with --overwrite") from error
        place, why = getattr(error, "filename", None) or work.path, getattr(error, "strerror", None) or error
        raise BitstepError(f"cannot write {place}: {why}; --resume goes on from here") from error
    finally:
        work.leave()


def _say_what_is_learned_from(recipe: Recipe, images: TrainingImages | None, progress: Reporter) -> None:
    objectives = [phase.objective for phase in recipe.method.training if phase.objective.wants_images]
    if objectives and images is None:
        progress.line("without images (--data) it learns from the full-precision model's own trajectories")
    elif any(objective.emphasis for objective in objectives):
        progress.line("on images all timesteps count alike: an emphasis is for distillation")


def _fit(
    source: Source,
    recipe: Recipe,
    work: RunFolder,
    seed: int,
    inputs: Inputs,
    images: TrainingImages | None,
    progress: Reporter,
) -> Student:
    """Record, calibrate, train, precondition."""
    method, calibration = recipe.method, recipe.method.calibration
    sampling: Sampling = {
        "steps": calibration.steps,
        "seed": seed + CALIBRATION_SEED,
        **inputs,
        "guidance_scale": calibration.guidance_scale,
        "eta": calibration.eta,
        "size": calibration.size,
    }
    pool = _record(source, calibration, work, sampling, progress)
    if method.output.preconditioned:
        check_preconditionable(source.denoiser, pool)
    distilled = [p.objective for p in method.training if images is None or not p.objective.wants_images]
    carried = importance = None
    if emphasis := max((objective.emphasis for objective in distilled), default=0.0):
        carried = _measure_how_far_errors_carry(source, pool, calibration, work, sampling, progress)
        importance = carried**emphasis
    student = prepare(
        source.denoiser,
        pool,
        method,
        weight_bits=recipe.weight_bits,
        activation_bits=recipe.activation_bits,
        seed=seed,
        importance=importance,
        progress=progress,
    )
    if method.training:
        context = student.context(source.denoiser, pool, work.path, seed, images=images, sensitivity=carried)
        _train(context, method.training, work, progress)
    if method.output.preconditioned:
        with progress.stage("precondition the output") as update:
            precondition(
                source,
                student,
                pool,
                images=calibration.range_images,
                batch_size=calibration.batch_size,
                averaged=method.output.averaged,
                progress=update,
                **sampling,
            )
    return student


def _record(source: Source, calibration: Calibration, work: RunFolder, sampling: Sampling, progress: Reporter) -> Pool:
    with progress.stage("record trajectories") as update:
        return record(
            source,
            work.pool,
            images=calibration.images,
            batch_size=calibration.batch_size,
            bf16=calibration.bf16,
            progress=update,
            **sampling,
        )


def _measure_how_far_errors_carry(
    source: Source, pool: Pool, calibration: Calibration, work: RunFolder, sampling: Sampling, progress: Reporter
) -> Tensor:
    with progress.stage("measure how far errors carry") as update:
        timesteps, batch_size = pool.timesteps, calibration.batch_size
        measure = partial(sensitivity, source, timesteps, batch_size=batch_size, progress=update, **sampling)
        return work.once("sensitivity", measure)


def _train(context: Context, phases: Sequence[Phase], work: RunFolder, progress: Reporter) -> None:
    state, losses = work.restore(context)
    saved = time.monotonic()
    with progress.stage("fine-tune") as update:
        for step in finetune(context, phases, state):
            losses.append((step.phase, step.unit, step.iteration, step.loss))
            place = f" ({step.unit + 1} of {step.units})" if step.units > 1 else ""
            update(step.iteration, step.iterations, f"{step.name}{place} loss {step.loss:.5f}")
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                work.save(context, state, losses)
                saved = time.monotonic()
    work.save(context, state, losses)


def _publish(source: Source, student: Student, recipe: Recipe, work: RunFolder, progress: Reporter) -> None:
    """The packed pipeline takes its place, with what became of every layer."""
    packed = pack(student, recipe.model_dump(mode="json"))
    layers = dispatch.packed_layers(packed)
    assert source.folder is not None
    for name, component in source.pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name != source.component:
            as_stored(component, source.folder / name)  # it was computed with in float32
    source.pipeline.register_modules(**{source.component: packed})
    # training may have taken bases away
    kept = [replace(layer, bases=layers[layer.name].format.bases) for layer in student.plan.layers]
    plan = replace(student.plan, layers=tuple(kept))
    record = {
        "coverage": plan.coverage,
        "layers": [asdict(layer) for layer in plan.layers],
        "attention": [asdict(site) for site in plan.attention],
        "left_alone": dict(plan.left_alone),
        "rewritten": [
            {"kind": kind, "layers": {name: asdict(stretch) for name, stretch in stretches.items()}}
            for kind, stretches in student.rewritten.stretches
        ],
        "folded": [asdict(origin) | {"layers": names} for origin, names in student.rewritten.folded.items()],
    }
    with without_progress_bars():
        work.publish(source.pipeline.save_pretrained, record)
    progress.line(
        f"{len(layers)} layers quantized, {plan.average_weight_bits:.4g} bits a weight; both factors of "
        f"{plan.coverage:.1%} of the multiply-accumulates"
    )
    for kind, stretches in student.rewritten.stretches:
        progress.line(f"{kind}: {summary(stretches.values())}")
    if scales := student.rewritten.scales:
        folded = sum(map(len, student.rewritten.folded.values()))
        progress.line(
            f"for that, inputs are divided: {folded} by the norm or layer before, {len(scales) - folded} where read"
        )


def _read_images(data: Path, source: Source, inputs: Inputs, progress: Reporter) -> TrainingImages:
    """Images of the denoiser's size: mosaics of such are cut, other pictures cropped and scaled. What cannot be is
    refused before anything is recorded."""
    call, _ = next(stream(source, images=1, batch_size=1, steps=FEW_STEPS, seed=0, **inputs)).batch([0])
    name, _ = unconditional(call)
    sample = call.arguments[name]
    tile = None if data.suffix == ".npz" else sample.shape[-1] * enlargement(source.pipeline)
    pixels = read(data, tile, fit=True)
    count, height, width, _ = pixels.shape
    progress.line(f"{count:,} images of {width}x{height} from {data}")
    images = TrainingImages.of_pipeline(pixels, source.pipeline)
    found, expected = images.clean(torch.tensor([0])).shape[1:], sample.shape[1:]
    if found != expected:
        raise UsageError(f"the images in {data} come as {list(found)} to the denoiser, which takes {list(expected)}")
    return images
