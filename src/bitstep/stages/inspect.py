"""Inspect: what a packed pipeline weighs, what it computes, and which kernel runs each layer."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import accelerate
import diffusers
from diffusers.models.modeling_utils import ModelMixin

from bitstep.checkpoint.config import Manifest
from bitstep.errors import BitstepError
from bitstep.runtime.dispatch import packed_layers
from bitstep.runtime.fused import fused_blocks
from bitstep.stages.load import Source, load

FULL_PRECISION_BYTES = 4  # of a float32 parameter


def inspect(directory: str | Path) -> dict[str, Any]:
    """The :func:`facts` of the packed pipeline in ``directory``, or of that name on the Hub."""
    return facts(load(directory))


def facts(source: Source) -> dict[str, Any]:
    """Size and cost of the packed denoiser of ``source``, for one forward pass at batch 1.

    recipe, bits: what the file says that it was made with; None where it does not
    average_weight_bits: over the weights of packed layers
    size_bytes, full_precision_bytes, compression: the denoiser on disk, all its parameters in float32, their ratio
    bytes_per_parameter: of the denoiser on disk, scales and tables included
    flops: multiply-accumulates of the full-precision model, each counted as one operation
    bops: sum over layers with quantized activations of multiply-accumulates x weight bits x activation bits, and over
        the two products of quantized attention x the bits of their operands
    ops, ops_saving: bops / 64 + multiply-accumulates that stay in floating point (the counting of the papers on
        binary networks, arXiv 2003.03488), and flops / ops
    macs_quantized: share of the multiply-accumulates whose factors are both quantized
    preconditioned: whether the output is weighed against the noisy sample
    layers: name, kind, weight_bits, activation_bits (None: floating point), kernel, macs
    fused_blocks: names of the residual, attention and transformer blocks that run fused; the others run layer by layer
    """
    manifest = packed_manifest(source)
    macs, modules = manifest.macs, packed_layers(source.denoiser)
    layers: list[dict[str, Any]] = [
        {
            "name": name,
            "kind": modules[name].problem.op,
            "weight_bits": entry.weight_bits * entry.bases,
            "activation_bits": entry.activation_bits,
            "kernel": modules[name].kernel.name,
            "macs": entry.macs,
        }
        for name, entry in manifest.layers.items()
    ]
    weights = [prod(modules[layer["name"]].weight_shape) for layer in layers]
    weight_bits = sum(layer["weight_bits"] * count for layer, count in zip(layers, weights, strict=True))
    folder = component_folder(source)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with accelerate.init_empty_weights():
        full_size = FULL_PRECISION_BYTES * sum(p.numel() for p in architecture(folder).parameters())
    low_bit = [layer for layer in layers if layer["activation_bits"] is not None]
    bops = sum(layer["macs"] * layer["weight_bits"] * layer["activation_bits"] for layer in low_bit)
    sites = manifest.attention.values()
    # queries meet keys, and probabilities values: half of the multiply-accumulates each
    bops += sum(site.macs * site.bits * (site.bits + site.probability_bits) // 2 for site in sites)
    ops = bops / 64 + macs.total - sum(layer["macs"] for layer in low_bit) - sum(site.macs for site in sites)
    method = manifest.recipe.get("method")
    return {
        "recipe": method.get("name") if isinstance(method, dict) else None,
        "bits": manifest.recipe.get("bits"),
        "average_weight_bits": weight_bits / sum(weights),
        "size_bytes": size,
        "full_precision_bytes": full_size,
        "compression": full_size / size,
        "bytes_per_parameter": FULL_PRECISION_BYTES * size / full_size,
        "flops": macs.total,
        "bops": bops,
        "ops": ops,
        "ops_saving": macs.total / ops,
        "macs_quantized": macs.quantized / macs.total,
        "preconditioned": manifest.preconditioned,
        "layers": layers,
        "fused_blocks": fused_blocks(source.denoiser),
    }


def packed_manifest(source: Source) -> Manifest:
    """What the packed denoiser of ``source`` says of itself; BitstepError where it is not packed."""
    quantizer = getattr(source.denoiser, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    manifest = getattr(config, "manifest", None)
    if not isinstance(manifest, Manifest):
        raise BitstepError(f"{source.name} is not packed: expected a folder written by `bitstep quantize`")
    return manifest


def component_folder(source: Source) -> Path:
    """The folder with the denoiser's files: a component of the pipeline's folder, or that folder itself."""
    assert source.folder is not None
    folder = source.folder / source.component
    return folder if folder.is_dir() else source.folder


def model_class(component: Path) -> type[ModelMixin]:
    """The class of the model in the folder ``component``."""
    found: type[ModelMixin] = getattr(diffusers, _config(component)["_class_name"])
    return found


def architecture(component: Path) -> ModelMixin:
    """A full-precision model of the architecture that the folder ``component`` describes, its weights random."""
    config = {key: value for key, value in _config(component).items() if key != "quantization_config"}
    return model_class(component).from_config(config)


def _config(component: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((component / "config.json").read_text())
    return config
