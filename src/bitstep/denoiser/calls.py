"""One denoiser call: its arguments, taken apart into tensors and the rest, and put together again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitstep.denoiser.steps import of_samples, timestep_name
from bitstep.errors import BitstepError


class Samples(list[Tensor]):
    """An argument that is a list of one tensor a sample, all of one shape; a :class:`Call` knows it as one tensor."""


@dataclass(frozen=True)
class Call:
    """The arguments of one denoiser forward, by name: tensors inside dicts, lists and tuples, and plain values."""

    arguments: Mapping[str, Any]

    @property
    def timestep(self) -> Tensor:
        """One timestep per row of the batch, ``[batch]``."""
        return of_samples(self.arguments[timestep_name(self.arguments)])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor among the arguments, by its dotted path."""
        leaves: dict[str, Tensor] = {}
        take_apart(dict(self.arguments), "call", leaves)
        return leaves

    def to(self, device: torch.device | str) -> Call:
        """The same call with every tensor on ``device``."""
        return self.map(lambda _, tensor: tensor.to(device))

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Call:
        """The same call with every tensor replaced by ``function(name, tensor)``; names are dotted paths."""
        leaves: dict[str, Tensor] = {}
        skeleton = take_apart(dict(self.arguments), "call", leaves)
        return Call(put_together(skeleton, {name: function(name, tensor) for name, tensor in leaves.items()}))


def run(denoiser: nn.Module, call: Call) -> Tensor:
    """The denoiser's output for ``call`` as one tensor; see :func:`first_tensor`."""
    arguments = {name: list(value) if isinstance(value, Samples) else value for name, value in call.arguments.items()}
    return first_tensor(denoiser(**arguments))


def first_tensor(output: Any) -> Tensor:
    """What a denoiser returned, as it is or first in a tuple or an output object; see :func:`stacked`."""
    return stacked(unwrapped(output))


def unwrapped(output: Any) -> Any:
    """What a denoiser returned besides its wrapping: a tensor, or a list of one tensor a sample (as Z-Image's does)."""
    return output if isinstance(output, Tensor) else output[0]


def has_one_a_sample(value: Any) -> bool:
    """Whether ``value`` is a list of one tensor a sample."""
    return isinstance(value, list) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value)


def stacked(value: Tensor | list[Tensor]) -> Tensor:
    """A tensor as it is; of a list of one tensor a sample a copy, ``[batch, ...]``."""
    if isinstance(value, Tensor):
        return value
    if has_one_a_sample(value):
        return torch.stack(value)
    raise BitstepError(f"expected a denoiser that returns a tensor, or a list of tensors, got a {type(value).__name__}")


def by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``forward``, a denoiser's forward, by their names."""
    return dict(zip(inspect.signature(forward).parameters, args, strict=False)) | dict(kwargs)


def timestep_of(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The timestep in the arguments of a call of ``forward``, a denoiser's forward."""
    arguments = by_name(forward, args, kwargs)
    return of_samples(torch.as_tensor(arguments[timestep_name(arguments)]))


def sample_name(denoiser: nn.Module) -> str:
    """Which of a denoiser's arguments is the noisy sample: its first."""
    return next(iter(inspect.signature(denoiser.forward).parameters))


def take_apart(value: Any, name: str, leaves: dict[str, Tensor]) -> Any:
    """``value`` as JSON, tensors replaced by their names and collected in ``leaves``."""
    if isinstance(value, Tensor):
        leaves[name] = value
        return {"tensor": name}
    if isinstance(value, Samples):
        leaves[name] = stacked(value)
        return {"samples": name}
    if isinstance(value, Mapping):
        return {"dict": {key: take_apart(item, f"{name}.{key}", leaves) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [take_apart(item, f"{name}.{i}", leaves) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise BitstepError(f"cannot record the denoiser's argument {name}: a {type(value).__name__} is no tensor or value")


def put_together(skeleton: Any, leaves: Mapping[str, Tensor]) -> Any:
    """Inverse of :func:`take_apart`."""
    ((kind, content),) = skeleton.items()
    match kind:
        case "tensor":
            return leaves[content]
        case "samples":
            return Samples(leaves[content].unbind())
        case "dict":
            return {key: put_together(item, leaves) for key, item in content.items()}
        case "list":
            return [put_together(item, leaves) for item in content]
        case "tuple":
            return tuple(put_together(item, leaves) for item in content)
        case _:
            return content


@contextmanager
def wrapped(owner: Any, method: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace ``owner.method`` by ``wrap(owner.method)`` for a while; its signature stays visible."""
    original, own = getattr(owner, method), method in vars(owner)
    setattr(owner, method, functools.wraps(original)(wrap(original)))
    try:
        yield
    finally:
        if own:
            setattr(owner, method, original)
        else:
            delattr(owner, method)
