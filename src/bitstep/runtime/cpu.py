"""Packed layers on the native CPU library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from bitstep.numerics.packing import QuantizedWeight
from bitstep.runtime import native
from bitstep.runtime.convolution import ACTIVATIONS, After, Before, Convolution
from bitstep.runtime.kernel import Forward, Kernel, LayerTensors, Problem, beyond_bytes
from bitstep.runtime.native import Table

_COLUMN = 16
_TABLE_BITS = 4  # activations whose sums of four fit a signed byte once they are centred


class CpuKernel(Kernel):
    """Integer arithmetic on packed weights: AMX, AVX512, AVX-VNNI, AVX2 or portable code, as the machine has.

    Weights of 1, 2 and 4 bits stay packed in memory, 3 bits take 4 and the others a byte. One-bit weights under
    activations of up to 4 bits run on tables of signed sums with AVX512-VBMI, AVX-VNNI and AVX2.
    """

    name = "cpu"

    def unsupported(self, problem: Problem) -> list[str]:
        wrong: list[str] = []
        if problem.device != "cpu":
            wrong.append(f"it runs on the CPU, not on {problem.device}")
        if native.kernels() is None:
            wrong.append("the native library is not built (install a C++ compiler and reinstall bitstep)")
        if problem.groups != 1:
            wrong.append("grouped convolution")
        return wrong + beyond_bytes(problem)

    def prepare(self, problem: Problem, tensors: LayerTensors) -> Forward:
        return NativeConvolution(problem, tensors)


class NativeConvolution(Convolution):
    """A layer's weights as the library takes them, and the calls into it; maps are float32."""

    def __init__(self, problem: Problem, tensors: LayerTensors) -> None:
        super().__init__(problem)
        assert problem.activation_bits is not None
        indexing = problem.weight_bits == 1 and problem.activation_bits <= _TABLE_BITS
        table = native.table() if indexing else Table.NONE
        image = self.problem
        self.padded_channels = _round_up(problem.in_channels, 16 if table else 4)
        bases, out, length = tensors.weight.codes.shape
        self.shape = (bases, out, length)
        self.packed = pack_columns(tensors.weight, image.kernel_size, table)
        self.bias = None if tensors.bias is None else tensors.bias.float().contiguous()
        reciprocal = tensors.channel_reciprocal
        self.channel_reciprocal = None if reciprocal is None else reciprocal.float().contiguous()
        self.layer = native.Layer(
            out_channels=out,
            padded_channels=self.padded_channels,
            kernel_h=image.kernel_size[0],
            kernel_w=image.kernel_size[1],
            stride_h=image.stride[0],
            stride_w=image.stride[1],
            dilation_h=image.dilation[0],
            dilation_w=image.dilation[1],
            bits=self.packed.bits,
            bases=bases,
            panel=self.packed.panel,
            table=table,
            largest=self.packed.largest,
            weight=self.packed.weight.data_ptr(),
            zero=self.packed.zero.data_ptr(),
            sum=self.packed.sum.data_ptr(),
            scale=self.packed.scale.data_ptr(),
        )

    def compute(
        self, y: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, before: Before, after: After, repeat: int
    ) -> None:
        gated = before.activation == "geglu"
        native.run(self.call, y, x.contiguous(), scale, zero_point, before, after, repeat, in_parts=not gated)

    def call(
        self,
        y: Tensor,
        x: Tensor | tuple[Tensor, Tensor],
        scale: Tensor,
        zero_point: Tensor,
        before: Before,
        after: After,
        repeat: int,
    ) -> native.Call:
        """The call that makes :meth:`convolve`'s result in y, of contiguous tensors; x may be two whose channels are to
        be joined."""
        lib = native.kernels()
        assert lib is not None
        x, rest = x if isinstance(x, tuple) else (x, None)
        batch, height, width, channels = x.shape
        channels = self.problem.in_channels if rest is None else channels
        rest_channels = 0 if rest is None else rest.shape[-1]
        bias = self.bias if after.bias is None else after.bias
        return partial(
            lib.bitstep_convolution,
            self.layer,
            native.Map(
                batch,
                height * repeat,
                width * repeat,
                channels + rest_channels,
                self.padded_channels,
                *self.problem.padding,
                repeat,
                _address(rest),
                rest_channels,
            ),
            _prologue(before),
            native.Step(
                scale.data_ptr(), zero_point.data_ptr(), len(scale), self.top, _address(self.channel_reciprocal)
            ),
            x.data_ptr(),
            native.Epilogue(
                _address(bias),
                1 if after.bias is None else batch,
                _address(after.gain),
                _address(after.residual),
            ),
            y.data_ptr(),
            torch.get_num_threads(),
        )

    def codes(self) -> Tensor:
        return unpack_columns(self.packed, self.shape, self.problem.kernel_size, Table(self.layer.table))


def _prologue(before: Before) -> native.Prologue:
    return native.Prologue(
        0 if before.eps is None else 2 if before.groups else 1,
        before.groups,
        before.eps or 0.0,
        _address(before.gain),
        _address(before.shift),
        max(len(t) if t is not None and t.ndim > 1 else 1 for t in (before.gain, before.shift)),
        ACTIVATIONS.index(before.activation),
    )


