"""Scales that move between a layer's input and its weight, so that what is hard to round is shared better.

Y = (X / s) (s W),   s positive, per input channel
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from bitstep.methods.base import Rewrite
from bitstep.numerics.dilation import dilation, range_aware


class SplitConcatenation(Rewrite):
    """Split quantizers (Q-Diffusion, arXiv 2302.04304) for an input concatenated of tensors with different ranges.

    The parts are brought to the range of the narrowest, so that each is rounded with a step size of its own, and the
    integer product stays one; the weights that read them are stretched by as much, and share theirs.
    """

    kind: Literal["split-concatenation"] = "split-concatenation"

    def scale(self, weight: Tensor, groups: int, channel_range: Tensor, parts: tuple[int, ...]) -> Tensor:
        if len(parts) < 2:
            return torch.ones_like(channel_range)
        ranges = torch.stack([part.max() for part in channel_range.split(list(parts))])
        ranges = torch.where(ranges > 0, ranges, ranges.max().clamp(min=1e-12))
        return (ranges / ranges.min()).repeat_interleave(torch.tensor(parts))


class Smoothing(Rewrite):
    """SmoothQuant (arXiv 2211.10438): ``s = range(x)**strength / range(w)**(1 - strength)`` per input channel.

    Channels of the input come closer to one range, those of the weight may drift apart. Ranges count as a thousandth
    of the largest at least. Grouped convolutions, whose groups have ranges of their own, are left as they are.
    """

    kind: Literal["smoothing"] = "smoothing"
    strength: Annotated[float, Field(ge=0, le=1)] = 0.35

    def scale(self, weight: Tensor, groups: int, channel_range: Tensor, parts: tuple[int, ...]) -> Tensor:
        if groups > 1:
            return torch.ones_like(channel_range)
        weight_range = weight.movedim(1, 0).flatten(1).abs().amax(1)
        scale = _floored(channel_range) ** self.strength / _floored(weight_range) ** (1 - self.strength)
        return scale / scale.min()


class Dilation(Rewrite):
    """Weight dilation (DilateQuant, arXiv 2409.14307) by the paper's rule.

    symmetric: keep only the larger end of every weight's range, on which alone symmetric weights' steps depend
    range_aware: stretch no channel further than the range of the input can follow
    """

    kind: Literal["dilation"] = "dilation"
    symmetric: bool = False
    range_aware: bool = False

    def scale(self, weight: Tensor, groups: int, channel_range: Tensor, parts: tuple[int, ...]) -> Tensor:
        scale = dilation(weight, groups, self.symmetric)
        return range_aware(scale, channel_range) if self.range_aware else scale


def _floored(ranges: Tensor) -> Tensor:
    return ranges.clamp(min=max(1e-3 * float(ranges.max()), 1e-12))
