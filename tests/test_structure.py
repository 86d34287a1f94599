"""Structure: order, roles and sizes of the layers of every kind of denoiser, found by running it."""

from __future__ import annotations

import functools

import pytest
import torch
from pipelines import BUILDERS, build
from torch import Tensor, nn

from bitstep.denoiser.calls import Call
from bitstep.denoiser.origins import Origin
from bitstep.denoiser.structure import Structure, blocks, trace
from bitstep.stages.calibrate import stream
from bitstep.stages.load import Source

ENDS = {
    "ddpm": ("conv_in", "conv_out"),
    "ddim": ("conv_in", "conv_out"),
    "latent_vq": ("conv_in", "conv_out"),
    "stable_diffusion": ("conv_in", "conv_out"),
    "animatediff": ("conv_in", "conv_out"),
    "dit": ("pos_embed.proj", "proj_out_2"),
    "pixart": ("pos_embed.proj", "proj_out"),
    "sd3": ("pos_embed.proj", "proj_out"),
    "flux": ("x_embedder", "proj_out"),
    "z_image": ("all_x_embedder.2-1", "all_final_layer.2-1.linear"),
}
EMBEDDINGS = {
    "ddim": ["time_embedding"],
    "stable_diffusion": ["time_embedding"],
    "animatediff": ["time_embedding"],
    "dit": [f"transformer_blocks.{i}.norm1.emb.timestep_embedder" for i in range(2)],
    "pixart": ["adaln_single.emb.timestep_embedder"],
    "sd3": ["time_text_embed.timestep_embedder"],
    "flux": ["time_text_embed.timestep_embedder", "time_text_embed.guidance_embedder"],
    "z_image": ["t_embedder"],
}


@functools.cache
def traced(name: str) -> tuple[nn.Module, Structure]:
    pipeline = build(name)
    source = Source(name, pipeline)
    pool = next(stream(source, images=2, batch_size=2, steps=2, seed=0))
    call, _ = pool.batch(pool.commonest[[0, -1]])
    return source.denoiser, trace(source.denoiser, call)


