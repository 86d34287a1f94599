"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""``progress(done, total)``"""


def silent(done: int, total: int) -> None:
    """For those who do not ask."""
