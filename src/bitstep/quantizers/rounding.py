"""AdaRound (arXiv 2004.10568): each weight learns whether it is rounded down or up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitstep.numerics import uniform
from bitstep.numerics.packing import QuantizedWeight
from bitstep.quantizers.weights import WeightQuantizer, WeightSource

_LOW, _HIGH = -0.1, 1.1
"""The ends of the stretched sigmoid: beyond 0 and 1, so that both are reached."""


class AdaRoundWeight(WeightQuantizer):
    """Symmetric uniform codes, ``q = clip(floor(w / s) + h + N/2, 0, N - 1)`` with a learned h per weight.

    h is 0 or 1. While :func:`relaxed`, it is the rectified sigmoid ``clip(1.2 sigmoid(v) - 0.1, 0, 1)`` of the trained
    ``rounding`` v, which starts where ``s (floor(w / s) + h)`` is the weight itself. Weight and scale stay as they are.
    """

    ROLES: ClassVar = {"rounding": "rounding"}

    def __init__(self, source: WeightSource, bits: int, *, method: uniform.RangeMethod = "mse") -> None:
        super().__init__()
        self.source, self.bits, self.is_relaxed = source.requires_grad_(False), bits, False
        with torch.no_grad():
            weight = source().flatten(1)
            scale, zero_point = uniform.search_range(weight, bits, symmetric=True, method=method)
            above = weight * scale.reciprocal()[:, None]  # as codes are made, or some would start a step too low
            above = (above - above.floor()).clamp(1e-3, 1 - 1e-3)
            self.rounding = nn.Parameter(((above - _LOW) / (_HIGH - _LOW)).logit())
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def up(self) -> Tensor:
        """h, ``[out, n]``, differentiable."""
        return (self.rounding.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def fake(self) -> Tensor:
        weight = self.source()
        if not self.is_relaxed:
            return self.codes().dequantize()
        zero_point = self.get_buffer("zero_point")[:, None]
        codes = (self._floor(weight) + self.up() + zero_point).clamp(0, uniform.levels(self.bits) - 1)
        return ((codes - zero_point) * self.get_buffer("scale")[:, None]).view_as(weight)

    @torch.no_grad()
    def codes(self) -> QuantizedWeight:
        weight, zero_point = self.source(), self.get_buffer("zero_point")
        codes = self._floor(weight) + (self.up() >= 0.5) + zero_point[:, None]
        return QuantizedWeight(
            codes=codes.clamp(0, uniform.levels(self.bits) - 1).to(torch.uint8)[None],
            scale=self.get_buffer("scale")[None],
            zero_point=zero_point.to(torch.uint8),
            bits=self.bits,
            shape=tuple(weight.shape),
        )

    def step_size(self) -> Tensor:
        return self.get_buffer("scale").mean()

    def _floor(self, weight: Tensor) -> Tensor:
        return (weight.flatten(1) * self.get_buffer("scale").reciprocal()[:, None]).floor()


@contextmanager
def relaxed(quantizers: Iterable[AdaRoundWeight]) -> Iterator[None]:
    """Round softly in forward passes under this context manager."""
    quantizers = list(quantizers)
    for quantizer in quantizers:
        quantizer.is_relaxed = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.is_relaxed = False


def rounding_penalty(up: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2 h - 1| ** beta)``: 0 once every h is 0 or 1; the smaller beta, the harder it presses."""
    return (1 - (2 * up - 1).abs().pow(beta)).sum()
