"""Replayed forward passes against the same passes run layer by layer: bit for bit, or not replayed at all."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from packed import GRID, filled, random_layer, random_model, without_replay
from pipelines import BUILDERS, build, unet
from replays import CHANGES, NOT_REPLAYED
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bitstep import library
from bitstep.errors import BitstepError
from bitstep.runtime.dispatch import set_backend
from bitstep.runtime.replay import Replay, enable_replay
from bitstep.runtime.tape import plan, record
from bitstep.stages.generate import denoiser_name, generate_batch

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def packed_unet() -> UNet2DModel:
    return random_model(unet().eval(), steps=len(GRID), dilated=True)


@pytest.fixture
def model(packed_unet: UNet2DModel) -> UNet2DModel:
    return copy.deepcopy(packed_unet)


def replay(model: nn.Module) -> Replay:
    assert isinstance(model.forward, Replay)
    return model.forward


def proven(model: nn.Module) -> int:
    return sum(known.proven for known in replay(model).known.values())


def forward(model: nn.Module, timestep: float | Tensor = 420.0, batch: int = 2, seed: int = 0) -> Tensor:
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    output: Tensor = model(x, torch.as_tensor(timestep)).sample
    return output


def warm(model: nn.Module) -> None:
    """Until its forward passes are replayed."""
    for seed in range(4):
        forward(model, seed=seed)
    assert proven(model) == 1


@pytest.mark.parametrize("kind", BUILDERS)
def test_every_denoiser_is_replayed_and_makes_the_same_images(kind: str) -> None:
    pipeline = build(kind)
    name = denoiser_name(pipeline)
    model = random_model(getattr(pipeline, name), 4, 8, steps=len(GRID))
    latents = []
    for denoiser in (without_replay(model), model):
        setattr(pipeline, name, denoiser)
        latents.append(generate_batch(pipeline, range(2), output_type="latent", steps=9, seed=0))
    assert torch.equal(*latents)
    assert proven(model)


def test_timesteps_alone_and_mixed_on_keys_and_between_them(model: UNet2DModel) -> None:
    plain = without_replay(model)
    on_keys, between = (50.0, 300.0, 900.0, 999.0), (420.0, 51.5, 731.0, 60.0)
    mixed = [torch.tensor(pair) for pair in ((420.0, 51.5), (300.0, 60.0), (0.0, 731.0), (899.0, 301.0), (5.0, 300.0))]
    for seed, timestep in enumerate([t for ts in zip(on_keys, between, mixed, strict=False) for t in ts] * 2):
        assert torch.equal(forward(model, timestep, seed=seed), forward(plain, timestep, seed=seed))
    assert proven(model) == 3


def test_few_signatures_are_kept(model: UNet2DModel) -> None:
    plain = without_replay(model)
    for batch in (1, 2, 3, 1, 2, 3, 4, 5, 6, 1, 2, 3) * 2:
        assert torch.equal(forward(model, batch=batch), forward(plain, batch=batch))
    assert len(replay(model).known) == 4
    for timestep in (1.0, 2.0, 3.0, 4.0, 5.0) * 3:  # numbers, of which each would be a signature
        x = torch.ones(1, 3, 8, 8)
        assert torch.equal(model(x, timestep).sample, plain(x, timestep).sample)
    assert not any(known.recording for known in replay(model).known.values())


def test_an_output_stays_and_an_input_may_change(model: UNet2DModel) -> None:
    warm(model)
    x = torch.randn(2, 3, 8, 8).expand(2, 3, 8, 8)
    first = model(x, torch.tensor(420.0).expand(2)).sample
    kept = first.clone()
    x.add_(1)
    assert not torch.equal(model(x, torch.tensor(420.0)).sample, first)
    assert torch.equal(first, kept)


def test_expanded_arguments_and_tuples(model: UNet2DModel) -> None:
    plain = without_replay(model)
    for t in (420.0, 51.5, 731.0, 333.0, 60.0):
        arguments = torch.full((1, 3, 8, 8), t / 1000).expand(2, -1, -1, -1), torch.tensor(t).expand(2)
        assert torch.equal(model(*arguments, return_dict=False)[0], plain(*arguments, return_dict=False)[0])
    assert proven(model) == 1


class Adapted(nn.Module):
    """What an adapter puts in a layer's place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.scale, self.scales = layer, 1.0, {"default": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * self.scale * self.scales["default"]
        return y


def replace_layer(model: Any) -> None:
    model.conv_out = Adapted(nn.Conv2d(20, 3, 1))


class Doubled(AttnProcessor):  # type: ignore[misc]
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(*args, **kwargs)  # type: ignore[no-any-return]


def replace_processor(model: Any) -> None:
    model.mid_block.attentions[0].processor = Doubled()


def choose_kernel(model: Any) -> None:
    set_backend(model, "reference")


def change_attribute(model: Any) -> None:
    model.mid_block.resnets[0].output_scale_factor = 2.0


def add_hook(model: Any) -> None:
    model.conv_norm_out.register_forward_hook(lambda _module, _args, output: output * 2)


