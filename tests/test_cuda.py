"""The programs for GPUs against the reference: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from packed import GRID, LAYERS, filled, random_layer, random_model
from pipelines import build
from torch import Tensor, nn

from bitstep.denoiser.steps import StepCursor
from bitstep.numerics.uniform import quantize
from bitstep.runtime import cuda
from bitstep.runtime.dispatch import KERNELS, kernels_in_use, packed_layers, reasons, set_backend
from bitstep.runtime.kernel import CodeKeeper
from bitstep.runtime.layers import PackedModule

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNGROUPED = {name: layer for name, layer in LAYERS.items() if "group" not in name and name != "depthwise"}


def outputs(module: PackedModule, x: Tensor) -> tuple[Tensor, Tensor]:
    set_backend(module.cpu(), "reference")
    reference = module(x)
    module.to(DEVICE).forget_kernel()
    module.choose = lambda _: KERNELS["cuda"]  # which would refuse the CPU that the interpreter runs on
    return module(x.to(DEVICE)).cpu(), reference


@pytest.mark.parametrize("kind", UNGROUPED)
@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "symmetric", "bases"),
    [
        (1, 4, True, 1),
        (1, 8, True, 2),
        (2, 8, True, 1),
        (3, 3, True, 1),
        (4, 4, True, 1),
        (4, 8, False, 1),
        (7, 8, False, 1),
        (8, 8, True, 1),
    ],
)
def test_equals_the_reference(kind: str, weight_bits: int, activation_bits: int, symmetric: bool, bases: int) -> None:
    build, shape = UNGROUPED[kind]
    layer, x = build(), torch.randn(shape, generator=torch.Generator().manual_seed(weight_bits))
    packed = random_layer(
        layer, weight_bits, activation_bits, symmetric=symmetric, bases=bases, steps=len(GRID), dilated=True
    )
    cursor = StepCursor(GRID)
    module = filled(layer, packed, cursor)
    for timestep in (420.0, torch.tensor([300.0, 999.0, 300.0, 420.0, 51.5, 899.0])):
        with cursor.at(timestep):
            y, reference = outputs(module, x)
        torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_half_precision_goes_in_and_comes_out(kind: str, dtype: torch.dtype) -> None:
    build, shape = UNGROUPED[kind]
    layer, x = build(), torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    module = filled(layer, random_layer(layer, 4, 8, dilated=True))
    y, reference = outputs(module, x)
    assert module.run(x.to(DEVICE), *module.input_rows(x)).dtype == y.dtype == dtype
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(y, reference, rtol=tolerance, atol=tolerance * float(reference.abs().max()))


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("bases", [1, 2])
def test_sums_in_parts_are_the_same(splits: int, bases: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine steps of 64 channels: the last of five programs has fewer than the others."""
    layer = nn.Conv2d(64, 40, 3, padding=1)
    module = filled(layer, random_layer(layer, 4 if bases == 1 else 1, 4, bases=bases))
    x = torch.randn(2, 64, 5, 6, generator=torch.Generator().manual_seed(0))
    whole, reference = outputs(module, x)
    monkeypatch.setattr(cuda, "tiling_of", lambda *_: cuda.Tiling(32, 32, 4, 3, splits))
    in_parts, _ = outputs(module, x)
    assert torch.equal(in_parts, whole)
    torch.testing.assert_close(in_parts, reference, rtol=1e-5, atol=1e-4)


