"""The whole run: methods x invariants, killed and resumed, and what is left when it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ZImagePipeline
from packed import some_bits
from pipelines import build
from safetensors import SafetensorError

import bitstep
from bitstep import run
from bitstep.cli import Bars
from bitstep.denoiser.calls import run as call_denoiser
from bitstep.errors import BitstepError, UsageError
from bitstep.methods import METHODS
from bitstep.methods.base import Effort
from bitstep.recipe import resolve
from bitstep.run_folder import LOSS, RUN, RunFolder
from bitstep.runtime.dispatch import set_backend
from bitstep.stages import finetune
from bitstep.stages.calibrate import stream
from bitstep.stages.inspect import inspect
from bitstep.stages.load import Source, load
from bitstep.stages.prepare import Student
from bitstep.stages.sample import save

TINY = [
    "calibration.images=4",
    "calibration.batch_size=2",
    "calibration.steps=3",
    "calibration.range_images=2",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher") / "ddim"
    build("ddim").save_pretrained(folder)
    return str(folder)


def phases_of(name: str, effort: Effort) -> int:
    return len(resolve(name, some_bits(METHODS[name]), effort).method.training)


def tiny(name: str, effort: Effort = "full", **changes: Any) -> dict[str, Any]:
    """Arguments of a run of method ``name`` that takes a second or two."""
    phases = range(phases_of(name, effort))
    shorter = [f"training.{i}.{key}" for i in phases for key in ("iterations=4", "batch_size=3")]
    return {"recipe": name, "bits": some_bits(METHODS[name]), "effort": effort, "overrides": TINY + shorter} | changes


def weights(folder: Path) -> bytes:
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


class Lines:
    """Keeps the lines that a run prints."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def stage(self, name: str) -> Any:
        return nullcontext(lambda *_: None)


def test_the_plan_says_what_was_packed(teacher: str, tmp_path: Path) -> None:
    said = Lines()
    out = run.quantize(teacher, out=tmp_path / "out", progress=said, **tiny("binarydm-ebb"))
    plan = json.loads((out / "run" / "plan.json").read_text())
    assert {layer["bases"] for layer in plan["layers"]} == {1}  # each had a second one while it was trained
    average = f"{inspect(out)['average_weight_bits']:.4g} bits a weight"
    assert [line for line in said.lines if f"quantized, {average}" in line]
    assert [line for line in said.lines if line.endswith("bits a weight on average, not 1")]  # said before the work


@pytest.mark.parametrize("rule", ["activation_bits: 8", "activation_bits: 32", "skip: true"])
def test_every_rewrite_says_what_it_did(rule: str, teacher: str, tmp_path: Path) -> None:
    said = Lines()
    arguments = tiny("dilatequant", bits="W4A8")
    arguments["overrides"] += [
        "rewrites=[{kind: dilation}, {kind: smoothing}, {kind: dilation, range_aware: true}]",
        f"layers.rules=[{{match: '*', {rule}}}, {{match: time_embedding.linear_1, activation_bits: 32}}]",
    ]
    out = run.quantize(teacher, out=tmp_path / "out", progress=said, **arguments)
    rewritten = json.loads((out / "run" / "plan.json").read_text())["rewritten"]
    kinds = ["dilation", "smoothing", "dilation"]
    assert [change["kind"] for change in rewritten] == kinds
    assert [line.partition(":")[0] for line in said.lines if "stretch" in line] == kinds
    assert any(change["layers"] for change in rewritten) == (rule != "skip: true")


