"""Pack: the trained student's codes and tables, handed to the checkpoint format."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bitstep.checkpoint import PackedLayer, PackedOperands
from bitstep.quantizers.attention import AttentionQuantizer
from bitstep.quantizers.layers import FakeQuantized
from bitstep.surgery import Plan


@torch.no_grad()
def packed_layers(layers: Mapping[str, FakeQuantized], plan: Plan) -> dict[str, PackedLayer]:
    """What the packed model stores for every quantized layer."""
    macs = {layer.name: layer.macs for layer in plan.layers}
    packed = {}
    for name, layer in layers.items():
        quantizer = layer.input_quantizer
        scale, zero_point = (None, None) if quantizer is None else quantizer.tables()
        packed[name] = PackedLayer(
            weight=layer.weight_quantizer.codes(),
            bias=layer.bias,
            input_scale=scale,
            input_zero_point=zero_point,
            activation_bits=None if quantizer is None else quantizer.bits,
            channel_reciprocal=layer.channel_reciprocal,
            macs=macs[name],
        )
    return packed


@torch.no_grad()
def packed_attention(attention: Mapping[str, AttentionQuantizer], plan: Plan) -> dict[str, PackedOperands]:
    """What the packed model stores for every quantized attention."""
    return {
        site.name: PackedOperands(attention[site.name].tables(), site.bits, site.probability_bits, site.macs)
        for site in plan.attention
    }
