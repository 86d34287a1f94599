"""The commands, the files and the Python of README and guide, as they stand there, one after another in one folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from bitstep import cli
from bitstep.methods import NAMES

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/guide.md")
HURRY = {
    "quantize": ["--set=calibration.images=4", "--set=calibration.steps=5", "--set=training.0.iterations=3"],
    "sample": ["--steps=2"],
    "evaluate": ["--steps=2"],
    "benchmark": ["--rounds=1"],
}


@pytest.fixture
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_quieten_libraries", lambda: None)  # it is for a process, not for a test among others


@pytest.mark.usefixtures("_in_an_empty_folder")
@pytest.mark.parametrize("hurry", [HURRY, pytest.param({}, marks=pytest.mark.slow)], ids=["hurried", "as printed"])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, hurry: dict[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"<!-- tested: ([\w.]+) -->\n```\w+\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert {kind for kind, _ in blocks} >= {"commands", "python"}
    for kind, block in blocks:
        if kind == "python":
            exec(block, {})
            continue
        if kind != "commands":
            Path(kind).write_text(block)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "bitstep"
            with pytest.raises(SystemExit) as exit_:
                cli.main([*arguments, *hurry.get(arguments[0], [])])
            assert exit_.value.code == 0, f"{line}\n{capsys.readouterr().err}"
    if page == "README.md":
        assert Path("grid.png").stat().st_size > 0
        assert Path("fruit.png").stat().st_size > 0


def test_the_readme_lists_every_recipe() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(NAMES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_points_at_files_that_exist(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
