"""Packed layers: linear layers and convolutions that hold b-bit codes, and run them with a kernel.

They subclass the layers they replace, so that code which looks for an ``nn.Linear`` or ``nn.Conv2d`` (adapters, for
one) finds them. The floating-point weight is never stored: :attr:`PackedModule.weight` is computed when it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

from bitstep.denoiser.layers import QUANTIZABLE, refusal
from bitstep.errors import BitstepError
from bitstep.numerics.dilation import stretched
from bitstep.numerics.packing import QuantizedWeight, keeping_dtype, pack, packed_size, unpack
from bitstep.runtime.kernel import CodeKeeper, Forward, Kernel, LayerTensors, Problem, refuse_gradients
from bitstep.runtime.tables import StepRows, rows_of

Packable = nn.Linear | nn.Conv1d | nn.Conv2d
_INPUT = "input"  # the table of a layer
_HYPERPARAMETERS = {*nn.Linear.__constants__, *nn.Conv2d.__constants__}


@dataclass(frozen=True)
class LayerFormat:
    """How one layer is packed.

    ``weight_bits``, ``bases``, ``symmetric``, ``activation_bits``, ``channel_reciprocal``: as in
    :class:`~bitstep.runtime.kernel.Problem`. ``steps``: rows of the input scales: one per key of the model's step
    grid, 1 for a static scale, 0 when activations stay floating point. ``input_divided``, ``output_divided``: whether
    something before the layer divides its input, and the layer its output for something behind it.
    """

    weight_bits: int
    bases: int
    symmetric: bool
    activation_bits: int | None
    steps: int
    channel_reciprocal: bool
    input_divided: bool = False
    output_divided: bool = False


def layer_problem(layer: Packable, layer_format: LayerFormat, device: str) -> Problem:
    """What a kernel would be asked for ``layer``, a linear layer or convolution, packed as ``layer_format``."""
    own = {field.name for field in fields(Problem)} & {field.name for field in fields(LayerFormat)}
    shared: dict[str, Any] = {name: getattr(layer_format, name) for name in own}
    if isinstance(layer, nn.Linear):
        return Problem(
            op="linear",
            in_channels=layer.in_features,
            out_channels=layer.out_features,
            kernel_size=(),
            stride=(),
            padding=(),
            dilation=(),
            groups=1,
            device=device,
            **shared,
        )
    assert not isinstance(layer.padding, str)  # those are refused
    return Problem(
        op="conv1d" if isinstance(layer, nn.Conv1d) else "conv2d",
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        kernel_size=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        device=device,
        **shared,
    )


class PackedModule(nn.Module):
    """A layer that holds its :class:`LayerFormat`, its tensors as on disk, and the kernel that runs it.

    Buffers (``n`` weights an output channel; None where the format has no such tensor):

        weight_packed             uint8   [bases, out, ceil(n * weight_bits / 8)]
        weight_scale              float32 [bases, out]
        weight_zero_point         uint8   [out]         asymmetric weights
        input_scale               float32 [steps]       quantized activations
        input_zero_point          uint8   [steps]       quantized activations
        input_channel_reciprocal  float32 [in]          dilated weights
        input_divisor             float32 [in]          divided input, for adapters alone
        output_divisor            float32 [out]         divided output, likewise
        bias                      float32 [out]

    A kernel that keeps the codes (:class:`~bitstep.runtime.kernel.CodeKeeper`) is their only holder while it is in use;
    ``weight_packed`` is then made anew whenever it is read or saved.

    ``choose`` picks the kernel, when the layer first runs and again after it moved to another device; see
    :func:`bitstep.runtime.dispatch.set_backend`.
    """

    weight_scale: Tensor
    weight_zero_point: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    input_channel_reciprocal: Tensor | None
    input_divisor: Tensor | None
    output_divisor: Tensor | None
    bias: Tensor | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Adapters make layers of their own as ``type(layer)(in, out, ...)``: these are plain ones."""
        if args and isinstance(args[0], int):
            return next(base for base in cls.__mro__ if not issubclass(base, PackedModule))(*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, like: Packable, layer_format: LayerFormat, rows: StepRows | None) -> None:
        """An empty packed layer with the geometry, the bias and the device of ``like``.

        ``rows`` selects the row of the input scales; a format with fewer than two steps needs none.
        """
        nn.Module.__init__(self)  # past the layer's own constructor, which would allocate a weight
        for name in _HYPERPARAMETERS & vars(like).keys():
            setattr(self, name, getattr(like, name))
        self._problem = layer_problem(like, layer_format, "meta")
        self.format = layer_format
        self.rows = rows if layer_format.steps > 1 else None
        if self.rows is not None:
            self.rows.tables.append((self, _INPUT))
        self.choose: Callable[[Problem], Kernel] | None = None
        self._kernel: Kernel | None = None
        self._run: Forward | None = None
        self._register_buffers(like.bias is not None, like.weight.device)

    @property
    def weight_packed(self) -> Tensor:
        stored = self._buffers.get("weight_packed")
        if stored is not None:
            return stored
        if not isinstance(self._run, CodeKeeper):
            raise AttributeError("weight_packed")
        return pack(self._run.codes(), self.format.weight_bits)

    @property
    def problem(self) -> Problem:
        """What the layer asks of a kernel, on the device where its tensors are."""
        return replace(self._problem, device=self.weight_scale.device.type)

    @property
    def kernel(self) -> Kernel:
        """The kernel that runs this layer."""
        if self._kernel is None:
            if self.choose is None:
                raise BitstepError("a packed layer has no kernel: call bitstep.runtime.dispatch.set_backend first")
            self._kernel = self.choose(self.problem)
        return self._kernel

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(out, in / groups, *kernel_size)``."""
        problem = self._problem
        return (problem.out_channels, problem.in_channels // problem.groups, *problem.kernel_size)

    @property
    def packed_nbytes(self) -> int:
        """Bytes of ``weight_packed``."""
        out, *rest = self.weight_shape
        return self.format.bases * out * packed_size(prod(rest), self.format.weight_bits)

    @property
    def weight(self) -> Tensor:
        """The weight that takes the layer's input as it comes, the channel reciprocals in it: float32, computed
        whenever its values are read."""
        return _Computed(self)

    def computed_weight(self) -> Tensor:
        """The values of ``weight``."""
        tensors = self.tensors()
        weight, reciprocal = tensors.weight.dequantize(), tensors.channel_reciprocal
        return weight if reciprocal is None else stretched(weight, reciprocal, self._problem.groups)

    def tensors(self) -> LayerTensors:
        """The layer's tensors as kernels take them, the codes unpacked."""
        shape, bits = self.weight_shape, self.format.weight_bits
        codes = unpack(self.weight_packed, bits, prod(shape[1:]))
        zero_point = self.weight_zero_point
        if zero_point is None and bits > 1:
            zero_point = torch.full(shape[:1], 2 ** (bits - 1), dtype=torch.uint8, device=codes.device)
        weight = QuantizedWeight(codes, self.weight_scale, zero_point, bits, shape)
        return LayerTensors(weight, self.bias, self.input_channel_reciprocal)

    def prepare(self) -> None:
        """Choose the kernel and re-lay the weight out for it, now rather than in the first forward pass."""
        if self.weight_scale.is_meta:
            raise BitstepError("a packed layer has no values: load them, or offload the model without its buffers")
        self._run = self.kernel.prepare(self.problem, self.tensors())
        if isinstance(self._run, CodeKeeper):
            self._buffers["weight_packed"] = None

    def forward(self, input: Tensor) -> Tensor:
        """Computes in float32 and returns the dtype of ``input``, which is named as in PyTorch's layers."""
        if self.format.activation_bits is not None:
            refuse_gradients(input)
        taken = input if input.dtype in self.kernel.dtypes else input.float()
        return self.run(taken, *self.input_rows(input)).to(input.dtype)

    @property
    def run(self) -> Forward:
        """What the kernel prepared; the first read prepares it."""
        if self._run is None:
            self.prepare()
        assert self._run is not None
        return self._run

    def extra_repr(self) -> str:
        activations = "" if self.format.activation_bits is None else f"A{self.format.activation_bits}"
        return f"{super().extra_repr()}, W{self.format.weight_bits}{activations}"

    def forget_kernel(self) -> None:
        """Drop what was prepared from the tensors, because they or their device change."""
        self._buffers["weight_packed"] = self.weight_packed
        self._kernel = self._run = None
        if self.rows is not None:
            self.rows.forget()

    def _register_buffers(self, bias: bool, device: torch.device) -> None:
        form, (out, *rest) = self.format, self.weight_shape

        def register(name: str, dtype: torch.dtype, *shape: int, wanted: bool = True) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device) if wanted else None)

        register("weight_packed", torch.uint8, form.bases, out, packed_size(prod(rest), form.weight_bits))
        register("weight_scale", torch.float32, form.bases, out)
        register("weight_zero_point", torch.uint8, out, wanted=not form.symmetric)
        register("input_scale", torch.float32, form.steps, wanted=form.steps > 0)
        register("input_zero_point", torch.uint8, form.steps, wanted=form.steps > 0)
        channels = self._problem.in_channels
        register("input_channel_reciprocal", torch.float32, channels, wanted=form.channel_reciprocal)
        register("input_divisor", torch.float32, channels, wanted=form.input_divided)
        register("output_divisor", torch.float32, out, wanted=form.output_divided)
        register("bias", torch.float32, out, wanted=bias)

    def input_rows(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scale and zero point of the activations: float32 ``[1]`` or ``[batch]``, at the cursor's position."""
        return (None, None) if self.input_scale is None else rows_of((self, _INPUT), self.rows, x)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget_kernel()
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_kernel()
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        stored = self._buffers["weight_packed"]
        self._buffers["weight_packed"] = self.weight_packed
        super()._save_to_state_dict(*args, **kwargs)
        self._buffers["weight_packed"] = stored

    def __getstate__(self) -> dict[str, Any]:
        # a copy prepares its own kernel: its tensors may be changed
        buffers = {**self._buffers, "weight_packed": self.weight_packed}
        return {**self.__dict__, "_buffers": buffers, "_kernel": None, "_run": None}


class _Computed(Tensor):
    """The weight of a packed layer. Denoisers that ask for its dtype in every forward pass do not have it computed.

    Adapters are fused by writing to ``weight.data``, which would be lost.
    """

    # what is computed from it is a plain tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _layer: PackedModule

    def __new__(cls, layer: PackedModule) -> Self:
        shape, device = layer.weight_shape, layer.weight_scale.device
        computed: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=device)
        computed._layer = layer
        return computed

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: OpOverload[Any, Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = args, kwargs or {}
        args, kwargs = tree_map_only(cls, lambda weight: weight._layer.computed_weight(), given)
        return op(*args, **kwargs)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        return self.detach().numpy(force=force)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise BitstepError("a packed weight cannot be written to: leave adapters unfused")


class PackedLinear(PackedModule, nn.Linear):  # type: ignore[misc, override]
    """A packed ``nn.Linear``; the input is ``[batch, ..., in_features]``."""


class PackedConv1d(PackedModule, nn.Conv1d):  # type: ignore[override]
    """A packed ``nn.Conv1d``; the input is ``[batch, in_channels, length]``."""


class PackedConv2d(PackedModule, nn.Conv2d):  # type: ignore[override]
    """A packed ``nn.Conv2d``; the input is ``[batch, in_channels, height, width]``."""


def packed_like(layer: nn.Module, layer_format: LayerFormat, rows: StepRows | None) -> PackedModule:
    """The empty packed layer that takes the place of ``layer``; BitstepError where none can."""
    if why := refusal(layer):
        raise BitstepError(f"a {type(layer).__name__} cannot be packed: {why}")
    kinds: dict[type[nn.Module], Callable[..., PackedModule]] = {
        nn.Linear: PackedLinear,
        nn.Conv1d: PackedConv1d,
        nn.Conv2d: PackedConv2d,
    }
    return next(kinds[kind](layer, layer_format, rows) for kind in QUANTIZABLE if isinstance(layer, kind))
