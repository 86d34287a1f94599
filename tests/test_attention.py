"""Quantized attention: intercepted whatever the module is called, trained, packed, and the same after loading."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from packed import GRID, random_layer, without_replay
from pipelines import build, source, unet
from torch import Tensor, nn
from torch.nn import functional as F

import bitstep.denoiser.attention
from bitstep import api, library
from bitstep.checkpoint import PackedOperands, pack_model
from bitstep.denoiser.attention import OPERANDS, attend, intercept
from bitstep.denoiser.calls import run
from bitstep.errors import BitstepError
from bitstep.methods.base import Activations, AttentionOperands, Calibration, Method
from bitstep.numerics.uniform import fake_quantize
from bitstep.runtime.attention import AttentionFormat, PackedAttention, attention
from bitstep.runtime.dispatch import set_backend
from bitstep.runtime.fused import fused_blocks
from bitstep.runtime.replay import Replay
from bitstep.stages.calibrate import stream
from bitstep.stages.finetune import roles
from bitstep.stages.load import Source
from bitstep.stages.pack import pack
from bitstep.stages.prepare import Student, prepare

SITE = "mid_block.attentions.0"


def operands(*shape: int, heads: int = 4, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, h, n, 8, generator=generator) for h, n in ((4, 5), (heads, keys), (heads, keys))
    )
    return query, key, value


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.randn(2, 1, 5, 7, generator=torch.Generator().manual_seed(1))},
        {"attn_mask": torch.arange(35).reshape(5, 7) % 3 > 0},
        {"attn_mask": torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(2))},
        {"attn_mask": torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(3))},
    ],
    ids=["plain", "scale", "causal", "bias", "mask", "bias of each head", "bias of each head, no batch"],
)
def test_untouched_operands_give_what_torch_gives(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = operands()
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attend(lambda _, x: x, query, key, value, **options), expected)
    # in pieces of three heads and of one, where memory is short
    monkeypatch.setattr(bitstep.denoiser.attention, "MAX_PROBABILITIES", 2 * 3 * 5 * 7)
    shapes = []

    def seen(operand: str, x: Tensor) -> Tensor:
        if operand == "probability":
            shapes.append(x.shape)
        return x

    with torch.no_grad():
        torch.testing.assert_close(attend(seen, query, key, value, **options), expected)
    assert shapes == [(2, 3, 5, 7), (2, 1, 5, 7)]


def test_grouped_queries() -> None:
    query, key, value = operands(heads=2)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(attend(lambda _, x: x, query, key, value, enable_gqa=True), expected)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_interception_ends_with_the_forward_pass_even_a_failing_one(failure: type[BaseException]) -> None:
    class Site(nn.Module):
        def forward(self, fail: bool = False) -> Tensor:
            result = F.scaled_dot_product_attention(*operands())
            if fail:
                raise failure("it failed")
            return result

    seen: list[str] = []
    site = Site()
    expected = site()

    def double(operand: str, x: Tensor) -> Tensor:
        seen.append(operand)
        return 2 * x if operand == "value" else x

    interception = intercept(site, functools.partial(attend, double))
    assert inspect.signature(site.forward) == inspect.signature(Site().forward)
    torch.testing.assert_close(site(), 2 * expected)
    assert tuple(seen) == (*OPERANDS[:3], "probability")
    with pytest.raises(failure, match="it failed"):
        site(fail=True)
    seen.clear()
    F.scaled_dot_product_attention(*operands())
    interception.remove()
    assert torch.equal(site(), expected)
    assert not seen


def test_half_precision_holds_the_logits() -> None:
    query, key, value = (x.half() for x in operands())
    query, key = query + 100, key + 100  # whose products are beyond 65,504, but not when scaled
    assert bool(attend(lambda _, x: x, query, key, value).isfinite().all())


@functools.cache
def student(name: str, per_step: bool = True) -> tuple[Student, Any]:
    given = source(name)
    pool = next(stream(given, images=2, batch_size=2, steps=3, seed=0))
    method = Method(
        name="rounding", activations=Activations(per_step=per_step), attention=AttentionOperands(quantized=True)
    )
    return prepare(given.denoiser, pool, method, weight_bits=8, activation_bits=4), pool


def test_attention_sample_by_sample_stays_in_floating_point() -> None:
    """As Mochi's: its rows of the tables cannot be told."""

    class OneByOne:
        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            projected = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
            samples = zip(*(x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).split(1) for x in projected), strict=True)
            mixed = torch.cat([F.scaled_dot_product_attention(*sample) for sample in samples])
            return attn.to_out[0](mixed.transpose(1, 2).flatten(2))

    pipeline = build("stable_diffusion")
    pipeline.unet.set_attn_processor(OneByOne())
    # three images in batches of two rows each, and a last one
    pool = next(stream(Source("one by one", pipeline), images=3, batch_size=3, steps=3, seed=0, guidance_scale=1.0))
    method = Method(name="rounding", attention=AttentionOperands(quantized=True))
    method = method.model_copy(update={"calibration": Calibration(batch_size=2)})
    with pytest.warns(UserWarning, match="compute attention sample by sample"):
        fitted = prepare(pipeline.unet, pool, method, weight_bits=8, activation_bits=4)
    assert not fitted.plan.attention
    call, _ = pool.batch([0, 4, 8])
    assert bool(run(fitted.denoiser, call).isfinite().all())