@pytest.mark.parametrize(
    "change",
    [*CHANGES, replace_layer, replace_processor, choose_kernel, change_attribute, add_hook],
)
def test_a_change_of_the_model_is_noticed(model: UNet2DModel, change: Callable[[Any], None]) -> None:
    warm(model)
    before = forward(model)
    torch.manual_seed(1)
    change(model)
    torch.manual_seed(1)
    plain = without_replay(model)
    expected = [forward(plain, seed=seed) for seed in range(5)]
    assert not torch.equal(expected[0], before)
    for seed in range(5):
        assert torch.equal(forward(model, seed=seed), expected[seed])


def test_a_change_of_an_adapter_is_noticed(model: UNet2DModel) -> None:
    model.conv_out = Adapted(model.conv_out)
    warm(model)
    before = forward(model)
    model.conv_out.scale = 2.0
    assert torch.equal(forward(model), 2 * before)
    model.conv_out.scale = 1.0
    warm(model)
    model.conv_out.scales["default"] = 2.0
    assert torch.equal(forward(model), 2 * before)


def test_other_threads_get_another_tape(model: UNet2DModel) -> None:
    warm(model)
    expected, threads = forward(model), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(forward(model), expected)
        assert len(replay(model).known) == 2
    finally:
        torch.set_num_threads(threads)


def test_autocast_to_another_dtype_gets_another_tape(model: UNet2DModel) -> None:
    for number, dtype in enumerate((torch.bfloat16, torch.float16), 1):
        with torch.autocast("cpu", dtype):
            forward(model)
        assert len(replay(model).known) == number


def test_a_forward_method_replaced_inside_runs_every_time(model: UNet2DModel) -> None:
    """As caches of diffusers do, which count their calls."""
    warm(model)
    calls, original = [], model.mid_block.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    model.mid_block.forward = counted
    for seed in range(5):
        forward(model, seed=seed)
    assert len(calls) == 5


def test_gradients_and_observers_get_the_real_pass(model: UNet2DModel) -> None:
    set_backend(model, "reference")
    warm(model)
    with torch.enable_grad(), pytest.raises(BitstepError, match="no gradients"):
        model(torch.zeros(2, 3, 8, 8, requires_grad=True), torch.tensor(420.0))
    with FlopCounterMode(display=False) as counter:
        forward(model)
    assert counter.get_total_flops() > 0


def test_threads_stand_at_timesteps_of_their_own(model: UNet2DModel) -> None:
    timesteps = (50.0, 300.0, 420.0, 900.0)
    expected = [forward(model, timestep) for timestep in timesteps]
    with ThreadPoolExecutor(4, initializer=torch.set_grad_enabled, initargs=(False,)) as threads:
        got = list(threads.map(forward, [model] * 80, timesteps * 20))
    assert all(map(torch.equal, got, expected * 20))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_compiler_leaves_replay_alone(model: UNet2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = forward(model)
    compiled: Any = torch.compile(model, backend="eager")
    for seed in range(4):
        forward(compiled, seed=seed)
    monkeypatch.delattr(Replay, "_forward")  # from now on nothing runs layer by layer
    assert torch.equal(forward(compiled), expected)


def test_inference_mode_and_no_grad_share_a_tape(model: UNet2DModel) -> None:
    expected = forward(without_replay(model))
    for _ in range(3):
        with torch.inference_mode():
            assert torch.equal(forward(model), expected)
        assert torch.equal(forward(model), expected)
    assert proven(model) == 1


def test_copies_and_files_hold_no_tape(model: UNet2DModel, tmp_path: Path) -> None:
    expected = forward(model)
    model.save_pretrained(tmp_path / "before")
    warm(model)
    model.save_pretrained(tmp_path / "after")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert replay(twin).model is twin
        assert not replay(twin).known
        warm(twin)
        assert torch.equal(forward(twin), expected)
    assert inspect.signature(model.forward) == inspect.signature(unet().forward)


# ---- the tape itself


def go_through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() + 1)


def go_through_a_list(x: Tensor) -> Tensor:
    return torch.tensor(x.tolist())


COUNTER = torch.zeros(())


def count(x: Tensor) -> Tensor:
    return x + COUNTER.add_(1)


def change_the_argument(x: Tensor) -> Tensor:
    return x.mul_(2)


