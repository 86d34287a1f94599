"""Evaluation: models against models on the same noise, models against images."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from packed import random_model
from pipelines import build
from torch import Tensor

from bitstep import api
from bitstep.denoiser.calls import run
from bitstep.errors import BitstepError, UsageError
from bitstep.metrics import frechet_distance, psnr
from bitstep.stages.calibrate import stream
from bitstep.stages.evaluate import step_error
from bitstep.stages.features import Inception, extract, load_features
from bitstep.stages.sample import save

SAMPLING: dict[str, Any] = {"num": 4, "steps": 3, "seed": 5}


def test_a_model_equals_itself(plain_pipeline: Path, feature_network: Path) -> None:
    numbers = api.evaluate(plain_pipeline, against=plain_pipeline, features=feature_network, **SAMPLING)
    assert numbers["psnr"] is None  # infinite
    assert numbers["step_error"] == [0, 0, 0]
    assert numbers["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert numbers["timesteps"] == sorted(numbers["timesteps"], reverse=True)
    assert (numbers["num_images"], numbers["steps"], numbers["seed"]) == (4, 3, 5)
    assert numbers["features"] == "moments"


def test_numbers_are_those_of_the_sampled_images(
    packed_pipeline: Path, plain_pipeline: Path, feature_network: Path
) -> None:
    numbers = api.evaluate(packed_pipeline, against=plain_pipeline, features=feature_network, **SAMPLING)
    packed, plain = (api.sample(folder, **SAMPLING) for folder in (packed_pipeline, plain_pipeline))
    assert numbers["psnr"] == pytest.approx(psnr(packed, plain))
    network = load_features(feature_network)
    expected = frechet_distance(extract(network, packed, 2), extract(network, plain, 3))
    assert numbers["frechet_distance"] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_step_error_uses_the_references_own_inputs(packed_pipeline: Path, plain_pipeline: Path) -> None:
    packed, plain = api.load(packed_pipeline), api.load(plain_pipeline)
    (errors,) = step_error([packed], plain, images=3, batch_size=2, steps=3, seed=0)
    (pool,) = stream(plain, images=3, batch_size=3, steps=3, seed=0)
    middle = pool.timesteps[1].item()
    call, expected = pool.batch(pool.indices_at(1))
    error = (run(packed.denoiser, call) - expected).square().sum() / expected.square().sum()
    assert errors[middle] == pytest.approx(error.item(), rel=1e-3)
    assert len(errors) == 3


def test_a_packed_pipeline_without_parameters_is_a_reference_too(tmp_path: Path) -> None:
    pipeline = build("sd3")
    pipeline.register_modules(transformer=random_model(pipeline.transformer))
    assert not list(pipeline.transformer.parameters())
    pipeline.save_pretrained(tmp_path)
    numbers = api.evaluate(tmp_path, against=tmp_path, num=2, steps=2)
    assert numbers["step_error"] == pytest.approx([0, 0], abs=1e-3)


def test_a_schedule_that_cannot_be_done_in_one_step(tmp_path: Path) -> None:
    """Stable Diffusion's own."""
    pipeline = build("stable_diffusion")
    pipeline.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    pipeline.register_modules(unet=random_model(pipeline.unet))
    pipeline.save_pretrained(tmp_path)
    numbers = api.evaluate(tmp_path, against=tmp_path, num=2, steps=5)
    assert numbers["step_error"] == pytest.approx([0] * len(numbers["timesteps"]), abs=1e-3)
    assert api.benchmark(tmp_path, against=["fp32"], rounds=1)["rows"][0]["median_ms"] > 0


