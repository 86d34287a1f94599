"""The oracle: dequantized weights, fake-quantized activations and a floating-point operation, on any device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitstep.denoiser.steps import per_sample
from bitstep.numerics.uniform import rounded
from bitstep.runtime.kernel import Forward, Kernel, LayerTensors, Problem


class ReferenceKernel(Kernel):
    """Runs every problem, in float32, exactly as the fake-quantized layer does in training."""

    name = "reference"

    def unsupported(self, problem: Problem) -> list[str]:
        return []

    def prepare(self, problem: Problem, tensors: LayerTensors) -> Forward:
        return in_float(problem, tensors)


class FloatKernel(Kernel):
    """Layers with floating-point activations, on any device.

    On the CPU a map comes out channels-last, as the kernels of its neighbours want it.
    """

    name = "float"

    def unsupported(self, problem: Problem) -> list[str]:
        return [] if problem.activation_bits is None else ["its activations are quantized"]

    def prepare(self, problem: Problem, tensors: LayerTensors) -> Forward:
        return in_float(problem, tensors, channels_last=problem.device == "cpu")


def in_float(problem: Problem, tensors: LayerTensors, *, channels_last: bool = False) -> Forward:
    """The problem in floating point; ``channels_last`` says how a map that comes out shall lie."""
    weight, bias, bits = tensors.weight.dequantize(), tensors.bias, problem.activation_bits
    if channels_last and weight.ndim == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    reciprocal = align_channels(tensors.channel_reciprocal, problem)
    operation = _operation(problem)

    def forward(x: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
        if reciprocal is not None:
            x = x * reciprocal
        if bits is not None and scale is not None and zero_point is not None:
            x = rounded(x, per_sample(scale, x), per_sample(zero_point, x), bits)
        return operation(x, weight, bias)  # type: ignore[no-any-return]

    return forward


def align_channels(per_channel: Tensor | None, problem: Problem) -> Tensor | None:
    """``[channels]`` shaped to broadcast against the problem's input or output (last axis of a linear, axis 1 of a
    convolution)."""
    return None if per_channel is None else per_channel.reshape(-1, *[1] * len(problem.kernel_size))


def _operation(problem: Problem) -> Any:
    if problem.op == "linear":
        return F.linear
    convolution = F.conv1d if problem.op == "conv1d" else F.conv2d
    geometry = {name: getattr(problem, name) for name in ("stride", "padding", "dilation", "groups")}
    return partial(convolution, **geometry)
