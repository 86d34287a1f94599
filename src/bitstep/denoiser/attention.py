"""Attention with its operands in reach: scaled dot-product attention, intercepted in the modules that compute it.

Whatever a module is called, it computes attention by torch's ``scaled_dot_product_attention``. :func:`intercept`
replaces that call, in one module and while it runs: by :func:`attend`, which hands each operand to a function that
may observe or quantize it, or by a kernel for attention of quantized operands.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

OPERANDS = ("query", "key", "value", "probability")

MAX_PROBABILITIES = 2**27
"""Probabilities that :func:`attend` computes at a time without gradients, half a gigabyte in float32."""

Transform = Callable[[str, Tensor], Tensor]
"""``transform(operand, tensor) -> tensor`` for each of :data:`OPERANDS`: ``[batch, heads, tokens, width]``, and
``[batch, heads, queries, keys]`` for the probabilities that softmax returns."""


def given_operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value among the arguments of ``scaled_dot_product_attention``."""
    query, key, value = (*args[:3], *(kwargs[name] for name in OPERANDS[len(args) : 3]))
    return query, key, value


def attend(
    transform: Transform,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` of transformed operands, as plain matrix products.

    Without gradients it goes by a few heads at a time, one at least, where those of all would be more than
    ``MAX_PROBABILITIES``; ``transform`` then meets them in pieces ``[batch, some heads, queries, keys]``.
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    query, key, value = transform("query", query), transform("key", key), transform("value", value)

    compute = partial(_attend, transform, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
    heads = query.shape[1] if query.ndim == 4 else 1
    probabilities = query[..., 0].numel() * key.shape[-2]
    together = heads if torch.is_grad_enabled() else max(1, heads * MAX_PROBABILITIES // max(probabilities, 1))
    if together >= heads:
        return compute(query, key, value, attn_mask)
    masks: Iterable[Tensor | None] = repeat(None)
    if attn_mask is not None:
        masks = attn_mask.expand(*query.shape[:-1], key.shape[-2]).split(together, 1)
    queries, keys, values = (operand.split(together, 1) for operand in (query, key, value))
    return torch.cat([compute(*piece) for piece in zip(queries, keys, values, masks, strict=False)], 1)


def _attend(
    transform: Transform,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    # scaled before the product, which half precision might not hold
    logits = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    probability = torch.dropout(logits.softmax(-1), dropout_p, train=dropout_p > 0)
    return transform("probability", probability) @ value


def intercept(module: nn.Module, instead: Callable[..., Tensor]) -> Interception:
    """Let ``instead`` stand for ``scaled_dot_product_attention`` under ``module``'s forward, until it is removed.

    It takes the same arguments. A part of ``module`` in it is copied with the module. A warning says where ``module``
    computes a softmax of its own, as some attention processors of diffusers do.
    """
    interception = Interception(module, instead)
    module.forward = interception
    return interception


class Interception:
    """Stands in for ``module``'s forward method: hooks around it would not run after an interrupt, and leave the mode
    to whatever is computed next."""

    def __init__(self, module: nn.Module, instead: Callable[..., Tensor]) -> None:
        self.module, self.instead = module, instead
        self.replaced = vars(module).get("forward")  # accelerate's, say

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Mode(self.instead):
            return self._forward(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._forward)

    @property
    def _forward(self) -> Callable[..., Any]:
        return self.replaced or partial(type(self.module).forward, self.module)

    def remove(self) -> None:
        """Give ``module`` its own forward method back."""
        del self.module.forward
        if self.replaced is not None:
            self.module.forward = self.replaced


class _Mode(TorchFunctionMode):
    def __init__(self, instead: Callable[..., Tensor]) -> None:
        super().__init__()
        self.instead = instead

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is nn.functional.scaled_dot_product_attention:
            return self.instead(*args, **(kwargs or {}))
        if function in _SOFTMAX:
            warnings.warn(
                "attention is computed without scaled_dot_product_attention, so its operands are not quantized: "
                "leave attention slicing and other attention processors out",
                stacklevel=2,
            )
        return function(*args, **(kwargs or {}))


_SOFTMAX = (torch.softmax, Tensor.softmax, nn.functional.softmax)
