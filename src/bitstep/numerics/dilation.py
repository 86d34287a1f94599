"""Weight dilation: input channels that do not set the weight range are stretched until they do (arXiv 2409.14307).

    Y = (X / s) (s W),   s >= 1 per input channel

Every output channel keeps its largest and smallest weight, hence the step size that covers both, while the weights
below them use more of the grid and the input they meet shrinks. The step of symmetric weights depends on the larger of
the two alone, so that more channels can be stretched, and further. (A step that is searched for may move a little, as
the weights between have.) The variance of the rounding error of one output is

    d_x'^2 / 12 * sum_k s_k^2 |W_k|^2  +  sum_k d_w^2 / 12 * E[x_k^2] / s_k^2

The second term always falls. The first rises when a channel that cannot be stretched sets the range of x, and with it
the step d_x': :func:`range_aware` therefore stretches no further than the range of x can follow.
"""

from __future__ import annotations

import torch
from torch import Tensor

CAP = 16.0
"""The most a channel is stretched: one with hardly any weight would otherwise be shrunk to nothing."""


def dilation(weight: Tensor, groups: int = 1, symmetric: bool = False) -> Tensor:
    """The largest s, float32 ``[in]``, 1 <= s <= ``CAP``, that widens the range of no output channel of ``weight``.

    weight: ``[out, in / groups, *kernel]``. With hi_o and lo_o the largest and the smallest weight of output channel o,
    or, if ``symmetric``, its largest magnitude and the negative of that,

        s_k = min over o and the kernel of  hi_o / w  where w > 0,  lo_o / w  where w < 0
    """
    w = weight.detach().float().reshape(groups, len(weight) // groups, weight.shape[1], -1)
    high, low = w.amax((2, 3), keepdim=True), w.amin((2, 3), keepdim=True)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    room = torch.where(w > 0, high / w, low / w)
    return room.masked_fill_(w == 0, torch.inf).amin((1, 3)).flatten().clamp(1, CAP)


def range_aware(scale: Tensor, channel_range: Tensor) -> Tensor:
    """``scale`` ``[in]``, reduced in the channels where that leaves the range of x / s as small as it can get.

    channel_range: largest magnitude of every input channel, ``[in]``.
    """
    reachable = (channel_range / scale).max().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.minimum((channel_range / reachable).clamp(min=1), scale)


def stretched(weight: Tensor, scale: Tensor, groups: int = 1) -> Tensor:
    """``weight`` ``[out, in / groups, *kernel]`` times ``scale`` ``[in]`` along its input channels."""
    per_group = scale.to(weight.device).reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * per_group).flatten(0, 1)
