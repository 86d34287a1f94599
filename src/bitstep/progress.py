"""How long work tells whoever started it how far it is; bars are drawn by the command line alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Progress = Callable[[int, int], None]
"""``progress(done, total)``"""


def silent(done: int, total: int, note: str = "") -> None:
    """Progress that nobody wants to see."""


class Noted(Protocol):
    """:data:`Progress` that may come with a ``note`` about what is being done."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


class Reporter(Protocol):
    """What a run of several stages tells whoever started it."""

    def line(self, text: str) -> None:
        """A result that is worth a line."""

    def stage(self, title: str) -> AbstractContextManager[Noted]:
        """The progress of a stage, for as long as it lasts."""


class _Silent:
    def line(self, text: str) -> None: ...

    def stage(self, title: str) -> AbstractContextManager[Noted]:
        return nullcontext(silent)


SILENT: Reporter = _Silent()
