"""From what training leaves (codes, scales, tables) to a packed diffusers model that saves itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import accelerate
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from bitstep.checkpoint.config import AttentionEntry, BitstepConfig, Grid, LayerEntry, Macs, Manifest
from bitstep.checkpoint.plugin import BitstepQuantizer
from bitstep.denoiser.preconditioning import Preconditioning
from bitstep.denoiser.steps import StepGrid
from bitstep.numerics.packing import QuantizedWeight, pack
from bitstep.runtime.attention import PackedAttention


@dataclass(frozen=True)
class PackedLayer:
    """One quantized layer, as training hands it over.

    bias: float32 ``[out]`` or None
    input_scale, input_zero_point: ``[T]``, one row per key of the grid, or ``[1]`` for a static quantizer; zero points
        integer-valued; None, like ``activation_bits``, for activations in floating point
    channel_reciprocal: ``[in]``, what the input is multiplied by before it is quantized, or None
    input_divisor, output_divisor: ``[in]``, ``[out]``, what the input was and the output is divided by, or None;
        for adapters alone (:mod:`bitstep.runtime.adapters`)
    macs: multiply-accumulates of the layer in one forward pass at batch 1
    """

    weight: QuantizedWeight
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    activation_bits: int | None
    channel_reciprocal: Tensor | None
    macs: int
    input_divisor: Tensor | None = None
    output_divisor: Tensor | None = None

    def entry(self) -> LayerEntry:
        """The layer's line in the manifest."""
        zero_point, bits = self.weight.zero_point, self.weight.bits
        return LayerEntry(
            weight_bits=bits,
            bases=len(self.weight.codes),
            symmetric=zero_point is None or bool((zero_point == 2 ** (bits - 1)).all()),
            activation_bits=self.activation_bits,
            steps=0 if self.input_scale is None else len(self.input_scale),
            channel_reciprocal=self.channel_reciprocal is not None,
            input_divided=self.input_divisor is not None,
            output_divided=self.output_divisor is not None,
            macs=self.macs,
        )

    def state(self) -> dict[str, Tensor]:
        """The layer's tensors under the names they have on disk."""
        tensors = {
            "weight_packed": pack(self.weight.codes, self.weight.bits),
            "weight_scale": self.weight.scale,
            "weight_zero_point": None if self.entry().symmetric else self.weight.zero_point,
            "input_scale": self.input_scale,
            "input_zero_point": None if self.input_zero_point is None else self.input_zero_point.to(torch.uint8),
            "input_channel_reciprocal": self.channel_reciprocal,
            "input_divisor": self.input_divisor,
            "output_divisor": self.output_divisor,
            "bias": self.bias,
        }
        return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True)
class PackedOperands:
    """The quantized operands of one module's attention, as training hands them over.

    tables: scale and integer-valued zero point of each of :data:`bitstep.denoiser.attention.OPERANDS`, ``[T]`` as for
        a layer
    bits, probability_bits: of query, key and value, and of the probabilities
    macs: multiply-accumulates of both matrix products in one forward pass at batch 1
    """

    tables: Mapping[str, tuple[Tensor, Tensor]]
    bits: int
    probability_bits: int
    macs: int

    def entry(self) -> AttentionEntry:
        """The module's line in the manifest."""
        scale, _ = self.tables["query"]
        return AttentionEntry(bits=self.bits, probability_bits=self.probability_bits, steps=len(scale), macs=self.macs)

    def state(self) -> dict[str, Tensor]:
        """The tensors under the names they have on disk."""
        scales = {f"{PackedAttention.NAME}.{name}_scale": scale.detach() for name, (scale, _) in self.tables.items()}
        return scales | {
            f"{PackedAttention.NAME}.{name}_zero_point": zero_point.detach().to(torch.uint8)
            for name, (_, zero_point) in self.tables.items()
        }


def pack_model(
    denoiser: ModelMixin,
    layers: Mapping[str, PackedLayer],
    *,
    grid: StepGrid | None,
    modules_to_not_convert: Mapping[str, str],
    total_macs: int,
    recipe: Mapping[str, Any],
    attention: Mapping[str, PackedOperands] = MappingProxyType({}),
) -> ModelMixin:
    """A packed copy of ``denoiser``, equal to what ``from_pretrained`` returns for its ``save_pretrained``.

    denoiser: the model before or after its layers were replaced for training; from it come the configuration and
        every tensor that belongs to none of ``layers`` (as float32), those of its preconditioning among them
    layers: what replaces each named layer
    grid: the keys of the per-timestep tables; None when no layer has one
    modules_to_not_convert: the layers left in floating point and why
    total_macs: of one forward pass at batch 1
    recipe: how the model was made, anything that JSON holds
    attention: how the attention that each named module computes is quantized

    BitstepError when a layer does not fit the denoiser.
    """
    parts: dict[str, PackedLayer | PackedOperands] = {**layers, **attention}
    low_bit = sum(layer.macs for layer in layers.values() if layer.activation_bits is not None)
    manifest = Manifest(
        step_grid=None if grid is None else Grid(keys=list(grid.keys), unit=grid.unit),
        layers={name: layer.entry() for name, layer in layers.items()},
        attention={name: operands.entry() for name, operands in attention.items()},
        preconditioned=hasattr(denoiser, Preconditioning.NAME),
        modules_to_not_convert=dict(modules_to_not_convert),
        macs=Macs(total=total_macs, quantized=low_bit + sum(operands.macs for operands in attention.values())),
        recipe=dict(recipe),
    )
    config = BitstepConfig(**manifest.model_dump())
    quantizer = BitstepQuantizer(config)
    with accelerate.init_empty_weights():
        model = cast(Any, type(denoiser)).from_config(denoiser.config)
    quantizer.preprocess_model(model)

    state = denoiser.state_dict()
    for name, part in parts.items():
        state |= {f"{name}.{key}": tensor for key, tensor in part.state().items()}
    expected = model.state_dict().keys()
    quantizer.update_missing_keys(model, sorted(expected - state.keys()), prefix="")
    for key in expected:
        if quantizer.check_if_quantized_param(model, state[key], key):
            quantizer.create_quantized_param(model, state[key], key, denoiser.device, state)
        else:
            value = state[key].float() if state[key].is_floating_point() else state[key]
            accelerate.utils.set_module_tensor_to_device(model, key, denoiser.device, value=value)
    quantizer.postprocess_model(model)

    model.hf_quantizer = quantizer
    model.register_to_config(quantization_config=config)
    return cast(ModelMixin, model.eval())
