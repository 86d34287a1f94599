"""Packed layers on NVIDIA GPUs: eight-bit integer products of tensor cores.

    codes   = clip(round(before(x) / s) + z, 0, N - 1), channels last      one pass over the input
    y       = after(s_x s_w sum (code - z) (c - z_w))                      one pass, exact up to the two scales

``before`` normalizes and activates, ``after`` adds bias, gate and residual (:mod:`bitstep.runtime.convolution`); the
moments of a group normalization take two small programs before the first pass.

The weight keeps its bits, rearranged, and is the layer's only copy (3, 5, 6 and 7 bits, and zero points other than the
middle, take a byte each). Weights that share bytes are unpacked right before the product, into memory that the next
layer's take over and the cache mostly holds: tensor cores read bytes from shared memory, where weights unpacked in the
registers of a program would have to go back to, once for every program.
"""

from __future__ import annotations

from functools import cache, partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, pad, silu

from bitstep.errors import first_line
from bitstep.numerics.packing import QuantizedWeight, pack, unpack
from bitstep.runtime.convolution import PLAIN_INPUT, After, Before, Convolution
from bitstep.runtime.kernel import Forward, Kernel, LayerTensors, Problem, beyond_bytes, refuse_gradients
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
        if problem.groups > 1:
            wrong.append("a convolution in groups")
        wrong += beyond_bytes(problem)
        if not wrong and (fault := programs_fault()):
            wrong.append(fault)
        return wrong

    def prepare(self, problem: Problem, tensors: LayerTensors) -> Forward:
        return TritonConvolution(problem, tensors)


