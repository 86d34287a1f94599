"""What a kernel is asked to compute, and how it says that it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from bitstep.errors import BitstepError
from bitstep.numerics.packing import QuantizedWeight

_INT32_MAX = 2**31 - 1
Operation = Literal["linear", "conv1d", "conv2d"]
Forward = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""``forward(x, scale, zero_point) -> y``: x ``[batch, ...]`` in one of the kernel's dtypes, and y in the same; scale
and zero_point float32 ``[rows]`` with rows 1 or batch (one activation step size per sample), None when activations stay
as they are."""


@dataclass(frozen=True)
class Problem:
    """One layer: ``y = op(fake_quantize(x * channel_reciprocal), W) + bias``.

    Tuples have one entry per spatial dimension (empty for ``linear``). ``activation_bits`` is None for a layer
    with floating-point activations. ``bases`` is 2 for a weight with two sign bases. ``symmetric`` says that every
    zero point of the weight is ``2**(bits-1)``.
    """

    op: Operation
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    weight_bits: int
    bases: int
    symmetric: bool
    activation_bits: int | None
    channel_reciprocal: bool
    device: str

    def over_images(self) -> Problem:
        """The same problem with two spatial dimensions: a convolution along one axis is over images of height 1, a
        linear layer over images of one pixel."""
        flat = 2 - len(self.kernel_size)
        return replace(
            self,
            kernel_size=(1,) * flat + self.kernel_size,
            stride=(1,) * flat + self.stride,
            padding=(0,) * flat + self.padding,
            dilation=(1,) * flat + self.dilation,
        )


@dataclass(frozen=True)
class LayerTensors:
    """The tensors of one packed layer, as on disk.

    bias: float32 ``[out]`` or None
    channel_reciprocal: float32 ``[in_channels]`` or None; the input is multiplied by it before it is quantized
    """

    weight: QuantizedWeight
    bias: Tensor | None
    channel_reciprocal: Tensor | None


@runtime_checkable
class CodeKeeper(Protocol):
    """A :data:`Forward` that can give back the codes it was made of: the layer then need not hold them as well."""

    def codes(self) -> Tensor:
        """The weight codes, uint8 ``[bases, out, n]``."""
        ...


class Kernel(ABC):
    """One way to run packed layers. ``dtypes`` are those of the inputs that it takes; it computes in float32."""

    name: str
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32})

    @abstractmethod
    def unsupported(self, problem: Problem) -> list[str]:
        """Why this kernel cannot run ``problem``, its activations quantized, here; empty when it can."""

    @abstractmethod
    def prepare(self, problem: Problem, tensors: LayerTensors) -> Forward:
        """Re-lay the weight out once and return the function that runs the layer."""


def refuse_gradients(*inputs: Tensor) -> None:
    """BitstepError where autograd would differentiate what is computed from inputs: rounding would cut the gradient."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise BitstepError("packed layers have no gradients: run them under torch.no_grad()")


def refuse_tracing() -> None:
    """BitstepError under torch.jit.trace, which would not see what kernels do."""
    if torch._C._get_tracing_state() is not None:
        raise BitstepError("torch.jit.trace cannot record the kernels: choose the backend 'reference' for it")


def beyond_bytes(problem: Problem) -> list[str]:
    """Why ``problem`` is no product of unsigned activation bytes and signed weight bytes, summed in 32 bits."""
    wrong: list[str] = []
    if problem.weight_bits == 8 and not problem.symmetric:
        wrong.append("8-bit weights with a zero point other than 128 do not fit a signed byte")
    row = problem.in_channels // problem.groups * prod(problem.kernel_size)
    if row * 255 * 128 > _INT32_MAX:
        wrong.append(f"a sum over {row} products may not fit 32 bits")
    return wrong