@pytest.mark.parametrize(
    "function",
    [*NOT_REPLAYED, go_through_numpy, go_through_a_list, count, change_the_argument],
)
def test_what_cannot_be_replayed_is_refused_and_still_computed(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([1.0, -2.0, 3.0])
    torch.manual_seed(0)
    COUNTER.zero_()
    expected = function(twin := x.clone())
    torch.manual_seed(0)
    COUNTER.zero_()
    result, tape, refusal = record(function, x)
    assert torch.equal(result, expected)
    assert torch.equal(x, twin)
    assert tape is None
    assert refusal


def test_operators_of_every_kind_run_again() -> None:
    table, index = torch.randn(7, 4), torch.tensor([2, 0])

    def function(x: Tensor, i: Tensor, extra: dict[str, Tensor]) -> dict[str, Any]:
        a, b = x.chunk(2, dim=-1)
        filled = torch.empty_like(a).zero_()
        filled[:, 0] = b[:, 1]
        rows = table[i] + torch.arange(4)
        mean, deviation = torch.std_mean(torch.cat([a, b * 2]), dim=0)
        unused = x.exp()
        del unused
        return {
            "mixed": (filled + a).softmax(-1),
            "rows": rows.T,
            "moments": (mean, deviation),
            "sum": extra["x"].sum(),
        }

    first = (torch.randn(2, 8), index, {"x": torch.randn(3)})
    _, tape, refusal = record(function, *first)
    assert refusal is None
    assert tape is not None
    for _ in range(2):
        arguments = (torch.randn(2, 8), torch.randint(7, (2,)), {"x": torch.randn(3)})
        expected, got = function(*arguments), tape.run(*arguments)
        for name in ("mixed", "rows", "sum"):
            assert torch.equal(got[name], expected[name])
            assert got[name].stride() == expected[name].stride()
        assert all(map(torch.equal, got["moments"], expected["moments"]))


def test_a_changed_constant_makes_a_tape_stale() -> None:
    constant = torch.ones(3)
    _, tape, _ = record(lambda x: x + constant.exp(), torch.ones(3))
    assert tape is not None
    assert not tape.is_stale()
    constant.add_(1)
    assert tape.is_stale()


@pytest.mark.skipif(not library.instruction_sets(), reason="the native library is not built")
def test_a_concatenation_is_read_in_parts_unless_a_part_changes() -> None:
    convolution = nn.Conv2d(12, 7, 3)
    layer = filled(convolution, random_layer(convolution))
    set_backend(layer, "cpu")
    layer.prepare()

    def join(a: Tensor, b: Tensor) -> Tensor:
        a, b = a * 2, b * 2
        return layer(torch.cat([a, b], dim=1))  # type: ignore[no-any-return]

    def join_and_change(a: Tensor, b: Tensor) -> Tensor:
        a, b = a * 2, b * 2
        whole = torch.cat([a, b], dim=1)
        a.zero_()
        return layer(whole)  # type: ignore[no-any-return]

    for function, in_parts in ((join, True), (join_and_change, False)):
        maps = [torch.randn(2, n, 4, 5).contiguous(memory_format=torch.channels_last) for n in (5, 7)]
        expected, tape, refusal = record(function, *maps)
        assert tape is not None, refusal
        assert torch.equal(tape.run(*maps), expected)
        joined = any(entry.args[0] is torch.ops.aten.cat.default for entry in tape.entries)
        assert joined != in_parts


def test_a_long_chain_needs_the_memory_of_two_links() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(50):
            x = (x * 2).sin()
        return x

    x = torch.randn(1000)
    _, tape, _ = record(chain, x)
    assert tape is not None
    assert tape.nbytes <= 3 * 4096
    assert torch.equal(tape.run(x + 1), chain(x + 1))


def test_buffers_alive_together_do_not_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(50, (60,), generator=generator).tolist()
    lives = {i: (start, start + length) for i, (start, length) in enumerate(zip(starts, range(60), strict=True))}
    nbytes = torch.randint(5000, (60,), generator=generator).tolist()
    offsets, total = plan(lives, nbytes)
    for a, (first, last) in lives.items():
        assert offsets[a] % 64 == 0
        assert offsets[a] + nbytes[a] <= total
        for b, (other_first, other_last) in lives.items():
            if a != b and first <= other_last and other_first <= last:
                assert offsets[a] + nbytes[a] <= offsets[b] or offsets[b] + nbytes[b] <= offsets[a]
    assert total < sum(nbytes)


def test_a_module_without_packed_layers_may_be_replayed_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    enable_replay(model)
    for _ in range(4):
        model(torch.ones(2, 4))
    (known,) = replay(model).known.values()
    assert known.refusal == "aten.bernoulli_.float is random"
    model.eval()
    for _ in range(4):
        model(torch.ones(2, 4))
    assert proven(model) == 1


class Growing(nn.Module):
    """Adds up whatever it has been given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.shifts, self.weights = nn.ModuleList(), list[float](), nn.ParameterList()

    def forward(self, x: Tensor) -> Tensor:
        terms = [layer(x) for layer in self.layers] + [x + shift for shift in self.shifts]
        return torch.stack([x, *terms, *(x * weight for weight in self.weights)]).sum(0)


@pytest.mark.parametrize(("name", "value"), [("layers", nn.ReLU()), ("shifts", 1.0), ("weights", torch.ones(3))])
def test_what_was_empty_may_be_filled(name: str, value: Any) -> None:
    model, x = Growing(), torch.tensor([1.0, -2.0, 3.0])
    enable_replay(model)
    for _ in range(4):
        before = model(x)
    assert proven(model) == 1
    getattr(model, name).append(value)
    expected = without_replay(model)(x)
    assert not torch.equal(expected, before)
    for _ in range(4):
        assert torch.equal(model(x), expected)
