"""The floors of docs/design.md: a file imports lower floors only, and a packed model runs without training code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
BESIDE = ("runtime", "checkpoint")  # lean on what knows no training; the stages may use them


def drawn() -> list[list[str]]:
    """The floors as the page draws them: a number where one begins, a name at the same place in every line of it."""
    floors: list[list[str]] = []
    for number, name in re.findall(
        r"^ {4}( \d|\d\d|  )  (\w+)(?:\.py|/) ", (ROOT / "docs" / "design.md").read_text(), re.M
    ):
        if number.strip():
            assert int(number) == len(floors)
            floors.append([])
        floors[-1].append(name)
    return [[name for name in names if name not in BESIDE] for names in floors]


FLOORS = [*drawn(), ["__init__"], ["__main__"]]
FILES = sorted((SOURCE / "bitstep").rglob("*.py"))


def unit(module: str) -> str:
    """``bitstep.stages.load`` -> ``stages``: what the floors are made of."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def floor(name: str) -> int:
    return next(height for height, names in enumerate(FLOORS) if name in names)


def imports(path: Path) -> set[str]:
    """Units of the package that ``path`` imports, anywhere in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            base = node.module or ""
            modules |= {f"{base}.{alias.name}" for alias in node.names} if base == "bitstep" else {base}
    units = {unit(module) for module in modules if module.split(".")[0] == "bitstep"}
    return units - {"__init__", "__version__"}  # the package itself is imported before any file in it


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_lower_floors_only(path: Path) -> None:
    here = unit(".".join(path.relative_to(SOURCE).with_suffix("").parts))
    others = imports(path) - {here}
    if here in BESIDE:
        below = {name for names in FLOORS[: floor("denoiser") + 1] for name in names}
        allowed = {*below, *BESIDE[: BESIDE.index(here)]}
        assert others <= allowed, f"{here} may import {sorted(allowed)} only"
        return
    too_high = [name for name in others if name not in BESIDE and floor(name) >= floor(here)]
    assert not too_high, f"{here} (floor {floor(here)}) imports {too_high}"
    if floor(here) < floor("stages"):
        assert not others & set(BESIDE), f"{here} (floor {floor(here)}) is training code and knows no kernels"


def test_every_file_has_a_floor_and_says_what_lives_there() -> None:
    for path in FILES:
        name = unit(".".join(path.relative_to(SOURCE).with_suffix("").parts))
        assert name in BESIDE or any(name in names for names in FLOORS), f"{path} stands on no floor"
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} needs an opening sentence"
