"""Uniform quantization: the forward rule, its gradients, and the search for a range."""

from __future__ import annotations

import pytest
import torch

from bitstep.numerics import uniform
from bitstep.numerics.packing import QuantizedWeight


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
def test_fake_equals_dequantized_codes_bit_for_bit(bits: int) -> None:
    x = _random(5, 37) * 3
    scale, zero_point = uniform.search_range(x, bits, symmetric=False)
    fake = uniform.fake_quantize(x, scale[:, None], zero_point[:, None], bits)
    codes = uniform.quantize(x, scale[:, None], zero_point[:, None], bits)
    assert int(codes.max()) < 2**bits
    weight = QuantizedWeight(codes[None], scale[None], zero_point.to(torch.uint8), bits, tuple(x.shape))
    assert torch.equal(fake, weight.dequantize())


def test_zero_is_exact_and_ties_round_to_even() -> None:
    scale, zero_point = torch.tensor(0.5), torch.tensor(3.0)
    x = torch.tensor([0.0, 0.25, 0.75, 1.25, -0.25])
    assert uniform.quantize(x, scale, zero_point, 4).tolist() == [3, 3, 5, 5, 3]
    assert uniform.fake_quantize(x, scale, zero_point, 4)[0] == 0


def test_gradients_follow_the_equations() -> None:
    bits, s, z = 3, 0.5, 2.0  # codes 0..7: values from -1 to 2.5
    x = torch.tensor([-9.0, -0.9, 0.3, 1.2, 9.0], requires_grad=True)
    scale = torch.tensor(s, requires_grad=True)
    zero_point = torch.tensor(z, requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    uniform.fake_quantize(x, scale, zero_point, bits).backward(grad)
    v = x.detach() / s
    assert x.grad is not None
    assert scale.grad is not None
    assert zero_point.grad is not None
    assert x.grad.tolist() == [0, 2, 3, 4, 0]
    inside = (v.round() - v)[1:4] * grad[1:4]
    assert scale.grad.item() == pytest.approx(inside.sum().item() + 1 * -z + 5 * (7 - z), rel=1e-6)
    assert zero_point.grad.item() == pytest.approx(-s * (1 + 5))


def test_clipped_gradients_match_finite_differences() -> None:
    """Where a value is clipped the output is linear in scale and zero point, so differences are exact there."""
    x = torch.tensor([[-50.0, 80.0]], dtype=torch.float64)
    scale = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    zero_point = torch.tensor([[5.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, z: uniform.fake_quantize(x, s, z, 4), (scale, zero_point), eps=1e-3, atol=1e-9
    )


@pytest.mark.parametrize("x", [1.0, 2000.0])
def test_the_scale_of_a_row_that_was_always_zero_has_the_gradient_of_a_clipped_value(x: float) -> None:
    strided = torch.full((2, 2), x)[:, :1]  # not dense, as on a GPU: torch's own operators
    scale = torch.full((2, 1), 1e-36, requires_grad=True)
    uniform.fake_quantize(strided, scale, torch.full((2, 1), 8.0), 4).sum().backward()
    assert scale.grad is not None
    assert scale.grad.tolist() == [[7.0], [7.0]]


def test_zero_point_rounds_into_range_with_a_straight_through_gradient() -> None:
    zero_point = torch.tensor([-3.0, 2.4, 99.0], requires_grad=True)
    rounded = uniform.round_zero_point(zero_point, 4)
    rounded.sum().backward()
    assert rounded.tolist() == [0, 2, 15]
    assert zero_point.grad is not None
    assert zero_point.grad.tolist() == [0, 1, 0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_search_never_loses_to_minmax(bits: int, symmetric: bool) -> None:
    x = _random(8, 16384)  # the largest of so many lie beyond 4 sigma: at 4 bits clipping them pays

    def error(method: uniform.RangeMethod) -> torch.Tensor:
        scale, zero_point = uniform.search_range(x, bits, symmetric=symmetric, method=method)
        return (uniform.fake_quantize(x, scale[:, None], zero_point[:, None], bits) - x).abs().pow(2.4).sum(1)

    assert (error("mse") <= error("minmax")).all()
    if bits == 4:
        assert error("mse").sum() < 0.9 * error("minmax").sum()


def test_minmax_covers_the_range_and_zero() -> None:
    x = torch.tensor([[1.0, 3.0], [-4.0, -1.0], [-1.0, 2.0], [0.0, 0.0]])
    scale, zero_point = uniform.search_range(x, 8, symmetric=False, method="minmax")
    low, high = -zero_point * scale, (255 - zero_point) * scale
    assert torch.allclose(low[:3], torch.tensor([0.0, -4.0, -1.0]), atol=0.01)
    assert torch.allclose(high[:3], torch.tensor([3.0, 0.0, 2.0]), atol=0.01)
    silent = uniform.fake_quantize(x[3:], scale[3:, None], zero_point[3:, None], 8)
    assert torch.equal(silent, torch.zeros(1, 2))