@pytest.mark.parametrize("name", BUILDERS)
def test_first_and_last_layer_and_the_total_of_all_parts(name: str) -> None:
    denoiser, structure = traced(name)
    assert (structure.first, structure.last) == ENDS[name]
    # our own sums per layer and attention against torch's count of the whole forward
    parts = sum(layer.macs for layer in structure.layers) + sum(site.macs for site in structure.attention)
    assert parts == structure.total_macs
    executed = {layer.name for layer in structure.layers}
    linear = {n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert executed | set(structure.left_alone) >= linear
    assert not executed & set(structure.left_alone)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_time_embedding(name: str) -> None:
    _, structure = traced(name)
    layers = ("mlp.0", "mlp.2") if name == "z_image" else ("linear_1", "linear_2")
    expected = {f"{embedding}.{layer}" for embedding in EMBEDDINGS[name] for layer in layers}
    assert set(structure.time_embedding) == expected


def test_sizes_of_single_layers() -> None:
    _, structure = traced("ddim")
    layers = {layer.name: layer for layer in structure.layers}
    conv = layers["conv_in"]
    assert conv.positions == 8 * 8
    assert conv.macs == 64 * 20 * 3 * 9
    assert conv.sees_sample
    assert not conv.sees_timestep
    modulation = layers["down_blocks.0.resnets.0.time_emb_proj"]
    assert modulation.sees_timestep
    assert not modulation.sees_sample
    assert modulation.macs == 80 * 20
    site = structure.attention[0]
    assert site.name == "down_blocks.1.attentions.0"
    assert site.macs == 2 * 3 * 16 * 16 * 8


def test_skips_and_changes_of_resolution() -> None:
    _, structure = traced("stable_diffusion")
    assert structure.skip == tuple(layer.name for layer in structure.layers if layer.name.endswith("conv_shortcut"))
    assert len(structure.skip) == 5
    assert structure.downsample == ("down_blocks.0.downsamplers.0.conv",)
    _, patches = traced("dit")
    assert patches.downsample == ()  # cutting an image into patches is the first layer


@pytest.mark.parametrize("name", BUILDERS)
def test_every_layer_is_in_one_block(name: str) -> None:
    denoiser, structure = traced(name)
    members = [layer for block in blocks(denoiser, structure) for layer in block.layers]
    assert sorted(members) == sorted(layer.name for layer in structure.layers)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_attention_is_in_one_block(name: str) -> None:
    denoiser, structure = traced(name)
    found = [block.name for block in blocks(denoiser, structure) if len(block.layers) > 1]
    assert structure.attention
    for site in structure.attention:
        assert sum(f"{site.name}.".startswith(f"{block}.") for block in found) == 1


def test_blocks_are_residual_attention_and_transformer_blocks() -> None:
    unet = {block.name: len(block.layers) for block in blocks(*traced("stable_diffusion"))}
    assert unet["down_blocks.1.resnets.0"] == 4  # two convolutions, the time projection, the skip
    assert unet["mid_block.attentions.0.transformer_blocks.0"] == 10
    assert unet["mid_block.attentions.0.proj_in"] == 1
    assert unet["down_blocks.0.downsamplers.0.conv"] == 1
    names = list(unet)
    assert names.index("conv_in") < names.index("mid_block.resnets.0") < names.index("conv_out") == len(names) - 1
    assert [block.name for block in blocks(*traced("dit"))] == [
        "pos_embed.proj",
        "transformer_blocks.0",
        "transformer_blocks.1",
        "proj_out_1",
        "proj_out_2",
    ]
    assert {"transformer_blocks.1", "context_embedder"} <= {block.name for block in blocks(*traced("sd3"))}
    assert "single_transformer_blocks.0" in {block.name for block in blocks(*traced("flux"))}


def test_what_is_left_alone_is_listed_with_a_reason_and_shared_modules_once() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input = nn.Conv1d(4, 8, 3, padding=1)
            self.grow = nn.ConvTranspose1d(8, 8, 2, stride=2)
            self.shrink = nn.Conv1d(8, 8, 2, stride=2, groups=4)
            self.shared = nn.Conv1d(8, 8, 1)
            self.again = self.shared
            self.unused = nn.Linear(4, 4)
            self.output = nn.Conv1d(8, 4, 1)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            x = self.shrink(self.grow(self.input(sample)))
            x = self.again(self.shared(x)) + timestep[:, None, None]
            return self.output(x)  # type: ignore[no-any-return]

    structure = trace(Denoiser(), Call({"sample": torch.randn(2, 4, 6), "timestep": torch.tensor([1, 0])}))
    layers = {layer.name: layer for layer in structure.layers}
    assert list(layers) == ["input", "shrink", "shared", "output"]
    assert layers["shared"].macs == 2 * 6 * 8 * 8  # it runs twice
    assert layers["shrink"].macs == 6 * 8 * 2 * 2
    assert layers["output"].sees_timestep
    assert structure.left_alone == {
        "grow": "ConvTranspose1d is not a Linear, Conv1d or Conv2d",
        "unused": "never ran",
    }
    assert structure.downsample == ("shrink",)
    assert structure.total_macs == sum(layer.macs for layer in structure.layers) + 6 * 8 * 8 * 2


class _Pair(nn.Module):
    """Looks like a norm, but returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x * self.gain


class _Normalized(nn.Module):
    """Two layers read a norm's output; ``also`` says what else is done with it."""

    def __init__(self, also: str = "") -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.GroupNorm(2, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.pair, self.tied = _Pair(), nn.GroupNorm(2, 8)
        self.tied.weight = self.norm.weight
        self.also = also

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.norm(sample + timestep[:, None, None] / 1000)
        tokens = x.transpose(1, 2)
        if self.also == "mixed":  # as many channels, but others
            tokens = x.reshape(len(x), 8, 8)
        y = self.one(tokens) * self.two(tokens)
        if self.also == "residual":
            y = y + tokens
        if self.also == "concatenated":
            y = torch.cat([y, tokens], 1)
        if self.also == "twice":
            y = self.one(y)
        if self.also == "aliased":
            y = y + tokens.mT.mT
        if self.also == "pair":
            y = y + self.pair(tokens)[1]
        if self.also == "tied":
            y = y + self.tied(sample).transpose(1, 2)
        assert isinstance(y, Tensor)
        return y


class _Attention(nn.Module):
    """Values, averaged by attention, then a gated unit; ``also`` says what else is done."""

    def __init__(self, also: str) -> None:
        super().__init__()
        self.values, self.out = nn.Linear(8, 8), nn.Linear(8, 6)
        self.gated, self.last, self.direct = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 8)
        self.also = also

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        tokens = sample.transpose(1, 2) + timestep[:, None, None] / 1000
        heads = tokens.unflatten(-1, (2, 4)).transpose(1, 2)
        values = self.values(tokens).unflatten(-1, (4, 2) if self.also == "mixed" else (2, 4))
        values = values.permute(0, 3, 1, 2) if self.also == "mixed" else values.transpose(1, 2)
        if self.also == "shifted":
            values = values + 1
        x = nn.functional.scaled_dot_product_attention(heads, heads, values).transpose(1, 2).flatten(2)
        value, gate = self.gated(self.out(x)).chunk(2, dim=-1)
        if self.also == "squared":
            gate = value
        y = self.last(value * nn.functional.silu(gate))
        if self.also == "shared":
            y = y + values.sum((1, 3))[..., None]
        if self.also == "both":
            y = y + self.direct(values.transpose(1, 2).flatten(2))
        assert isinstance(y, Tensor)
        return y


@pytest.mark.parametrize("also", ["", "mixed", "shifted", "squared", "shared", "both"])
def test_values_and_gated_units_belong_to_layers_when_nothing_else_reads_them(also: str) -> None:
    torch.manual_seed(0)
    call = Call({"sample": torch.randn(2, 8, 8), "timestep": torch.tensor([10.0, 500.0])})
    layers = {info.name: info.origin for info in trace(_Attention(also), call).layers}
    values = None if also in ("mixed", "shifted", "shared", "both") else Origin("values", 0, 8, attention="")
    # (what cannot be verified after one that is none counts as none)
    between = None if also == "mixed" else Origin("out", 0, 6)
    gated = None if also in ("mixed", "squared") else Origin("gated", 0, 4)
    assert layers == {"values": None, "out": values, "gated": between, "last": gated} | (
        {"direct": None} if also == "both" else {}
    )


@pytest.mark.parametrize("also", ["", "residual", "concatenated", "mixed", "twice", "aliased", "pair", "tied"])
def test_a_norm_belongs_to_layers_when_nothing_else_reads_it(also: str) -> None:
    torch.manual_seed(0)
    call = Call({"sample": torch.randn(2, 8, 8), "timestep": torch.tensor([10.0, 500.0])})
    layers = {info.name: info.origin and info.origin.module for info in trace(_Normalized(also), call).layers}
    assert layers == dict.fromkeys(("one", "two"), None if also else "norm")
