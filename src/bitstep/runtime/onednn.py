"""Eight-bit integer arithmetic through the oneDNN operators inside PyTorch: no build of ours, any weight as a byte.

The operators (``torch.ops.onednn``) are the ones torch's own inductor calls; they are no public interface, so the
kernel tries them on a small product with a known result before it agrees to run anything.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bitstep.denoiser.steps import per_sample
from bitstep.errors import first_line
from bitstep.numerics.packing import QuantizedWeight
from bitstep.numerics.uniform import quantize
from bitstep.runtime.kernel import Forward, Kernel, LayerTensors, Problem, beyond_bytes
from bitstep.runtime.reference import align_channels

_PLAIN_OUTPUT: tuple[Any, ...] = (
    1.0,
    0,
    torch.float32,
    "none",
    [],
    "",
)  # scale, zero point and dtype of y; no operation after


class OneDnnKernel(Kernel):
    """u8 activations times s8 weights. One prepacked weight serves the step sizes of every timestep."""

    name = "onednn"

    def unsupported(self, problem: Problem) -> list[str]:
        wrong: list[str] = []
        if problem.device != "cpu":
            wrong.append(f"it runs on the CPU, not on {problem.device}")
        if problem.bases == 2:
            wrong.append("a weight of two sign bases is no integer times one scale")
        wrong += beyond_bytes(problem)
        if not wrong and (fault := operators_fault()):
            wrong.append(fault)
        return wrong

    def prepare(self, problem: Problem, tensors: LayerTensors) -> Forward:
        bits = problem.activation_bits
        assert bits is not None
        reciprocal = align_channels(tensors.channel_reciprocal, problem)
        multiply = _linear(tensors) if problem.op == "linear" else _convolution(problem, tensors)

        def forward(x: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
            assert scale is not None
            assert zero_point is not None
            if reciprocal is not None:
                x = x * reciprocal
            codes = quantize(x, per_sample(scale, x), per_sample(zero_point, x), bits)
            if len(scale) == 1:
                return multiply(codes, scale.item(), int(zero_point))
            # the operators take one scale: samples that share theirs go together
            pairs, member = torch.unique(torch.stack((scale, zero_point)), dim=1, return_inverse=True)
            outputs = [multiply(codes[member == i], s, int(z)) for i, (s, z) in enumerate(pairs.T.tolist())]
            return torch.cat(outputs)[member.argsort(stable=True).argsort()]

        return forward


Multiply = Callable[[Tensor, float, int], Tensor]
"""``multiply(codes, scale, zero_point)``: the layer's output for u8 ``codes`` of one step size."""


def _linear(tensors: LayerTensors) -> Multiply:
    scale, no_offset = tensors.weight.scale[0].contiguous(), _no_offset(tensors.weight)
    weight = torch.ops.onednn.qlinear_prepack(_signed(tensors.weight), None)
    bias = tensors.bias

    def multiply(codes: Tensor, x_scale: float, x_zero_point: int) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, x_scale, x_zero_point, weight, scale, no_offset, bias, *_PLAIN_OUTPUT
        )
        return y.reshape(*codes.shape[:-1], len(scale))  # it forgets dimensions where there are no values

    return multiply


def _convolution(problem: Problem, tensors: LayerTensors) -> Multiply:
    scale, no_offset = tensors.weight.scale[0].contiguous(), _no_offset(tensors.weight)
    signed, bias = _signed(tensors.weight), tensors.bias
    flat, over_images = problem.op == "conv1d", problem.over_images()
    if flat:
        signed = signed.unsqueeze(2)
    geometry = (over_images.stride, over_images.padding, over_images.dilation, problem.groups)
    weight = torch.ops.onednn.qconv_prepack(signed, scale, 1.0, 0, *geometry, None)

    def multiply(codes: Tensor, x_scale: float, x_zero_point: int) -> Tensor:
        image = (codes.unsqueeze(2) if flat else codes).contiguous(memory_format=torch.channels_last)
        y: Tensor = torch.ops.onednn.qconv2d_pointwise(
            image, x_scale, x_zero_point, weight, scale, no_offset, bias, *geometry, *_PLAIN_OUTPUT
        )
        return y.squeeze(2) if flat else y

    return multiply


def _signed(weight: QuantizedWeight) -> Tensor:
    """The integers that times ``scale`` make the weight, int8 in its shape."""
    return weight.integers()[0].to(torch.int8).reshape(weight.shape)


def _no_offset(weight: QuantizedWeight) -> Tensor:
    return torch.zeros(weight.shape[0], dtype=torch.int32)


@cache
def operators_fault() -> str | None:
    """What is wrong with torch's oneDNN operators on this machine: None, or a reason to refuse.

    Without VNNI instructions, oneDNN adds pairs of products in 16 bits, where large ones saturate.
    """
    codes, row = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((1, 1, 64), 0, dtype=torch.uint8)
    weight = QuantizedWeight(row, torch.ones(1, 1), torch.tensor([128], dtype=torch.uint8), 8, (1, 64))
    try:
        y = _linear(LayerTensors(weight, None, None))(codes, 1.0, 0)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"torch's oneDNN operators do not work here ({first_line(error)})"
    return None if y.item() == -128 * 255 * 64 else "products of eight bits saturate on this processor"
