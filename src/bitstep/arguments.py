"""What the verbs accept, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from bitstep.errors import UsageError, first_line


def at_least(least: int, **numbers: int | None) -> None:
    """Raise UsageError naming the first of ``numbers`` below ``least``; None stands for a default."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise UsageError(f"{name.replace('_', ' ')} {number} is too small: expected at least {least}")


def check_seed(seed: int) -> None:
    """Raise UsageError for what is no seed."""
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed {seed} is out of range: expected 0 to 2**64 - 1")


def as_list(given: str | Path | Iterable[str | Path]) -> list[str]:
    """One value, or an iterable of them, as a list of strings."""
    return [str(each) for each in ([given] if isinstance(given, str | Path) else given)]


def check_device(device: str) -> None:
    """Raise UsageError where nothing can be computed on ``device``."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device has its own
        raise UsageError(f"cannot compute on device {device!r} ({first_line(error)}): try cpu") from error
