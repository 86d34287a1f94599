"""Tables in Markdown, and pages that hold them between markers named for what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bitstep.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))


def put(page: Path, name: str, content: str) -> None:
    """Put ``content`` between the markers of that name, at the end of the page where there are none."""
    begin, end = (f"<!-- {word} {name} -->" for word in ("begin", "end"))
    text = page.read_text() if page.exists() else "# Results\n\nMeasured by the scripts in `benchmarks/`.\n"
    if begin not in text:
        text += f"\n{begin}\n{end}\n"
    head, _, rest = text.partition(begin)
    write(page, f"{head}{begin}\n{content}\n{end}{rest.partition(end)[2]}")


def write(path: Path, text: str) -> None:
    """Write all of a file or nothing."""
    write_atomically(path, lambda file: file.write(text.encode()))