def test_a_processor_that_goes_round_the_quantizers_is_noticed() -> None:
    fitted, pool = student("stable_diffusion")
    model: Any = copy.deepcopy(fitted.denoiser)
    call, _ = pool.batch([0])
    with torch.no_grad():
        run(model, call)  # any warning would be an error
        model.set_attention_slice("max")
        with pytest.warns(UserWarning, match="attention slicing"):
            run(model, call)


@pytest.mark.parametrize("name", ["ddim", "stable_diffusion", "dit", "flux"])
@pytest.mark.parametrize("per_step", [True, False])
def test_packed_attention_equals_fake_attention(name: str, per_step: bool, tmp_path: Path) -> None:
    fitted, pool = student(name, per_step)
    call, _ = pool.batch(range(6))  # of three timesteps
    with torch.no_grad():
        expected = run(fitted.denoiser, call)
    assert fitted.attention
    whole = sum(layer.macs for layer in fitted.plan.layers if layer.activation_bits is None)  # first and last
    assert fitted.plan.coverage == pytest.approx(1 - whole / fitted.plan.total_macs)
    packed = pack(fitted, {})
    packed.save_pretrained(tmp_path)
    loaded = type(packed).from_pretrained(tmp_path)
    for model in (packed, loaded, copy.deepcopy(loaded)):
        set_backend(model, "reference")
        with torch.no_grad():
            torch.testing.assert_close(run(model, call), expected, rtol=1e-4, atol=1e-5)
    set_backend(loaded)  # nothing fused may lose the rounding
    with torch.no_grad():
        apart = (run(loaded, call) - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert apart.median() < 1e-3  # next to a tie a code may fall the other way, which four bits carry far in its sample
    if name == "ddim":
        facts = api.inspect(tmp_path)
        attention_macs = sum(site.macs for site in fitted.plan.attention)
        layers = [layer for layer in facts["layers"] if layer["activation_bits"]]
        bops = sum(layer["macs"] * layer["weight_bits"] * layer["activation_bits"] for layer in layers)
        assert facts["bops"] == bops + attention_macs * (4 * 4 + 8 * 4) // 2
        quantized = attention_macs + sum(layer["macs"] for layer in layers)
        assert facts["ops"] == facts["bops"] / 64 + facts["flops"] - quantized
    if name == "ddim" and library.instruction_sets():
        assert SITE in fused_blocks(loaded)


def test_operands_are_rounded_at_their_bits_and_timestep_and_learn_as_activations() -> None:
    fitted, pool = student("ddim")
    quantizer = fitted.attention[SITE]
    found = roles(quantizer)
    assert len(found["activation_scale"]) == len(found["activation_zero_point"]) == len(OPERANDS)
    x = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    for row, timestep in enumerate(pool.timesteps):
        for operand, bits in (("query", 4), ("probability", 8)):
            scale, zero_point = quantizer.tables()[operand]
            with fitted.cursor.at(timestep), torch.no_grad():
                expected = fake_quantize(x, scale[row], zero_point[row], bits)
                assert torch.equal(quantizer(operand, x), expected)


def with_attention(**change: Any) -> UNet2DModel:
    torch.manual_seed(0)
    source = unet()
    tables = {name: (torch.full((len(GRID),), 0.05), torch.full((len(GRID),), 3.0)) for name in OPERANDS}
    part = PackedOperands(tables | change, 4, 8, macs=10)
    layers = {"conv_in": random_layer(source.conv_in, 4, 4)}
    return pack_model(
        source, layers, grid=GRID, modules_to_not_convert={}, total_macs=10**6, recipe={}, attention={SITE: part}
    )


@pytest.mark.skipif(not library.instruction_sets(), reason="the native library is not built")
@pytest.mark.parametrize(
    ("left_to_torch", "given"),
    [
        (False, {}),
        (False, {"scale": 0.3, "dropout_p": 0.0, "is_causal": False, "attn_mask": None}),
        (True, {"is_causal": True}),
        (True, {"attn_mask": torch.arange(35).reshape(5, 7) % 3 > 0}),
    ],
)
def test_packed_operands_run_natively_or_in_torch_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch, left_to_torch: bool, given: dict[str, Any]
) -> None:
    part = PackedAttention(AttentionFormat(8, 8, 1), None)
    for operand in OPERANDS:
        part.get_buffer(f"{operand}_scale").fill_(1 / 255 if operand == "probability" else 1 / 32)
        part.get_buffer(f"{operand}_zero_point").fill_(0 if operand == "probability" else 128)
    expected = part(*operands(), **given)
    assert not torch.equal(expected, F.scaled_dot_product_attention(*operands(), **given))
    part.native = True
    calls: list[Tensor] = []

    def natively(*args: Any) -> Tensor:
        calls.append(attention(*args))
        return calls[-1]

    monkeypatch.setattr("bitstep.runtime.attention.attention", natively)
    got = part(*operands(), **given)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)  # a code of a probability, times the largest value
    assert bool(calls) != left_to_torch


