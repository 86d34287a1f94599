"""The oneDNN kernel against the reference: equal within float rounding, codes and zero padding included."""

from __future__ import annotations

import pytest
import torch
from packed import GRID, LAYERS, filled, random_layer
from torch import Tensor, nn

from bitstep.denoiser.steps import StepCursor
from bitstep.runtime import onednn
from bitstep.runtime.dispatch import KERNELS, set_backend
from bitstep.runtime.layers import PackedModule

pytestmark = pytest.mark.skipif(onednn.operators_fault() is not None, reason=str(onednn.operators_fault()))


def outputs(module: PackedModule, x: Tensor) -> tuple[Tensor, Tensor]:
    found = []
    for backend in ("onednn", "reference"):
        set_backend(module, backend)
        found.append(module(x))
    return found[0], found[1]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "symmetric"),
    [(bits, bits, True) for bits in range(1, 9)] + [(2, 8, False), (4, 4, False), (7, 8, False), (1, 8, True)],
)
def test_equals_the_reference(kind: str, weight_bits: int, activation_bits: int, symmetric: bool) -> None:
    build, shape = LAYERS[kind]
    layer, x = build(), torch.randn(shape, generator=torch.Generator().manual_seed(weight_bits))
    packed = random_layer(layer, weight_bits, activation_bits, symmetric=symmetric, steps=len(GRID), dilated=True)
    cursor = StepCursor(GRID)
    module = filled(layer, packed, cursor)
    mixed = torch.tensor([300.0, 999.0, 300.0, 420.0, 51.5, 899.0])
    for timestep in (300.0, 420.0, mixed, mixed[:2]):
        with cursor.at(timestep):
            y, reference = outputs(module, x)
        torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


def test_the_largest_products_do_not_saturate() -> None:
    layer = nn.Conv2d(256, 2, 3, padding=1, bias=False)
    packed = random_layer(layer, 8, 8)
    packed.weight.codes.zero_()  # every weight is -128 steps
    module = filled(layer, packed)
    y, _ = outputs(module, torch.full((1, 256, 4, 4), 1e30))
    # the reference adds 2,304 products in float32, in the processor's own order: not near enough
    assert packed.input_scale is not None
    assert packed.input_zero_point is not None
    highest = packed.input_scale.double() * (255 - packed.input_zero_point)
    weight = packed.weight.dequantize().double()
    exact = nn.functional.conv2d(highest.expand(1, 256, 4, 4), weight, padding=1).float()
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 1, "bases": 2}, "two sign bases"),
        ({"bits": 8, "symmetric": False}, "zero point other than 128"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(options: dict[str, object], reason: str) -> None:
    layer = nn.Linear(8, 3)
    module = filled(layer, random_layer(layer, **options))  # type: ignore[arg-type]
    (why,) = KERNELS["onednn"].unsupported(module.problem)
    assert reason in why


@pytest.mark.parametrize("layer", [nn.Linear(8, 3), nn.Conv2d(5, 7, 3, padding=1)], ids=["linear", "conv2d"])
def test_floating_point_activations_give_a_channels_last_map(layer: nn.Module) -> None:
    module = filled(layer, random_layer(layer, 8, None))
    y, reference = outputs(module, torch.randn(2, 5, 4, 8, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(y, reference)
    assert y.is_contiguous(
        memory_format=torch.channels_last if isinstance(layer, nn.Conv2d) else torch.contiguous_format
    )


def test_a_sum_that_may_overflow_is_refused() -> None:
    layer = nn.Linear(70_000, 1)
    (why,) = KERNELS["onednn"].unsupported(filled(layer, random_layer(layer)).problem)
    assert "32 bits" in why