@pytest.mark.parametrize("name", METHODS)
def test_packed_equals_fake_for_every_method(name: str, teacher: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The reference kernel computes bit for bit what the trained student computes."""
    students: list[Student] = []
    publish = run._publish

    def watched(source: Source, student: Student, *rest: Any) -> None:
        students.append(student)
        publish(source, student, *rest)

    monkeypatch.setattr(run, "_publish", watched)
    out = run.quantize(teacher, out=tmp_path / "out", **tiny(name))
    packed = load(out)
    set_backend(packed.denoiser, "reference")
    pool = next(stream(load(teacher), images=3, batch_size=3, steps=5, seed=1))
    call, _ = pool.batch(torch.arange(0, len(pool), 2))
    with torch.no_grad():
        expected = call_denoiser(students[0].denoiser, call)
        assert torch.equal(call_denoiser(packed.denoiser, call), expected)


@pytest.mark.parametrize(
    ("name", "effort", "memory"),
    [
        *((name, "full", 8.0) for name, method in METHODS.items() if method.training),
        ("dilatequant", "quick", 8.0),
        ("binarydm", "quick", 1e-9),  # sample by sample, blocks computed again
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes(
    name: str, effort: Effort, memory: float, teacher: str, tmp_path: Path, monkeypatch: Any
) -> None:
    arguments = tiny(name, effort)
    arguments["overrides"] += [f"training.{phase}.memory={memory}" for phase in range(phases_of(name, effort))]
    whole = run.quantize(teacher, out=tmp_path / "whole", **arguments)
    monkeypatch.setattr(run, "SAVE_EVERY_SECONDS", 0.0)
    real = finetune.finetune

    def killed(*args: Any) -> Iterator[finetune.Step]:
        for step in real(*args):
            if (step.phase, step.iteration) == (phases_of(name, effort) - 1, 3):
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(run, "finetune", killed)
    with pytest.raises(KeyboardInterrupt):
        run.quantize(teacher, out=tmp_path / "killed", **arguments)
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(run, "finetune", real)
    with pytest.raises(UsageError, match="unfinished run"):
        run.quantize(teacher, out=tmp_path / "killed", **arguments)
    with pytest.raises(UsageError, match="another seed: repeat its options"):
        run.quantize(teacher, out=tmp_path / "killed", resume=True, **arguments | {"seed": 5})
    resumed = run.quantize(teacher, out=tmp_path / "killed", resume=True, **arguments)
    assert weights(resumed) == weights(whole)
    assert (resumed / "run" / LOSS).read_text() == (whole / "run" / LOSS).read_text()
    spelled = f"{teacher}/../{Path(teacher).name}"
    assert run.quantize(spelled, out=resumed, resume=True, **arguments) == resumed
    assert not list(tmp_path.glob("*.partial"))


def test_the_result_is_an_ordinary_pipeline_folder(teacher: str, tmp_path: Path) -> None:
    out = bitstep.quantize(teacher, out=tmp_path / "out", **tiny("efficientdm"))
    pipeline = DiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 3)
    record = json.loads((out / "run" / RUN).read_text())
    assert record["recipe"]["method"]["name"] == "efficientdm"
    facts = bitstep.inspect(out)
    assert (facts["recipe"], facts["bits"]) == ("efficientdm", record["recipe"]["bits"])
    assert record["versions"]["torch"] == torch.__version__


def test_only_the_denoiser_becomes_another_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "half"
    pipeline = build("stable_diffusion").to(torch.float16)
    pipeline.text_encoder.encoder.layers[0].mlp.fc2.float()  # T5 keeps some of its layers like that
    pipeline.save_pretrained(source)
    capfd.readouterr()
    out = run.quantize(source, out=tmp_path / "out", **tiny("minmax"))
    assert capfd.readouterr().err == "", "neither diffusers nor transformers shows bars"
    for weights in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (out / weights).read_bytes() == (source / weights).read_bytes()
    config = json.loads((out / "text_encoder" / "config.json").read_text())
    assert config["dtype"] == "float16"


def test_a_denoiser_of_lists_and_texts_of_all_lengths(tmp_path: Path) -> None:
    """Recorded in several forms, distilled block by block and as a whole, preconditioned, replayed."""
    source = tmp_path / "source"
    ZImagePipeline(**build("z_image").components).save_pretrained(source)
    settings = tiny("best-blocks", bits="W8A8")
    settings["overrides"] = [*settings["overrides"], "calibration.size=8x8"]
    out = bitstep.quantize(source, out=tmp_path / "out", **settings)
    found = bitstep.evaluate(out, against=source, num=3, steps=3, size="8x8")
    assert max(found["step_error"]) < 1e-2


def test_training_reduces_the_loss_and_pays_against_rounding(tmp_path: Path) -> None:
    """On the model that comes with the package, a few seconds of EfficientDM beat plain rounding."""
    small = [
        "calibration.images=16",
        "calibration.batch_size=16",
        "calibration.steps=5",
        "calibration.range_images=8",
        "calibration.eta=0.0",
    ]
    trained = run.quantize(
        "demo:fruits32",
        out=tmp_path / "trained",
        bits="W4A4",
        effort="quick",
        overrides=[*small, "training.0.iterations=30", "training.0.batch_size=4"],
    )
    rounded = run.quantize("demo:fruits32", out=tmp_path / "rounded", recipe="mse", bits="W4A4", overrides=small)
    pool = next(stream(load("demo:fruits32"), images=4, batch_size=4, steps=5, seed=9))
    call, target = pool.batch(torch.arange(len(pool)))

    def error(folder: Path) -> float:
        with torch.no_grad():
            return float((call_denoiser(load(folder).denoiser, call) - target).square().mean())

    assert error(trained) < 0.75 * error(rounded)


def test_failures_leave_nothing_half_written(teacher: str, tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run.quantize(teacher, out=occupied, **tiny("minmax"))
    assert (occupied / "precious.txt").read_text() == "mine"
    with pytest.raises(UsageError, match="matches no layer"):
        run.quantize(
            teacher,
            out=tmp_path / "rule",
            **tiny("minmax", overrides="layers.rules=[{match: nope, skip: true}]"),
        )
    with pytest.raises(BitstepError, match="does not exist"):
        run.quantize("nowhere", out=tmp_path / "source", **tiny("minmax"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple")
    with pytest.raises(UsageError, match="takes no prompts"):
        run.quantize(teacher, out=tmp_path / "prompts", prompts=prompts, **tiny("minmax"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["occupied", "prompts.txt"]


@pytest.mark.parametrize(("out", "message"), [("source", "it holds .*source"), ("source/unet", "not written by")])
def test_overwriting_spares_the_source(out: str, message: str, tmp_path: Path) -> None:
    build("ddim").save_pretrained(tmp_path / "source")
    with pytest.raises(UsageError, match=message):
        run.quantize(tmp_path / "source", out=tmp_path / out, overwrite=True, **tiny("minmax"))
    assert len(weights(tmp_path / "source")) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_only_what_bitstep_wrote_is_overwritten(teacher: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for precious in ("precious", "out.partial"):
        (tmp_path / precious).mkdir()
        (tmp_path / precious / "text").write_text("mine")
    for out in (".", "", "/"):
        with pytest.raises(UsageError, match="is not empty"):
            run.quantize(teacher, out=out, **tiny("minmax"))
    for out in (".", "precious", "out"):
        with pytest.raises(UsageError, match="not written by bitstep"):
            run.quantize(teacher, out=out, overwrite=True, **tiny("minmax"))
    (tmp_path / "out.partial" / "text").unlink()
    assert run.quantize(teacher, out="out", **tiny("minmax")) == Path("out")
    before = (tmp_path / "out" / "run" / RUN).stat().st_ino
    (tmp_path / "out" / "unet" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds unet/mine.txt, which bitstep did not write"):
        run.quantize(teacher, out="out", overwrite=True, **tiny("minmax"))
    (tmp_path / "out" / "unet" / "mine.txt").unlink()
    (tmp_path / "out" / "photos").mkdir()
    with pytest.raises(UsageError, match=r"holds .*photos"):
        RunFolder.claim(Path("out"), {}, keep=[Path("out/photos")], resume=False, overwrite=True)
    run.quantize(teacher, out="out", overwrite=True, **tiny("minmax"))
    assert (tmp_path / "out" / "run" / RUN).stat().st_ino != before
    assert (tmp_path / "precious" / "text").read_text() == "mine"


def test_overwriting_spares_the_recipe_and_the_prompts(teacher: str, tmp_path: Path) -> None:
    out = run.quantize(teacher, out=tmp_path / "out", **tiny("minmax"))
    (out / "mine.yaml").write_text("base: mse")
    (out / "prompts.txt").write_text("a red apple")
    given = tiny("minmax")
    with pytest.raises(UsageError, match=r"it holds .*mine\.yaml"):
        run.quantize(teacher, out=out, overwrite=True, **{**given, "recipe": out / "mine.yaml"})
    with pytest.raises(UsageError, match=r"it holds .*prompts\.txt"):
        run.quantize(teacher, out=out, overwrite=True, prompts=out / "prompts.txt", **given)
    assert (out / "mine.yaml").read_text() == "base: mse"


@pytest.mark.parametrize("left", ["", "run.json"])
def test_a_run_killed_while_it_cleared_up_is_finished(
    left: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(work: RunFolder) -> None:
        for name in {RUN, "loss.csv"} - {left}:
            (work.path / name).unlink(missing_ok=True)
        work.lock.release()

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "leave", killed)
        run.quantize(teacher, out=tmp_path / "out", **tiny("minmax"))
    assert (tmp_path / "out.partial" / "pool").exists()
    before = (tmp_path / "out" / "run" / RUN).stat().st_ino
    run.quantize(teacher, out=tmp_path / "out", resume=True, **tiny("minmax"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "run" / RUN).stat().st_ino == before


@pytest.mark.parametrize(
    ("operation", "name"), [("rename", "out"), ("rename", "packed"), ("unlink", "pool.json")], ids=str
)
def test_a_run_killed_while_it_published_is_finished_by_resuming(
    operation: str, name: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before one file is moved or removed, where another result was to be replaced."""
    run.quantize(teacher, out=tmp_path / "out", **tiny("minmax"))
    again = partial(run.quantize, teacher, out=tmp_path / "out", overwrite=True, **(tiny("minmax") | {"seed": 5}))
    original = getattr(Path, operation)

    def kill(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == name:
            raise KeyboardInterrupt
        return original(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, operation, kill)
        with pytest.raises(KeyboardInterrupt):
            again()
    again(resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "run" / RUN).read_text())["seed"] == 5


def test_a_published_run_holds_its_folder_until_it_left(tmp_path: Path) -> None:
    claim = partial(RunFolder.claim, tmp_path / "out", {}, keep=[], resume=False, overwrite=True)
    first = claim()
    assert first is not None
    first.publish(Path.mkdir, {})
    with pytest.raises(UsageError, match="a run is under way"):
        claim()
    first.leave()
    second = claim()
    assert second is not None
    assert second.path.exists()
    second.leave()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    claim = partial(RunFolder.claim, tmp_path / "out", {}, keep=[], resume=False, overwrite=True)
    for _ in range(2):
        work = claim()
        assert work is not None
        with pytest.raises(UsageError, match=r"a run is under way in .*out\.partial"):
            claim()
        work.leave()
        assert not list(tmp_path.iterdir())


def test_what_is_packed_already_is_refused(packed_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="packed already"):
        run.quantize(packed_pipeline, out=tmp_path / "out", **tiny("minmax"))


def test_a_typo_in_a_rule_is_found_before_anything_runs(teacher: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(run, "record", pytest.fail)
    overrides = [*TINY, "layers.rules=[{match: 'conv_*', type: Linear, weight_bits: 8}]"]
    with pytest.raises(UsageError, match="matches no layer"):
        run.quantize(teacher, out=tmp_path / "out", **tiny("minmax", overrides=overrides))


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("ddim", "text.png", "cannot read the picture .*text.png"),
        ("ddim", "9x9.npz", r"come as \[3, 9, 9\] to the denoiser, which takes \[3, 8, 8\]"),
        ("stable_diffusion", "8x8.png", "conditional denoiser .*encoder_hidden_states"),
        ("flux", "8x8.png", "conditional denoiser"),
    ],
)
def test_images_that_do_not_fit_are_found_before_anything_runs(
    kind: str, name: str, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(run, "record", pytest.fail)
    build(kind).save_pretrained(tmp_path / "teacher")
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / name
    if name == "text.png":
        path.write_text("text")
    else:
        save(torch.zeros(1, int(name[0]), int(name[0]), 3, dtype=torch.uint8), path)
    data = path if path.suffix == ".npz" else path.parent
    with pytest.raises(BitstepError, match=message):
        run.quantize(tmp_path / "teacher", out=tmp_path / "out", data=data, **tiny("lsq"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["data", "teacher"]


def test_a_method_without_training_shows_no_training(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run.quantize(teacher, out=tmp_path / "out", progress=Bars(), **tiny("minmax"))
    assert "fine-tune" not in capsys.readouterr().err
    assert not (out / "run" / LOSS).exists()


def test_an_interrupted_run_says_how_to_go_on_and_a_damaged_one_how_not(
    teacher: str, tmp_path: Path, monkeypatch: Any
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    arguments, told = tiny("efficientdm", "quick"), Lines()
    with monkeypatch.context() as patched:
        patched.setattr(run, "_publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.quantize(teacher, out=tmp_path / "out", progress=told, **arguments)
    assert told.lines[-1] == f"{tmp_path / 'out.partial'} is kept: --resume goes on from here"
    damaged = tmp_path / "out.partial" / "sensitivity.safetensors"
    assert damaged.exists()
    damaged.write_bytes(b"\x08" + bytes(7) + b"not JSON")
    with pytest.raises(BitstepError, match=r"a file in .*out\.partial is damaged .*--overwrite$"):
        run.quantize(teacher, out=tmp_path / "out", resume=True, **arguments)
    assert run.quantize(teacher, out=tmp_path / "out", overwrite=True, **arguments).exists()


def test_a_full_gpu_is_one_clear_line(teacher: str, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(run, "record", full)
    with pytest.raises(BitstepError, match=r"cpu ran out of memory: with --set .*memory \(GiB\)$"):
        run.quantize(teacher, out=tmp_path / "out", **tiny("minmax"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "place"),
    [(OSError(28, "No space left on device", "weights"), "weights"), (SafetensorError("No space left on device"), "")],
)
def test_a_full_disk_is_one_clear_line(
    error: Exception, place: str, teacher: str, tmp_path: Path, monkeypatch: Any
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(run, "_publish", full)
        with pytest.raises(BitstepError, match=f"cannot write .*{place}.*: No space left on device; --resume"):
            run.quantize(teacher, out=tmp_path / "out", **tiny("minmax"))
    assert not (tmp_path / "out").exists()
    assert run.quantize(teacher, out=tmp_path / "out", resume=True, **tiny("minmax")).exists()
