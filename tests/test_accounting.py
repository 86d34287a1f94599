"""The numbers of docs/accounting.md: size and operations of a binary LDM-4, as `inspect` reports them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from packed import random_layer

from bitstep.checkpoint import PackedOperands, pack_model
from bitstep.denoiser.attention import OPERANDS
from bitstep.denoiser.calls import Call
from bitstep.denoiser.structure import Structure, trace
from bitstep.methods.binarydm import BINARYDM
from bitstep.planning import AttentionPlan, LayerPlan, Plan, add_attention, add_bases, plan_layers
from bitstep.stages.inspect import inspect

DOCUMENT = (Path(__file__).parent.parent / "docs" / "accounting.md").read_text()
MEBIBYTE = 2**20


def ldm4() -> UNet2DModel:
    """The UNet of LDM-4 (LSUN-Bedroom, CelebA-HQ), random weights."""
    with accelerate.init_empty_weights():
        unet = UNet2DModel(
            sample_size=64,
            block_out_channels=(224, 448, 672, 896),
            layers_per_block=2,
            attention_head_dim=32,
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
            up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"),
        )
    unet.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.uniform_(-0.02, 0.02, generator=generator)
    return unet.eval()


@cache
def traced() -> tuple[UNet2DModel, Structure]:
    unet = ldm4()
    return unet, trace(unet, Call({"sample": torch.randn(1, 3, 64, 64), "timestep": torch.tensor([500])}))


def binary_plan() -> Plan:
    """What `binarydm` makes of it at W1A4, before second bases."""
    unet, structure = traced()
    plan = plan_layers(unet, structure, weight_bits=1, activation_bits=4, coverage=BINARYDM.layers.coverage)
    return add_attention(plan, structure, bits=4, probability_bits=BINARYDM.attention.probability_bits)


def papers_placement(decided: Plan) -> Plan:
    """Second bases in every layer at full and half resolution: the first and the last six blocks of the paper. The
    inputs of skip convolutions, which have 8 bits here, have the paper's 4."""
    _, structure = traced()
    positions = {info.name: info.positions for info in structure.layers}

    def papers(layer: LayerPlan) -> LayerPlan:
        if layer.name in structure.skip:
            layer = replace(layer, activation_bits=4)
        return replace(layer, bases=2) if layer.weight_bits == 1 and positions[layer.name] >= 32 * 32 else layer

    return replace(decided, layers=tuple(map(papers, decided.layers)))


def packed(decided: Plan, folder: Path) -> dict[str, Any]:
    """What `inspect` says of the model that the plan describes, with random codes."""
    unet, _ = traced()

    def layer(item: LayerPlan) -> Any:
        module = unet.get_submodule(item.name)
        return random_layer(module, item.weight_bits, item.activation_bits, bases=item.bases)

    def operands(site: AttentionPlan) -> PackedOperands:
        tables = {operand: (torch.tensor([0.05]), torch.tensor([3.0])) for operand in OPERANDS}
        return PackedOperands(tables, site.bits, site.probability_bits, site.macs)

    model = pack_model(
        unet,
        {item.name: replace(layer(item), macs=item.macs) for item in decided.layers},
        grid=None,
        modules_to_not_convert=decided.left_alone,
        total_macs=decided.total_macs,
        recipe={},
        attention={site.name: operands(site) for site in decided.attention},
    )
    DDIMPipeline(model, DDIMScheduler()).save_pretrained(folder)
    return inspect(folder)


def attention_of(plan: Plan) -> tuple[int, float]:
    """The multiply-accumulates of all attention, and the operations that `inspect` counts for them."""
    macs = sum(site.macs for site in plan.attention)
    return macs, sum(site.macs * site.bits * (site.bits + site.probability_bits) / 2 for site in plan.attention) / 64


def test_the_papers_accounting(tmp_path: Path) -> None:
    decided = papers_placement(binary_plan())
    facts = packed(decided, tmp_path)
    layers = {layer.name: layer for layer in decided.layers}
    attention, operations = attention_of(decided)
    assert attention == facts["flops"] - sum(layer.macs for layer in layers.values())
    unet, structure = traced()
    embedding = sum(layers[name].weights for name in structure.time_embedding)
    channels = {info.name: len(unet.get_submodule(info.name).weight) for info in structure.layers}
    scales = 4 * sum(channels[name] * layer.bases for name, layer in layers.items())
    as_the_paper = facts["size_bytes"] + 3 * embedding - scales
    one_bit = [layer for layer in layers.values() if layer.weight_bits == 1]
    numbers = {
        "full precision": f"{facts['full_precision_bytes'] / MEBIBYTE:.1f} MiB",
        "layers": f"{(facts['flops'] - attention) / 1e9:.1f} G",
        "attention": f"{attention / 1e9:.2f} G",
        "attention's operations": f"{operations / 1e9:.2f} G",
        "scales": f"{scales / MEBIBYTE:.1f} MiB",
        "embedding": f"{3 * embedding / MEBIBYTE:.1f} MiB",
        "doubled": f"{sum(x.weights for x in one_bit if x.bases == 2) / sum(x.weights for x in layers.values()):.1%}",
        "one-bit average": f"{sum(x.weights * x.bases for x in one_bit) / sum(x.weights for x in one_bit):.3f}",
        "average": f"{facts['average_weight_bits']:.3f}",
        "on disk": f"{facts['size_bytes'] / MEBIBYTE:.1f} MiB",
        "compression": f"{facts['compression']:.1f}x",
        "papers size": f"{as_the_paper / MEBIBYTE:.1f} MiB",
        "papers compression": f"{facts['full_precision_bytes'] / as_the_paper:.1f}x",
        "ops": f"{facts['ops'] / 1e9:.2f} G",
        "saving": f"{facts['ops_saving']:.2f}x",
        "papers ops": f"{(facts['ops'] - operations) / 1e9:.2f} G",
        "papers saving": f"{(facts['flops'] - attention) / (facts['ops'] - operations):.1f}x",
    }
    assert {name: number for name, number in numbers.items() if number not in DOCUMENT} == {}
    assert float(numbers["papers saving"][:-1]) == pytest.approx(9.3, abs=0.1)
    assert float(numbers["papers compression"][:-1]) == pytest.approx(24.8, abs=0.15)


def test_the_bits_that_give_the_papers_placement() -> None:
    _, structure = traced()
    decided = binary_plan()
    expected = {layer.name for layer in papers_placement(decided).layers if layer.bases == 2}
    assert {layer.name for layer in add_bases(decided, structure, 1.176).layers if layer.bases == 2} == expected
    assert "`--bits W1.176A4`" in DOCUMENT


def test_one_point_one_bits_are_one_point_one(tmp_path: Path) -> None:
    _, structure = traced()
    decided = add_bases(binary_plan(), structure, 1.1)
    facts = packed(decided, tmp_path)
    attention, operations = attention_of(decided)
    assert facts["average_weight_bits"] == pytest.approx(decided.average_weight_bits)
    assert facts["average_weight_bits"] == pytest.approx(1.1, abs=0.001)
    numbers = (
        f"{facts['average_weight_bits']:.4f}",
        f"{facts['size_bytes'] / MEBIBYTE:.1f} MiB",
        f"{facts['compression']:.1f}x",
        f"{facts['ops'] / 1e9:.2f} G",
        f"{facts['ops_saving']:.2f}x",
        f"{(facts['flops'] - attention) / (facts['ops'] - operations):.1f}x",
    )
    assert [number for number in numbers if number not in DOCUMENT] == []
