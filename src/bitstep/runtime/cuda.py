"""Packed layers on NVIDIA GPUs: eight-bit integer products of tensor cores.

    codes   = clip(round(x / s) + z, 0, N - 1), channels last              one pass over the input
    y       = s_x s_w sum (code - z) (c - z_w) + bias                      one pass, exact up to the two scales

The weight keeps its bits, rearranged, and is the layer's only copy (3, 5, 6 and 7 bits, and zero points other than the
middle, take a byte each). Weights that share bytes are unpacked right before the product, into memory that the next
layer's take over and the cache mostly holds: tensor cores read bytes from shared memory, where weights unpacked in the
registers of a program would have to go back to, once for every program.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bitstep.errors import first_line
from bitstep.numerics.packing import QuantizedWeight, pack, unpack
from bitstep.numerics.uniform import levels
from bitstep.runtime.kernel import Forward, Kernel, LayerTensors, Problem, beyond_bytes
from bitstep.runtime.layers import LayerFormat, layer_problem
from bitstep.runtime.reference import in_float


class CudaKernel(Kernel):
    """Signed bytes times signed bytes, compiled by Triton when a layer of its kind first runs."""

    name = "cuda"
    dtypes = frozenset({torch.float32, torch.float16, torch.bfloat16})

    def unsupported(self, problem: Problem) -> list[str]:
        if problem.device != "cuda":
            return [f"it runs on NVIDIA GPUs, not on {problem.device}"]
        wrong: list[str] = []
        if problem.activation_bits is None:
            wrong.append("floating-point activations")
        if problem.groups > 1:
            wrong.append("a convolution in groups")
        wrong += beyond_bytes(problem)
        if not wrong and (fault := programs_fault()):
            wrong.append(fault)
        return wrong

    def prepare(self, problem: Problem, tensors: LayerTensors) -> Forward:
        return _Product(problem, tensors)


class _Product:
    """One layer, a :class:`~bitstep.runtime.kernel.CodeKeeper`."""

    def __init__(self, problem: Problem, tensors: LayerTensors) -> None:
        weight = tensors.weight
        assert problem.activation_bits is not None
        self._op, self._channels, self._out = problem.op, problem.in_channels, problem.out_channels
        self._top = levels(problem.activation_bits) - 1
        image = problem.over_images()
        self._kernel, self._stride = image.kernel_size, image.stride
        self._padding, self._dilation = image.padding, image.dilation
        self._tile = _tile_of(problem.in_channels)
        self._padded_channels = _blocks(problem.in_channels, self._tile) * self._tile
        self._steps = prod(self._kernel) * self._padded_channels // self._tile
        # signed bytes are ready to be multiplied; codes are unpacked to those around the middle of their range
        self._bits = weight.bits if problem.symmetric and weight.bits in (1, 2, 4) else 8
        self._zero_point = weight.zero_point
        self._weight = self._stored(
            weight.codes if self._bits < 8 else weight.integers().to(torch.int8).view(torch.uint8)
        )
        self._sum = weight.integers().sum(2, dtype=torch.int32)
        self._scale = weight.scale.contiguous()
        self._bias = torch.zeros_like(self._scale[0]) if tensors.bias is None else tensors.bias
        self._reciprocal = tensors.channel_reciprocal

    def _stored(self, codes: Tensor) -> Tensor:
        """``[bases, out, n]`` in the order in which the program reads: uint8 ``[bases, out, bytes, tile]``, a byte
        holding one place of as many tiles as fit."""
        by_tap = codes.unflatten(2, (self._channels, -1)).transpose(2, 3)
        tiles = pad(by_tap, (0, self._padded_channels - self._channels)).flatten(2).unflatten(2, (-1, self._tile))
        return pack(tiles.transpose(2, 3), self._bits).transpose(2, 3).contiguous()

    def codes(self) -> Tensor:
        tiles = unpack(self._weight.transpose(2, 3).contiguous(), self._bits, self._steps).transpose(2, 3)
        by_tap: Tensor = tiles.flatten(2).unflatten(2, (-1, self._padded_channels))[..., : self._channels]
        stored = by_tap.transpose(2, 3).flatten(2)
        if self._bits < 8 or self._zero_point is None:
            return stored
        return stored + self._zero_point[:, None]  # uint8, as the codes were: what wrapped around wraps back

    def __call__(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
        assert scale is not None
        assert zero_point is not None
        if self._op == "linear":
            image = x.reshape(len(x), 1, -1, self._channels).movedim(3, 1)
        else:
            image = x if x.ndim == 4 else x.unsqueeze(2)
        with torch.cuda.device_of(x):
            y = self._multiplied(self._coded(image, scale, zero_point), scale, zero_point, x.dtype)
        if self._op == "linear":
            return y.view(*x.shape[:-1], self._out)
        y = y.movedim(3, 1)
        return y if x.ndim == 4 else y.squeeze(2)

    def _coded(self, image: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """int8 ``[samples, padded height, padded width, padded channels]``."""
        from bitstep.runtime import device_code

        samples, channels, *size = image.shape
        padded = [length + 2 * padding for length, padding in zip(size, self._padding, strict=True)]
        codes = torch.empty(samples, *padded, self._padded_channels, dtype=torch.int8, device=image.device)
        block = 32
        device_code.code_inputs[(_blocks(prod(padded), block), self._padded_channels // self._tile, samples)](
            image,
            codes,
            self._reciprocal,
            scale,
            zero_point,
            channels,
            *size,
            *padded,
            self._padded_channels,
            *image.stride(),
            int(len(scale) > 1),
            *self._padding,
            TOP=self._top,
            DILATED=self._reciprocal is not None,
            BLOCK_P=block,
            BLOCK_C=self._tile,
        )
        return codes

    def _multiplied(self, codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
        """``[samples, height, width, out]``."""
        from bitstep.runtime import device_code

        samples, *size, _ = codes.shape
        out_size = [
            (length - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, dilation in zip(size, self._kernel, self._stride, self._dilation, strict=True)
        ]
        y = torch.empty(samples, *out_size, self._out, dtype=dtype, device=codes.device)
        rows, bases = samples * prod(out_size), len(self._weight)
        tiling = tiling_of(rows, self._out, self._steps, _processors(codes.device))
        whole = tiling.splits == 1
        sums = y if whole else y.new_empty(tiling.splits, bases, rows, self._out, dtype=torch.int32)
        epilogue = (self._bias, scale, zero_point, self._scale, self._sum)
        scale_stride = int(len(scale) > 1)
        device_code.multiply[(_blocks(rows, tiling.rows), _blocks(self._out, tiling.columns), tiling.splits)](
            codes,
            self._unpacked(),
            sums,
            *epilogue,
            samples,
            *size,
            self._padded_channels,
            *out_size,
            self._out,
            scale_stride,
            bases,
            *self._kernel,
            *self._stride,
            *self._dilation,
            BLOCK_M=tiling.rows,
            BLOCK_N=tiling.columns,
            BLOCK_K=self._tile,
            SPLITS=tiling.splits,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        if not whole:
            device_code.add_up[(_blocks(y.numel(), 1024),)](
                sums, y, *epilogue, rows, prod(out_size), self._out, scale_stride, bases, tiling.splits, BLOCK=1024
            )
        return y

    def _unpacked(self) -> Tensor:
        """int8 ``[bases, out, steps, tile]``."""
        from bitstep.runtime import device_code

        if self._bits == 8:
            return self._weight.view(torch.int8)
        bases, out, size, tile = self._weight.shape
        weight = self._weight.new_empty(bases, out, self._steps, tile, dtype=torch.int8)
        device_code.unpack_weight[(bases * out, _blocks(size * tile, 1024))](
            self._weight, weight, size, self._steps, BITS=self._bits, BLOCK_K=tile, BLOCK=1024
        )
        return weight


class Tiling(NamedTuple):
    """What one program computes, rows (pixels) times columns (output channels), and how: in how many warps, loading how
    many steps ahead, and how many programs share the steps of one sum."""

    rows: int
    columns: int
    warps: int
    stages: int
    splits: int = 1


def tiling_of(rows: int, out: int, steps: int, processors: int) -> Tiling:
    """The tiling for a product of that many rows and columns, each the sum of ``steps`` tiles of channels.

    A tensor core is fed best by tiles of 64 by 128. Narrower ones, and programs that share the steps of a sum (eight
    steps each at the least, two and a half programs a processor at the most), give every processor something to do.
    Measured (benchmarks/gpu_tilings.py): 1.03 times the time of the best of 120 tilings, 1.11 at the worst.
    """
    for height, width in ((64, 128), (128, 64), (64, 64)):
        programs, splits = _blocks(rows, height) * _blocks(out, width), 1
        while splits < 8 and steps // (2 * splits) >= 8 and 2 * splits * programs <= 2.5 * processors:
            splits *= 2
        if splits * programs >= 0.4 * processors and (width < 128 or out % width == 0):
            return Tiling(height, width, 4, 3, splits)
    return Tiling(32, 32, 4, 4)


@cache
def _processors(device: torch.device) -> int:
    """Of the GPU; as many as a large one has where there is none, in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _tile_of(channels: int) -> int:
    """Channels that a product takes at a time: 128, or less where that many would be mostly filling."""
    return min((128, 64, 32), key=lambda tile: (_blocks(channels, tile) * tile, -tile))


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


