"""A packed layer as a convolution over maps, and what kernels compute in the same passes: normalization and activation
before its input becomes codes; bias, gate and residual where its sums leave the registers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from math import prod
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from bitstep.errors import BitstepError
from bitstep.runtime.kernel import Problem, refuse_tracing

Activation = Literal["none", "silu", "gelu", "geglu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


class Before(NamedTuple):
    """What is done to a layer's input before it is quantized: ``activation(normalize(x) * gain + shift)``.

    ``eps`` None means no normalization; otherwise it is over each pixel's channels, or over ``groups`` of them.
    gain, shift: ``[channels]`` or, without groups, ``[batch, channels]``; None for none
    activation: "gelu" is its tanh approximation; "geglu" takes twice the channels, values and then their gates, of
        which it makes ``value * gelu(gate)``, gelu exact, and goes with nothing else
    """

    eps: float | None = None
    groups: int = 0
    gain: Tensor | None = None
    shift: Tensor | None = None
    activation: Activation = "none"


class After(NamedTuple):
    """What becomes of a layer's output: ``residual + gain * (y + bias)``.

    bias: ``[batch, out]``, in the place of the layer's own; gain: ``[batch, out]``; residual: of y's shape, NHWC
    """

    bias: Tensor | None = None
    gain: Tensor | None = None
    residual: Tensor | None = None


PLAIN_INPUT, PLAIN_OUTPUT = Before(), After()


class Convolution(ABC):
    """What a kernel prepared for one layer, a :data:`~bitstep.runtime.kernel.Forward`; a linear layer is a 1x1
    convolution of maps that are one row."""

    def __init__(self, problem: Problem) -> None:
        assert problem.activation_bits is not None
        self.op = problem.op
        self.problem = problem.over_images()
        self.top = 2**problem.activation_bits - 1

    def __call__(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
        if self.op == "linear":
            y = self.convolve(x.reshape(len(x), 1, prod(x.shape[1:-1]), x.shape[-1]), scale, zero_point)
            return y.reshape(*x.shape[:-1], self.problem.out_channels)
        if self.op == "conv1d":
            return self.convolve(x.transpose(1, 2)[:, None], scale, zero_point)[:, 0].transpose(1, 2)
        return self.convolve(x.permute(0, 2, 3, 1), scale, zero_point).permute(0, 3, 1, 2)

    def convolve(
        self,
        x: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        before: Before = PLAIN_INPUT,
        after: After = PLAIN_OUTPUT,
        *,
        repeat: int = 1,
    ) -> Tensor:
        """``after(convolve(quantize(before(x))))``, on NHWC tensors; what before and after hold is contiguous.

        scale and zero_point are float32, ``[1]`` or ``[batch]``. Every pixel of x stands for ``repeat`` x ``repeat`` of
        them. BitstepError for what does not fit the layer.
        """
        refuse_tracing()
        assert scale is not None
        assert zero_point is not None
        batch, height, width, channels = x.shape
        gated = before.activation == "geglu"
        if gated and before != Before(activation="geglu"):
            raise BitstepError(f"a gated input goes with nothing else before the product, got {before}")
        channels = channels // 2 if gated else channels
        size = self._extent(0, height * repeat), self._extent(1, width * repeat)
        if channels != self.problem.in_channels or min(size) < (1 if x.numel() else 0):
            reach = [self._reach(axis) for axis in (0, 1)]
            raise BitstepError(
                f"a layer of {self.problem.in_channels} channels, its kernel {reach[0]}x{reach[1]} in all, "
                f"got {channels} channels and a map of {height * repeat}x{width * repeat}"
            )
        y = x.new_empty(batch, *size, self.problem.out_channels)
        _require((after.bias, after.gain), (batch, self.problem.out_channels))
        _require((after.residual,), tuple(y.shape))
        _require((scale, zero_point), (1,), (batch,))
        by_sample = [] if before.groups else [(1, channels), (batch, channels)]
        _require((before.gain, before.shift), (channels,), *by_sample)
        if y.numel():
            self.compute(y, x, scale.contiguous(), zero_point.contiguous(), before, after, repeat)
        return y

    def ahead(self, x: Tensor, before: Before) -> Before:
        """What ``before`` comes to on x, with less left to compute for every layer that reads x so."""
        return before

    @abstractmethod
    def compute(
        self, y: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, before: Before, after: After, repeat: int
    ) -> None:
        """Write :meth:`convolve`'s result to y; everything fits."""

    def _reach(self, axis: int) -> int:
        return self.problem.dilation[axis] * (self.problem.kernel_size[axis] - 1) + 1

    def _extent(self, axis: int, size: int) -> int:
        problem = self.problem
        return (size + 2 * problem.padding[axis] - self._reach(axis)) // problem.stride[axis] + 1


def _require(tensors: Iterable[Tensor | None], *shapes: tuple[int, ...]) -> None:
    """The tensors, but for those left out, have all the same of the shapes."""
    found = {tensor.shape for tensor in tensors if tensor is not None}
    if len(found) > 1 or not found.issubset(shapes):
        raise BitstepError(f"expected tensors of shape {shapes}, got {sorted(map(tuple, found))}")
