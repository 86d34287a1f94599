"""Where the channels of a tensor come from: a norm or a layer before, from which on they can be scaled alike.

    f(x / s) = f(x) / s   by channel

for another shape of x, its product with another tensor, its dropout, and the average of values over tokens that
attention takes. So dividing what the norm or layer returns is dividing what the layer at the end of such f is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from bitstep.denoiser.attention import given_operands
from bitstep.denoiser.layers import channel_axis, input_of
from bitstep.randomness import generator


@dataclass(frozen=True)
class Origin:
    """Channels ``start`` to ``stop`` of what ``module``, an affine norm or a layer, returns: rows of its parameters.

    attention: the module whose attention averages them, as its values, on their way; else None
    """

    module: str
    start: int
    stop: int
    attention: str | None = None


class Origins:
    """Follows channels through one forward pass of a denoiser, function by function."""

    def __init__(self) -> None:
        self._of = WeakTensorKeyDictionary()
        self._returned: Counter[str] = Counter()
        self._reads: dict[str, set[tuple[int, int, str]]] = {}  # of a module's channels: by whom
        self._given: dict[str, list[Origin | None]] = {}  # of every layer's runs

    def returned(self, name: str, channels: int, output: Any) -> None:
        """The norm or layer ``name`` returned ``output``."""
        self._returned[name] += 1
        if isinstance(output, Tensor):
            self._of[output] = Origin(name, 0, channels)

    def given(self, layer: str, x: Tensor, axis: int) -> None:
        """A layer runs on ``x``, channels along ``axis``."""
        origin = self._of.get(x)
        whole = origin is not None and origin.stop - origin.start == x.shape[axis]
        self._given.setdefault(layer, []).append(origin if whole else None)

    def follow(self, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], result: Any, by: str) -> None:
        """``function``, called in the module ``by``, returned ``result``."""
        known = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x in self._of]
        if not known or (function.__name__ == "__get__" and not isinstance(result, Tensor)):  # shape, dtype, device
            return
        passed, parts, dim = _continued(function, args, kwargs, result, known)
        for x in known:
            origin = self._of[x]
            if x is not passed:
                self._reads.setdefault(origin.module, set()).add((origin.start, origin.stop, by))
                continue
            if function is nn.functional.scaled_dot_product_attention:
                origin = replace(origin, attention=by)
            stops = [origin.stop]
            if len(parts) > 1:
                stops = list(accumulate((part.shape[dim] for part in parts), initial=origin.start))[1:]
            for part, start, stop in zip(parts, [origin.start, *stops], stops, strict=False):
                self._of[part] = replace(origin, start=start, stop=stop)

    def found(self) -> dict[str, Origin]:
        """The origin of every layer that has one, which nothing but such layers reads, once each."""
        origins = {
            layer: given[0]
            for layer, given in self._given.items()
            if len(given) == 1 and given[0] is not None and self._returned[given[0].module] == 1
        }

        def alone(origin: Origin) -> bool:
            reads = self._reads.get(origin.module, set())
            overlapping = (by for start, stop, by in reads if start < origin.stop and origin.start < stop)
            return all(origins.get(by) == origin for by in overlapping)

        return {layer: origin for layer, origin in origins.items() if alone(origin)}


def _continued(
    function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], result: Any, known: list[Tensor]
) -> tuple[Tensor | None, Sequence[Tensor], int]:
    """The tensor whose channels go on in ``result``, or None; what has them; and the dimension that it was cut along,
    where that is several."""
    dim = int(kwargs.get("dim", args[2] if len(args) > 2 else 0)) if function in _CHUNKING else 0
    if function in _CHUNKING and sum(part.shape[dim] for part in result) == known[0].shape[dim]:
        return known[0], result, dim
    if function in _RESHAPING or (function in _PRODUCTS and len(known) == 1 and known[0].shape == result.shape):
        return known[0], [result], 0
    if function is nn.functional.scaled_dot_product_attention:
        _, _, value = given_operands(args, kwargs)
        # heads that are not in the batch, and not shared by several of the query
        if value.ndim == 4 and value.shape[1] == result.shape[1]:
            return value, [result], 0
    return None, (), 0


_RESHAPING = (
    *(Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.unflatten, Tensor.squeeze, Tensor.unsqueeze),
    *(Tensor.transpose, Tensor.permute, Tensor.movedim, Tensor.contiguous, Tensor.to, nn.functional.dropout),
)
_CHUNKING = (Tensor.chunk, torch.chunk)
_PRODUCTS = (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul)


@torch.no_grad()
def divide(denoiser: nn.Module, origin: Origin, scale: Tensor) -> None:
    """Divide the channels of ``origin`` by ``scale``, ``[channels]``, in its module's parameters."""
    for parameter in denoiser.get_submodule(origin.module).parameters(recurse=False):
        rows = parameter[origin.start : origin.stop]
        rows.div_(scale.to(rows).reshape(-1, *[1] * (rows.ndim - 1)))


@contextmanager
def scaled(denoiser: nn.Module, origins: Mapping[str, Origin]) -> Iterator[None]:
    """Meanwhile the channels of all ``origins`` are divided by random scales, and what their layers read multiplied."""

    def scale(origin: Origin) -> Tensor:
        random = generator(0, f"origin.{origin.module}", origin.start)
        return torch.exp2(4 * torch.rand(origin.stop - origin.start, generator=random) - 2)

    def multiplied(origin: Origin, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Any:
        axis = channel_axis(layer)
        x = input_of(args, kwargs).movedim(axis, -1)
        return ((x * scale(origin).to(x)).movedim(-1, axis),), {}

    with ExitStack() as stack:
        for origin in {replace(origin, attention=None) for origin in origins.values()}:
            for parameter in denoiser.get_submodule(origin.module).parameters(recurse=False):
                stack.callback(setattr, parameter, "data", parameter.data)
                parameter.data = parameter.data.clone()
            divide(denoiser, origin, scale(origin))
        for layer, origin in origins.items():
            hook = partial(multiplied, origin)
            handle = denoiser.get_submodule(layer).register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield
