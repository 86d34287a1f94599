"""Fused blocks of diffusers models against the same blocks run layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from test_native import Case, tensors_for
from torch import Tensor, nn

from bitstep import library
from bitstep.denoiser.attention import OPERANDS
from bitstep.errors import BitstepError
from bitstep.numerics.packing import pack
from bitstep.numerics.uniform import fake_quantize
from bitstep.runtime.attention import AttentionFormat, Operand, PackedAttention, attention
from bitstep.runtime.convolution import After, Before
from bitstep.runtime.cpu import CpuKernel, NativeConvolution
from bitstep.runtime.fused import fuse, fused_blocks
from bitstep.runtime.kernel import Kernel
from bitstep.runtime.layers import LayerFormat, packed_like
from bitstep.runtime.reference import ReferenceKernel

CPU = CpuKernel()
pytestmark = pytest.mark.skipif(not library.instruction_sets(), reason="the native library is not built")


@pytest.fixture(params=library.instruction_sets(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.manual_seed(0)
    with library.instruction_set(request.param), torch.no_grad():
        yield request.param


def packed(model: nn.Module, weight_bits: int = 4, activation_bits: int = 4, kernel: Kernel = CPU) -> nn.Module:
    """``model`` with its linear layers and convolutions replaced by packed ones of random weights."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        new = packed_like(layer, LayerFormat(weight_bits, 1, True, activation_bits, 1, False), None)
        codes = torch.randint(0, 2**weight_bits, (1, len(layer.weight), layer.weight[0].numel()))
        new.weight_packed.copy_(pack(codes, weight_bits))
        new.weight_scale.fill_(2.0 ** -(weight_bits + 3))
        assert new.input_scale is not None
        assert new.input_zero_point is not None
        new.input_scale.fill_(6 / 2**activation_bits)
        new.input_zero_point.fill_(2 ** (activation_bits - 1))
        if new.bias is not None:
            new.bias.normal_()
        new.choose = lambda _: kernel
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model.eval()


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Equal within rounding, but for the few outputs that see an activation which rounded to the other side."""
    assert got.shape == expected.shape
    differs = (got - expected).abs() > 1e-5 * expected.abs().max()
    assert differs.float().mean() < 0.02


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal within the rounding of attention and of the codes that follow it."""
    assert got.shape == expected.shape
    assert (got - expected).norm() < 0.01 * expected.norm()


def run_both(block: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    model = packed(nn.Sequential(block))
    expected = block(*args, **kwargs)
    fuse(model)
    assert fused_blocks(model)[0] == "0"
    return block(*args, **kwargs), expected


@pytest.mark.parametrize("activation", ["none", "silu", "gelu"])
@pytest.mark.parametrize("channels", [32, 21])
def test_normalization_and_activation_before_codes(activation: Any, channels: int) -> None:
    """8-bit codes of the fused pass differ from torch's own by at most one, and rarely."""
    identity = Case(
        channels=(channels, channels), kernel=(1, 1), padding=0, weight_bits=2, activation_bits=8, bias=False
    )
    tensors = tensors_for(identity, exact=True)
    tensors.weight.codes.copy_(2 + torch.eye(channels)[None])
    tensors.weight.scale.fill_(1)
    layer = NativeConvolution(identity.problem, tensors)
    x = torch.randn(2, 5, 3, channels) * 3 + 1
    scale, zero_point = torch.tensor([0.05]), torch.tensor([60.0])
    activations = {"none": nn.Identity(), "silu": nn.SiLU(), "gelu": nn.GELU("tanh")}
    norm = nn.GroupNorm(channels // 7 if channels == 21 else 8, channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer_norm = nn.LayerNorm(channels)
    nn.init.normal_(layer_norm.weight)
    group = Before(eps=norm.eps, groups=norm.num_groups, gain=norm.weight, shift=norm.bias, activation=activation)
    layer_wise = Before(eps=1e-5, gain=layer_norm.weight, shift=layer_norm.bias, activation=activation)
    for before, normal in (
        (group, norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)),
        (layer_wise, layer_norm(x)),
    ):
        expected = torch.fake_quantize_per_tensor_affine(activations[activation](normal), 0.05, 60, 0, 255)
        steps = ((layer.convolve(x, scale, zero_point, before) - expected) / scale).round().abs()
        assert steps.max() <= 1
        assert steps.mean() < 0.01


@pytest.mark.parametrize("channels", [32, 21, 2])  # 2 with their gates are as many as 2 are padded to
def test_gated_values_before_codes(channels: int) -> None:
    case = Case(channels=(channels, channels), kernel=(1, 1), padding=0, weight_bits=2, activation_bits=8, bias=False)
    tensors = tensors_for(case, exact=True)
    tensors.weight.codes.copy_(2 + torch.eye(channels)[None])
    tensors.weight.scale.fill_(1)
    layer = NativeConvolution(case.problem, tensors)
    x = torch.randn(2, 5, 3, 2 * channels) * 3
    x[0, 0, 0, channels:] = torch.linspace(-40, 40, channels)
    for span in (4.0, 0.01):  # near zero too
        scale, zero_point = torch.tensor([span / 255]), torch.tensor([128.0])
        value, gate = x.chunk(2, dim=-1)
        normal = value * nn.functional.gelu(gate.double()).float()
        expected = torch.fake_quantize_per_tensor_affine(normal, span / 255, 128, 0, 255)
        steps = ((layer.convolve(x, scale, zero_point, Before(activation="geglu")) - expected) / scale).round().abs()
        assert steps.max() <= 1
        assert steps.mean() < 0.002
    with pytest.raises(BitstepError, match=f"a layer of {channels} channels.* got {channels // 2} channels"):
        layer.convolve(x[..., :channels].contiguous(), scale, zero_point, Before(activation="geglu"))
    with pytest.raises(BitstepError, match="a gated input goes with nothing else"):
        layer.convolve(x, scale, zero_point, Before(eps=1e-5, activation="geglu"))


@pytest.mark.parametrize("own", [21, 5])
def test_group_normalization_far_from_zero(own: int) -> None:
    case = Case(channels=(21, 21), kernel=(1, 1), padding=0, weight_bits=2, activation_bits=8, bias=False)
    tensors = tensors_for(case, exact=True)
    tensors.weight.codes.copy_(2 + torch.eye(21)[None])
    tensors.weight.scale.fill_(1)
    layer, step = NativeConvolution(case.problem, tensors), (torch.tensor([0.05]), torch.tensor([128.0]))
    x = torch.randn(2, 9, 8, 21) + 3000
    normal = nn.functional.group_norm(x.movedim(3, 1).double(), 3).movedim(1, 3)
    got = torch.empty_like(x)
    parts = x if own == 21 else (x[..., :own].contiguous(), x[..., own:].contiguous())
    layer.call(got, parts, *step, Before(eps=1e-5, groups=3), After(), 1)()
    assert (got - normal.clip(-6.4, 6.35)).abs().max() < 0.05


@pytest.mark.parametrize(("own", "rest"), [(16, 32), (5, 9), (1, 20)])
def test_a_map_in_two_parts_is_their_concatenation(own: int, rest: int) -> None:
    channels = own + rest
    case = Case(channels=(channels, 37), activation_bits=4)
    layer = NativeConvolution(case.problem, tensors_for(case, exact=False))
    parts = torch.randn(2, *case.size, own), torch.randn(2, *case.size, rest)
    whole, scale, zero_point = torch.cat(parts, -1), torch.tensor([0.5]), torch.tensor([7.0])
    gain, shift = torch.randn(channels), torch.randn(channels)
    for before in (
        Before(),
        Before(eps=1e-5, groups=1, gain=gain, shift=shift, activation="silu"),
        Before(eps=1e-5, gain=gain, shift=shift),
    ):
        expected = layer.convolve(whole, scale, zero_point, before)
        got = torch.full_like(expected, torch.nan)
        layer.call(got, parts, scale, zero_point, before, After(), 1)()
        if before.eps and not before.groups:
            assert_same(got, expected)
        else:
            assert torch.equal(got, expected)


@pytest.mark.parametrize("weight_bits", [1, 8])
def test_bias_gain_and_residual_are_applied_after_the_sums(weight_bits: int) -> None:
    case = Case(weight_bits=weight_bits)
    layer = NativeConvolution(case.problem, tensors_for(case, exact=True))
    x = torch.randn(case.batch, *case.size, case.channels[0])
    scale, zero_point = torch.full((2,), 0.5), torch.full((2,), 7.0)
    plain = layer.convolve(x, scale, zero_point, after=After(bias=torch.zeros(2, 37)))
    bias, gain, residual = torch.randn(2, 37), torch.randn(2, 37), torch.randn_like(plain)
    got = layer.convolve(x, scale, zero_point, after=After(bias, gain, residual))
    expected = residual + gain[:, None, None] * (plain + bias[:, None, None])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def residual(out_channels: int, layout: torch.memory_format) -> Any:
    block = ResnetBlock2D(in_channels=16, out_channels=out_channels, temb_channels=12, groups=4)
    return block, (torch.randn(2, 16, 6, 5).contiguous(memory_format=layout), torch.randn(2, 12)), {}


def over_a_map() -> Any:
    block = Attention(query_dim=24, heads=3, dim_head=8, norm_num_groups=4, residual_connection=True, bias=True)
    return block, (torch.randn(2, 24, 4, 3),), {}


def cross_attending(activation: str) -> Any:
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=20, activation_fn=activation)
    return block, (torch.randn(2, 9, 16),), {"encoder_hidden_states": torch.randn(2, 5, 20)}


def adaptive() -> Any:
    block = BasicTransformerBlock(
        16,
        2,
        8,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        attention_bias=True,
    )
    return block, (torch.randn(2, 9, 16),), {"timestep": torch.tensor([3, 5]), "class_labels": torch.tensor([1, 7])}


def labelled(timesteps: list[float]) -> Any:
    args = torch.tensor(timesteps), torch.tensor([1, 7])
    return CombinedTimestepLabelEmbeddings(10, 16), args, {"hidden_dtype": torch.float32}


def downsampling(*size: int) -> Any:
    return Downsample2D(16, use_conv=True, padding=0, name="op"), (torch.randn(2, 16, *size),), {}


def upsampling() -> Any:
    return Upsample2D(16, use_conv=True), (torch.randn(2, 16, 5, 3),), {}


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got, expected)


BLOCKS: dict[str, tuple[Callable[[], Any], Callable[[Tensor, Tensor], None]]] = {
    **{
        f"residual, {out} channels, {layout}": (partial(residual, out, layout), assert_same)
        for out in (16, 24)
        for layout in (torch.contiguous_format, torch.channels_last)
    },
    "attention over a map": (over_a_map, assert_close),
    **{
        f"transformer, {activation}": (partial(cross_attending, activation), assert_close)
        for activation in ("gelu", "gelu-approximate", "geglu")
    },
    "transformer, adaptive normalization": (adaptive, assert_close),
    "timesteps and labels": (partial(labelled, [3.0, 500.0]), assert_same),
    "a timestep and labels": (partial(labelled, [3.0]), assert_same),
    "downsampling 6x6, a border on one side": (partial(downsampling, 6, 6), assert_equal),
    "downsampling 5x8, a border on one side": (partial(downsampling, 5, 8), assert_equal),
    "upsampling, codes repeated": (upsampling, assert_equal),
}
"""What builds a block with its arguments, and how near it has to come fused to what it gives layer by layer."""


@pytest.mark.parametrize("name", BLOCKS)
def test_a_fused_block_is_the_same(name: str) -> None:
    build, check = BLOCKS[name]
    block, args, kwargs = build()
    check(*run_both(block, *args, **kwargs))


def test_an_embedding_that_is_not_projected_is_added_all_the_same() -> None:
    block = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4)
    assert_same(*run_both(block, torch.randn(2, 16, 6, 5), torch.randn(2, 16, 1, 1)))


def test_dropout_drops_out_in_training() -> None:
    block = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4, dropout=0.5)
    fuse(packed(nn.Sequential(block)))
    x = torch.randn(2, 16, 6, 5)
    assert torch.equal(block(x, None), block(x, None))
    block.train()
    assert not torch.equal(block(x, None), block(x, None))


def rounded(site: nn.Module) -> PackedAttention:
    """Quantize the operands of the attention that ``site`` computes, in reference arithmetic until told otherwise."""
    part = PackedAttention(AttentionFormat(4, 8, 1), None)
    for operand in OPERANDS:
        top = 2 ** part.format.bits_of(operand) - 1
        part.get_buffer(f"{operand}_scale").fill_((1 if operand == "probability" else 6) / top)
        part.get_buffer(f"{operand}_zero_point").fill_(0 if operand == "probability" else top // 2)
    part.attach(site)
    return part


def test_rounded_attention_over_a_map() -> None:
    block = Attention(query_dim=24, heads=3, dim_head=8, norm_num_groups=4, residual_connection=True, bias=True)
    model, x = packed(nn.Sequential(block)), torch.randn(2, 24, 4, 3)
    unrounded, part = block(x), rounded(block)
    expected = block(x)
    part.native = True
    natively = block(x)
    fuse(model)
    assert fused_blocks(model) == ["0"]
    for y in (natively, block(x)):
        assert (y - expected).norm() < 0.2 * (unrounded - expected).norm()


def test_rounded_attention_in_a_transformer_block() -> None:
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=20)
    model, x, context = packed(nn.Sequential(block)), torch.randn(2, 9, 16), torch.randn(2, 5, 20)
    unrounded, parts = block(x, encoder_hidden_states=context), [rounded(block.attn1), rounded(block.attn2)]
    expected = block(x, encoder_hidden_states=context)
    for part in parts:
        part.native = True
    fuse(model)
    assert fused_blocks(model)[0] == "0"
    seen: list[bool] = []
    for watched in (False, True):
        if watched:
            block.attn1.register_forward_hook(lambda *_: seen.append(True))
        y = block(x, encoder_hidden_states=context)
        assert (y - expected).norm() < 0.2 * (unrounded - expected).norm()
    assert seen


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_transformer_on_a_map(linear: bool, layout: torch.memory_format) -> None:
    block = map_transformer(linear)
    x, text = torch.randn(2, 16, 4, 3).contiguous(memory_format=layout), torch.randn(2, 5, 20)
    model = packed(nn.Sequential(block))
    block.transformer_blocks[0].attn2.to_v.weight_scale.mul_(16)  # so that the text counts
    expected = block(x, text, return_dict=False)[0]
    fuse(model)
    assert fused_blocks(model) == ["0", "0.transformer_blocks.0", *(f"0.transformer_blocks.0.attn{i}" for i in (1, 2))]
    assert_close(block(x, text, return_dict=False)[0], expected)
    assert_close(block(x, encoder_hidden_states=text, cross_attention_kwargs=None).sample, expected)
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 2)
    (masked,) = block(x, text, encoder_attention_mask=mask, return_dict=False)
    assert (masked - expected).norm() > 0.02 * expected.norm()


DEPRECATED_BY_ITSELF = pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated")


def map_transformer(linear: bool = False) -> Transformer2DModel:
    return Transformer2DModel(
        2, 8, in_channels=16, norm_num_groups=4, cross_attention_dim=20, use_linear_projection=linear
    )


@pytest.mark.parametrize(("queries", "keys", "heads", "channels"), [(37, 300, 3, 17), (5, 5, 2, 64), (33, 1, 1, 40)])
def test_attention_is_finer_than_bfloat16(queries: int, keys: int, heads: int, channels: int) -> None:
    q, k, v = (torch.randn(2, n, heads * channels) * size for n, size in ((queries, 1), (keys, 4), (keys, 2)))
    k[:, 0] = 0  # a row without a largest value
    y = attention(q, k, v, heads)
    per_head = [x.double().unflatten(-1, (heads, channels)).transpose(1, 2) for x in (q, k, v)]
    expected = nn.functional.scaled_dot_product_attention(*per_head).transpose(1, 2).flatten(-2)
    assert (y - expected).norm() < 2**-9 * expected.norm()


def test_attention_to_a_key_far_above_the_others() -> None:
    q = k = 5000 * torch.eye(17)[None]
    v = torch.randn(1, 17, 17)
    torch.testing.assert_close(attention(q, k, v, 1), v, rtol=0, atol=1e-3 * float(v.abs().max()))


@pytest.mark.parametrize(("queries", "keys", "heads", "channels"), [(37, 300, 3, 17), (5, 5, 2, 64), (33, 1, 1, 40)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 2])
def test_coded_attention_is_exact_but_for_the_softmax(
    queries: int, keys: int, heads: int, channels: int, bits: int, rows: int
) -> None:
    q, k, v = (torch.randn(2, n, heads * channels) for n in (queries, keys, keys))
    top, uneven = 2**bits - 1, 1 + torch.arange(rows) / 7
    zeros = (top // 2, top // 3, top - top // 3)
    operands = [Operand(5 * uneven / top, torch.full((rows,), float(zero)), bits) for zero in zeros]
    fine = 2.0 / keys if keys > 1 else 1.0  # many probabilities are in range and some beyond
    operands.append(Operand(fine * uneven / 255, torch.full((rows,), 3.0), 8))
    y = attention(q, k, v, heads, tuple(operands), scale=0.7)

    def rounded(x: Tensor, operand: Operand) -> Tensor:
        shape = (rows, 1, 1, 1)
        scale, zero_point = operand.scale.reshape(shape), operand.zero_point.reshape(shape)
        return fake_quantize(x.float(), scale, zero_point, operand.bits)

    q, k, v = (
        rounded(x.unflatten(-1, (heads, channels)).transpose(1, 2), operand).double()
        for x, operand in zip((q, k, v), operands, strict=False)
    )
    probability = (0.7 * q @ k.transpose(-2, -1)).softmax(-1)
    coded = rounded(probability, operands[3]).double()
    expected = (coded @ v).transpose(1, 2).flatten(-2)
    # what rounds otherwise in float32 is next to a tie; a sum may see a few such codes of several hundred
    steps = operands[3].scale.max() * v.abs().max()
    assert (y - expected).abs().max() < 2.01 * steps
    assert ((y - expected).abs() > 1e-5 * expected.abs().max()).float().mean() < 0.02


def test_coded_attention_of_a_long_row() -> None:
    q, k = torch.randn(1, 3, 16), torch.randn(1, 5000, 16)
    rounding = Operand(torch.tensor([0.1]), torch.tensor([128.0]), 8)
    probability = Operand(torch.tensor([1 / 255]), torch.tensor([0.0]), 8)
    k[0, 4321] = 10 * q[0, 1]
    y = attention(q, k, k, 1, (rounding, rounding, rounding, probability))
    torch.testing.assert_close(y[0, 1], fake_quantize(k[0, 4321], *rounding))


@pytest.mark.parametrize("shape", [(1, 5, 8), (3, 5, 8), (2, 5, 12)], ids=["broadcast", "batch", "width"])
def test_attention_refuses_keys_that_do_not_fit(shape: tuple[int, ...]) -> None:
    keys = torch.zeros(shape)
    with pytest.raises(BitstepError, match="attention of 2 heads"):
        attention(torch.zeros(2, 3, 8), keys, keys, 2)


@pytest.mark.parametrize(
    "given", [{"bias": torch.ones(1, 37)}, {"gain": torch.ones(3, 37)}, {"residual": torch.ones(2)}]
)
def test_what_is_added_must_fit(given: dict[str, Any]) -> None:
    layer = NativeConvolution(Case().problem, tensors_for(Case(), exact=True))
    with pytest.raises(BitstepError, match="expected tensors of shape"):
        layer.convolve(torch.zeros(2, 7, 5, 20), torch.ones(1), torch.zeros(1), after=After(**given))


SITES: dict[str, tuple[Callable[[], Any], tuple[Any, ...]]] = {
    "resnet": (lambda: ResnetBlock2D(in_channels=16, temb_channels=None, groups=4), (torch.ones(1, 16, 4, 4), None)),
    "attention": (lambda: Attention(16, heads=2, dim_head=8, norm_num_groups=4), (torch.ones(1, 16, 4, 4),)),
    "transformer": (
        lambda: BasicTransformerBlock(16, 2, 8, cross_attention_dim=16),
        (torch.ones(1, 9, 16), None, torch.ones(1, 5, 16)),
    ),
    "transformer on a map": (map_transformer, (torch.ones(1, 16, 4, 4), torch.ones(1, 5, 20))),
}


@DEPRECATED_BY_ITSELF
@pytest.mark.parametrize("site", SITES)
def test_hooks_and_replaced_forward_methods_inside_see_their_modules(site: str) -> None:
    build, args = SITES[site]
    plain, block = build().eval(), build()
    model = packed(nn.Sequential(block))
    fuse(model)
    assert fused_blocks(model)[0] == "0"
    for name, _ in list(plain.named_modules())[1:]:
        seen: list[str] = []
        plain.get_submodule(name).register_forward_hook(lambda *_, seen=seen: seen.append("plain"))
        plain(*args)
        module = block.get_submodule(name)
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append("hook"))
        block(*args)
        handle.remove()
        original = module.forward
        module.forward = lambda *a, seen=seen, original=original, **k: seen.append("forward") or original(*a, **k)
        block(*args)
        del module.forward
        assert {*seen} in ({"plain", "hook", "forward"}, set())


