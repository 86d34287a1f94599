"""Attention on the native library, and packed attention: its operands rounded as in training, natively or in torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bitstep.denoiser.attention import OPERANDS, Interception, attend, intercept
from bitstep.denoiser.steps import per_sample
from bitstep.errors import BitstepError
from bitstep.numerics.packing import keeping_dtype
from bitstep.numerics.uniform import rounded
from bitstep.runtime import native
from bitstep.runtime.kernel import refuse_tracing
from bitstep.runtime.tables import StepRows, rows_of


class Operand(NamedTuple):
    """How an operand of attention becomes codes.

    scale, zero_point: contiguous float32 ``[1]`` or ``[batch]``
    """

    scale: Tensor
    zero_point: Tensor
    bits: int

    def step(self) -> native.Step:
        return native.Step(self.scale.data_ptr(), self.zero_point.data_ptr(), len(self.scale), 2**self.bits - 1, None)


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, operands: tuple[Operand, ...] = (), scale: float | None = None
) -> Tensor:
    """``softmax(scale q k^T) v`` per head; contiguous float32 ``[batch, tokens, heads * d]``, scale ``1 / sqrt(d)``.

    ``operands``, of query, key, value and probability, quantizes them: both products are then exact sums of integers.
    Without, it is computed in 16-bit fixed point (steps per row of q, per head of k, per channel of v).
    """
    refuse_tracing()
    batch, _, channels = q.shape
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (batch, channels) or channels % heads:
        raise BitstepError(
            f"attention of {heads} heads got queries {list(q.shape)}, keys {list(k.shape)}, values {list(v.shape)}"
        )
    y = torch.empty_like(q)
    native.run(_attention_call, y, q, k, v, heads, operands, scale)
    return y


def attention_in_torch(q: Tensor, k: Tensor, v: Tensor, heads: int, rounding: PackedAttention | None) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` per head on any device; ``[batch, tokens, heads * d]``."""
    per_head = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if rounding is None:
        mixed = nn.functional.scaled_dot_product_attention(*per_head)
    else:
        with torch._C.DisableTorchFunction():  # what else intercepts this attention
            mixed = rounding(*per_head)
    return mixed.to(q.dtype).transpose(1, 2).flatten(2)  # under autocast it is narrower


def _attention_call(
    y: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, operands: tuple[Operand, ...], scale: float | None
) -> native.Call:
    lib = native.kernels()
    assert lib is not None
    batch, queries, channels = q.shape
    width = channels // heads
    shape = native.AttentionShape(batch, queries, k.shape[1], heads, width, width**-0.5 if scale is None else scale)
    addresses = [tensor.data_ptr() for tensor in (q, k, v, y)]
    if not operands:
        return partial(lib.bitstep_attention, shape, *addresses, torch.get_num_threads())
    steps = (native.Step * len(operands))(*(operand.step() for operand in operands))
    return partial(lib.bitstep_coded_attention, shape, steps, *addresses, torch.get_num_threads())


@dataclass(frozen=True)
class AttentionFormat:
    """How the operands of one module's attention are quantized: query, key and value at ``bits``, the probabilities at
    ``probability_bits``; ``steps`` rows of each table, one per key of the model's step grid, or 1."""

    bits: int
    probability_bits: int
    steps: int

    def bits_of(self, operand: str) -> int:
        return self.probability_bits if operand == "probability" else self.bits


class PackedAttention(nn.Module):
    """The tables of the four operands: float32 ``OPERAND_scale`` and uint8 ``OPERAND_zero_point``, each ``[steps]``.

    ``rows`` selects theirs; static tables need none. ``native``: run on the native library where it can; see
    :func:`bitstep.runtime.dispatch.set_backend`.
    """

    NAME: ClassVar = "attention_operands"  # its name in the module that computes the attention

    def __init__(self, attention_format: AttentionFormat, rows: StepRows | None) -> None:
        super().__init__()
        self.format = attention_format
        self.rows = rows if attention_format.steps > 1 else None
        self.native = False
        for operand in OPERANDS:
            self.register_buffer(f"{operand}_scale", torch.empty(attention_format.steps, dtype=torch.float32))
            self.register_buffer(f"{operand}_zero_point", torch.empty(attention_format.steps, dtype=torch.uint8))
            if self.rows is not None:
                self.rows.tables.append((self, operand))

    def attach(self, site: nn.Module) -> None:
        """Become a part of ``site`` and compute its attention."""
        site.add_module(self.NAME, self)
        intercept(site, self)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``scaled_dot_product_attention`` of operands that are rounded in float32, in the dtype of ``query``.

        The native library computes in float32. It takes ``[batch, heads, tokens, width]``, batch, heads and width alike
        in all three; what has masks, dropout or grouped queries is left to torch.
        """
        plain = attn_mask is None and not (dropout_p or is_causal or enable_gqa) and query.ndim == 4
        alike = key.shape == value.shape == (*query.shape[:-2], key.shape[-2], query.shape[-1])
        if plain and alike and self.native and query.device.type == "cpu" and native.kernels() is not None:
            q, k, v = (x.float().transpose(1, 2).flatten(2).contiguous() for x in (query, key, value))
            mixed = attention(q, k, v, query.shape[1], self.operands(q), scale)
            return mixed.reshape(len(q), -1, *query.shape[1::2]).transpose(1, 2).to(query.dtype)
        return attend(self._round, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def operands(self, x: Tensor) -> tuple[Operand, ...]:
        """How each of the operands is rounded for the batch of ``x``, at the cursor's position."""
        return tuple(self._operand(name, x) for name in OPERANDS)

    def _operand(self, name: str, x: Tensor) -> Operand:
        return Operand(*rows_of((self, name), self.rows, x), self.format.bits_of(name))

    def _round(self, name: str, x: Tensor) -> Tensor:
        scale, zero_point, bits = self._operand(name, x)
        return rounded(x.float(), per_sample(scale, x), per_sample(zero_point, x), bits).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forget()
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _forget(self) -> None:
        if self.rows is not None:
            self.rows.forget()


def is_watched(module: nn.Module) -> bool:
    """Whether ``module`` has hooks, or a forward method in the place of its own (accelerate offloads weights so) other
    than that by which its packed attention is computed."""
    forward = vars(module).get("forward")
    if isinstance(forward, Interception) and isinstance(forward.instead, PackedAttention):
        forward = forward.replaced
    return forward is not None or bool(module._forward_pre_hooks or module._forward_hooks)
