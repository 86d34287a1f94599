"""What the programs for GPUs compute before codes and after sums; fused blocks on them against the same blocks layer by
layer. On a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from packed import filled, random_layer
from test_native_fused import BLOCKS, DEPRECATED_BY_ITSELF, assert_close, assert_same, map_transformer, packed, rounded
from torch import Tensor, nn
from torch.nn import functional as F

from bitstep.errors import BitstepError
from bitstep.runtime import cuda
from bitstep.runtime.convolution import After, Before
from bitstep.runtime.cuda import CudaKernel, TritonConvolution
from bitstep.runtime.fused import fuse, fused_blocks
from bitstep.runtime.reference import ReferenceKernel
from bitstep.runtime.replay import enable_replay
from bitstep.runtime.tape import listen

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = CudaKernel()


@pytest.fixture(autouse=True)
def no_gradients(no_grad: None) -> Iterator[None]:
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def prepared(layer: nn.Module, bits: int = 8, **options: Any) -> TritonConvolution:
    module = filled(layer, random_layer(layer, 4, bits, **options)).to(DEVICE)
    run = CUDA.prepare(module.problem, module.tensors())
    assert isinstance(run, TritonConvolution)
    return run


def coded(channels: int, x: Tensor, step: float, before: Before, repeat: int = 1) -> Tensor:
    """The values that the codes of x stand for, NHWC."""
    product = prepared(nn.Conv2d(channels, 8, 3, padding=1))
    scale, zero_point = torch.tensor([step], device=DEVICE), torch.tensor([100.0], device=DEVICE)
    gain, shift = (None if part is None else part.to(DEVICE) for part in (before.gain, before.shift))
    before = before._replace(gain=gain, shift=shift)
    codes = product._coded(x.to(DEVICE), scale, zero_point, before, repeat)[..., :channels].cpu().float() + 128
    assert torch.equal(codes[:, 0], torch.full_like(codes[:, 0], 100.0))  # the border is zero
    return (codes[:, 1:-1, 1:-1] - 100) * step


def assert_rarely_a_step_apart(got: Tensor, expected: Tensor, step: float) -> None:
    steps = ((got - expected.clamp(-100 * step, 155 * step)) / step).abs()
    assert steps.max() < 1.01
    assert (steps > 0.51).float().mean() < 0.01


ACTIVATIONS = {"none": nn.Identity(), "silu": nn.SiLU(), "gelu": nn.GELU("tanh")}


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of a sigmoid that is 0
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", [30, 140])  # of one tile, and of several
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_normalization_and_activation_before_codes(activation: Any, channels: int, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 9, 8, channels) * 3 + 1).to(dtype)
    gain, shift = torch.randn(2, channels), torch.randn(2, channels)
    maps = x.float().movedim(3, 1)
    grouped = F.group_norm(maps, 10, gain[0], shift[0], 1e-5).movedim(1, 3)
    by_pixel = F.layer_norm(x.float(), (channels,), eps=1e-6) * gain[:, None, None] + shift[:, None, None]
    for before, normal in (
        (Before(1e-5, 10, gain[0], shift[0], activation), grouped),
        (Before(1e-5, 10, None, None, activation), F.group_norm(maps, 10, eps=1e-5).movedim(1, 3)),
        (Before(1e-6, 0, gain, shift, activation), by_pixel),
        (Before(None, 0, gain[0], None, activation), x.float() * gain[0]),
    ):
        assert_rarely_a_step_apart(coded(channels, x, 0.05, before), ACTIVATIONS[activation](normal), 0.05)


def test_a_map_of_any_strides_whose_pixels_are_repeated() -> None:
    x = torch.randn(2, 30, 5, 3).permute(0, 2, 3, 1)
    got = coded(30, x, 0.05, Before(1e-5, 3, activation="silu"), repeat=2)
    normal = F.silu(F.group_norm(x.movedim(3, 1), 3))
    assert_rarely_a_step_apart(got, F.interpolate(normal, scale_factor=2).movedim(1, 3), 0.05)


def test_group_normalization_of_many_pixels_far_from_zero() -> None:
    x = torch.randn(1, 70, 61, 6) + 3000  # more blocks of pixels than are added up at a time
    normal = F.group_norm(x.movedim(3, 1).double(), 3).movedim(1, 3).float()
    assert (coded(6, x, 0.05, Before(1e-5, 3)) - normal.clamp(-5, 7.75)).abs().max() < 0.05


@pytest.mark.parametrize("channels", [64, 21])
def test_gated_values_before_codes(channels: int) -> None:
    x = torch.randn(2, 5, 3, 2 * channels) * 3
    x[0, 0, 0, channels:] = torch.linspace(-40, 40, channels)
    value, gate = x.chunk(2, dim=-1)
    got = coded(channels, x, 0.05, Before(activation="geglu"))
    assert_rarely_a_step_apart(got, value * F.gelu(gate), 0.05)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bias_gain_and_residual_after_the_sums(
    splits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = prepared(nn.Conv2d(64, 40, 3, padding=1), 4)
    monkeypatch.setattr(cuda, "tiling_of", lambda *_: cuda.Tiling(32, 32, 4, 3, splits))
    x, step = torch.randn(2, 5, 6, 64, device=DEVICE, dtype=dtype), torch.tensor([0.5, 0.25], device=DEVICE)
    rows = step, torch.tensor([7.0, 8.0], device=DEVICE)
    zero, bias, gain = (size * torch.randn(2, 40, device=DEVICE, dtype=dtype) for size in (0, 1, 1))
    plain = product.convolve(x, *rows, after=After(bias=zero)).float()
    residual = torch.randn(plain.shape, device=DEVICE, dtype=dtype)
    got = product.convolve(x, *rows, after=After(bias, gain, residual))
    expected = residual + gain[:, None, None] * (plain + bias[:, None, None])
    assert got.dtype == dtype
    tolerance = 2e-3 if dtype == torch.float16 else 1e-6
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance * float(plain.abs().max()))
    own = product.convolve(x, *rows).float() - plain
    torch.testing.assert_close(own[0], own[1], rtol=0, atol=2 * tolerance * float(plain.abs().max()))


@pytest.mark.parametrize("given", [{"bias": torch.ones(1, 8)}, {"residual": torch.ones(2)}])
def test_what_is_added_must_fit(given: dict[str, Any]) -> None:
    with pytest.raises(BitstepError, match="expected tensors of shape"):
        prepared(nn.Conv2d(6, 8, 1)).convolve(
            torch.zeros(2, 7, 5, 6), torch.ones(1), torch.zeros(1), after=After(**given)
        )


def test_nothing_is_differentiated() -> None:
    product, rows = prepared(nn.Conv2d(6, 8, 1)), (torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE))
    x = torch.ones(1, 2, 2, 6, device=DEVICE, requires_grad=True)
    with torch.enable_grad(), pytest.raises(BitstepError, match="no gradients"):
        product.convolve(x, *rows)


# ---- blocks


def run_on_device(
    block: nn.Module, *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Fused, and layer by layer."""

    def placed(given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        return given.to(DEVICE, dtype if given.is_floating_point() else given.dtype)

    def run() -> Tensor:
        y = block(*map(placed, args), **{name: placed(given) for name, given in kwargs.items()})
        y = y if isinstance(y, Tensor) else y.sample
        assert y.dtype == dtype
        return y.float().cpu()

    model = packed(nn.Sequential(block), kernel=CUDA).to(DEVICE, dtype)
    expected = run()
    fuse(model)
    assert fused_blocks(model)[0] == "0"
    return run(), expected


@pytest.mark.parametrize("name", BLOCKS)
def test_a_fused_block_is_the_same(name: str) -> None:
    build, check = BLOCKS[name]
    block, args, kwargs = build()
    check(*run_on_device(block, *args, **kwargs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype) -> None:
    """Between the layers there is none, so that codes are the nearer ones."""
    block = ResnetBlock2D(in_channels=16, out_channels=24, temb_channels=12, groups=4)
    x, embedding = torch.randn(2, 16, 6, 5).to(dtype).float(), torch.randn(2, 12).to(dtype).float()
    got, layer_by_layer = run_on_device(block, x, embedding, dtype=dtype)
    # parameters stay rounded to half precision
    model = nn.Sequential(block).float()
    assert fused_blocks(model) == ["0"]
    exact = block(x.to(DEVICE), embedding.to(DEVICE)).cpu()
    assert (got - exact).norm() < 0.02 * exact.norm()
    assert (got - exact).norm() < (layer_by_layer - exact).norm()


@pytest.mark.parametrize("inside", [False, True])
def test_rounded_attention(inside: bool) -> None:
    """By itself, and in a block that does not call its forward method."""
    block: Any
    if inside:
        block, x = BasicTransformerBlock(24, 3, 8), torch.randn(2, 12, 24, device=DEVICE)
    else:
        block = Attention(query_dim=24, heads=3, dim_head=8, norm_num_groups=4, residual_connection=True, bias=True)
        x = torch.randn(2, 24, 4, 3, device=DEVICE)
    model = packed(nn.Sequential(block), kernel=CUDA).to(DEVICE)
    unrounded = block(x)
    rounded(block.attn1 if inside else block).to(DEVICE)
    expected = block(x)
    fuse(model)
    assert fused_blocks(model)[0] == "0"
    assert (block(x) - expected).norm() < 0.2 * (unrounded - expected).norm()


@DEPRECATED_BY_ITSELF
@pytest.mark.parametrize("linear", [False, True])
def test_transformer_on_a_map(linear: bool) -> None:
    x, text = torch.randn(2, 16, 4, 3), torch.randn(2, 5, 20)
    assert_close(*run_on_device(map_transformer(linear), x, text))


def test_group_normalization_is_computed_once_for_all_who_read_it() -> None:
    block = Attention(query_dim=24, heads=3, dim_head=8, norm_num_groups=4, residual_connection=True, bias=True)
    with mock.patch.object(cuda, "_settled", wraps=cuda._settled) as settled:
        run_on_device(block, torch.randn(2, 24, 4, 3))
    assert settled.call_count == 1


def test_a_block_that_was_fused_on_the_cpu_stays_so_on_a_gpu() -> None:
    block, x = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4), torch.randn(1, 16, 4, 4)
    model = packed(nn.Sequential(block))
    fuse(model)
    expected = block(x, None)
    for layer in (block.conv1, block.conv2):
        layer.choose = lambda _: CUDA
    model.to(DEVICE)
    for layer in (block.conv1, block.conv2):
        layer.forget_kernel()
    assert_same(block(x.to(DEVICE), None).cpu(), expected)


def test_what_a_graph_must_watch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs read parameters past torch's dispatcher. The interpreter's copies could not be recorded."""
    monkeypatch.setattr(TritonConvolution, "_coded", lambda *_: None)
    monkeypatch.setattr(TritonConvolution, "_multiply", lambda _, y, *__: y.zero_())
    block, x = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4), torch.randn(1, 16, 4, 4, device=DEVICE)
    fuse(packed(nn.Sequential(block), kernel=CUDA).to(DEVICE))
    block(x, None)  # prepared
    _, recorder = listen(lambda x: block(x, None), x)
    assert recorder.refusal is None
    constants = {tensor.data_ptr() for tensor in recorder.constants.values()}
    assert {parameter.data_ptr() for parameter in block.parameters()} <= constants


def test_autocast_leaves_the_residual_stream_as_it_is() -> None:
    block = BasicTransformerBlock(16, 2, 8)
    fuse(packed(nn.Sequential(block), kernel=CUDA).to(DEVICE))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert block(torch.randn(2, 9, 16, device=DEVICE)).dtype == torch.float32


class Only(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any) -> Any:
        return self.block(*args)


def test_a_block_is_fused_when_its_layers_come_where_they_can_be() -> None:
    block, x = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4), torch.randn(1, 16, 4, 4)
    model = packed(Only(block), kernel=ReferenceKernel())
    fuse(model)
    enable_replay(model)
    assert fused_blocks(model) == []
    for layer in (block.conv1, block.conv2):
        layer.choose = lambda _: CUDA
        layer.forget_kernel()
    model.to(DEVICE)
    model(x.to(DEVICE), None)
    assert fused_blocks(model) == ["block"]


# ---- compiled without a GPU

COMPILE = """
from itertools import product

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bitstep.runtime import device_code


def compiled(name, pointers, **constants):
    program = getattr(device_code, name)
    names = program.arg_names
    given = {**dict.fromkeys(pointers, "*fp16"), "codes": "*i8", "eps": "fp32"}
    given |= dict.fromkeys(["scale", "zero_point", "reciprocal", "moments", "affine"], "*fp32")
    given |= dict.fromkeys(["input_scale", "input_zero_point", "weight_scale"], "*fp32")
    given |= {"weight": "*i8", "weight_sum": "*i32", "parts": "*i32"}
    source = ASTSource(
        fn=program,
        signature={n: "constexpr" if n in constants else given.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
    )
    compile(source, target=GPUTarget("cuda", 90, 32))


sizes = {"PADDING_H": 1, "PADDING_W": 1, "REPEAT": 1, "TOP": 15}
for given in ({"channel_stride": 1}, {"channels": 1, "height": 1, "width": 1, "scale_stride": 1}):
    for activation in ("none", "silu", "gelu", "geglu"):
        tile = {"NORMALIZED": False, "ACTIVATION": activation, "BLOCK_P": 32, "BLOCK_C": 64}
        compiled("code_inputs", ["x", "gain", "shift"], **sizes, **tile, **given)
    row = {"NORMALIZED": True, "ACTIVATION": "none", "BLOCK_P": 1, "BLOCK_C": 2048}
    compiled("code_inputs", ["x"], gain=None, shift=None, reciprocal=None, **sizes, **row, **given)
for ones in ({}, {"pixels": 1, "width": 1, "channels": 1}):
    compiled("channel_moments", ["x"], BLOCK_P=64, BLOCK_C=64, channel_stride=1, **ones)
for ones in ({}, {"pixels": 1, "blocks": 1, "channels": 1, "width": 1, "gain": None, "shift": None}):
    compiled("group_affine", ["gain", "shift"], BLOCK_P=64, BLOCK_B=64, BLOCK_C=16, **ones)
layer = {f"{name}_{axis}": 1 for name in ("KERNEL", "STRIDE", "DILATION") for axis in "HW"}
ends = [{"BIASES": True, "gain": None}, {"BIASES": False}, {"BIASES": True, "out": 1}]
for alone, end in product((False, True), ends):
    tile = {"ALONE": alone, "SPLITS": 1, "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}
    compiled("multiply", ["y", "bias", "gain", "residual"], BASES=1, **tile, **layer, **end)
    compiled("add_up", ["y", "bias", "gain", "residual"], BASES=2, SPLITS=4, BLOCK=1024, **end)
"""


def test_compiles() -> None:
    """Also where Triton makes constants of arguments that are 1, which its interpreter does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
