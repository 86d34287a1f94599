"""DilateQuant: dilation changes nothing but the rounding, and every part pays for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import source
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitstep.denoiser.calls import Call, run
from bitstep.denoiser.structure import blocks
from bitstep.methods.base import Rewrite
from bitstep.methods.baselines import MSE
from bitstep.methods.best import BEST_WIDE
from bitstep.methods.dilatequant import DILATEQUANT
from bitstep.methods.rewrites import Dilation, Smoothing, SplitConcatenation
from bitstep.numerics.dilation import CAP, dilation, range_aware, stretched
from bitstep.numerics.uniform import search_range
from bitstep.quantizers.activations import ActivationQuantizer
from bitstep.quantizers.layers import FakeQuantized
from bitstep.quantizers.weights import DenseWeight, UniformWeight, WeightQuantizer
from bitstep.stages.calibrate import stream
from bitstep.stages.load import load
from bitstep.stages.prepare import prepare
from bitstep.stages.rewrite import scales_of, stretch_of

LAYERS: dict[str, tuple[nn.Linear | nn.Conv1d | nn.Conv2d, tuple[int, ...]]] = {
    "linear": (nn.Linear(24, 10), (3, 5, 24)),
    "conv1d": (nn.Conv1d(24, 10, 3, padding=1), (3, 24, 7)),
    "conv2d": (nn.Conv2d(24, 10, 3, padding=1), (3, 24, 5, 5)),
    "grouped": (nn.Conv2d(24, 12, 3, stride=2, groups=4), (3, 24, 5, 5)),
    "depthwise": (nn.Conv2d(24, 24, 3, groups=24), (3, 24, 5, 5)),
}


def uneven(name: str) -> tuple[nn.Linear | nn.Conv1d | nn.Conv2d, int, Tensor]:
    """A layer whose input channels differ (log-normally) in the size of their weights, its groups, and an input."""
    generator = torch.Generator().manual_seed(0)
    layer, shape = LAYERS[name]
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    sizes = torch.randn(24, generator=generator).mul(0.5).exp()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        layer.weight.copy_(stretched(layer.weight, sizes, groups))
    return layer, groups, torch.randn(shape, generator=generator)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rule", [False, True], ids=["paper", "symmetric"])
def test_dilation_keeps_the_output_and_every_step_size_and_never_widens_the_input(name: str, rule: bool) -> None:
    layer, groups, x = uneven(name)
    scale = dilation(layer.weight, groups, symmetric=rule)
    assert bool((scale >= 1).all())
    assert bool((scale > 1).any()) == (name != "depthwise")  # whose channels all set a range
    weight = stretched(layer.weight, scale, groups)
    for symmetric in (True,) if rule else (False, True):
        before, after = (
            search_range(w.flatten(1), 4, symmetric=symmetric, method="minmax") for w in (layer.weight, weight)
        )
        torch.testing.assert_close(after, before, rtol=1e-6, atol=0)  # scale and zero point
    channels_last = x.movedim(1, -1) if x.ndim > 2 and not isinstance(layer, nn.Linear) else x
    assert bool(((channels_last / scale).abs() <= channels_last.abs()).all())

    quantizer = UniformWeight(DenseWeight(weight), 8)
    dilated = FakeQuantized(layer, quantizer, None, 1 / scale)
    quantizer.enabled = False
    torch.testing.assert_close(dilated(x), layer(x))


def scale_of(*settings: Any) -> torch.Tensor:
    """Of all rewrites together."""
    return torch.stack(list(scales_of(*settings))).prod(0)


def test_the_paper_rule_by_brute_force() -> None:
    layer, groups, _ = uneven("grouped")
    weight = layer.weight.detach()
    expected = torch.full((24,), CAP)
    for out in range(12):
        high, low = weight[out].max(), weight[out].min()
        for k in range(6):
            for w in weight[out, k].flatten():
                channel = out // 3 * 6 + k
                expected[channel] = min(expected[channel], high / w if w > 0 else low / w)
    torch.testing.assert_close(dilation(weight, groups), expected.clamp(1, CAP))


def test_the_channels_that_set_a_range_stay() -> None:
    weight = torch.tensor([[4.0, 1.0, -0.5, 0.0], [1.0, 0.5, -1.0, 0.0]])
    assert dilation(weight).tolist() == [1.0, 2.0, 1.0, CAP]


def test_symmetric_dilation_keeps_magnitudes() -> None:
    weight = torch.tensor([[4.0, 1.0, -0.5, -2.0], [1.0, 0.5, -0.5, 0.0]])
    assert dilation(weight).tolist() == [1.0, 2.0, 1.0, 1.0]
    assert dilation(weight, symmetric=True).tolist() == [1.0, 2.0, 2.0, 2.0]
    for name in LAYERS:
        layer, groups, _ = uneven(name)
        assert bool((dilation(layer.weight, groups, symmetric=True) >= dilation(layer.weight, groups)).all())


def test_range_aware_dilation_reaches_the_same_range_with_less() -> None:
    scale = torch.tensor([1.0, 2.0, 4.0, 4.0])
    ranges = torch.tensor([3.0, 8.0, 8.0, 1.0])
    aware = range_aware(scale, ranges)
    # channel 1 can do no better than 8 / 2 = 4, and no other has to go below it
    assert aware.tolist() == [1.0, 2.0, 2.0, 1.0]
    assert stretch_of(aware, ranges).range_shrink == stretch_of(scale, ranges).range_shrink == 0.5
    assert stretch_of(aware, ranges).share == 0.5


def test_rewrites_follow_one_another() -> None:
    layer, groups, _ = uneven("linear")
    ranges = torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.5
    ranges[:8] *= 10
    split = scale_of((SplitConcatenation(),), layer.weight, groups, ranges, (8, 16))
    assert torch.unique(split[:8]).numel() == torch.unique(split[8:]).numel() == 1
    torch.testing.assert_close((ranges / split)[:8].max(), (ranges / split)[8:].max())
    both = scale_of((SplitConcatenation(), Dilation()), layer.weight, groups, ranges, (8, 16))
    torch.testing.assert_close(both, split * dilation(stretched(layer.weight, split, groups), groups))
    assert torch.equal(scale_of((SplitConcatenation(),), layer.weight, groups, ranges, ()), torch.ones(24))


def test_smoothing_shares_the_ranges_of_input_and_weight() -> None:
    layer, groups, _ = uneven("linear")
    weight = layer.weight.detach()
    ranges = torch.rand(24, generator=torch.Generator().manual_seed(2)) + 0.1
    half = scale_of((Smoothing(strength=0.5),), weight, groups, ranges, ())
    shared = stretched(weight, half, groups).abs().amax(0) / (ranges / half)
    torch.testing.assert_close(shared, shared[0].expand(24))
    whole = scale_of((Smoothing(strength=1.0),), weight, groups, ranges, ())
    torch.testing.assert_close(ranges / whole, ranges.min().expand(24))
    grouped, groups, _ = uneven("grouped")
    assert torch.equal(scale_of((Smoothing(),), grouped.weight, groups, ranges, ()), torch.ones(24))


def outputs_of(denoiser: nn.Module, names: list[str], call: Call) -> dict[str, list[Tensor]]:
    """All that the modules of these names return, their floating point numbers."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        denoiser.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: found[name].extend(x.clone() for x in tree_leaves(output))
        )
        for name in names
    ]
    run(denoiser, call)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["ddim", "stable_diffusion", "dit", "pixart", "z_image"])
