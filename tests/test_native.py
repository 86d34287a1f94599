"""The native kernels against the reference kernel, for every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from bitstep import library
from bitstep.errors import BitstepError
from bitstep.numerics.packing import QuantizedWeight
from bitstep.runtime.cpu import CpuKernel
from bitstep.runtime.kernel import LayerTensors, Operation, Problem
from bitstep.runtime.reference import ReferenceKernel

pytestmark = pytest.mark.skipif(not library.instruction_sets(), reason="the native library is not built")


@pytest.fixture(params=library.instruction_sets(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.instruction_set(request.param):
        yield request.param


@dataclass(frozen=True)
class Case:
    """One layer and its input; the defaults are a 3x3 convolution on odd sizes."""

    op: Operation = "conv2d"
    batch: int = 2
    size: tuple[int, ...] = (7, 5)
    channels: tuple[int, int] = (20, 37)
    kernel: tuple[int, ...] = (3, 3)
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    weight_bits: int = 4
    activation_bits: int = 4
    bases: int = 1
    symmetric: bool = True
    reciprocal: bool = False
    bias: bool = True
    rows: int = 2

    @property
    def problem(self) -> Problem:
        spatial = len(self.kernel)
        return Problem(
            op=self.op,
            in_channels=self.channels[0],
            out_channels=self.channels[1],
            kernel_size=self.kernel,
            stride=(self.stride,) * spatial,
            padding=(self.padding,) * spatial,
            dilation=(self.dilation,) * spatial,
            groups=1,
            weight_bits=self.weight_bits,
            bases=self.bases,
            symmetric=self.symmetric,
            activation_bits=self.activation_bits,
            channel_reciprocal=self.reciprocal,
            device="cpu",
        )


def tensors_for(case: Case, exact: bool) -> LayerTensors:
    """Random codes; with ``exact``, scales are powers of two, so that float32 sums of small integers are exact."""
    inner, out = case.channels
    shape = (out, inner, *case.kernel)
    levels = 2**case.weight_bits
    zero_point = None
    if case.weight_bits > 1:
        zero_point = torch.full((out,), levels // 2, dtype=torch.uint8)
        if not case.symmetric:
            zero_point = torch.randint(0, levels, (out,), dtype=torch.uint8)
    count = torch.Size(shape[1:]).numel()
    codes = torch.randint(0, levels, (case.bases, out, count), dtype=torch.uint8)
    scale = torch.rand(case.bases, out) + 0.5
    if exact:
        scale = 2.0 ** torch.randint(-2, 3, (case.bases, out))
    return LayerTensors(
        weight=QuantizedWeight(codes, scale, zero_point, case.weight_bits, shape),
        bias=torch.randn(out).round() if case.bias else None,
        channel_reciprocal=2.0 ** torch.randint(-1, 2, (inner,)) if case.reciprocal else None,
    )


def run(case: Case, exact: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the native kernel and of the reference on the same random layer and input."""
    torch.manual_seed(0)
    tensors = tensors_for(case, exact)
    levels = 2**case.activation_bits
    scale = 2.0 ** torch.randint(-3, 0, (case.rows,)) if exact else torch.rand(case.rows) / 4 + 0.05
    zero_point = torch.randint(0, levels, (case.rows,)).float()
    inner = case.channels[0]
    shape = (case.batch, *case.size, inner) if case.op == "linear" else (case.batch, inner, *case.size)
    x = torch.randn(shape) * scale.max() * levels / 4
    assert CpuKernel().unsupported(case.problem) == []
    got = CpuKernel().prepare(case.problem, tensors)(x, scale, zero_point)
    expected = ReferenceKernel().prepare(case.problem, tensors)(x, scale, zero_point)
    return got, expected


GEOMETRIES = {
    "3x3": Case(),
    "1x1": Case(kernel=(1, 1), padding=0, size=(3, 3)),
    "strided": Case(stride=2, size=(9, 8)),
    "strided batch": Case(stride=2, batch=3, rows=3, size=(6, 7), channels=(16, 16)),
    "dilated": Case(dilation=2, padding=2, size=(8, 9)),
    "no padding": Case(padding=0),
    "wide padding": Case(padding=3, size=(2, 3)),
    "5x1": Case(kernel=(5, 1), padding=2),
    "one channel": Case(channels=(1, 1)),
    "wide": Case(channels=(64, 130), size=(4, 4)),
    "many pixels": Case(channels=(17, 18), size=(29, 31), batch=1, rows=1),
    "one row": Case(rows=1, batch=3, bias=False),
    "reciprocal": Case(reciprocal=True),
    "linear": Case(op="linear", kernel=(), size=(5,), padding=0),
    "linear 2d": Case(op="linear", kernel=(), size=(), channels=(33, 70), padding=0),
    "conv1d": Case(op="conv1d", kernel=(3,), size=(11,), stride=2),
}
WEIGHTS = [
    *(pytest.param(bits, 1, True, id=f"W{bits}") for bits in range(1, 9)),
    *(pytest.param(bits, 1, False, id=f"W{bits} asymmetric") for bits in range(2, 8)),
    pytest.param(1, 2, True, id="two bases"),
]


# one of each way to run: tables, nibbles, nibbles under bytes, bytes, two bases
@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "bases"), [(1, 4, 1), (4, 4, 1), (4, 8, 1), (8, 8, 1), (1, 8, 2)]
)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_sums_are_exact_in_every_geometry(geometry: str, weight_bits: int, activation_bits: int, bases: int) -> None:
    """With scales that are powers of two, float32 holds the integer sums, so nothing may differ."""
    case = GEOMETRIES[geometry]
    assert_exact(replace(case, weight_bits=weight_bits, activation_bits=activation_bits, bases=bases))


