"""Pack: the trained student's codes and tables, handed to the checkpoint format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin

from bitstep.checkpoint import PackedLayer, PackedOperands, pack_model
from bitstep.stages.prepare import Student


def pack(student: Student, recipe: Mapping[str, Any]) -> ModelMixin:
    """The packed model of a trained student; ``recipe``, JSON, is noted in its config."""
    return pack_model(
        student.denoiser,
        _layers(student),
        grid=student.cursor.grid,
        modules_to_not_convert=student.plan.left_alone,
        total_macs=student.plan.total_macs,
        recipe=recipe,
        attention=_attention(student),
    )


@torch.no_grad()
def _layers(student: Student) -> dict[str, PackedLayer]:
    macs = {layer.name: layer.macs for layer in student.plan.layers}
    packed = {}
    for name, layer in student.layers.items():
        quantizer, codes = layer.input_quantizer, layer.weight_quantizer.codes()
        scale, zero_point = (None, None) if quantizer is None else quantizer.tables()
        packed[name] = PackedLayer(
            weight=codes,
            bias=layer.bias,
            input_scale=scale,
            input_zero_point=zero_point,
            activation_bits=None if quantizer is None else quantizer.bits,
            channel_reciprocal=layer.channel_reciprocal,
            input_divisor=student.rewritten.input_divisor(name),
            output_divisor=student.rewritten.output_divisor(name, len(codes.codes[0])),
            macs=macs[name],
        )
    return packed


@torch.no_grad()
def _attention(student: Student) -> dict[str, PackedOperands]:
    return {
        site.name: PackedOperands(student.attention[site.name].tables(), site.bits, site.probability_bits, site.macs)
        for site in student.plan.attention
    }
