"""Quantized attention operands: an activation quantizer for each of query, key, value and the probabilities."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from bitstep.quantizers.activations import ActivationQuantizer


class AttentionQuantizer(nn.Module):
    """What :func:`bitstep.denoiser.attention.intercept` applies in one module; a quantizer per operand."""

    def __init__(self, operands: Mapping[str, ActivationQuantizer]) -> None:
        super().__init__()
        self.operands = nn.ModuleDict(operands)

    def forward(self, operand: str, tensor: Tensor) -> Tensor:
        quantized: Tensor = self.operands[operand](tensor)
        return quantized

    def tables(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Scales and integer-valued zero points of every operand: what the packed model stores."""
        return {name: quantizer.tables() for name, quantizer in self.operands.items()}  # type: ignore[operator]
