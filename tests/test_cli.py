"""The command line: exit codes, one-line errors, quick help, and each verb through its front door."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.main import get_command

import bitstep as bitstep_package
from bitstep import api, cli
from bitstep.errors import BitstepError
from bitstep.stages.benchmark import DTYPES
from bitstep.stages.peers import PEERS


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def bitstep(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(cli, "_quieten_libraries", lambda: None)  # it is for a process, not for a test among others

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), captured.out, captured.err)

    return run


def errors(outcome: Outcome) -> list[str]:
    return [line for line in outcome.err.splitlines() if line.startswith("bitstep: error:")]


def test_sample(bitstep: Run, plain_pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "images.npz"
    outcome = bitstep("sample", plain_pipeline, "--num", 3, "--steps", 2, "--seed", 1, "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert np.load(out)["images"].shape == (3, 8, 8, 3)


def test_inspect_json(bitstep: Run, packed_pipeline: Path) -> None:
    outcome = bitstep("inspect", packed_pipeline, "--json")
    assert outcome.code == 0
    assert {"average_weight_bits", "size_bytes", "compression", "ops_saving", "layers"} <= json.loads(
        outcome.out
    ).keys()
    assert "conv_in" in bitstep("inspect", packed_pipeline).out


def test_evaluate_json(bitstep: Run, packed_pipeline: Path, plain_pipeline: Path, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    options = ("--num", 2, "--steps", 2, "--json", file)
    assert bitstep("evaluate", packed_pipeline, "--against", plain_pipeline, *options).code == 0
    keys = {"psnr", "ssim", "step_error", "frechet_distance", "features", "num_images"}
    assert keys <= json.loads(file.read_text()).keys()


@pytest.mark.parametrize("against", [["--against", "fp32", "bf16"], ["--against", "fp32", "--against", "bf16"]])
def test_benchmark_takes_several_precisions(
    bitstep: Run,
    against: list[str],
    packed_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def benchmark(directory: Path, **options: object) -> dict[str, object]:
        asked.update(options)
        return {"rows": [{"name": "packed", "median_ms": 1.5}], "kernels": {"reference": 3}}

    monkeypatch.setattr(api, "benchmark", benchmark)
    outcome = bitstep("benchmark", packed_pipeline, *against, "--json", tmp_path / "numbers.json")
    assert outcome.code == 0
    assert list(asked["against"]) == ["fp32", "bf16"]
    assert json.loads((tmp_path / "numbers.json").read_text())["rows"][0]["median_ms"] == 1.5


def test_the_help_of_benchmark_names_all_there_is_to_compare_with() -> None:
    (against,) = (o for o in get_command(cli.app).commands["benchmark"].params if o.name == "against")  # type: ignore[attr-defined]
    assert against.help.partition(", or ")[0].split(", ") == [*DTYPES, *PEERS]


def test_demo_shows_both_recipes(
    bitstep: Run, packed_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.arange(4 * 12 * 12 * 3).reshape(4, 12, 12, 3).to(torch.uint8)
    monkeypatch.setattr(api, "sample", lambda source, seed: images + (source == packed_pipeline))
    monkeypatch.setattr(api, "quantize", lambda *_, out, **__: out.mkdir(parents=True) or packed_pipeline)
    outcome = bitstep("demo", "--out", tmp_path / "demo")
    assert outcome.code == 0, outcome.err
    assert "minmax" in outcome.out
    assert "best" in outcome.out
    with Image.open(tmp_path / "demo" / "demo.png") as picture:
        assert picture.width > 900


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize", "demo:fruits32"], 2, "Missing option '--out'"),
        (["paint"], 2, "No such command 'paint'"),
        (["sample", "demo:fruits32", "--num", "0", "--out", "a.png"], 2, "'--num'"),
        (["sample", "demo:fruits32", "--out", "a.gif"], 2, "expected a name that ends in .png or .npz"),
        (["sample", "nowhere", "--out", "a.png"], 1, "nowhere does not exist"),
        (["sample", "demo:fruits32", "--prompts", "none.txt", "--out", "a.png"], 2, "cannot read prompts none.txt"),
        (["benchmark", "folder", "fp32"], 2, "unexpected argument 'fp32'"),
        (["benchmark", "folder", "--backend", "abacus"], 2, "no backend named 'abacus'"),
        (["benchmark", "folder", "--json", "a.txt"], 2, "expected a name that ends in .json"),
        (["evaluate", "nowhere", "--against", "nowhere", "--json", "a.txt"], 2, "expected a name that ends in .json"),
        (["quantize", "demo:fruits32", "--recipe", "efficentdm", "--out", "out"], 2, "efficientdm"),
        (["quantize", "demo:fruits32", "--bits", "W9A4", "--out", "out"], 2, "W9A4"),
        (["quantize", "demo:fruits32", "--seed", f"{2**64}", "--out", "out"], 2, "out of range"),
        (["quantize", "demo:fruits32", "--device", "gpu", "--out", "out"], 2, "cannot compute on device 'gpu'"),
        (["quantize", "demo:fruits32", "--set", "trainig.0.iterations=3", "--out", "out"], 2, "trainig"),
    ],
)
def test_errors_are_one_line(
    bitstep: Run, arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = bitstep(*arguments)
    assert outcome.code == code
    assert len(outcome.err.splitlines()) == 1
    assert message in errors(outcome)[0]
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_without_a_command_the_help_is_shown(bitstep: Run) -> None:
    outcome = bitstep()
    assert (outcome.code, outcome.err) == (2, "")
    assert "quantize" in outcome.out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BitstepError("two\nlines"), 1, "two lines"),
        (OSError(28, "No space left on device", "grid.png"), 1, "No space left on device: grid.png"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero (--verbose shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures(bitstep: Run, error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(api, "sample", fail)
    outcome = bitstep("sample", "demo:fruits32", "--out", "a.png")
    assert (outcome.code, outcome.err) == (code, f"bitstep: error: {message}\n")
    if not isinstance(error, KeyboardInterrupt):
        verbose = bitstep("sample", "demo:fruits32", "--out", "a.png", "--verbose")
        assert "Traceback" in verbose.err
        assert verbose.code == code


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"], ["quantize"]])
def test_help_and_usage_errors_do_not_import_torch(arguments: list[str]) -> None:
    script = f"""
import sys
from bitstep.cli import main
try:
    main({arguments})
finally:
    assert not {{"torch", "diffusers"}} & sys.modules.keys()
"""
    done = run_python(script)
    assert done.returncode == (2 if arguments == ["quantize"] else 0), done.stderr
    assert "Assertion" not in done.stderr


@pytest.mark.parametrize("imports", ["bitstep, diffusers", "diffusers, bitstep", "bitstep.checkpoint, diffusers"])
def test_plain_diffusers_loads_packed_folders(packed_pipeline: Path, imports: str) -> None:
    script = f"""
import {imports}
pipeline = diffusers.DiffusionPipeline.from_pretrained({str(packed_pipeline)!r})
print(type(pipeline.unet.conv_in).__name__)
"""
    done = run_python(script)
    assert done.stdout == "PackedConv2d\n", done.stderr


def test_the_package_offers_the_verbs() -> None:
    assert bitstep_package.sample is api.sample
    assert {"quantize", "load", "inspect", "evaluate", "benchmark"} <= set(dir(bitstep_package))
    with pytest.raises(AttributeError, match="no attribute 'dance'"):
        _ = bitstep_package.dance
