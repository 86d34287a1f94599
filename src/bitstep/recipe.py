"""Recipes: a method's name or a YAML file, bits, effort and overrides -> one frozen, validated :class:`Recipe`.

A YAML recipe starts from a method (``base:``) and changes slots, or names all of them. It has the last word over the
method's settings for an effort, and may have ``efforts`` of its own:

    base: efficientdm
    weights: {rank: 16}
    layers: {rules: [{match: "*.to_out.0", weight_bits: 8}]}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from bitstep.errors import UsageError
from bitstep.methods import NAMES, method_named
from bitstep.methods.base import Effort, Method
from bitstep.planning import ACTIVATION_WIDTHS, EXPECTED_WIDTHS
from bitstep.slots import Slot, nearest

_WANTED = {
    "tuple_type": "a list",
    "string_type": "text",
    **dict.fromkeys(("dict_type", "model_type"), "settings (key: value)"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
}
"""What a value of another type should have been, in the words of who writes recipes, by pydantic's types of errors."""
_BITS = re.compile(r"W(\d+(?:\.\d+)?)A(\d+)")


class Recipe(BaseModel, frozen=True):
    """All that decides the result, besides the source and the seed."""

    bits: str
    weight_bits: float
    activation_bits: int
    method: Method


def resolve(recipe: str | Path, bits: str, effort: Effort, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a method's name or a YAML file, with the effort's settings and ``slot.key=value`` overrides.

    Raises UsageError naming what is unknown, with the nearest valid name.
    """
    if effort not in get_args(Effort):
        raise UsageError(f"unknown effort {effort!r}: expected one of {', '.join(get_args(Effort))}")
    bits = bits.upper()
    widths = weight_bits, activation_bits = parse_bits(bits)
    from_file = str(recipe).endswith((".yaml", ".yml"))
    asked = (*widths, effort)
    layers = _from_file(Path(recipe), *asked) if from_file else [_from_name(str(recipe), *asked)]
    settings: dict[str, Any] = {}
    for layer in layers:
        settings = _merge(settings, layer)
        for path, value in _settings_of(effort, layer).items():
            _put(settings, path, value)
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f"expected slot.key=value, got {override!r}")
        _put(settings, path.strip(), _value(override, value))
    method = _validate(settings).model_copy(update={"efforts": {}})  # the one that was asked for is in the slots now
    try:
        method.weights.layer_bits(weight_bits)
    except ValueError as error:
        raise UsageError(f"bits {bits!r} do not suit recipe {method.name!r}: {error}") from error
    return Recipe(bits=bits, weight_bits=weight_bits, activation_bits=activation_bits, method=method)


def parse_bits(bits: str) -> tuple[float, int]:
    """``"W4A8"`` -> (4.0, 8). Activations take 2 to 8 bits, or 32 to stay in floating point."""
    match = _BITS.fullmatch(bits)
    if not match:
        raise UsageError(f"bits are written WxAy, such as W4A4; got {bits!r}")
    weight, activation = float(match[1]), int(match[2])
    if activation not in ACTIVATION_WIDTHS:
        raise UsageError(f"{EXPECTED_WIDTHS}; got {bits!r}")
    if not 1 <= weight <= 8:
        raise UsageError(f"weights take 1 to 8 bits; got {bits!r}")
    return weight, activation


def _from_name(name: Any, weight_bits: float, activation_bits: int, effort: Effort) -> dict[str, Any]:
    if not isinstance(name, str) or name not in NAMES:
        raise UsageError(
            f"unknown recipe {name!r}{nearest(str(name), NAMES)}; known: {', '.join(NAMES)}, or a .yaml file"
        )
    settings: dict[str, Any] = method_named(name, weight_bits, activation_bits, effort).model_dump(mode="json")
    return settings


def _from_file(path: Path, weight_bits: float, activation_bits: int, effort: Effort) -> list[dict[str, Any]]:
    """The method that a file starts from, or the slots' defaults, and what the file says."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"recipe {path} is no mapping of slots")
    if "base" in content:
        base = _from_name(content.pop("base"), weight_bits, activation_bits, effort)
    else:
        base = Method(name=path.stem).model_dump(mode="json")
    return [base, {"name": path.stem, **content}]


def _settings_of(effort: Effort, layer: Mapping[str, Any]) -> Mapping[str, Any]:
    efforts = layer.get("efforts") or {}
    settings = (efforts.get(effort) or {}) if isinstance(efforts, Mapping) else None
    if not isinstance(settings, Mapping):
        raise UsageError(f"recipe: efforts: expected {effort}: {{slot.key: value}}, got {efforts!r}")
    return settings


def _merge(base: Any, change: Any) -> Any:
    """Mappings merge key by key, unless the change chooses another kind; anything else is replaced."""
    if not isinstance(base, Mapping) or not isinstance(change, Mapping):
        return change
    if change.get("kind", base.get("kind")) != base.get("kind"):
        return dict(change)
    return {**base, **{key: _merge(base.get(key), value) for key, value in change.items()}}


def _put(settings: Any, path: str, value: Any) -> None:
    """Set ``a.b.0.c`` in nested mappings and sequences; the last key may be new (validation then judges it). Another
    ``kind`` starts from that kind's defaults."""
    *parents, last = path.split(".")
    place = settings
    for key in parents:
        place = _enter(place, key, path)
    if isinstance(place, list):
        _enter(place, last, path)
        place[int(last)] = _merge(place[int(last)], value)
    elif isinstance(place, dict):
        if last == "kind" and place.get(last) != value:
            place.clear()
        place[last] = _merge(place.get(last), value)
    else:
        raise UsageError(f"cannot set {path!r}: {'.'.join(parents)!r} is a single value, without keys")


def _value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"cannot read the value in {override!r}: expected YAML such as 3, true or [a, b]") from error


