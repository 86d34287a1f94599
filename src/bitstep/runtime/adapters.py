"""Adapters (LoRA) beside packed layers that are given x / s and return y / d, as folding leaves them.

What an adapter adds was trained on x and y, so it is shown x again, and its output is divided; with W the packed
weight, which has s and d in it,

    y / d = W (x / s)     becomes     W (x / s) + B A (s (x / s)) / d
"""

from __future__ import annotations

from torch import Tensor, nn

from bitstep.errors import BitstepError
from bitstep.runtime.layers import PackedModule
from bitstep.runtime.reference import align_channels


def fit_adapters(model: nn.Module) -> None:
    """Fit the adapters in ``model`` that are not fitted yet, as peft puts them around layers; BitstepError for other
    kinds than LoRA, where something is divided."""
    for name, module in model.named_modules():
        layer = getattr(module, "base_layer", None)
        if not isinstance(layer, PackedModule) or (layer.input_divisor is None and layer.output_divisor is None):
            continue
        down, up = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if not (isinstance(down, nn.ModuleDict) and isinstance(up, nn.ModuleDict)) or _has_more(module):
            raise BitstepError(
                f"{name} has an adapter that is no plain LoRA, and a layer whose scales are folded into the layers "
                "around it: quantize with --set 'rewrites=[]' for such adapters"
            )
        for parts, of_channels, fitted in ((down, layer.input_divisor, _SHOWN), (up, layer.output_divisor, _ADDED)):
            divisor = align_channels(of_channels, layer.problem)
            for part in parts.values():
                if divisor is not None and type(part) in fitted:
                    part.register_buffer("divisor", divisor, persistent=False)
                    part.__class__ = fitted[type(part)]


def _has_more(module: nn.Module) -> bool:
    """Whether an adapter computes with more than A and B, as DoRA does."""
    return any(len(getattr(module, name, ())) for name in ("lora_variant", "lora_magnitude_vector"))


class _Shown:
    """A of an adapter beside a layer whose input was divided."""

    divisor: Tensor

    def forward(self, input: Tensor) -> Tensor:
        shown: Tensor = super().forward(input * self.divisor.to(input.dtype))  # type: ignore[misc]
        return shown


class _Added:
    """B of an adapter beside a layer that returns a divided output."""

    divisor: Tensor

    def forward(self, input: Tensor) -> Tensor:
        added: Tensor = super().forward(input)  # type: ignore[misc]
        return added / self.divisor.to(added.dtype)


class ShownLinear(_Shown, nn.Linear):
    """A of a linear layer."""


class ShownConv1d(_Shown, nn.Conv1d):
    """A of a one-dimensional convolution."""


class ShownConv2d(_Shown, nn.Conv2d):
    """A of a two-dimensional convolution."""


class AddedLinear(_Added, nn.Linear):
    """B of a linear layer."""


class AddedConv1d(_Added, nn.Conv1d):
    """B of a one-dimensional convolution."""


class AddedConv2d(_Added, nn.Conv2d):
    """B of a two-dimensional convolution."""


_SHOWN: dict[type, type] = {nn.Linear: ShownLinear, nn.Conv1d: ShownConv1d, nn.Conv2d: ShownConv2d}
_ADDED: dict[type, type] = {nn.Linear: AddedLinear, nn.Conv1d: AddedConv1d, nn.Conv2d: AddedConv2d}
