"""The activation quantizer: one learned (scale, zero point) per row of the step grid, or a single static one."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from bitstep.denoiser.steps import StepCursor, interpolate, interpolate_scale, per_sample
from bitstep.numerics import uniform


class ActivationQuantizer(nn.Module):
    """Per-tensor fake quantization with a table of T rows (EfficientDM's TALSQ, DilateQuant's TPQ).

    scale, zero_point: float32 ``[T]``; T is the length of the cursor's grid, or 1 for a static quantizer.

    Forward: the row of each sample's timestep, then :func:`bitstep.numerics.uniform.fake_quantize`. A batch may mix
    timesteps. Scales are learned as logarithms, zero points are rounded with a straight-through gradient, or fixed for
    ``signed`` codes (LSQ).

    A warm-up sets ``enabled`` to False for a while; values then pass as they are.
    """

    ROLES: ClassVar = {"log_scale": "activation_scale", "zero_point": "activation_zero_point"}
    enabled = True

    def __init__(
        self, bits: int, scale: Tensor, zero_point: Tensor, cursor: StepCursor, *, signed: bool = False
    ) -> None:
        super().__init__()
        if len(scale) not in (1, len(cursor.grid)):
            raise ValueError(f"expected 1 or {len(cursor.grid)} rows, got {len(scale)}")
        self.bits, self.cursor = bits, cursor
        self.log_scale = nn.Parameter(scale.log())
        if signed:
            self.register_buffer("zero_point", zero_point.clone())
        else:
            self.zero_point = nn.Parameter(zero_point.clone())

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        scale, zero_point = self.tables()
        if len(scale) > 1:
            position = self.cursor.position.to(x.device)
            scale = interpolate_scale(scale, position)
            zero_point = uniform.round_zero_point(interpolate(zero_point, position), self.bits)
        return uniform.fake_quantize(x, per_sample(scale, x), per_sample(zero_point, x), self.bits)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Scales and integer-valued zero points, each ``[T]``: what the packed layer stores."""
        return self.log_scale.exp(), uniform.round_zero_point(self.zero_point, self.bits)