def _enter(place: Any, key: str, path: str) -> Any:
    if isinstance(place, list):
        if key.isdecimal() and int(key) < len(place):
            return place[int(key)]
        wanted = f"expected a number below {len(place)} in the place of {key!r}" if place else "the list there is empty"
        raise UsageError(f"cannot set {path!r}: {wanted}")
    if not isinstance(place, dict) or key not in place:
        known = place if isinstance(place, dict) else ()
        raise UsageError(f"cannot set {path!r}: unknown slot {key!r}{nearest(key, known)}")
    return place[key]


def _validate(settings: dict[str, Any]) -> Method:
    try:
        return Method.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] or ["slots that do not go together"])
        if first["type"] == "extra_forbidden":
            place, key = _mapping_around(first["loc"], settings), str(first["loc"][-1])
            kind = f" where kind is {place['kind']!r}" if "kind" in place else ""
            known = _fields_of(place)
            guess = nearest(key, known) or (f"; known: {', '.join(known)}" if known else "")
            raise UsageError(f"unknown recipe key {where!r}{kind}{guess}") from error
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] in _WANTED:
            problem = f"expected {_WANTED[first['type']]}, got {first['input']!r}"
        raise UsageError(f"recipe: {where}: {problem}") from error


def _mapping_around(location: tuple[int | str, ...], settings: dict[str, Any]) -> Mapping[str, Any]:
    """The mapping that the last key of ``location`` stands in."""
    place: Any = settings
    for part in location[:-1]:
        place = place[part] if not isinstance(part, str) or part in place else place
    return place  # type: ignore[no-any-return]


def _fields_of(place: Mapping[str, Any]) -> list[str]:
    """The field names of the slot that the mapping is: the one of its kind, or else with the most of its keys."""

    def fit(slot: type[Slot]) -> int:
        fields = slot.model_fields
        if "kind" in place:
            return int("kind" in fields and fields["kind"].default == place["kind"])
        return len(place.keys() & fields.keys())

    slot = max(_all_slots(Slot), key=fit)
    return list(slot.model_fields) if fit(slot) else []


def _all_slots(cls: type[Slot]) -> Iterable[type[Slot]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _all_slots(sub)
