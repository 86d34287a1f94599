"""Weight quantizers: a float weight from a source, and the codes it rounds to.

Sources say what floating-point weight is trained (:class:`DenseWeight`, :class:`MergedLoRA`); quantizers say how it
becomes codes (:class:`UniformWeight`). Any source goes with any quantizer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitstep.numerics import uniform
from bitstep.numerics.lowrank import merged_delta
from bitstep.numerics.packing import QuantizedWeight


class WeightSource(nn.Module, ABC):
    """The floating-point weight behind a quantizer; calling it gives ``[out, in, *kernel]``.

    ROLES: here and in every quantizer, the role of each trained parameter (a field of
        :class:`bitstep.methods.base.LearningRates`), by name
    """

    ROLES: ClassVar[Mapping[str, str]]
    weight: Tensor

    @abstractmethod
    def forward(self) -> Tensor: ...


class DenseWeight(WeightSource):
    """The weight itself, every entry trained."""

    ROLES: ClassVar = {"weight": "weight"}

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self) -> Tensor:
        return self.weight


class MergedLoRA(WeightSource):
    """A frozen weight plus a trained low-rank delta, merged *before* quantization (EfficientDM, arXiv 2310.03270).

    ``W = W0 + up @ down``; both factors see the quantizer's rounding, and nothing of them is left at inference.
    (peft's ``use_qalora`` is another thing: QA-LoRA, arXiv 2309.14717, pools the adapter's input by quantization group
    so that the delta can be absorbed in the zero points.) There is no alpha/rank factor. ``down`` starts
    Kaiming-uniform, drawn on the CPU, and ``up`` zero, so that training starts from W0.
    """

    ROLES: ClassVar = {"down": "adapter", "up": "adapter"}

    def __init__(self, weight: Tensor, rank: int, random: torch.Generator) -> None:
        super().__init__()
        weight = weight.detach()
        rank = min(rank, len(weight), weight[0].numel())
        self.register_buffer("weight", weight.clone())
        start = nn.init.kaiming_uniform_(torch.empty(rank, *weight.shape[1:]), a=math.sqrt(5), generator=random)
        self.down = nn.Parameter(start.to(weight))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))

    def forward(self) -> Tensor:
        return self.weight + merged_delta(self.down, self.up)


class WeightQuantizer(nn.Module, ABC):
    """Turns a source's weight into codes. ``fake()`` equals ``codes().dequantize()`` bit for bit.

    A warm-up sets ``enabled`` to False for a while; the layer then uses the source's weight as it is.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"log_scale": "weight_scale", "zero_point": "weight_zero_point"}
    source: WeightSource
    enabled = True

    @abstractmethod
    def fake(self) -> Tensor:
        """The quantized weight in floating point, ``[out, in, *kernel]``, differentiable."""

    @abstractmethod
    def codes(self) -> QuantizedWeight:
        """The quantized weight as codes."""

    @abstractmethod
    def step_size(self) -> Tensor:
        """The mean distance between neighbouring levels, a scalar: the unit of scale-aware learning rates."""


class UniformWeight(WeightQuantizer):
    """Uniform b-bit codes with one learned scale per output channel, symmetric or with a learned zero point.

    The scale is learned as its logarithm, which keeps it positive and lets one learning rate serve layers of every
    magnitude; zero points only for asymmetric weights.
    """

    def __init__(
        self, source: WeightSource, bits: int, *, symmetric: bool = True, method: uniform.RangeMethod = "mse"
    ) -> None:
        super().__init__()
        self.source, self.bits, self.symmetric = source, bits, symmetric
        with torch.no_grad():
            scale, zero_point = uniform.search_range(source().flatten(1), bits, symmetric=symmetric, method=method)
        self.log_scale = nn.Parameter(scale.log())
        if symmetric:
            self.register_buffer("zero_point", zero_point)
        else:
            self.zero_point = nn.Parameter(zero_point)

    def fake(self) -> Tensor:
        weight = self.source()
        scale, zero_point = self._parameters_per_row()
        return uniform.fake_quantize(weight.flatten(1), scale, zero_point, self.bits).view_as(weight)

    @torch.no_grad()
    def codes(self) -> QuantizedWeight:
        weight = self.source()
        scale, zero_point = self._parameters_per_row()
        return QuantizedWeight(
            codes=uniform.quantize(weight.flatten(1), scale, zero_point, self.bits)[None],
            scale=scale.T,
            zero_point=zero_point.flatten().to(torch.uint8),
            bits=self.bits,
            shape=tuple(weight.shape),
        )

    def step_size(self) -> Tensor:
        return self.log_scale.detach().exp().mean()

    def _parameters_per_row(self) -> tuple[Tensor, Tensor]:
        zero_point = self.zero_point if self.symmetric else uniform.round_zero_point(self.zero_point, self.bits)
        return self.log_scale.exp()[:, None], zero_point[:, None]
