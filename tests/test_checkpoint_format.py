"""docs/format.md read to the letter: a reader in NumPy, sharing no code with the package, finds the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from packed import GRID, random_layer
from pipelines import unet
from safetensors.numpy import load_file
from torch import nn

from bitstep.checkpoint import PackedLayer, pack_model
from bitstep.runtime.dispatch import packed_layers

Array = NDArray[Any]


def read_weight(tensors: dict[str, Array], name: str, entry: dict[str, Any], shape: tuple[int, ...]) -> Array:
    bits, count = entry["weight_bits"], int(np.prod(shape[1:]))
    stream = np.unpackbits(tensors[f"{name}.weight_packed"], axis=-1, bitorder="little")
    planes = stream[..., : count * bits].reshape(*stream.shape[:2], count, bits)
    assert not stream[..., count * bits :].any()
    codes = (planes * 2 ** np.arange(bits)).sum(-1).astype(np.float32)
    if bits == 1:
        values = 2 * codes - 1
    else:
        zero_point = tensors.get(f"{name}.weight_zero_point", np.full(shape[0], 2 ** (bits - 1)))
        values = codes - zero_point[None, :, None].astype(np.float32)
    scaled: Array = (tensors[f"{name}.weight_scale"][..., None] * values).sum(0)
    return scaled.reshape(shape)


def read_row(table: Array, zero_points: Array, grid: dict[str, Any], timestep: float) -> tuple[float, float]:
    keys, u = grid["keys"], timestep / grid["unit"]
    if not keys[0] < u < keys[-1]:
        row = 0 if u <= keys[0] else -1
        return float(table[row]), float(zero_points[row])
    j = max(i for i, key in enumerate(keys) if key <= u)
    f = (u - keys[j]) / (keys[j + 1] - keys[j])
    low, high = (float(zero_points[i]) for i in (j, j + 1))
    return float(table[j] * (table[j + 1] / table[j]) ** f), float(np.round(low + (high - low) * f))


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_reader_written_from_the_documentation(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = unet()
    layers: dict[str, PackedLayer] = {
        name: random_layer(
            module, bits, 8, bases=1 + (bits == 1), symmetric=bits != 5, steps=len(GRID), dilated=bits == 2, seed=seed
        )
        for seed, (name, module) in enumerate(source.named_modules())
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    model = pack_model(source, layers, grid=GRID, modules_to_not_convert={}, total_macs=10**6, recipe={})
    model.save_pretrained(tmp_path)

    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["layers"].keys() == layers.keys()
    for name, entry in config["layers"].items():
        layer = packed_layers(model)[name]
        weight = read_weight(tensors, name, entry, layer.weight_shape)
        if entry["channel_reciprocal"]:  # a weight takes the input as it comes
            weight = weight * tensors[f"{name}.input_channel_reciprocal"].reshape(-1, *[1] * (weight.ndim - 2))
        np.testing.assert_array_equal(weight, layer.weight.numpy())
    layer = packed_layers(model)["conv_in"]
    assert layer.rows is not None
    scales, zero_points = tensors["conv_in.input_scale"], tensors["conv_in.input_zero_point"]
    for timestep in (0.0, 50.0, 120.0, 300.0, 777.0, 1000.0):
        with layer.rows.cursor.at(timestep):
            found = [row.item() for row in layer.rows.of((layer, "input"))]
        np.testing.assert_allclose(found, read_row(scales, zero_points, config["step_grid"], timestep), rtol=1e-6)
