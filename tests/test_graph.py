"""Forward passes replayed as CUDA graphs against the same passes run layer by layer; on a GPU only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from packed import GRID, random_model, without_replay
from pipelines import BUILDERS, build, unet
from replays import CHANGES, NOT_REPLAYED
from torch import Tensor, nn

from bitstep.runtime.graph import Graph, record
from bitstep.runtime.replay import Replay
from bitstep.stages.generate import denoiser_name, generate_batch

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.usefixtures("no_grad"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed")
    random_model(unet().eval(), steps=len(GRID), dilated=True).save_pretrained(path)
    return path


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def model(folder: Path, request: pytest.FixtureRequest) -> UNet2DModel:
    return UNet2DModel.from_pretrained(folder, torch_dtype=request.param).to("cuda")


def known(model: nn.Module) -> list[Any]:
    assert isinstance(model.forward, Replay)
    return list(model.forward.known.values())


def proven(model: nn.Module) -> int:
    return sum(isinstance(found.recording, Graph) and found.proven for found in known(model))


def forward(model: Any, timestep: float | Tensor = 420.0, seed: int = 0) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    output: Tensor = model(x.to("cuda", model.dtype), torch.as_tensor(timestep)).sample
    return output


def warm(model: nn.Module) -> None:
    """Until its forward passes are replayed."""
    for seed in range(4):
        forward(model, seed=seed)
    assert proven(model) == 1, [found.refusal for found in known(model)]


def test_timesteps_alone_and_mixed_on_both_devices(model: UNet2DModel) -> None:
    plain = without_replay(model)
    alone = [torch.tensor(t) for t in (50.0, 420.0, 300.0, 51.5, 900.0, 731.0, 999.0, 60.0)]
    mixed = [torch.tensor(pair, device="cuda") for pair in ((420.0, 51.5), (300.0, 60.0), (0.0, 731.0), (899.0, 5.0))]
    on_gpu = [t.cuda() for t in alone]
    for seed, timestep in enumerate([t for ts in zip(alone, on_gpu, mixed * 2, strict=True) for t in ts] * 2):
        assert torch.equal(forward(model, timestep, seed=seed), forward(plain, timestep, seed=seed))
    assert proven(model) == 4, [found.refusal for found in known(model)]  # on the CPU it is seen which lie on keys


def test_an_output_stays_and_an_input_may_change(model: UNet2DModel) -> None:
    warm(model)
    first = forward(model, seed=1)
    kept = first.clone()
    second = forward(model, seed=2)
    assert not torch.equal(first, second)
    assert torch.equal(first, kept)
    assert torch.equal(forward(model, seed=1), first)


def test_streams_take_turns(model: UNet2DModel) -> None:
    warm(model)
    expected = [forward(model, seed=seed) for seed in range(8)]
    torch.cuda.synchronize()
    got = []
    for seed in range(8):
        with torch.cuda.stream(torch.cuda.Stream()):
            got.append(forward(model, seed=seed))
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, expected))


def move_parameter(model: Any) -> None:
    model.conv_norm_out.weight.data = 2 * model.conv_norm_out.weight.data


def move_parameter_that_only_a_program_reads(model: Any) -> None:
    norm = model.down_blocks[0].resnets[0].norm1
    norm.weight.data = 2 * norm.weight.data


@pytest.mark.parametrize("change", [*CHANGES, move_parameter, move_parameter_that_only_a_program_reads])
def test_a_change_of_the_model_is_noticed(model: UNet2DModel, change: Callable[[Any], None]) -> None:
    warm(model)
    before = forward(model)
    change(model)
    plain = without_replay(model)
    expected = [forward(plain, seed=seed) for seed in range(5)]
    assert not torch.equal(expected[0], before)
    for seed in range(5):
        assert torch.equal(forward(model, seed=seed), expected[seed])
    assert proven(model) == 1


def test_autocast_and_a_capture_of_the_user_s_own_run_layer_by_layer(model: UNet2DModel) -> None:
    warm(model)
    with torch.autocast("cuda", torch.bfloat16):
        forward(model)
    x, t = torch.randn(2, 3, 8, 8, device="cuda", dtype=model.dtype), torch.tensor(420.0, device="cuda")
    expected = model(x, t).sample
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = model(x, t).sample
    graph.replay()
    assert torch.equal(static, expected)


@pytest.mark.parametrize("kind", BUILDERS)
def test_every_denoiser_is_replayed_and_makes_the_same_images(kind: str) -> None:
    pipeline = build(kind)
    name = denoiser_name(pipeline)
    model = random_model(getattr(pipeline, name), 4, 8, steps=len(GRID))
    pipeline.register_modules(**{name: model})
    pipeline.to("cuda")
    latents = []
    for denoiser in (without_replay(model), model):
        setattr(pipeline, name, denoiser)
        latents.append(generate_batch(pipeline, range(2), output_type="latent", steps=9, seed=0))
    assert torch.equal(*latents)
    assert proven(model), [found.refusal for found in known(model)]


# ---- the graph itself


def go_through_the_cpu(x: Tensor) -> Tensor:
    return x.cpu().exp().cuda()


def bring_numbers(x: Tensor) -> Tensor:
    return x + torch.tensor([1.0, 2.0, 3.0], device="cuda")


def wait(x: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return x + 1


@pytest.mark.parametrize("function", [*NOT_REPLAYED, go_through_the_cpu, bring_numbers, wait])
def test_what_cannot_be_replayed_is_refused_and_leaves_no_trace(function: Callable[[Tensor], Tensor]) -> None:
    x, stream = torch.tensor([1.0, -2.0, 3.0], device="cuda"), torch.cuda.current_stream()
    torch.manual_seed(0)
    expected = function(x.clone())
    torch.manual_seed(0)
    result, graph, refusal = record(function, x)
    assert torch.equal(result, expected)
    assert graph is None
    assert refusal
    # a capture that failed would show here
    assert torch.cuda.current_stream() == stream
    torch.randn(3, device="cuda")
    torch.cuda.empty_cache()
    _, graph, refusal = record(lambda x: {"y": (x.exp(), x + 1)}, x)
    assert graph is not None, refusal
    first, second = graph.run(x), graph.run(x + 1)
    assert torch.equal(first["y"][0], x.exp())
    assert torch.equal(second["y"][1], x + 2)