def test_norms_and_layers_that_only_rewritten_layers_read_take_the_reciprocals(name: str) -> None:
    """Exactly: the student that rounds nothing is the teacher."""
    given = source(name)
    given.denoiser.requires_grad_(False)
    pool = next(stream(given, images=2, batch_size=2, steps=3, seed=0))
    method = DILATEQUANT.model_copy(update={"rewrites": (Smoothing(), Dilation())})
    student = prepare(given.denoiser, pool, method, weight_bits=4, activation_bits=4)
    readers = [reader for names in student.rewritten.folded.values() for reader in names]
    assert all(student.layers[reader].channel_reciprocal is None for reader in readers)
    norms, values, gated = {"to_q", "to_k", "to_v"}, {"to_out.0"}, {"net.2"}
    expected = {
        "ddim": norms | values,
        "stable_diffusion": norms | {"proj_in", "net.0.proj"} | values | gated,
        "dit": values,
        "pixart": values,
        "z_image": norms | {"w1", "w3", "cap_embedder.1"} | values | {"w2"},  # its norms are diffusers' own
    }[name]
    assert all(reader.endswith(tuple(expected)) for reader in readers)
    assert all(any(reader.endswith(ending) for reader in readers) for ending in expected)
    assert any(layer.channel_reciprocal is not None for layer in student.layers.values())  # behind activations
    for module in (student.denoiser, *student.attention.values()):
        for part in module.modules():
            if isinstance(part, WeightQuantizer | ActivationQuantizer):
                part.enabled = False
    call, target = pool.batch(pool.commonest)
    names = [block.name for block in blocks(given.denoiser, student.structure)]
    ours, theirs = (outputs_of(model, names, call) for model in (student.denoiser, given.denoiser))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # block-wise distillation compares them
    torch.testing.assert_close(run(student.denoiser, call), target, rtol=1e-4, atol=1e-5)


def test_stretching_as_far_as_symmetric_weights_allow_pays_on_the_bundled_model() -> None:
    """Rounding alone, on trajectories that calibration has not seen."""
    given = load("demo:fruits32")
    pool, held_out = (next(stream(given, images=8, batch_size=8, steps=6, seed=seed)) for seed in (0, 1))
    call, target = held_out.batch(range(len(held_out)))

    def error(rewrites: tuple[Rewrite, ...]) -> float:
        method = MSE.model_copy(update={"rewrites": rewrites})
        student = prepare(given.denoiser, pool, method, weight_bits=6, activation_bits=6)
        with torch.no_grad():
            return float((run(student.denoiser, call) - target).square().mean())

    assert error(BEST_WIDE.rewrites) < 0.9 * error((Smoothing(),))
