"""Adapters (LoRA, by peft) on packed models whose scales were folded into norms and layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packed import filled, random_layer
from peft import LoraConfig
from pipelines import source
from torch import Tensor, nn

from bitstep.denoiser.calls import Call, run
from bitstep.errors import BitstepError
from bitstep.methods.base import Method
from bitstep.methods.rewrites import Smoothing
from bitstep.runtime.layers import PackedModule
from bitstep.stages.calibrate import stream
from bitstep.stages.pack import pack
from bitstep.stages.prepare import prepare

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "stable_diffusion": [*ATTENTION, "net.0.proj", "net.2", "proj_in", "conv1"],
    "z_image": [*ATTENTION, "w1", "w2", "w3"],
}


def packed(name: str, rewrites: tuple[Smoothing, ...] = (Smoothing(),)) -> tuple[Any, Any, Call]:
    """A teacher, its packed model, and what both are called with."""
    given = source(name)
    given.denoiser.requires_grad_(False)
    pool = next(stream(given, images=2, batch_size=2, steps=3, seed=0))
    method = Method(name="smoothed", rewrites=rewrites)
    student = prepare(given.denoiser, pool, method, weight_bits=8, activation_bits=32)
    assert bool(student.rewritten.folded) == bool(rewrites)
    call, _ = pool.batch(pool.commonest)
    return given.denoiser, pack(student, {}), call


def adapt(model: Any, name: str = "default", **config: Any) -> None:
    """Adapters of values that depend on nothing but where they are."""
    model.add_adapter(LoraConfig(r=2, **config), name)
    generator = torch.Generator().manual_seed(len(name))
    for parameter_name, parameter in model.named_parameters():
        if f"lora_B.{name}" in parameter_name or f"lora_A.{name}" in parameter_name:
            nn.init.normal_(parameter, std=0.15, generator=generator)
    model.requires_grad_(False)


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # peft's, at the second
@pytest.mark.parametrize("name", TARGETS)
@torch.no_grad()
def test_they_add_what_they_add_to_the_original(name: str) -> None:
    teacher, model, call = packed(name)
    plain = run(teacher, call)
    rounding = error(run(model, call), plain)
    for adapters in (["first"], ["first", "second"]):  # what is fitted is not fitted again
        for adapted in (teacher, model):
            adapt(adapted, adapters[-1], target_modules=TARGETS[name])
            adapted.set_adapters(adapters)
        expected = run(teacher, call)
        assert error(plain, expected) > 10 * rounding
        for _ in range(3):  # layer by layer, recorded, replayed
            assert error(run(model, call), expected) < 3 * rounding
        assert error(run(copy.deepcopy(model), call), expected) < 3 * rounding


@torch.no_grad()
def test_a_weight_takes_the_input_as_it_comes() -> None:
    """What diffusers makes of several projections at once is computed from their weights."""
    _, model, call = packed("stable_diffusion")
    plain = run(model, call)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, call), plain, rtol=1e-3, atol=1e-4)
    layer, x = nn.Conv2d(4, 6, 3, groups=2), torch.randn(1, 4, 5, 5)
    module = filled(layer, random_layer(layer, activation_bits=None, dilated=True))
    module.choose = model.get_submodule("conv_in").choose
    expected = nn.functional.conv2d(x, torch.Tensor(module.weight), module.bias, groups=2)
    torch.testing.assert_close(module(x), expected)


@torch.no_grad()
def test_other_kinds_are_refused_where_something_is_divided() -> None:
    teacher, model, call = packed("stable_diffusion")
    adapt(model, target_modules=ATTENTION, use_dora=True)
    with pytest.raises(BitstepError, match=r"is no plain LoRA.*rewrites="):
        run(model, call)
    teacher, model, call = packed("stable_diffusion", ())
    for adapted in (teacher, model):
        adapt(adapted, target_modules=ATTENTION, use_dora=True)
    assert error(run(model, call), run(teacher, call)) < 0.05


def test_what_was_divided_is_in_the_file(tmp_path: Any) -> None:
    _, model, _ = packed("stable_diffusion")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    divided = 0
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            other = again.get_submodule(name)
            for divisor in ("input_divisor", "output_divisor"):
                one, two = getattr(module, divisor), getattr(other, divisor)
                assert (one is None) == (two is None)
                if one is not None:
                    divided += 1
                    assert torch.equal(one, two)
    assert divided
