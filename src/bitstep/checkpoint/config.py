"""What ``quantization_config`` in a packed model's ``config.json`` says: docs/format.md as types, strictly checked."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, Literal, Self

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from bitstep.denoiser.steps import StepGrid
from bitstep.errors import BitstepError
from bitstep.runtime.attention import AttentionFormat
from bitstep.runtime.layers import LayerFormat

FORMAT_VERSION: Final = 1


class QuantMethod(StrEnum):
    """The name of this plug-in, as the member of an enumeration that diffusers expects."""

    BITSTEP = "bitstep"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Grid(_Strict):
    """The keys of the per-timestep tables; see :class:`bitstep.denoiser.steps.StepGrid`."""

    keys: list[float]
    unit: float

    def grid(self) -> StepGrid:
        return StepGrid(tuple(self.keys), self.unit)


class LayerEntry(_Strict):
    """One packed layer: a :class:`~bitstep.runtime.layers.LayerFormat`, and its MACs in one forward pass at batch 1."""

    weight_bits: int = Field(ge=1, le=8)
    bases: int = Field(ge=1, le=2)
    symmetric: bool
    activation_bits: int | None = Field(ge=1, le=8)
    steps: int = Field(ge=0)
    channel_reciprocal: bool
    input_divided: bool = False
    output_divided: bool = False
    macs: int = Field(ge=0, lt=2**63)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.bases == 2 and self.weight_bits != 1:
            raise ValueError("two bases need weights of one bit")
        if self.weight_bits == 1 and not self.symmetric:
            raise ValueError("weights of one bit are symmetric")
        if (self.activation_bits is None) != (self.steps == 0):
            raise ValueError("steps is 0 exactly when activation_bits is null")
        return self

    def layer_format(self) -> LayerFormat:
        return LayerFormat(**self.model_dump(exclude={"macs"}))


class AttentionEntry(_Strict):
    """The attention of one module: an :class:`~bitstep.runtime.attention.AttentionFormat`, and its MACs."""

    bits: int = Field(ge=1, le=8)
    probability_bits: int = Field(ge=1, le=8)
    steps: int = Field(ge=1)
    macs: int = Field(ge=0, lt=2**63)

    def attention_format(self) -> AttentionFormat:
        return AttentionFormat(**self.model_dump(exclude={"macs"}))


class Macs(_Strict):
    """Multiply-accumulates of one forward pass at batch 1: all, and those with both factors quantized."""

    total: int = Field(gt=0, lt=2**63)
    quantized: int = Field(ge=0, lt=2**63)

    @model_validator(mode="after")
    def _are_not_exceeded(self) -> Self:
        if self.quantized > self.total:
            raise ValueError(f"{self.quantized} multiply-accumulates of {self.total} cannot be quantized")
        return self


class Manifest(_Strict):
    """The whole of ``quantization_config``."""

    quant_method: Literal["bitstep"] = "bitstep"
    format_version: Literal[1] = FORMAT_VERSION
    compute_dtype: Literal["float32"] = "float32"
    step_grid: Grid | None
    layers: dict[str, LayerEntry]
    attention: dict[str, AttentionEntry] = {}
    preconditioned: bool = False
    modules_to_not_convert: dict[str, str]
    macs: Macs
    recipe: dict[str, JsonValue]

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        rows = {0, 1} if self.step_grid is None else {0, 1, len(self.step_grid.grid())}
        for name, entry in (self.layers | self.attention).items():
            if entry.steps not in rows:
                raise ValueError(f"{name!r} has {entry.steps} steps, the step grid allows {sorted(rows)}")
        if self.preconditioned and self.step_grid is None:
            raise ValueError("a preconditioned output needs a step grid")
        return self


class BitstepConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A :class:`Manifest` as diffusers carries it; BitstepError for fields that docs/format.md does not allow."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QuantMethod.BITSTEP
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise BitstepError(f"the checkpoint has format_version {version!r}, this bitstep reads {FORMAT_VERSION}")
        try:
            self.manifest = Manifest.model_validate(fields)
        except ValidationError as error:
            raise BitstepError(f"quantization_config is damaged: {_first(error)}") from None

    def to_dict(self) -> dict[str, Any]:
        return self.manifest.model_dump()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def _first(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False, include_context=False)
    where = ".".join(map(str, first["loc"]))
    return f"{where or 'it'}: {first['msg']}" + (f" (and {len(others)} more)" if others else "")