def test_more_channels_than_a_tile_holds() -> None:
    layer = nn.Conv2d(200, 70, 3, padding=1)
    module = filled(layer, random_layer(layer, 1, 4, bases=2))
    x = torch.randn(1, 200, 5, 6, generator=torch.Generator().manual_seed(0))
    y, reference = outputs(module, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-4)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_denoiser_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer: a code that falls the other way would repaint the picture of random weights."""
    model = random_model(build("ddim").unet, 4, 8, steps=len(GRID))
    monkeypatch.setattr(KERNELS["cuda"], "unsupported", lambda problem: [])  # the interpreter's CPU included
    set_backend(model, "cuda")
    compared = []

    def compare(layer: PackedModule, args: tuple[Tensor], y: Tensor) -> None:
        reference = KERNELS["reference"].prepare(layer.problem, layer.tensors())(args[0], *layer.input_rows(args[0]))
        torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))
        compared.append(layer)

    layers = packed_layers(model)
    for layer in layers.values():
        layer.register_forward_hook(compare)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        model.to(DEVICE)(x.to(DEVICE), torch.tensor([420.0, 300.0], device=DEVICE))
    assert set(compared) == set(layers.values())
    assert set(kernels_in_use(model).values()) == {"cuda"}


@pytest.mark.parametrize(("bits", "symmetric", "bases"), [(1, True, 2), (3, True, 1), (4, True, 1), (4, False, 1)])
@pytest.mark.parametrize("layer", [nn.Linear(50, 6), nn.Conv2d(5, 7, 3)], ids=["linear", "conv2d"])
def test_the_codes_come_back(layer: nn.Linear | nn.Conv2d, bits: int, symmetric: bool, bases: int) -> None:
    packed = random_layer(layer, bits, symmetric=symmetric, bases=bases)
    module = filled(layer, packed)
    kept = KERNELS["cuda"].prepare(module.problem, module.tensors())
    assert isinstance(kept, CodeKeeper)
    assert torch.equal(kept.codes(), packed.weight.codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_are_rounded_like_everywhere_else(bits: int) -> None:
    halves = torch.arange(-600, 600) / 2  # ties of a step size of 1
    awkward = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, -torch.inf, 1e-40, 2**22 + 1.0])
    x = torch.cat([halves, awkward, torch.randn(592, generator=torch.Generator().manual_seed(0)) * 20])
    scale, zero_point = torch.tensor([1.0, 0.3, 1.7e-3]), torch.tensor([3.0, 0.0, 12.0])
    rows = x.repeat(len(scale), 1)
    layer = nn.Linear(x.numel(), 1)
    module = filled(layer, random_layer(layer, 4, bits)).to(DEVICE)
    product = KERNELS["cuda"].prepare(module.problem, module.tensors())
    coded = product._coded(rows[:, None, None].to(DEVICE), scale.to(DEVICE), zero_point.to(DEVICE))  # type: ignore[attr-defined]
    expected = quantize(rows, scale[:, None], zero_point[:, None], bits)
    assert torch.equal(coded.flatten(1)[:, : x.numel()].cpu().int() + 128, expected.int())


@pytest.mark.parametrize(
    ("layer", "options", "reason"),
    [
        (nn.Linear(8, 3), {"bits": 8, "symmetric": False}, "zero point other than 128"),
        (nn.Linear(70_000, 1), {}, "32 bits"),
        (nn.Conv1d(6, 4, 3, groups=2), {}, "groups"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(layer: nn.Module, options: dict[str, Any], reason: str) -> None:
    problem = replace(filled(layer, random_layer(layer, **options)).problem, device="cuda")
    (why,) = reasons(problem)["cuda"]
    assert reason in why


def test_it_leaves_the_cpu_to_others() -> None:
    layer = nn.Linear(8, 3)
    (why,) = reasons(replace(filled(layer, random_layer(layer)).problem, device="cpu"))["cuda"]
    assert "not on cpu" in why


def test_a_machine_without_triton_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in str(cuda.programs_fault.__wrapped__())


def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial that a GPU must pass before it is trusted passes here, and fails where the rounding is wrong."""
    exactness, fused = cuda.trial_errors(DEVICE)
    assert exactness < 1e-6
    assert fused < 1e-4
    prepare = cuda.TritonConvolution.__init__

    def with_few_levels(self: cuda.TritonConvolution, *args: Any) -> None:
        prepare(self, *args)
        self.top = 14

    monkeypatch.setattr(cuda.TritonConvolution, "__init__", with_few_levels)
    assert min(cuda.trial_errors(DEVICE)) > 1e-2


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bitstep.runtime.device_code import multiply

pointers = {"codes": "*i8", "weight": "*i8", "weight_sum": "*i32"}
pointers |= dict.fromkeys(["bias", "input_scale", "input_zero_point", "weight_scale"], "*fp32")
pointers["y"] = "*i32" if PARTS > 1 else "*fp32"
constants = {"gain": None, "residual": None, "BIASES": False, "ALONE": False, "BASES": 1, "SPLITS": PARTS}
constants |= {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
constants |= {f"{name}_{axis}": 1 for name in ("KERNEL", "STRIDE", "DILATION") for axis in "HW"}
names = multiply.arg_names
aligned = [*pointers, "channels", "out"]
source = ASTSource(
    fn=multiply,
    signature={name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names},
    constexprs={(names.index(name),): value for name, value in constants.items()},
    attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
)
print(compile(source, target=GPUTarget("cuda", CAPABILITY, 32)).asm["ptx"])
"""


ADD_UP = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bitstep.runtime.device_code import add_up

pointers = {"parts": "*i32", "weight_sum": "*i32"}
pointers |= dict.fromkeys(["y", "bias", "input_scale", "input_zero_point", "weight_scale"], "*fp32")
constants = {"gain": None, "residual": None, "BIASES": False, "BASES": 2, "SPLITS": 4, "BLOCK": 256, "out": 1}
names = add_up.arg_names
source = ASTSource(
    fn=add_up,
    signature={name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names},
    constexprs={(names.index(name),): value for name, value in constants.items()},
)
compile(source, target=GPUTarget("cuda", 90, 32))
"""


def test_compiles_for_one_output_channel() -> None:
    """Triton makes a constant of an argument that is 1; the interpreter does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", ADD_UP], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("splits", [1, 4])
def test_compiles_to_tensor_core_products_of_bytes(capability: int, splits: int) -> None:
    """No GPU needed: Triton brings the compilers. Loads that are not vectors, or not ahead of time, would show."""
    program = COMPILE.replace("PARTS", str(splits)).replace("CAPABILITY", str(capability))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    product = {80: "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", 90: "wgmma.mma_async"}[capability]
    assert product in done.stdout
    assert "cp.async.cg.shared.global" in done.stdout
    assert "ld.global.b8" not in done.stdout
