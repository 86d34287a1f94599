"""What `inspect` says of a packed model, and the benchmark of one."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from packed import random_model
from pipelines import build
from torch import nn

from bitstep import api
from bitstep.denoiser.calls import Call, run
from bitstep.errors import BitstepError, UsageError
from bitstep.runtime.dispatch import packed_layers
from bitstep.stages import benchmark
from bitstep.stages.peers import PEERS, OfTensors


def test_sizes_and_operations(packed_pipeline: Path) -> None:
    facts = api.inspect(packed_pipeline)
    unet = build("ddim").unet
    macs = sum(layer["macs"] for layer in facts["layers"])
    assert facts["recipe"] is facts["bits"] is None  # what made it did not say
    assert facts["average_weight_bits"] == 4
    assert facts["full_precision_bytes"] == 4 * sum(p.numel() for p in unet.parameters())
    assert facts["size_bytes"] == (packed_pipeline / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert facts["compression"] == facts["full_precision_bytes"] / facts["size_bytes"]
    assert facts["bytes_per_parameter"] == pytest.approx(4 / facts["compression"])
    assert facts["flops"] == macs
    assert facts["bops"] == 16 * macs
    assert facts["ops"] == 16 * macs / 64
    assert facts["ops_saving"] == 4
    assert facts["macs_quantized"] == 1
    kinds = {layer["name"]: layer["kind"] for layer in facts["layers"]}
    assert kinds["conv_in"] == "conv2d"
    assert kinds["time_embedding.linear_1"] == "linear"
    assert all(layer["kernel"] for layer in facts["layers"])
    if all(layer["kernel"] == "cpu" for layer in facts["layers"]):
        assert "mid_block.resnets.0" in facts["fused_blocks"]
    else:
        assert facts["fused_blocks"] == []


def test_floating_point_activations_count_as_flops(tmp_path: Path) -> None:
    unet = random_model(build("ddim").unet, 1, None, bases=2)
    unet.save_pretrained(tmp_path)
    facts = api.inspect(tmp_path)  # a single component
    assert facts["average_weight_bits"] == 2  # one bit in each of two bases
    assert facts["bops"] == 0
    assert facts["ops"] == facts["flops"]
    weights = sum(prod(layer.weight_shape) for layer in packed_layers(unet).values())
    assert facts["size_bytes"] > 2 * weights / 8


def test_a_pipeline_that_is_not_packed_is_refused(plain_pipeline: Path) -> None:
    with pytest.raises(BitstepError, match="is not packed: expected a folder written by `bitstep quantize`"):
        api.inspect(plain_pipeline)
    with pytest.raises(BitstepError, match="is not packed"):
        api.benchmark(plain_pipeline)


def test_a_packed_pipeline_on_the_hub(packed_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: str(packed_pipeline))
    assert api.inspect("somebody/packed") == api.inspect(packed_pipeline)


def test_benchmark_times_each_in_its_own_process(packed_pipeline: Path) -> None:
    numbers = api.benchmark(packed_pipeline, against=["fp32"], rounds=2, batch_size=2)
    packed, full = numbers["rows"]
    assert (packed["name"], full["name"]) == ("packed", "fp32")
    assert full["ratio_to_fp32"] == 1
    assert packed["median_ms"] > 0
    assert packed["peak_memory_mb"] > 50  # a Python with torch
    assert numbers["layers"].keys() == packed_layers(api.load(packed_pipeline).denoiser).keys()
    assert sum(numbers["kernels"].values()) == len(numbers["layers"])


def test_benchmark_times_packed_pipelines_side_by_side(packed_pipeline: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(packed_pipeline, other)
    numbers = api.benchmark(packed_pipeline, against=[str(other)], rounds=2)
    assert [row["name"] for row in numbers["rows"]] == ["packed", str(other)]
    latents = build("dit")
    latents.register_modules(transformer=random_model(latents.transformer))
    latents.save_pretrained(tmp_path / "another")
    with pytest.raises(UsageError, match="cannot be compared"):
        api.benchmark(packed_pipeline, against=[str(tmp_path / "another")])
    shutil.rmtree(other / "unet")
    with pytest.raises(BitstepError):
        api.benchmark(packed_pipeline, against=[str(other)])


def test_a_benchmark_that_cannot_run_says_why(packed_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot compare with 'fp64', did you mean"):
        api.benchmark(packed_pipeline, against="fp64")
    with pytest.raises(UsageError, match="cannot compute on device 'abacus'"):
        api.benchmark(packed_pipeline, device="abacus")
    with pytest.raises(UsageError, match="rounds 0 is too small: expected at least 1"):
        api.benchmark(packed_pipeline, rounds=0)
    monkeypatch.setattr(benchmark, "check_device", lambda _: None)
    with pytest.raises(BitstepError, match=r"the benchmark of packed failed: .*abacus"):
        api.benchmark(packed_pipeline, against=[], device="abacus")


def test_other_runtimes_are_named_when_they_are_not_installed(packed_pipeline: Path) -> None:
    absent = next((name for name, peer in PEERS.items() if peer.missing()), None)
    if absent is None:
        pytest.skip("every other runtime is installed")
    with pytest.raises(UsageError, match=f"{absent} needs packages that are not installed: pip install"):
        api.benchmark(packed_pipeline, against=[absent])


def test_a_denoiser_of_the_tensors_in_its_call() -> None:
    """What other runtimes are given, for a call with tensors inside dictionaries and plain values beside them."""
    model = nn.Module()
    model.forward = lambda sample, timestep, extra, scale: (sample * scale + timestep + extra["text"],)
    call = Call({"sample": torch.ones(2, 3), "timestep": torch.tensor(5), "extra": {"text": torch.ones(3)}, "scale": 2})
    module = OfTensors(model, call)
    assert len(module.inputs) == 3
    assert torch.equal(module(*module.inputs), run(model, call))
    assert torch.equal(module(*(2 * x for x in module.inputs)), 2 * run(model, call))
