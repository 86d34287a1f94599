"""The errors a user may see: each message is one line saying what was wrong, what was expected and how to fix it."""

from __future__ import annotations


class BitstepError(Exception):
    """An operation could not be carried out; the command line exits with code 1."""


class UsageError(BitstepError):
    """The request itself was wrong (an unknown recipe, an impossible option); the command line exits with code 2."""


def first_line(error: Exception) -> str:
    """What another library's error says, for a line of our own; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
