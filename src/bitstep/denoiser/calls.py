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

from bitstep.denoiser.steps import TIMESTEP_NAMES, of_samples
from bitstep.errors import BitstepError


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
    """The denoiser's output tensor for ``call``, whether it returns a tensor, a tuple or an output object."""
    return first_tensor(denoiser(**call.arguments))


def first_tensor(output: Any) -> Tensor:
    """The tensor that a denoiser returned, as it is or first in a tuple or an output object."""
    tensor = output if isinstance(output, Tensor) else output[0]
    if not isinstance(tensor, Tensor):
        raise BitstepError(
            f"expected a denoiser that returns a tensor, got a {type(tensor).__name__}: those that take and return one "
            "tensor a sample cannot be quantized"
        )
    return tensor


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


def timestep_name(arguments: Mapping[str, Any]) -> str:
    """Which of a denoiser's arguments is its timestep."""
    name = next((name for name in TIMESTEP_NAMES if name in arguments), None)
    if name is None:
        raise BitstepError(f"the denoiser is called without an argument named {' or '.join(TIMESTEP_NAMES)}")
    return name


def take_apart(value: Any, name: str, leaves: dict[str, Tensor]) -> Any:
    """``value`` as JSON, tensors replaced by their names and collected in ``leaves``."""
    if isinstance(value, Tensor):
        leaves[name] = value
        return {"tensor": name}
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
