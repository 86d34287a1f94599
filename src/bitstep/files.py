"""Files that appear whole or not at all, in places that were looked at before the work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bitstep.errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place when everything under this context manager went well,
    and else is removed."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Have ``write`` write the file ``path``, which appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        write(file)


def check_path(path: Path, what: str, endings: Sequence[str]) -> Path:
    """``path``, if ``what`` can be written to a file there whose name has one of ``endings``; UsageError if not."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.suffix not in endings:
        problem = f"expected a name that ends in {' or '.join(endings)}"
    elif path.is_dir():
        problem = "it is a folder"
    elif not above.is_dir():
        problem = f"{above} is a file"
    elif not os.access(above, os.W_OK):
        problem = f"the folder {above} is not to be written to"
    else:
        return path
    raise UsageError(f"cannot write {what} to {path}: {problem}")
