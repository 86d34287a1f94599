"""The fake-quantized layer that training sees: ``op(input_quantizer(x), weight_quantizer.fake()) + bias``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bitstep.denoiser.layers import QUANTIZABLE
from bitstep.quantizers.activations import ActivationQuantizer
from bitstep.quantizers.weights import WeightQuantizer


class FakeQuantized(nn.Module):
    """A Linear, Conv1d or Conv2d with a fake-quantized weight and, unless ``input_quantizer`` is None, input.

    channel_reciprocal: float32 ``[in]`` or None; the input is multiplied by it before it is quantized (the weight
    holds its inverse: weight dilation).
    """

    bias: Tensor | None
    channel_reciprocal: Tensor | None

    def __init__(
        self,
        layer: nn.Linear | nn.Conv1d | nn.Conv2d,
        weight_quantizer: WeightQuantizer,
        input_quantizer: ActivationQuantizer | None,
        channel_reciprocal: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight_quantizer, self.input_quantizer = weight_quantizer, input_quantizer
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.register_buffer("channel_reciprocal", channel_reciprocal)
        self._geometry: dict[str, Any] = {}
        if not isinstance(layer, nn.Linear):
            names = ("stride", "padding", "dilation", "groups")
            self._geometry = {name: getattr(layer, name) for name in names}
        operations: dict[type, Callable[..., Tensor]] = {nn.Linear: F.linear, nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d}
        self._operation = next(operations[kind] for kind in QUANTIZABLE if isinstance(layer, kind))

    @property
    def weight(self) -> Tensor:
        """The quantized weight (diffusers reads ``layer.weight.dtype`` in places).

        While its quantizer is not enabled the weight is not trained: without rounding its gradients are so small that
        Adam, which scales steps by those it remembers, would leap once rounding begins.
        """
        quantizer = self.weight_quantizer
        return quantizer.fake() if quantizer.enabled else quantizer.source().detach()

    def forward(self, input: Tensor, *_: Any) -> Tensor:
        x = input  # named as in PyTorch's layers, for models that call them so
        if self.channel_reciprocal is not None:
            trailing = 0 if not self._geometry else x.ndim - 2
            x = x * self.channel_reciprocal.reshape(-1, *[1] * trailing)
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return self._operation(x, self.weight, self.bias, **self._geometry)


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Forward passes under this context manager keep nothing for gradients of the parameters of ``modules``."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