class Adapted(nn.Module):
    """What an adapter puts in a layer's place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def forward(self, x: Tensor) -> Any:
        return 2 * self.base_layer(x)


@DEPRECATED_BY_ITSELF
@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("resnet", "conv2"),
        ("attention", "to_q"),
        ("transformer", "attn1.to_k"),
        ("transformer on a map", "proj_in"),
    ],
)
def test_an_adapter_inside_is_run(site: str, name: str) -> None:
    build, args = SITES[site]
    block = build()
    fuse(packed(nn.Sequential(block)))
    block.set_submodule(name, Adapted(block.get_submodule(name)))
    unfused = copy.deepcopy(block)
    for module in unfused.modules():
        if fused_blocks(module)[:1] == [""]:
            module.__class__ = type(module).__base__
    got, expected = block(*args), unfused(*args)
    assert all(map(torch.equal, *((y,) if isinstance(y, Tensor) else y.to_tuple() for y in (got, expected))))


def test_a_fused_block_follows_its_layers_to_another_kernel() -> None:
    block = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4)
    fuse(packed(nn.Sequential(block)))
    x = torch.randn(1, 16, 4, 4)
    expected = block(x, None)
    block.conv1.choose = lambda _: ReferenceKernel()
    block.conv1.forget_kernel()
    torch.testing.assert_close(block(x, None), expected)


def test_half_precision_is_computed_but_said_to_be_slow() -> None:
    block = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4)
    fuse(packed(nn.Sequential(block)))
    block.half()
    with pytest.warns(UserWarning, match="slow on a CPU"):
        assert block(torch.ones(1, 16, 4, 4).half(), None).dtype == torch.float16


def test_a_block_on_another_kernel_is_left_alone() -> None:
    block = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4)
    model = nn.Sequential(block)
    fuse(model)
    assert fused_blocks(model) == []