@cache
def programs_fault() -> str | None:
    """What is wrong with the programs on this machine's GPU: None, or a reason to refuse.

    They are tried on a small layer with a known result before they are trusted with any.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed (pip install triton)"
    if torch.cuda.get_device_capability() < (8, 0):
        return "Triton has no 8-bit integer products for this GPU (compute capability 8.0 and later)"
    try:
        wrong = trial_error("cuda")
    except Exception as error:  # whatever a compiler may raise
        return f"Triton's programs do not run here ({first_line(error)})"
    return None if wrong < 1e-4 else f"Triton's programs compute wrong results here (relative error {wrong:.1e})"


def trial_error(device: str) -> float:
    """Largest error of a small convolution, its padding and the step sizes of its two samples included, relative to the
    largest result."""
    layer, bits = nn.Conv2d(40, 24, 3, stride=2, padding=1, device="meta"), 4
    layer_format = LayerFormat(
        weight_bits=bits, bases=1, symmetric=True, activation_bits=8, steps=1, channel_reciprocal=False
    )
    problem = layer_problem(layer, layer_format, "cpu")
    out, channels, *kernel = shape = tuple(layer.weight.shape)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (1, out, channels * prod(kernel)), generator=generator, dtype=torch.uint8)
    scale, zero_point = 0.5 + torch.rand(1, out, generator=generator), torch.full((out,), 8, dtype=torch.uint8)
    x = torch.randn(2, channels, 9, 7, generator=generator)
    rows = (torch.tensor([0.02, 0.05]), torch.tensor([100.0, 128.0]))

    def tensors(device: str) -> LayerTensors:
        weight = QuantizedWeight(codes.to(device), scale.to(device), zero_point.to(device), bits, shape)
        return LayerTensors(weight, None, None)

    known = in_float(problem, tensors("cpu"))(x, *rows)
    y = _Product(problem, tensors(device))(x.to(device), *(row.to(device) for row in rows))
    return float((y.cpu() - known).abs().max() / known.abs().max())
