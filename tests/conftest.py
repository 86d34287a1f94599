"""Fixtures shared by the tests of the stages and of the command line."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# without a GPU its programs run in Triton's interpreter, which has to be known before anything imports Triton
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from packed import random_model
from pipelines import build


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Without gradients, as forward passes are replayed, and from one seed."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def packed_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline, its denoiser packed at random to W4A4."""
    folder = tmp_path_factory.mktemp("packed") / "tiny-w4a4"
    pipeline = build("ddim")
    pipeline.register_modules(unet=random_model(pipeline.unet))
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same tiny pipeline in full precision."""
    folder = tmp_path_factory.mktemp("plain") / "tiny"
    build("ddim").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def feature_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TorchScript file: images [N, 3, H, W] -> means and deviations of their channels [N, 6]."""

    class Moments(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)

    path = tmp_path_factory.mktemp("features") / "moments.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, which users' networks still come in
        torch.jit.trace(Moments(), torch.zeros(2, 3, 8, 8)).save(str(path))
    return path