@dataclass(frozen=True)
class Columns:
    """A weight as ``native/bitstep.h`` lays it out.

    weight: uint8, the packed blocks; bits: of memory per byte of a block; panel: columns of a panel
    largest: absolute value of a weight
    zero: int8 ``[columns, 64]``; sum: int32 ``[columns, 16]``; scale: float32 ``[columns, 16]``
    """

    weight: Tensor
    bits: int
    panel: int
    largest: int
    zero: Tensor
    sum: Tensor
    scale: Tensor


def pack_columns(weight: QuantizedWeight, kernel: tuple[int, ...], table: Table) -> Columns:
    """Re-lay a weight out in columns of 16 output channels; a ``table`` makes its signs indices."""
    bases, out, _ = weight.codes.shape
    codes = weight.codes.reshape(bases, out, -1, *kernel)
    extra = (-out % _COLUMN, -codes.shape[2] % (16 if table else 4))
    codes = F.pad(codes, (0, 0, 0, 0, 0, extra[1], 0, extra[0]))
    codes = _interleave(codes)
    scale = _interleave(F.pad(weight.scale.float(), (0, extra[0])))
    panel = 4 if table else 2
    if table:
        bits = 4
        largest = 1
        sums = torch.zeros_like(scale, dtype=torch.int32)
        zero = torch.arange(0, -64, -16) if table is Table.BESIDE else torch.zeros(4, dtype=torch.int64)
        zero = zero.repeat(len(scale), _COLUMN)
        codes = _join(codes.reshape(*codes.shape[:2], -1, 4, *kernel).unbind(3), 1)
    else:
        bits = {1: 1, 2: 2, 3: 4, 4: 4}.get(weight.bits, 8)
        if weight.zero_point is None:
            zero, values = torch.ones_like(scale, dtype=torch.int32), 2 * codes.int() - 1
        else:
            zero = _interleave(F.pad(weight.zero_point.int(), (0, extra[0])).expand(bases, -1))
            values = codes.int() - zero[:, :, None, None, None]
        largest = int(values.abs().max())
        sums = values.sum((2, 3, 4), dtype=torch.int32)
        zero = zero.repeat_interleave(4, 1)
        if bits == 8:
            codes = values.to(torch.int8).view(torch.uint8)
    # [column, 16, granule, 4, h, w] -> [h, w, granule, column, 16, 4], or 4, 16
    order = (3, 1) if table is Table.APART else (1, 3)
    blocks = codes.reshape(-1, _COLUMN, codes.shape[2] // 4, 4, *kernel).permute(4, 5, 2, 0, *order)
    panels = [_share(part.reshape(-1, 64), bits) for part in torch.split(blocks, panel, 3)]
    return Columns(
        weight=torch.cat(panels),
        bits=bits,
        panel=panel,
        largest=largest,
        zero=zero.to(torch.int8).contiguous(),
        sum=sums.contiguous(),
        scale=scale.contiguous(),
    )


def unpack_columns(columns: Columns, shape: tuple[int, int, int], kernel: tuple[int, ...], table: Table) -> Tensor:
    """The codes, uint8 ``[bases, out, n]`` = ``shape``, that :func:`pack_columns` re-laid."""
    bases, out, length = shape
    share, granules = 8 // columns.bits, -(-length // prod(kernel) // (16 if table else 4))
    block, order = ((4, _COLUMN), (5, 2, 4)) if table is Table.APART else ((_COLUMN, 4), (4, 2, 5))
    parts: list[Tensor] = []
    begin = 0
    for zero in torch.split(columns.zero, columns.panel):
        blocks = prod(kernel) * granules * len(zero)
        end = begin + -(-blocks // share)
        shared = torch.stack([columns.weight[begin:end] >> columns.bits * i for i in range(share)], 1)
        parts.append(shared.reshape(-1, 64)[:blocks].reshape(*kernel, granules, len(zero), *block))
        begin = end
    codes: Tensor = torch.cat(parts, 3).permute(3, *order, 0, 1).flatten(2, 3) & (2**columns.bits - 1)
    if table:
        codes = torch.stack([codes >> i & 1 for i in range(4)], 3).flatten(2, 3)
    elif columns.bits == 8:
        codes = codes + columns.zero[:, ::4, None, None, None].view(torch.uint8)
    codes = codes.reshape(-1, bases, *codes.shape[1:]).transpose(0, 1).flatten(1, 2)
    return codes[:, :out, : length // prod(kernel)].reshape(shape)


def _interleave(x: Tensor) -> Tensor:
    """``[bases, out, ...]`` -> ``[columns, 16, ...]``, the bases of a column next to each other."""
    return x.reshape(len(x), -1, _COLUMN, *x.shape[2:]).transpose(0, 1).flatten(0, 1)


def _share(blocks: Tensor, bits: int) -> Tensor:
    """Blocks ``[n, 64]`` of ``bits`` bits -> uint8 ``[ceil(n * bits / 8), 64]``, neighbours sharing memory."""
    share = 8 // bits
    shared = F.pad(blocks, (0, 0, 0, -len(blocks) % share)).reshape(-1, share, 64)
    return _join(shared.unbind(1), bits)


def _join(parts: Sequence[Tensor], bits: int) -> Tensor:
    """Sum of the parts, each shifted ``bits`` further."""
    joined = parts[0].clone()
    for i, part in enumerate(parts[1:], start=1):
        joined += part << bits * i
    return joined


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