def test_against_images(plain_pipeline: Path, feature_network: Path, tmp_path: Path) -> None:
    images = tmp_path / "real.npz"
    save(api.sample(plain_pipeline, **SAMPLING), images)
    numbers = api.evaluate(plain_pipeline, against=images, features=feature_network, **SAMPLING)
    assert numbers["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert numbers["psnr"] is numbers["ssim"] is numbers["step_error"] is None


def test_bad_input(plain_pipeline: Path, feature_network: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no feature network"):
        api.evaluate(plain_pipeline, against=plain_pipeline, features=tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(BitstepError, match="expected a TorchScript network"):
        api.evaluate(plain_pipeline, against=plain_pipeline, features=tmp_path / "text.pt")
    save(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), tmp_path / "real.npz")
    with pytest.raises(UsageError, match="add --features"):
        api.evaluate(plain_pipeline, against=tmp_path / "real.npz")
    with pytest.raises(UsageError, match="expected at least 2"):
        api.evaluate(plain_pipeline, against=tmp_path / "real.npz", features=feature_network)
    with pytest.raises(UsageError, match="steps 0 is too small"):
        api.evaluate(plain_pipeline, against=plain_pipeline, steps=0)
    with pytest.raises(UsageError, match=r"sample is \[1, 3, 8, 8\], that of the other \[1, 3, 32, 32\]"):
        api.evaluate(plain_pipeline, against="demo:fruits32")
    with pytest.raises(UsageError, match="--tile"):
        api.evaluate(plain_pipeline, against=plain_pipeline, tile=32)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (torch.nn.Identity(), r"makes \[1, 3, 8, 8\] of images \[1, 8, 8, 3\]"),
        (torch.nn.Linear(9, 9), "fails on images"),
    ],
)
def test_a_feature_network_is_tried_before_the_work(
    network: torch.nn.Module, message: str, plain_pipeline: Path, tmp_path: Path
) -> None:
    torch.jit.trace(network, torch.zeros(1, 3, 9, 9)).save(str(tmp_path / "network.pt"))
    with pytest.raises(BitstepError, match=message):
        api.evaluate(plain_pipeline, against=plain_pipeline, features=tmp_path / "network.pt", **SAMPLING)


class _Extractor(torch.nn.Module):
    """Stands in for torch-fidelity's, which needs a download: the same outputs, of other numbers."""

    def __init__(self, name: str, features_list: list[str]) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = torch.nn.AdaptiveAvgPool2d(17)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert images.dtype == torch.uint8
        spatial = self.Mixed_6d(images.double().repeat(1, 4, 1, 1))  # 12 channels
        return spatial.flatten(1)[:, :2048], spatial.flatten(1)[:, -1008:] / 255


def test_inception_numbers(plain_pipeline: Path, packed_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor, score = ModuleType("extractor"), ModuleType("score")
    vars(extractor)["FeatureExtractorInceptionV3"] = _Extractor
    vars(score).update(KEY_METRIC_ISC_MEAN="mean", isc_features_to_metric=lambda logits, splits: {"mean": splits})
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", extractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_isc", score)
    settings: Any = {"num": 10, "steps": 2, "batch_size": 5}
    numbers = api.evaluate(packed_pipeline, against=plain_pipeline, features="inception", **settings)
    maps = [
        torch.nn.functional.adaptive_avg_pool2d(api.sample(each, **settings).movedim(-1, 1).double(), 17)
        for each in (packed_pipeline, plain_pipeline)
    ]
    channels_last = [torch.cat([x, x, x[:, :1]], 1).permute(0, 2, 3, 1).flatten(1) for x in maps]  # seven of them
    assert numbers["sfid"] == pytest.approx(frechet_distance(*channels_last), rel=1e-4)
    pooled = [x.repeat(1, 4, 1, 1).flatten(1)[:, :2048] for x in maps]
    assert numbers["fid"] == numbers["frechet_distance"] == pytest.approx(frechet_distance(*pooled), rel=1e-4)
    assert numbers["features"] == "inception"
    assert numbers["inception_score"] == 10
    assert 0 <= numbers["precision"] <= 1


def test_inception_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UsageError, match=r"bitstep\[fid\]"):
        Inception()
