"""Sign bases: the forward rule, its gradients, the codes, and the packed layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitstep.numerics import binary
from bitstep.numerics.packing import pack, unpack
from bitstep.quantizers.binary import BinaryWeight
from bitstep.quantizers.layers import FakeQuantized
from bitstep.quantizers.weights import DenseWeight, MergedLoRA, WeightSource
from bitstep.runtime.kernel import LayerTensors
from bitstep.runtime.layers import LayerFormat, layer_problem
from bitstep.runtime.reference import ReferenceKernel


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _source(kind: str, weight: Tensor) -> WeightSource:
    if kind == "dense":
        return DenseWeight(weight)
    lora = MergedLoRA(weight, 2, torch.Generator().manual_seed(0))
    nn.init.normal_(lora.up, std=0.1)
    return lora


def test_zero_is_positive_and_the_gradient_is_clipped() -> None:
    x = torch.tensor([-2.0, -1.0, -0.5, -0.0, 0.0, 0.3, 1.0, 1.1], requires_grad=True)
    y = binary.sign(x)
    y.sum().backward()
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_gradients_follow_the_equations() -> None:
    """Weights and residuals on both sides of the clip at 1, against the equations of the paper, term by term."""
    weight = (_random(3, 40, dtype=torch.float64) * 1.5).requires_grad_()
    scale = torch.tensor([[0.6, 1.3, 0.1], [0.3, 0.2, 0.05]], dtype=torch.float64, requires_grad=True)
    upstream = _random(3, 40, seed=1, dtype=torch.float64)
    binary.binarize(weight, scale).backward(upstream)
    w = weight.detach()
    s1, s2 = scale.detach()[:, :, None]
    signs = torch.where(w >= 0, 1.0, -1.0)
    r = w - s1 * signs
    inside_w, inside_r = (w.abs() <= 1).double(), (r.abs() <= 1).double()
    assert 0 < inside_w.mean() < 1
    assert 0 < inside_r.mean() < 1
    assert weight.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(weight.grad, upstream * (s1 * inside_w + s2 * inside_r * (1 - s1 * inside_w)))
    torch.testing.assert_close(scale.grad[0], (upstream * signs * (1 - s2 * inside_r)).sum(1))
    torch.testing.assert_close(scale.grad[1], (upstream * torch.where(r >= 0, 1.0, -1.0)).sum(1))


def test_scale_gradients_match_finite_differences_where_the_second_sign_stays() -> None:
    """Away from the kinks w_b is linear in the scales; the straight-through term of s_1 is the known difference."""
    weight = _random(4, 9, dtype=torch.float64)
    scale = binary.initial_scale(weight.float(), 2).double()
    residual = weight - scale[0, :, None] * binary.sign(weight)
    assert residual.abs().min() > 1e-4
    step, upstream = 1e-6, _random(4, 9, seed=1, dtype=torch.float64)

    def value(s: Tensor) -> Tensor:
        return (upstream * binary.binarize(weight, s)).sum(1)

    learned = scale.clone().requires_grad_()
    value(learned).sum().backward()
    assert learned.grad is not None
    for basis in range(2):
        shift = torch.zeros_like(scale)
        shift[basis] = step
        difference = (value(scale + shift) - value(scale - shift)) / (2 * step)
        if basis == 0:
            inside = (residual.abs() <= 1).double()
            difference -= (upstream * binary.sign(weight) * scale[1, :, None] * inside).sum(1)
        torch.testing.assert_close(learned.grad[basis], difference, rtol=1e-6, atol=1e-8)


def test_the_initial_scales_are_the_best_of_their_basis() -> None:
    weight = _random(5, 200)
    scale = binary.initial_scale(weight, 2)

    def error(s: Tensor) -> Tensor:
        return (binary.binarize(weight, s) - weight).square().sum(1)

    assert (error(scale) < 0.5 * error(scale[:1])).all()  # the second basis pays
    for factor in (0.9, 1.1):
        assert (error(scale[:1]) < error(factor * scale[:1])).all()


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 3, 3), (6, 1, 5), (2, 9)])
@pytest.mark.parametrize("bases", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "merged"])
def test_fake_equals_codes_bit_for_bit(kind: str, bases: int, shape: tuple[int, ...]) -> None:
    weight = _random(*shape) * 0.05
    weight[0] = 0  # a silent channel
    quantizer = BinaryWeight(_source(kind, weight), bases)
    with torch.no_grad():
        quantizer.log_scale.add_(_random(*quantizer.log_scale.shape, seed=3) * 0.1)
    codes = quantizer.codes()
    assert codes.codes.dtype == torch.uint8
    assert codes.codes.shape == (bases, shape[0], weight[0].numel())
    assert int(codes.codes.max()) <= 1
    assert torch.equal(quantizer.fake(), codes.dequantize())


def test_a_dropped_basis_is_gone_for_good() -> None:
    quantizer = BinaryWeight(DenseWeight(_random(4, 10) * 0.1), 2)
    one = BinaryWeight(DenseWeight(_random(4, 10) * 0.1), 1)
    quantizer.drop_second_basis()
    assert torch.equal(quantizer.fake(), one.fake())
    assert len(quantizer.codes().scale) == 1
    assert torch.equal(quantizer.fake(), quantizer.codes().dequantize())
    quantizer.fake().square().sum().backward()
    assert quantizer.log_scale.grad is not None
    assert quantizer.log_scale.grad[1].tolist() == [0, 0, 0, 0]
    assert bool(quantizer.log_scale.grad[0].any())


@pytest.mark.parametrize("bases", [1, 2])
@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Conv2d(3, 5, 3, padding=1), nn.Conv1d(3, 4, 3, stride=2)])
def test_packed_equals_fake_through_the_reference_kernel(layer: nn.Linear | nn.Conv2d | nn.Conv1d, bases: int) -> None:
    """Codes through bytes and back, in the reference kernel, against the layer that training saw: no bit differs."""
    quantized = FakeQuantized(layer, BinaryWeight(DenseWeight(layer.weight), bases), None)
    weight = quantized.weight_quantizer.codes()
    restored = unpack(pack(weight.codes, 1), 1, weight.codes.shape[-1])
    assert torch.equal(restored, weight.codes)
    problem = layer_problem(layer, LayerFormat(1, bases, True, None, 0, False), "cpu")
    forward = ReferenceKernel().prepare(problem, LayerTensors(weight, layer.bias, None))
    x = _random(2, 7) if isinstance(layer, nn.Linear) else _random(2, 3, *[8] * len(layer.kernel_size))
    with torch.no_grad():
        assert torch.equal(forward(x, None, None), quantized(x))