@pytest.mark.parametrize("activation_bits", [2, 4, 5, 8])
@pytest.mark.parametrize(("weight_bits", "bases", "symmetric"), WEIGHTS)
def test_sums_are_exact_at_every_width(weight_bits: int, bases: int, symmetric: bool, activation_bits: int) -> None:
    assert_exact(Case(weight_bits=weight_bits, bases=bases, symmetric=symmetric, activation_bits=activation_bits))


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(1, 4), (2, 4), (4, 4), (4, 8), (6, 8), (7, 8)])
def test_sums_of_nothing_but_the_largest_products_are_exact(
    weight_bits: int, activation_bits: int, negative: bool
) -> None:
    """As many as float32 can add up: more than any narrower sum can hold."""
    top = 2**weight_bits - 1
    x = 2.0**activation_bits - 1
    inner = int(min(9000, 2**24 // (top * x)))
    case = Case("linear", channels=(inner, 20), kernel=(), padding=0, bias=False, symmetric=False)
    case = replace(case, weight_bits=weight_bits, activation_bits=activation_bits)
    zero_point = None if weight_bits == 1 else torch.full((20,), top if negative else 0, dtype=torch.uint8)
    codes = torch.full((1, 20, inner), 0 if negative else top, dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.ones(1, 20), zero_point, weight_bits, (20, inner))
    layer = CpuKernel().prepare(case.problem, LayerTensors(weight=weight, bias=None, channel_reciprocal=None))
    got = layer(torch.full((3, inner), x), torch.ones(1), torch.zeros(1))
    assert torch.equal(got, torch.full((3, 20), (-1 if negative else 1) * inner * top * x))


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(1, 4), (4, 4), (8, 8)])
def test_threads_share_the_work(weight_bits: int, activation_bits: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_exact(Case(weight_bits=weight_bits, activation_bits=activation_bits, channels=(16, 70), size=(9, 11)))
    finally:
        torch.set_num_threads(before)


def assert_exact(case: Case) -> None:
    got, expected = run(case)
    assert got.shape == expected.shape
    assert torch.equal(got, expected)


@pytest.mark.parametrize("weight_bits", [1, 4, 8])
def test_outputs_agree_to_rounding(weight_bits: int) -> None:
    got, expected = run(
        Case(weight_bits=weight_bits, activation_bits=8, channels=(96, 40), reciprocal=True), exact=False
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        (Case(), (2, 21, 7, 5)),
        (Case(), (2, 3, 7, 5)),
        (Case(padding=0), (2, 20, 2, 100)),
        (Case(padding=0, stride=2), (2, 20, 2, 2)),
        (Case(padding=0), (2, 20, 0, 5)),
        (Case(op="linear", kernel=(), padding=0), (2, 5, 33)),
    ],
    ids=["more channels", "fewer channels", "low", "small, strided", "empty", "linear"],
)
def test_inputs_that_do_not_fit_are_refused(case: Case, shape: tuple[int, ...]) -> None:
    layer = CpuKernel().prepare(case.problem, tensors_for(case, exact=True))
    with pytest.raises(BitstepError, match="a layer of 20 channels"):
        layer(torch.zeros(shape), torch.ones(1), torch.zeros(1))


@pytest.mark.parametrize(
    ("op", "kernel", "shape", "expected"),
    [
        ("linear", (), (0, 5, 20), (0, 5, 37)),
        ("linear", (), (2, 0, 20), (2, 0, 37)),
        ("conv2d", (1, 1), (0, 20, 3, 3), (0, 37, 3, 3)),
    ],
)
def test_nothing_gives_nothing(
    op: Operation, kernel: tuple[int, ...], shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    case = Case(op=op, kernel=kernel, padding=0)
    layer = CpuKernel().prepare(case.problem, tensors_for(case, exact=True))
    assert layer(torch.zeros(shape), torch.ones(1), torch.zeros(1)).shape == expected


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.zeros(2, 20, device="meta"), "float32 tensors on the CPU, got torch.float32 on meta"),
        (torch.zeros(2, 20, dtype=torch.float64), "float32 tensors on the CPU, got torch.float64 on cpu"),
        (torch.zeros(2, 20, requires_grad=True), "no gradients"),
    ],
    ids=["meta", "float64", "gradients"],
)
def test_tensors_that_cannot_be_read_are_refused(x: torch.Tensor, why: str) -> None:
    case = Case(op="linear", kernel=(), padding=0)
    layer = CpuKernel().prepare(case.problem, tensors_for(case, exact=True))
    with pytest.raises(BitstepError, match=why):
        layer(x, torch.ones(1), torch.zeros(1))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:Using len:torch.jit.TracerWarning")
def test_a_trace_is_refused() -> None:
    case = Case(op="linear", kernel=(), padding=0)
    layer = CpuKernel().prepare(case.problem, tensors_for(case, exact=True))
    with pytest.raises(BitstepError, match="backend 'reference'"):
        torch.jit.trace(lambda x: layer(x, torch.ones(1), torch.zeros(1)), torch.zeros(2, 20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        got = CpuKernel().prepare(Case().problem, tensors_for(Case(), exact=True))(
            torch.ones(2, 20, 7, 5, dtype=torch.float32),
            torch.ones(1, dtype=torch.float32),
            torch.zeros(1, dtype=torch.float32),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32


def test_a_shortage_of_memory_is_an_error() -> None:
    far = Case(kernel=(1, 1), size=(1, 1), padding=2**24, stride=2**24, rows=1)
    with pytest.raises(MemoryError, match="bitstep_convolution is out of memory"):
        run(far)
