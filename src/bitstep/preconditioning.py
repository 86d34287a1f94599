"""Output preconditioning: what a quantized denoiser says, weighed against the noisy sample that it was asked about.

    y[t] = c_out[t] * f_q(x_t, t) + c_skip[t] * x_t

At high noise a denoiser returns nearly the sample it was given, and the picture lies in the small difference, which the
rounding of everything on the way drowns: at the first steps of the bundled model a W4A4 network errs by as much as that
difference. But the sample itself is at hand without rounding errors. Where c_out falls below 1, that much less of them
is left. The two numbers per timestep are fitted to the full-precision output in closed form; what they cost is one
multiply-add per value. Karras et al. (EDM, arXiv 2206.00364) train with this form; here it is fitted to a
model that was trained without it, whatever it predicts (noise, sample, velocity).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitstep.steps import StepCursor, interpolate, per_sample

NAME = "preconditioning"


class Preconditioning(nn.Module):
    """The tables ``out`` and ``skip``, float32 ``[T]``, one row per key of the cursor's grid; linear between keys.

    Where output and sample differ in channels (a learned variance, a mask), the first channels that both have are
    meant. Starts as the identity.
    """

    out: Tensor
    skip: Tensor

    def __init__(self, cursor: StepCursor) -> None:
        super().__init__()
        self.cursor = cursor
        self.register_buffer("out", torch.ones(len(cursor.grid)))
        self.register_buffer("skip", torch.zeros(len(cursor.grid)))
        self._sample = ""

    def attach(self, denoiser: nn.Module) -> None:
        """Become a part of ``denoiser`` and change what its forward passes return. Attach the cursor afterwards."""
        self._sample = next(iter(inspect.signature(denoiser.forward).parameters))
        denoiser.add_module(NAME, self)
        denoiser.register_forward_hook(self._called, with_kwargs=True)

    def sample(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The noisy sample among the arguments of the denoiser: its first."""
        found: Tensor = kwargs[self._sample] if self._sample in kwargs else args[0]
        return found

    @staticmethod
    def shared(output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """The parts of the two that belong together: the channels of the one with fewer."""
        axis = 2 if output.ndim == 3 else 1  # tokens have their channels last
        channels = min(output.shape[axis], sample.shape[axis])
        return output.narrow(axis, 0, channels), sample.narrow(axis, 0, channels)

    def _called(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        output = result if isinstance(result, Tensor) else result[0]
        output, sample = self.shared(output, self.sample(args, kwargs))
        position = self.cursor.position
        out, skip = (per_sample(interpolate(table, position), output) for table in (self.out, self.skip))
        output.mul_(out).add_((skip * sample).to(output.dtype))


def fit(output: Tensor, sample: Tensor, target: Tensor, averaged: float) -> tuple[float, float]:
    """``(c_out, c_skip)`` that bring ``c_out * output + c_skip * sample`` to ``target``; shapes are alike.

    Least squares weigh the network's signal S against its noise N as one step sees them, c_out = S / (S + N): what is
    lost of the signal is as bad as noise. But it is lost at every step in the same direction, while noise is another at
    every step and averages out. With ``averaged`` steps taken together, c_out = S / (S + N / averaged).
    """
    known = torch.stack([output.flatten(), sample.flatten()]).double()
    gram, moment = known @ known.T, known @ target.flatten().double()
    # the pseudo-inverse takes the shortest solution where the two are proportional, as all zeros are
    out = float((torch.linalg.pinv(gram, hermitian=True) @ moment)[0])
    if 0 < out < 1:
        out = 1 / (1 + (1 / out - 1) / averaged)
    skip = float((moment[1] - out * gram[0, 1]) / gram[1, 1].clamp(min=1e-30))
    return out, skip
