"""The packed checkpoint: its format (docs/format.md), the writer, and the diffusers plug-in that loads it."""

from __future__ import annotations

from diffusers.quantizers import auto

from bitstep.checkpoint.config import BitstepConfig, Manifest, QuantMethod
from bitstep.checkpoint.plugin import BitstepQuantizer
from bitstep.checkpoint.write import PackedLayer, PackedOperands, pack_model

__all__ = ["BitstepConfig", "BitstepQuantizer", "Manifest", "PackedLayer", "PackedOperands", "pack_model"]

# diffusers offers no public way to make its from_pretrained load packed models
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.BITSTEP.value] = BitstepConfig
auto.AUTO_QUANTIZER_MAPPING[QuantMethod.BITSTEP.value] = BitstepQuantizer
