"""Packed attention: the operands of scaled dot-product attention rounded as in training, in reference arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitstep.attention import OPERANDS, intercept
from bitstep.numerics.uniform import fake_quantize
from bitstep.steps import StepCursor, interpolate, interpolate_scale, per_sample


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

    cursor: the model's; None where all tables are static.
    """

    NAME: ClassVar = "attention_operands"  # its name in the module that computes the attention

    def __init__(self, attention_format: AttentionFormat, cursor: StepCursor | None) -> None:
        super().__init__()
        self.format, self.cursor = attention_format, cursor
        for operand in OPERANDS:
            self.register_buffer(f"{operand}_scale", torch.empty(attention_format.steps))
            self.register_buffer(f"{operand}_zero_point", torch.empty(attention_format.steps, dtype=torch.uint8))

    def attach(self, site: nn.Module) -> None:
        """Become a part of ``site`` and round the operands of the attention that it computes."""
        site.add_module(self.NAME, self)
        intercept(site, self)

    def forward(self, operand: str, x: Tensor) -> Tensor:
        """Computes in float32 and returns the dtype of ``x``."""
        scale, zero_point = self.get_buffer(f"{operand}_scale"), self.get_buffer(f"{operand}_zero_point").float()
        if self.format.steps > 1:
            assert self.cursor is not None
            position = self.cursor.position.to(x.device)
            scale = interpolate_scale(scale, position)
            zero_point = interpolate(zero_point, position).round()
        bits = self.format.bits_of(operand)
        return fake_quantize(x.float(), per_sample(scale, x), per_sample(zero_point, x), bits).to(x.dtype)
