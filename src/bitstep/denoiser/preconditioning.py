"""Output preconditioning: a quantized denoiser's output, corrected with the noisy sample that it was given.

    y[t] = c_out[t] * f_q(x_t, t) + c_skip[t] * x_t

At high noise a denoiser returns nearly the sample it was given. The picture lies in the small difference, which
rounding hides: at the first steps of the bundled model a W4A4 network errs by as much as that difference. But the
sample itself is at hand, without rounding errors. Where c_out falls below 1, so much less of the network's errors is
left, and c_skip puts back what is lost of the sample. The two numbers per timestep are fitted to the full-precision
output in closed form; what they cost is one multiply-add per value. Karras et al. (EDM, arXiv 2206.00364) train with
this form; here it is fitted to a model that was trained without it, whatever it predicts (noise, sample, velocity).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bitstep.denoiser.calls import sample_name, stacked, unwrapped
from bitstep.denoiser.steps import StepCursor, interpolate, per_sample
from bitstep.numerics.packing import keeping_dtype

_TINY = 1e-30


class Preconditioning(nn.Module):
    """The tables ``out`` and ``skip``, float32 ``[T]``, one row per key of the cursor's grid; linear between keys.

    Where output and sample differ in channels (a learned variance, a mask), the first channels that both have are
    meant. Starts as the identity.
    """

    NAME: ClassVar = "preconditioning"  # its name in the denoiser
    out: Tensor
    skip: Tensor

    def __init__(self, cursor: StepCursor) -> None:
        super().__init__()
        self.cursor = cursor
        self.register_buffer("out", torch.ones(len(cursor.grid), dtype=torch.float32))
        self.register_buffer("skip", torch.zeros(len(cursor.grid), dtype=torch.float32))
        self._sample = ""

    def attach(self, denoiser: nn.Module) -> None:
        """Become a part of ``denoiser`` and change what its forward passes return."""
        self._sample = sample_name(denoiser)
        denoiser.add_module(self.NAME, self)
        # first of all hooks: the cursor's own forgets the position
        denoiser.register_forward_hook(self._called, with_kwargs=True, prepend=True)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]

    def _called(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        returned, given = unwrapped(result), kwargs[self._sample] if self._sample in kwargs else args[0]
        whole = stacked(returned)
        output, sample = common_channels(whole, stacked(given))
        position = self.cursor.position.to(output.device)
        out, skip = (per_sample(interpolate(table, position), output) for table in (self.out, self.skip))
        output.mul_(out).add_((skip * sample).to(output.dtype))
        if isinstance(returned, list):
            returned[:] = whole.unbind()


def common_channels(output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of the two that belong together: the channels of the one with fewer."""
    axis = 2 if output.ndim == 3 else 1  # tokens have their channels last
    channels = min(output.shape[axis], sample.shape[axis])
    return output.narrow(axis, 0, channels), sample.narrow(axis, 0, channels)


def inner_products(output: Tensor, sample: Tensor, target: Tensor) -> Tensor:
    """All that :func:`fit` needs to know of the three, of one shape: their inner products, float64 ``[3, 3]``."""
    rows = torch.stack([tensor.flatten().double() for tensor in (output, sample, target)])
    return rows @ rows.T


def fit(products: Tensor, averaged: float) -> tuple[float, float]:
    """``(c_out, c_skip)`` that bring ``c_out * output + c_skip * sample`` to ``target``.

    c_out follows from q and y, the parts of output and target that are orthogonal to the sample. Least squares would
    take w = <q, y> / <q, q>, which is right for a single step: of the picture it keeps the share
    r = <q, y>^2 / <q, q><y, y> and counts what is lost like noise. But over the steps the losses add up, while noise
    differs from step to step and averages out. Over ``averaged`` steps K noise counts for 1 / K only, and

        c_out = w / (r + (1 - r) / K)

    c_skip is the least-squares weight of the sample, given c_out.
    """
    # project output and target onto the complement of the sample
    beside_sample = products - products[:, 1:2] * products[1:2] / products[1, 1].clamp(min=_TINY)
    of_output, of_target = beside_sample[0, 0].clamp(min=_TINY), beside_sample[2, 2].clamp(min=_TINY)
    both = beside_sample[0, 2]
    share = both.square() / (of_output * of_target)
    out = both / of_output / (share + (1 - share) / averaged)
    skip = (products[2, 1] - out * products[0, 1]) / products[1, 1].clamp(min=_TINY)
    return float(out), float(skip)