@pytest.mark.skipif(not library.instruction_sets(), reason="the native library is not built")
def test_passes_with_rounded_attention_are_replayed() -> None:
    uneven = torch.tensor([0.03, 0.04, 0.06, 0.05]), torch.tensor([3.0, 4.0, 5.0, 6.0])
    model = with_attention(**dict.fromkeys(OPERANDS, uneven)).eval()
    plain = without_replay(model)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for timestep in (420.0, 51.5, 731.0, 333.0, 60.0, 77.7):
            assert torch.equal(model(x, torch.tensor(timestep)).sample, plain(x, torch.tensor(timestep)).sample)
    assert isinstance(model.forward, Replay)
    assert any(known.proven for known in model.forward.known.values())


@pytest.mark.parametrize(
    "table",
    [
        (torch.full((4,), -1.0), torch.zeros(4)),
        (torch.ones(4), torch.full((4,), 16.0)),
        (torch.ones(4, 1), torch.ones(4)),
    ],
)
def test_damaged_tables_are_refused(table: tuple[Tensor, Tensor]) -> None:
    with_attention()
    with pytest.raises(BitstepError, match=r"query_(scale|zero_point)"):
        with_attention(query=table)


def test_softmax_rows_still_sum_to_about_one() -> None:
    query, key, value = operands()

    def at_eight_bits(operand: str, x: Tensor) -> Tensor:
        return fake_quantize(x, torch.tensor(1 / 255), torch.tensor(0.0), 8) if operand == "probability" else x

    constant = torch.ones_like(value)
    rows = attend(at_eight_bits, query, key, constant)
    assert math.isclose(float(rows.mean()), 1, abs_tol=0.01)
