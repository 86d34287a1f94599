"""Attention with its operands in reach: scaled dot-product attention, intercepted in the modules that compute it.

Whatever a module is called, it computes attention by torch's ``scaled_dot_product_attention``. :func:`intercept`
replaces that call, in one module and while it runs: by :func:`attend`, which hands each operand to a function that
may observe or quantize it, or by a kernel for attention of quantized operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

OPERANDS = ("query", "key", "value", "probability")

Transform = Callable[[str, Tensor], Tensor]
"""``transform(operand, tensor) -> tensor`` for each of :data:`OPERANDS`: ``[batch, heads, tokens, width]``, and
``[batch, heads, queries, keys]`` for the probabilities that softmax returns."""


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
    """``scaled_dot_product_attention`` of transformed operands, as plain matrix products."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    query, key, value = transform("query", query), transform("key", key), transform("value", value)
    logits = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    probability = torch.dropout(logits.softmax(-1), dropout_p, train=dropout_p > 0)
    return transform("probability", probability) @ value


def intercept(module: nn.Module, instead: Callable[..., Tensor]) -> tuple[RemovableHandle, RemovableHandle]:
    """Let ``instead`` stand for ``scaled_dot_product_attention`` under ``module``'s forward; the handles undo it.

    It takes the same arguments. A part of ``module`` in it is copied with the module.
    """
    interception = Interception(instead)
    return (
        module.register_forward_pre_hook(interception.begin),
        module.register_forward_hook(interception.end, always_call=True),
    )


class Interception(TorchFunctionMode):
    """The owner of the two hooks that :func:`intercept` registers."""

    def __init__(self, instead: Callable[..., Tensor]) -> None:
        super().__init__()
        self.instead = instead

    def begin(self, *_: Any) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self, *_: Any) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is nn.functional.scaled_dot_product_attention:
            return self.instead(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))
