"""The base of all that a recipe can say: frozen pydantic models, unknown keys refused, variants chosen by ``kind``."""

from __future__ import annotations

import difflib
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, model_validator


class Slot(BaseModel):
    """A frozen group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Variant(Slot):
    """A slot with several implementations. A field typed with the direct subclass of Variant takes any of its own
    subclasses; from a mapping, the one whose ``kind`` default it names."""

    kind: str

    @model_validator(mode="wrap")
    @classmethod
    def _dispatch(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if Variant not in cls.__bases__ or not isinstance(data, dict):
            return handler(data)
        known = {variant.model_fields["kind"].default: variant for variant in _leaves(cls)}
        kind = data.get("kind")
        if kind not in known:
            raise ValueError(f"unknown kind {kind!r}{nearest(str(kind), known)}; known: {', '.join(sorted(known))}")
        variant: Self = known[kind].model_validate(data)
        return variant


def nearest(name: str, known: Any) -> str:
    """``", did you mean 'x'?"`` for the closest of ``known``, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {matches[0]!r}" if matches else ""


def _leaves(cls: type[Variant]) -> list[Any]:
    return [leaf for sub in cls.__subclasses__() for leaf in (_leaves(sub) or [sub])]
