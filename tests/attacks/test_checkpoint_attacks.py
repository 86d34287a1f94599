"""Damaged and hostile checkpoints: an error that says what is wrong, never a crash, never foreign code."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from packed import GRID, random_layer, random_model
from pipelines import unet
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitstep.checkpoint import BitstepConfig, pack_model
from bitstep.errors import BitstepError, UsageError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed component: conv_in asymmetric and dilated with a table, conv_out of 3 bits, weight-only and between
    divisions."""
    folder = tmp_path_factory.mktemp("intact")
    source = unet()
    layers = {
        "conv_in": random_layer(source.conv_in, 4, 4, symmetric=False, steps=len(GRID), dilated=True),
        "conv_out": replace(
            random_layer(source.conv_out, 3, None), input_divisor=torch.ones(20), output_divisor=torch.ones(3)
        ),
    }
    model = pack_model(source, layers, grid=GRID, modules_to_not_convert={}, total_macs=10**6, recipe={})
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(intact, tmp_path / "model"))


def load(folder: Path) -> UNet2DModel:
    return UNet2DModel.from_pretrained(folder)


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name].clone())
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def test_the_untouched_folder_loads(folder: Path) -> None:
    load(folder)


def test_a_truncated_file(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        (folder / WEIGHTS).write_bytes(content[:length])
        with pytest.raises((OSError, SafetensorError)):
            load(folder)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{" * 1000,
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 64) + b'{"conv_in.bias":{"dtype":"F32","shape":[4],"data_offsets":[0,9]}}'[:64],
        struct.pack("<Q", 90)
        + b'{"conv_in.bias":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,16]}}'.ljust(90)
        + b"\0" * 16,
        b"PK\x03\x04" + b"\0" * 100,
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_a_header_that_lies(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises((OSError, ValueError, SafetensorError)):
        load(folder)


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.bin"])
def test_a_pickle_is_never_run(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    trace = tmp_path / "trace"
    (folder / name).write_bytes(pickle.dumps({"conv_in.bias": Payload(trace)}))
    with pytest.raises((OSError, BitstepError)):
        load(folder)
    assert not trace.exists()


def test_weights_of_the_old_kind_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(BitstepError, match="safetensors files only"):
        load(folder)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer version": (lambda c: c.update(format_version=2), "format_version 2, this bitstep reads 1"),
    "version as text": (lambda c: c.update(format_version="1"), "format_version '1'"),
    "no version": (lambda c: c.pop("format_version"), "format_version None"),
    "unknown key": (lambda c: c.update(run="rm"), "run: Extra inputs"),
    "no layers": (lambda c: c.pop("layers"), "layers: Field required"),
    "layers as a list": (lambda c: c.update(layers=[]), "layers: Input should be"),
    "nine bits": (lambda c: c["layers"]["conv_in"].update(weight_bits=9), "conv_in.weight_bits: Input should be less"),
    "no bits": (lambda c: c["layers"]["conv_in"].update(weight_bits=0), "greater than or equal to 1"),
    "bits as text": (lambda c: c["layers"]["conv_in"].update(weight_bits="4"), "valid integer"),
    "bits as a fraction": (lambda c: c["layers"]["conv_in"].update(weight_bits=4.5), "valid integer"),
    "huge bits": (lambda c: c["layers"]["conv_in"].update(activation_bits=10**400), "activation_bits"),
    "negative steps": (lambda c: c["layers"]["conv_in"].update(steps=-1), "conv_in.steps"),
    "huge steps": (lambda c: c["layers"]["conv_in"].update(steps=10**18), "the step grid allows"),
    "steps of nothing": (lambda c: c["layers"]["conv_out"].update(steps=4), "steps is 0 exactly"),
    "three bases": (lambda c: c["layers"]["conv_in"].update(bases=3), "conv_in.bases"),
    "two bases of many bits": (lambda c: c["layers"]["conv_in"].update(bases=2), "two bases"),
    "one asymmetric bit": (lambda c: c["layers"]["conv_in"].update(weight_bits=1), "one bit are symmetric"),
    "huge macs": (lambda c: c["macs"].update(total=10**400), "macs.total"),
    "negative macs": (lambda c: c["macs"].update(quantized=-1), "macs.quantized"),
    "no macs": (lambda c: c["macs"].update(total=0), "macs.total: Input should be greater than 0"),
    "more macs than all": (lambda c: c["macs"].update(quantized=10**9), "cannot be quantized"),
    "no keys": (lambda c: c["step_grid"].update(keys=[]), "at least one key"),
    "keys out of order": (lambda c: c["step_grid"].update(keys=[0.1, 0.3, 0.2, 0.4]), "strictly ascending"),
    "key that is no number": (lambda c: c["step_grid"].update(keys=[0.1, float("nan")]), "finite number"),
    "no unit": (lambda c: c["step_grid"].update(unit=0), "positive unit"),
    "endless unit": (lambda c: c["step_grid"].update(unit=float("inf")), "finite number"),
    "no grid": (lambda c: c.update(step_grid=None), "the step grid allows"),
    "foreign layer": (lambda c: c["layers"].update({"conv_": c["layers"]["conv_in"]}), "'conv_' which UNet2DModel"),
    "the model itself": (lambda c: c["layers"].update({"": c["layers"]["conv_in"]}), "a UNet2DModel cannot be packed"),
    "an attribute": (lambda c: c["layers"].update({"__class__": c["layers"]["conv_in"]}), "'__class__' which"),
    "a line break": (lambda c: c["layers"].update({"a\nb": c["layers"]["conv_in"]}), r"'a\\nb' which"),
    "a norm": (lambda c: c["layers"].update(conv_norm_out=c["layers"]["conv_in"]), "a GroupNorm cannot be packed"),
    "a layer less": (lambda c: c["layers"].pop("conv_in"), "lack 1 tensors of UNet2DModel, conv_in.weight among"),
    "a layer more": (
        lambda c: c["layers"].update({"time_embedding.linear_1": c["layers"]["conv_in"]}),
        "lack 6 tensors",
    ),
    "other bits": (lambda c: c["layers"]["conv_in"].update(weight_bits=8), r"\[1, 20, 27\], got \[1, 20, 14\]"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_lies(folder: Path, kind: str) -> None:
    change, message = CONFIGS[kind]
    change_config(folder, change)
    with pytest.raises(BitstepError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def _first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "flat codes": ("conv_in.weight_packed", torch.flatten, r"expected the shape \[1, 20, 14\], got \[280\]"),
    "float codes": ("conv_in.weight_packed", Tensor.float, "expected torch.uint8, got torch.float32"),
    "bits after the row": ("conv_in.weight_packed", lambda t: t | 0x80, "bits after the last code"),
    "nan": ("conv_in.weight_scale", _first(float("nan")), "not every value is finite"),
    "infinite": ("conv_out.weight_scale", _first(float("inf")), "not every value is finite"),
    "half": ("conv_in.weight_scale", Tensor.half, "expected torch.float32, got torch.float16"),
    "zero point": ("conv_in.weight_zero_point", _first(16), "a zero point exceeds 4 bits"),
    "input zero point": ("conv_in.input_zero_point", _first(16), "a zero point exceeds 4 bits"),
    "negative scale": ("conv_in.input_scale", _first(-0.1), "positive and finite"),
    "zero scale": ("conv_in.input_scale", _first(0.0), "positive and finite"),
    "tiny scale": ("conv_in.input_scale", _first(1e-40), "finite reciprocal"),
    "longer table": ("conv_in.input_scale", lambda t: torch.cat([t, t]), r"expected the shape \[4\], got \[8\]"),
    "reciprocal": ("conv_in.input_channel_reciprocal", _first(float("nan")), "positive and finite"),
    "input divisor": ("conv_out.input_divisor", _first(0.0), "positive and finite"),
    "output divisor": ("conv_out.output_divisor", lambda t: t[:2], r"expected the shape \[3\], got \[2\]"),
    "bias": ("conv_in.bias", _first(float("nan")), "not every value is finite"),
    "half bias": ("conv_in.bias", lambda t: (t * torch.inf).half(), "not every value is finite"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_that_lies(folder: Path, kind: str) -> None:
    name, change, message = TENSORS[kind]
    change_tensor(folder, name, change)
    with pytest.raises(BitstepError, match=message) as error:
        load(folder)
    assert str(error.value).startswith(f"{name}: ")


def test_a_tensor_that_is_missing(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name in ("conv_in.input_scale", "conv_norm_out.weight"):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "less.safetensors")
        (folder / "less.safetensors").replace(folder / WEIGHTS)
        with pytest.raises(BitstepError, match=rf"lack 1 tensors of UNet2DModel, {name} among them"):
            load(folder)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    random_model(unet()).save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / (WEIGHTS + ".index.json")
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "..", "no-such-file.safetensors", "a\0b"])
def test_an_index_that_points_elsewhere(shards: Path, shard: str) -> None:
    (shards.parent / "secret.safetensors").touch()
    change_index(shards, lambda weights: weights.update({"conv_in.bias": shard}))
    with pytest.raises((BitstepError, OSError, ValueError)):
        load(shards)


def test_an_index_of_pickles(shards: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (shards / "weights.bin").write_bytes(pickle.dumps(Payload(trace)))
    change_index(shards, lambda weights: weights.update({"conv_in.bias": "weights.bin"}))
    with pytest.raises(BitstepError, match="safetensors files only"):
        load(shards)
    assert not trace.exists()


def test_an_index_that_promises_too_much(shards: Path) -> None:
    index = json.loads((shards / (WEIGHTS + ".index.json")).read_text())["weight_map"]
    file = shards / index["conv_in.bias"]
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items() if key != "conv_in.bias"}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BitstepError, match=r"lack 1 tensors of UNet2DModel, conv_in\.bias among them"):
        load(shards)


def test_a_recipe_that_is_nested_too_deep(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"recipe": {}', '"recipe": {"a": ' + "[" * 900 + "]" * 900 + "}"))
    with pytest.raises((BitstepError, RecursionError)):
        load(folder)


def test_quantizing_while_loading_is_no_feature(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    unet().save_pretrained(tmp_path / "full")
    with pytest.raises(UsageError, match="does not quantize while loading"):
        UNet2DModel.from_pretrained(tmp_path / "full", quantization_config=BitstepConfig(**config))