class TritonConvolution(Convolution):
    """One layer, a :class:`~bitstep.runtime.kernel.CodeKeeper`; maps may be of any floating dtype and strides."""

    def __init__(self, problem: Problem, tensors: LayerTensors) -> None:
        super().__init__(problem)
        weight = tensors.weight
        self._channels, self._tile = problem.in_channels, _tile_of(problem.in_channels)
        self._padded_channels = _blocks(self._channels, self._tile) * self._tile
        self._steps = prod(self.problem.kernel_size) * self._padded_channels // self._tile
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

    def ahead(self, x: Tensor, before: Before) -> Before:
        with torch.cuda.device_of(x):
            return _settled(x, before) if before.groups else before

    def compute(
        self, y: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, before: Before, after: After, repeat: int
    ) -> None:
        refuse_gradients(x, *(given for given in (*before, *after) if isinstance(given, Tensor)))
        # tensors that only a program reads are seen by no dispatcher, whose watcher has to know them (graph.py)
        before = before._replace(gain=_seen(before.gain), shift=_seen(before.shift))
        after = After(*map(_seen, after))
        with torch.cuda.device_of(x):
            self._multiply(y, self._coded(x, scale, zero_point, before, repeat), scale, zero_point, after)

    def _coded(
        self, x: Tensor, scale: Tensor, zero_point: Tensor, before: Before = PLAIN_INPUT, repeat: int = 1
    ) -> Tensor:
        """int8 ``[samples, padded height, padded width, padded channels]``."""
        from bitstep.runtime import device_code

        before = self.ahead(x, before)
        normalized = before.eps is not None
        samples, channels = len(x), self._channels
        size = [length * repeat for length in x.shape[1:3]]
        padded = [length + 2 * padding for length, padding in zip(size, self.problem.padding, strict=True)]
        codes = torch.empty(samples, *padded, self._padded_channels, dtype=torch.int8, device=x.device)
        block_c = max(_power_of_two(channels), self._tile) if normalized else self._tile
        block_p = min(32, max(1, 4096 // block_c))
        per_sample = [t for t in (before.gain, before.shift) if t is not None and t.numel() > channels]
        device_code.code_inputs[(_blocks(prod(padded), block_p), _blocks(self._padded_channels, block_c), samples)](
            x,
            codes,
            before.gain,
            before.shift,
            self._reciprocal,
            scale,
            zero_point,
            channels,
            *size,
            *padded,
            self._padded_channels,
            *x.stride(),
            channels if per_sample else 0,
            int(len(scale) > 1),
            before.eps or 0.0,
            *self.problem.padding,
            REPEAT=repeat,
            NORMALIZED=normalized,
            ACTIVATION=before.activation,
            TOP=self.top,
            BLOCK_P=block_p,
            BLOCK_C=block_c,
        )
        return codes

    def _multiply(self, y: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, after: After) -> None:
        """Write the product of codes and weights, scaled and added to, to y ``[samples, height, width, out]``."""
        from bitstep.runtime import device_code

        samples, *size, _ = codes.shape
        _, *out_size, out = y.shape
        rows, bases = samples * prod(out_size), len(self._weight)
        tiling = tiling_of(rows, out, self._steps, _processors(codes.device))
        whole = tiling.splits == 1
        sums = y if whole else y.new_empty(tiling.splits, bases, rows, out, dtype=torch.int32)
        biases = after.bias is not None
        added = (after.bias if biases else self._bias, after.gain, after.residual)
        scales = (scale, zero_point, self._scale, self._sum)
        pixels = prod(out_size)
        scale_stride = int(len(scale) > 1)
        device_code.multiply[(_blocks(rows, tiling.rows), _blocks(out, tiling.columns), tiling.splits)](
            codes,
            self._unpacked(),
            sums,
            *(added if whole else (None, None, None)),
            *scales,
            samples,
            *size,
            self._padded_channels,
            *out_size,
            out,
            scale_stride,
            biases and whole,
            samples == 1 or pixels % tiling.rows == 0,
            bases,
            *self.problem.kernel_size,
            *self.problem.stride,
            *self.problem.dilation,
            BLOCK_M=tiling.rows,
            BLOCK_N=tiling.columns,
            BLOCK_K=self._tile,
            SPLITS=tiling.splits,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
        if not whole:
            device_code.add_up[(_blocks(y.numel(), 1024),)](
                sums,
                y,
                *added,
                *scales,
                rows,
                pixels,
                out,
                scale_stride,
                biases,
                bases,
                tiling.splits,
                BLOCK=1024,
            )

    def _unpacked(self) -> Tensor:
        """int8 ``[bases, out, steps, tile]``."""
        from bitstep.runtime import device_code

        if self._bits == 8:
            return self._weight.view(torch.int8)
        bases, out, size, tile = self._weight.shape
        weight = self._weight.new_empty(bases, out, self._steps, tile, dtype=torch.int8)
        device_code.unpack_weight[(_blocks(self._weight.numel(), 1024),)](
            self._weight, weight, self._weight.numel(), size, self._steps, BITS=self._bits, BLOCK_K=tile, BLOCK=1024
        )
        return weight


def _seen(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _settled(x: Tensor, before: Before) -> Before:
    """``before`` with the group normalization of x ``[samples, height, width, channels]`` as gains and shifts of every
    sample."""
    from bitstep.runtime import device_code

    samples, height, width, channels = x.shape
    pixels, of_group, block_p, block_c = height * width, channels // before.groups, 64, _tile_of(channels)
    blocks = _blocks(pixels, block_p)
    moments = x.new_empty(samples, blocks, 2, channels, dtype=torch.float32)
    device_code.channel_moments[(blocks, _blocks(channels, block_c), samples)](
        x, moments, pixels, width, channels, *x.stride(), BLOCK_P=block_p, BLOCK_C=block_c
    )
    affine = x.new_empty(2, samples, channels, dtype=torch.float32)
    device_code.group_affine[(before.groups, samples)](
        moments,
        before.gain,
        before.shift,
        affine,
        pixels,
        blocks,
        channels,
        of_group,
        before.eps,
        BLOCK_P=block_p,
        BLOCK_B=64,
        BLOCK_C=_power_of_two(of_group),
    )
    return Before(gain=affine[0], shift=affine[1], activation=before.activation)


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


def _power_of_two(value: int) -> int:
    """The least that is no less."""
    return 1 << (value - 1).bit_length()


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
        with torch.device("cpu"):  # whatever the default is
            exactness, fused = trial_errors("cuda")
    except Exception as error:  # whatever a compiler may raise
        return f"Triton's programs do not run here ({first_line(error)})"
    if exactness < 1e-4 and fused < 1e-3:
        return None
    return f"Triton's programs compute wrong results here (relative errors {exactness:.1e}, {fused:.1e})"


def trial_errors(device: str) -> tuple[float, float]:
    """Errors of a small convolution, its padding and the step sizes of its two samples included: the largest one,
    relative to the largest result, and, with all that is fused, that of the whole (a few codes may round otherwise)."""
    layer, bits = nn.Conv2d(40, 24, 3, stride=2, padding=1, device="meta"), 4
    layer_format = LayerFormat(
        weight_bits=bits, bases=1, symmetric=True, activation_bits=8, steps=1, channel_reciprocal=False
    )
    problem = layer_problem(layer, layer_format, "cpu")
    out, channels, *kernel = shape = tuple(layer.weight.shape)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (1, out, channels * prod(kernel)), generator=generator, dtype=torch.uint8)
    normal = partial(torch.randn, generator=generator, dtype=torch.float32)  # whatever the default is
    scale, zero_point = 0.5 + normal(1, out).abs(), torch.full((out,), 8, dtype=torch.uint8)
    x, (gain, shift) = normal(2, channels, 9, 7), normal(2, channels)
    bias, gate, residual = normal(2, out), normal(2, out), normal(2, 5, 4, out)
    rows = torch.tensor([[0.02, 0.05], [100.0, 128.0]], dtype=torch.float32)

    def tensors(device: str) -> LayerTensors:
        weight = QuantizedWeight(codes.to(device), scale.to(device), zero_point.to(device), bits, shape)
        return LayerTensors(weight, None, None)

    reference, prepared = in_float(problem, tensors("cpu")), TritonConvolution(problem, tensors(device))
    plain, activated = (reference(map_, *rows).movedim(1, 3) for map_ in (x, silu(group_norm(x, 4, gain, shift))))
    fused = residual + gate[:, None, None] * (activated + bias[:, None, None])

    before = Before(1e-5, 4, gain.to(device), shift.to(device), "silu")
    after = After(bias.to(device), gate.to(device), residual.to(device))
    x, scales, zero_points = x.movedim(1, 3).to(device), rows[0].to(device), rows[1].to(device)
    y, y_fused = (prepared.convolve(x, scales, zero_points, *given).cpu() for given in ((), (before, after)))
    exactness = float((y - plain).abs().max() / plain.abs().max())
    return exactness, float((y_fused - fused).norm() / fused.norm())
