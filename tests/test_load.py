"""Loading: every kind of SOURCE, and a clear line for what is no source."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import build

from bitstep.errors import BitstepError, UsageError
from bitstep.stages.load import demos, load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("ddim").save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize(("name", "component"), [("ddim", "unet"), ("dit", "transformer")])
def test_a_pipeline_folder_is_loaded_with_its_denoiser(name: str, component: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    source = load(tmp_path)
    assert source.name == str(tmp_path)
    assert (source.folder, source.component) == (tmp_path, component)
    saved = getattr(build(name), component).state_dict()
    for key, value in source.denoiser.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, saved[key])


def test_half_precision_weights_are_computed_in_the_type_asked_for(folder: Path) -> None:
    build("ddim").to(torch.float16).save_pretrained(folder)
    assert next(load(folder).denoiser.parameters()).dtype == torch.float32
    assert next(load(folder, dtype=torch.bfloat16).denoiser.parameters()).dtype == torch.bfloat16


def test_an_unconditional_component_gets_the_simplest_pipeline(folder: Path) -> None:
    source = load(folder / "unet")
    images = source.pipeline(batch_size=2, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 8, 8)


def test_a_demo_is_addressed_by_name() -> None:
    assert demos()
    for name in demos():
        assert load(f"demo:{name}").name == f"demo:{name}"


def test_unknown_demos_are_answered_with_the_known_ones() -> None:
    with pytest.raises(BitstepError, match=rf"no demo:pears: choose among .*{demos()[0]}"):
        load("demo:pears")


@pytest.mark.parametrize("source", ["nowhere", "./no/such/folder", "/no/such/folder"])
def test_a_missing_path(source: str) -> None:
    with pytest.raises(BitstepError, match="does not exist: expected a pipeline folder, a Hub id"):
        load(source)


def test_a_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BitstepError, match="cannot be had from the Hugging Face Hub") as raised:
        load("somebody/some-model")
    assert len(str(raised.value)) < 200


def test_a_hub_id_is_loaded_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **options: bool) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert load("somebody/some-model").name == "somebody/some-model"
    assert asked == [("somebody/some-model", {"use_safetensors": True})]


def test_what_is_no_pipeline(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BitstepError, match=r"no diffusers pipeline: expected model_index\.json"):
        load(tmp_path)
    with pytest.raises(BitstepError, match="is a file"):
        load(folder / "model_index.json")
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(BitstepError, match="not valid JSON"):
        load(folder / "unet")


def test_a_component_that_does_not_run_alone(tmp_path: Path) -> None:
    build("dit").transformer.save_pretrained(tmp_path)
    with pytest.raises(BitstepError, match="a single DiTTransformer2DModel, which does not run without its pipeline"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel", "num_class_embeds": 10}))
    with pytest.raises(BitstepError, match="class-conditional UNet2DModel"):
        load(tmp_path)


def test_a_pipeline_without_a_denoiser(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitstep.stages.generate.DENOISERS", ("prior",))
    with pytest.raises(BitstepError, match="has no denoiser: expected a component named prior, found unet, scheduler"):
        load(folder)


@pytest.mark.parametrize(
    ("quantization", "why"),
    [
        ({"quant_method": "torchao"}, r"unet is quantized by torchao: expected full precision, or what bitstep packed"),
        ({}, r"config\.json is damaged: quantization_config does not say its quant_method"),
        ([], r"config\.json is damaged: quantization_config does not say its quant_method"),
    ],
)
@pytest.mark.parametrize("component", [".", "unet"])
def test_what_bitstep_did_not_quantize(component: str, quantization: object, why: str, folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    with pytest.raises(BitstepError, match=why):
        load(folder / component)


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not safetensors at all", b""):
        weights.write_bytes(damaged)
        with pytest.raises(BitstepError, match="cannot load"):
            load(folder)


@pytest.mark.parametrize(
    ("ending", "options"), [("bin", "use_safetensors=False"), ("fp16.safetensors", "variant='fp16'")]
)
def test_only_plain_safetensors_are_loaded(ending: str, options: str, folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(f".{ending}"))
    with pytest.raises(BitstepError, match=f"unet has no plain safetensors files: load it with .*{options}"):
        load(folder)


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_a_device_that_does_not_exist(device: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=f"cannot compute on device '{device}'"):
        load(folder, device=device)
