"""Fake quantization in the native library: the values of tensor arithmetic bit for bit, its gradients to rounding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitstep import library
from bitstep.numerics import native
from bitstep.numerics.uniform import fake_quantize, rounded

pytestmark = pytest.mark.skipif(not library.instruction_sets(), reason="the native library is not built")


@pytest.fixture(params=library.instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    with library.instruction_set(request.param):
        yield


def both(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, grad: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients of x, scale and zero point: in rows, and by tensor arithmetic."""

    def computed() -> list[Tensor]:
        a, b, c = (tensor.detach().requires_grad_() for tensor in (x, scale, zero_point))
        value = fake_quantize(a, b, c, bits)
        return [value.detach(), *torch.autograd.grad(value, (a, b, c), grad)]

    assert native.in_rows(x, scale, zero_point)
    fast = computed()
    with monkeypatch.context() as patched:
        patched.setattr(native, "in_rows", lambda *_: False)
        return fast, computed()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 9, 11), (4, 64, 16, 16), (1, 20_003)], ids=str)
@pytest.mark.parametrize("own_rows", [True, False], ids=["a step a row", "one step"])
def test_rows_equal_tensor_arithmetic(
    shape: tuple[int, ...], bits: int, own_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    one_each = [shape[0] if own_rows else 1, *[1] * (len(shape) - 1)]
    x, grad = torch.randn(shape), torch.randn(shape)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)  # and the gradient in the other layout
    scale = (0.05 + torch.rand(one_each)) / 2 ** (bits - 2)
    zero_point = torch.randint(0, 2**bits, one_each).float()
    fast, arithmetic = both(x, scale, zero_point, bits, grad, monkeypatch)
    assert torch.equal(fast[0], arithmetic[0])
    assert torch.equal(fast[1], arithmetic[1])
    assert fast[1].stride() == x.stride()
    magnitude = grad.abs().sum() * (1 + x.abs().max() / scale.min())
    for ours, theirs in zip(fast[2:], arithmetic[2:], strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * magnitude


def test_ties_and_bounds_are_those_of_tensor_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    # halves round to even; half a step beyond the last code is in range or clipped as rounding goes
    x = torch.arange(-40, 41).reshape(1, -1) / 2 * 0.1
    for zero_point in range(16):
        arguments = (x, torch.tensor([[0.1]]), torch.tensor([[float(zero_point)]]), 4, torch.ones_like(x))
        fast, arithmetic = both(*arguments, monkeypatch)
        assert torch.equal(fast[0], arithmetic[0])
    inside = fast[1] == 1
    assert torch.equal(inside, (x / 0.1 + 15 >= -0.5) & (x / 0.1 <= 0.5))


def test_not_a_number_stays_one() -> None:
    x = torch.full((2, 33), torch.nan, requires_grad=True)
    assert fake_quantize(x, torch.ones(2, 1), torch.zeros(2, 1), 4).isnan().all()


def test_sums_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    x, grad, scale, zero_point = torch.randn(3, 50_000), torch.randn(3, 50_000), torch.rand(3, 1), torch.ones(3, 1)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(native.gradients(grad, x, scale, zero_point, 15))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_scale_along_the_last_dimension_is_none_of_rows() -> None:
    x, scale, zero_point = torch.randn(4, 4), torch.tensor([0.1, 0.2, 0.4, 0.8]), torch.full((4,), 8.0)
    assert torch.equal(fake_quantize(x, scale, zero_point, 4), rounded(x, scale, zero_point, 4))


@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 6)[:, ::2], torch.randn(2, 3).double(), torch.randn(2, 3).bfloat16(), torch.randn(3, 2).t()],
    ids=["gaps", "float64", "bfloat16", "transposed"],
)
def test_other_tensors_are_left_to_tensor_arithmetic(x: Tensor) -> None:
    scale, zero_point = torch.ones(2, 1, dtype=x.dtype), torch.zeros(2, 1, dtype=x.dtype)
    assert not native.in_rows(x, scale, zero_point)
    assert fake_quantize(x, scale, zero_point, 4).shape == x.shape
