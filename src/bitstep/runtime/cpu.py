"""Packed layers on the native CPU library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from bitstep.errors import BitstepError
from bitstep.numerics.packing import QuantizedWeight
from bitstep.runtime import native
from bitstep.runtime.kernel import Forward, Kernel, LayerTensors, Problem, beyond_bytes
from bitstep.runtime.reference import in_float

Activation = Literal["none", "silu", "gelu", "geglu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

_COLUMN = 16
_TABLE_BITS = 4  # activations whose sums of four fit a signed byte once they are centred


class CpuKernel(Kernel):
    """Integer arithmetic on packed weights: AMX, AVX512, AVX2 or portable code, chosen when the library loads.

    Weights of 1, 2 and 4 bits stay packed in memory, 3 bits take 4 and the others a byte. One-bit weights under
    activations of up to 4 bits run on tables of signed sums where the machine has AVX512-VBMI and no AMX. A layer with
    floating-point activations is left to torch, and gives a channels-last map, as the layers beside it want it.
    """

    name = "cpu"

    def unsupported(self, problem: Problem) -> list[str]:
        wrong: list[str] = []
        if problem.device != "cpu":
            wrong.append(f"it runs on the CPU, not on {problem.device}")
        if native.kernels() is None:
            wrong.append("the native library is not built (install a C++ compiler and reinstall bitstep)")
        if problem.activation_bits is None:
            return wrong
        if problem.groups != 1:
            wrong.append("grouped convolution")
        return wrong + beyond_bytes(problem)

    def prepare(self, problem: Problem, tensors: LayerTensors) -> Forward:
        if problem.activation_bits is None:
            return in_float(problem, tensors, channels_last=True)
        return Convolution(problem, tensors)


class Convolution:
    """A layer's weights as the library takes them, and the calls into it; linear layers are 1x1 convolutions."""

    def __init__(self, problem: Problem, tensors: LayerTensors) -> None:
        assert problem.activation_bits is not None
        self.op = problem.op
        table = problem.weight_bits == 1 and problem.activation_bits <= _TABLE_BITS and native.has_tables()
        image = problem.over_images()
        kernel, stride, dilation, padding = image.kernel_size, image.stride, image.dilation, image.padding
        self.granule = 16 if table else 4
        self.padding = padding
        self.reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
        self.stride = stride
        self.in_channels, self.out_channels = problem.in_channels, problem.out_channels
        self.padded_channels = _round_up(problem.in_channels, self.granule)
        self.top = 2**problem.activation_bits - 1
        self.kernel = kernel
        bases, out, length = tensors.weight.codes.shape
        self.shape = (bases, out, length)
        self.packed = pack_columns(tensors.weight, kernel, table)
        self.bias = None if tensors.bias is None else tensors.bias.float().contiguous()
        reciprocal = tensors.channel_reciprocal
        self.channel_reciprocal = None if reciprocal is None else reciprocal.float().contiguous()
        self.layer = native.Layer(
            out_channels=self.out_channels,
            padded_channels=self.padded_channels,
            kernel_h=kernel[0],
            kernel_w=kernel[1],
            stride_h=stride[0],
            stride_w=stride[1],
            dilation_h=dilation[0],
            dilation_w=dilation[1],
            bits=self.packed.bits,
            bases=bases,
            panel=self.packed.panel,
            table=table,
            weight=self.packed.weight.data_ptr(),
            zero=self.packed.zero.data_ptr(),
            sum=self.packed.sum.data_ptr(),
            scale=self.packed.scale.data_ptr(),
        )

    def __call__(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
        if self.op == "linear":
            x = x.contiguous()
            y = self.convolve(x.reshape(len(x), 1, prod(x.shape[1:-1]), x.shape[-1]), scale, zero_point)
            return y.reshape(*x.shape[:-1], self.out_channels)
        if self.op == "conv1d":
            return self.convolve(x.transpose(1, 2).contiguous()[:, None], scale, zero_point)[:, 0].transpose(1, 2)
        return self.convolve(x.permute(0, 2, 3, 1).contiguous(), scale, zero_point).permute(0, 3, 1, 2)

    def convolve(
        self,
        x: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        before: Before | None = None,
        *,
        bias: Tensor | None = None,
        gain: Tensor | None = None,
        residual: Tensor | None = None,
        repeat: int = 1,
    ) -> Tensor:
        """``residual + gain * (convolve(quantize(before(x))) + bias)``, on contiguous float32 NHWC tensors.

        ``bias`` ``[batch, out]`` replaces the layer's own; ``gain`` is ``[batch, out]``; ``residual`` has y's shape.
        Every pixel of x stands for ``repeat`` x ``repeat`` of them. BitstepError for what does not fit the layer.
        """
        assert scale is not None
        assert zero_point is not None
        native.refuse_tracing()
        batch, height, width, channels = x.shape
        gated = before is not None and before.activation == "geglu"
        if gated and before != Before(activation="geglu"):
            raise BitstepError(f"a gated input goes with nothing else before the product, got {before}")
        channels = channels // 2 if gated else channels
        size = self._extent(0, height * repeat), self._extent(1, width * repeat)
        if channels != self.in_channels or min(size) < (1 if x.numel() else 0):
            raise BitstepError(
                f"a layer of {self.in_channels} channels, its kernel {self.reach[0]}x{self.reach[1]} in all, "
                f"got {channels} channels and a map of {height * repeat}x{width * repeat}"
            )
        y = x.new_empty(batch, *size, self.out_channels)
        _require((bias, gain), (batch, self.out_channels))
        _require((residual,), tuple(y.shape))
        _require((scale, zero_point), (1,), (batch,))
        if before is not None:
            _require((before.gain, before.shift), (channels,), (1, channels), (batch, channels))
        scale, zero_point = scale.contiguous(), zero_point.contiguous()
        if y.numel():
            native.run(self.call, y, x, scale, zero_point, before, bias, gain, residual, repeat, in_parts=not gated)
        return y

    def call(
        self,
        y: Tensor,
        x: Tensor | tuple[Tensor, Tensor],
        scale: Tensor,
        zero_point: Tensor,
        before: Before | None,
        bias: Tensor | None,
        gain: Tensor | None,
        residual: Tensor | None,
        repeat: int,
    ) -> native.Call:
        """The call that makes :meth:`convolve`'s result in y; x may be two tensors whose channels are to be joined."""
        lib = native.kernels()
        assert lib is not None
        x, rest = x if isinstance(x, tuple) else (x, None)
        batch, height, width, channels = x.shape
        channels = self.in_channels if rest is None else channels
        rest_channels = 0 if rest is None else rest.shape[-1]
        return partial(
            lib.bitstep_convolution,
            self.layer,
            native.Map(
                batch,
                height * repeat,
                width * repeat,
                channels + rest_channels,
                self.padded_channels,
                *self.padding,
                repeat,
                _address(rest),
                rest_channels,
            ),
            before and before.prologue(),
            native.Step(
                scale.data_ptr(), zero_point.data_ptr(), len(scale), self.top, _address(self.channel_reciprocal)
            ),
            x.data_ptr(),
            native.Epilogue(
                _address(self.bias if bias is None else bias),
                1 if bias is None else batch,
                _address(gain),
                _address(residual),
            ),
            y.data_ptr(),
            torch.get_num_threads(),
        )

    def codes(self) -> Tensor:
        return unpack_columns(self.packed, self.shape, self.kernel, bool(self.layer.table))

    def _extent(self, axis: int, size: int) -> int:
        return (size + 2 * self.padding[axis] - self.reach[axis]) // self.stride[axis] + 1


class Before(NamedTuple):
    """What is done to a layer's input before it is quantized: ``activation(normalize(x) * gain + shift)``.

    ``eps`` None means no normalization; otherwise it is over each pixel's channels, or over ``groups`` of them.
    gain, shift: contiguous float32 ``[channels]`` or, without groups, ``[batch, channels]``; None for none
    activation: "gelu" is its tanh approximation; "geglu" takes twice the channels, values and then their gates, of
        which it makes ``value * gelu(gate)``, gelu exact, and goes with nothing else
    """

    eps: float | None = None
    groups: int = 0
    gain: Tensor | None = None
    shift: Tensor | None = None
    activation: Activation = "none"

    def prologue(self) -> native.Prologue:
        return native.Prologue(
            0 if self.eps is None else 2 if self.groups else 1,
            self.groups,
            self.eps or 0.0,
            _address(self.gain),
            _address(self.shift),
            max(len(t) if t is not None and t.ndim > 1 else 1 for t in (self.gain, self.shift)),
            ACTIVATIONS.index(self.activation),
        )


@dataclass(frozen=True)
class Columns:
    """A weight as ``native/bitstep.h`` lays it out.

    weight: uint8, the packed blocks; bits: of memory per byte of a block; panel: columns of a panel
    zero: int8 ``[columns, 64]``; sum: int32 ``[columns, 16]``; scale: float32 ``[columns, 16]``
    """

    weight: Tensor
    bits: int
    panel: int
    zero: Tensor
    sum: Tensor
    scale: Tensor


def pack_columns(weight: QuantizedWeight, kernel: tuple[int, ...], table: bool) -> Columns:
    """Re-lay a weight out in columns of 16 output channels; ``table`` makes its signs indices into tables."""
    bases, out, _ = weight.codes.shape
    codes = weight.codes.reshape(bases, out, -1, *kernel)
    extra = (-out % _COLUMN, -codes.shape[2] % (16 if table else 4))
    codes = F.pad(codes, (0, 0, 0, 0, 0, extra[1], 0, extra[0]))
    codes = _interleave(codes)
    scale = _interleave(F.pad(weight.scale.float(), (0, extra[0])))
    panel = 4 if table else 2
    if table:
        bits = 4
        sums = torch.zeros_like(scale, dtype=torch.int32)
        zero = torch.arange(0, -64, -16).repeat(len(scale), _COLUMN)
        codes = _join(codes.reshape(*codes.shape[:2], -1, 4, *kernel).unbind(3), 1)
    else:
        bits = {1: 1, 2: 2, 3: 4, 4: 4}.get(weight.bits, 8)
        if weight.zero_point is None:
            zero, values = torch.ones_like(scale, dtype=torch.int32), 2 * codes.int() - 1
        else:
            zero = _interleave(F.pad(weight.zero_point.int(), (0, extra[0])).expand(bases, -1))
            values = codes.int() - zero[:, :, None, None, None]
        sums = values.sum((2, 3, 4), dtype=torch.int32)
        zero = zero.repeat_interleave(4, 1)
        if bits == 8:
            codes = values.to(torch.int8).view(torch.uint8)
    # [column, 16, granule, 4, h, w] -> [h, w, granule, column, 16, 4]
    blocks = codes.reshape(-1, _COLUMN, codes.shape[2] // 4, 4, *kernel).permute(4, 5, 2, 0, 1, 3)
    panels = [_share(part.reshape(-1, 64), bits) for part in torch.split(blocks, panel, 3)]
    return Columns(
        weight=torch.cat(panels),
        bits=bits,
        panel=panel,
        zero=zero.to(torch.int8).contiguous(),
        sum=sums.contiguous(),
        scale=scale.contiguous(),
    )


def unpack_columns(columns: Columns, shape: tuple[int, int, int], kernel: tuple[int, ...], table: bool) -> Tensor:
    """The codes, uint8 ``[bases, out, n]`` = ``shape``, that :func:`pack_columns` re-laid."""
    bases, out, length = shape
    share, granules = 8 // columns.bits, -(-length // prod(kernel) // (16 if table else 4))
    parts: list[Tensor] = []
    begin = 0
    for zero in torch.split(columns.zero, columns.panel):
        blocks = prod(kernel) * granules * len(zero)
        end = begin + -(-blocks // share)
        shared = torch.stack([columns.weight[begin:end] >> columns.bits * i for i in range(share)], 1)
        parts.append(shared.reshape(-1, 64)[:blocks].reshape(*kernel, granules, len(zero), _COLUMN, 4))
        begin = end
    codes: Tensor = torch.cat(parts, 3).permute(3, 4, 2, 5, 0, 1).flatten(2, 3) & (2**columns.bits - 1)
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


def _require(tensors: Iterable[Tensor | None], *shapes: tuple[int, ...]) -> None:
    """The tensors, but for those left out, have all the same of the shapes."""
    found = {tensor.shape for tensor in tensors if tensor is not None}
    if len(found) > 1 or not found.issubset(shapes):
        raise BitstepError(f"expected tensors of shape {shapes}, got {sorted(map(tuple, found))}")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
