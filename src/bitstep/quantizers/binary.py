"""The binary weight quantizer: one or two learned sign bases over any weight source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitstep.numerics import binary
from bitstep.numerics.packing import QuantizedWeight
from bitstep.quantizers.weights import WeightQuantizer, WeightSource

_LOG_NOTHING = -1e4
"""The logarithm of a scale that underflows to zero in any format, yet can be averaged, saved and stepped on."""


class BinaryWeight(WeightQuantizer):
    """One bit a weight and basis: :func:`bitstep.numerics.binary.binarize`, scales per output channel.

    The scales ``[bases, out]`` are learned as logarithms: positive, and one learning rate serves layers of every
    magnitude.
    """

    def __init__(self, source: WeightSource, bases: int) -> None:
        super().__init__()
        self.source = source
        with torch.no_grad():
            self.log_scale = nn.Parameter(binary.initial_scale(source().flatten(1), bases).log())

    def fake(self) -> Tensor:
        weight = self.source()
        return binary.binarize(weight.flatten(1), self.log_scale.exp()).view_as(weight)

    @torch.no_grad()
    def codes(self) -> QuantizedWeight:
        """The signs and scales; a second basis that was dropped leaves nothing behind."""
        weight, scale = self.source(), self.log_scale.exp()
        if not scale[1:].any():
            scale = scale[:1]
        planes = binary.codes(weight.flatten(1), scale)
        return QuantizedWeight(planes, scale, zero_point=None, bits=1, shape=tuple(weight.shape))

    def step_size(self) -> Tensor:
        scale = self.log_scale.detach().exp()
        neighbours: int = 2 ** len(scale) - 1
        return 2 * scale.sum(0).mean() / neighbours

    def second_scale(self) -> Tensor:
        """Scales of the second basis, ``[1, out]``, or ``[0, out]`` with one basis only."""
        second: Tensor = self.log_scale[1:]
        return second.exp()

    @torch.no_grad()
    def drop_second_basis(self) -> None:
        """Set the scales of the second basis to zero for good: their gradient vanishes with them."""
        self.log_scale[1:] = _LOG_NOTHING
