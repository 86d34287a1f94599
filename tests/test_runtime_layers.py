"""Packed layers: equal to the fake-quantized layer bit for bit, row by row, and well-behaved as modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed import GRID, LAYERS, filled, random_layer
from torch import Tensor, nn
from torch.nn import functional as F

from bitstep.checkpoint import PackedLayer
from bitstep.denoiser.preconditioning import Preconditioning
from bitstep.denoiser.steps import StepCursor, StepError, interpolate, interpolate_scale, per_sample
from bitstep.errors import BitstepError, UsageError
from bitstep.numerics.uniform import fake_quantize
from bitstep.runtime.attention import AttentionFormat, PackedAttention
from bitstep.runtime.dispatch import KERNELS, choose, kernels_in_use, reasons, set_backend
from bitstep.runtime.layers import PackedConv2d, PackedLinear, packed_like
from bitstep.runtime.tables import StepRows


def expected(layer: nn.Module, packed: PackedLayer, x: Tensor, timestep: Tensor | float) -> Tensor:
    """What the fake-quantized layer computes in training."""
    if packed.channel_reciprocal is not None:
        shape = (-1,) if isinstance(layer, nn.Linear) else (-1, *[1] * (x.ndim - 2))
        x = x * packed.channel_reciprocal.reshape(shape)
    if packed.input_scale is not None and packed.input_zero_point is not None:
        scale, zero_point = packed.input_scale, packed.input_zero_point
        if len(scale) > 1:
            position = GRID.locate(timestep)
            scale = interpolate_scale(scale, position)
            zero_point = interpolate(zero_point, position).round()
        assert packed.activation_bits is not None
        x = fake_quantize(x, per_sample(scale, x), per_sample(zero_point, x), packed.activation_bits)
    weight = packed.weight.dequantize()
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, packed.bias)
    names = ("stride", "padding", "dilation", "groups")
    geometry: dict[str, Any] = {name: getattr(layer, name) for name in names}
    return (F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d)(x, weight, packed.bias, **geometry)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weight_bits", range(1, 9))
@pytest.mark.parametrize("activation_bits", [2, 4, 8, None])
def test_fake_equals_packed(kind: str, weight_bits: int, activation_bits: int | None) -> None:
    build, shape = LAYERS[kind]
    layer, x = build(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed = random_layer(
        layer,
        weight_bits,
        activation_bits,
        bases=2 if weight_bits == 1 else 1,
        symmetric=weight_bits % 2 == 1,
        steps=len(GRID),
        dilated=True,
        seed=weight_bits,
    )
    cursor = StepCursor(GRID)
    module = filled(layer, packed, cursor)
    set_backend(module, "reference")
    mixed = torch.tensor([0.0, 999.0, 300.0, 420.0, 51.5, 899.0])
    for timestep in (300.0, 420.0, mixed, mixed[:3]):
        with cursor.at(timestep):
            assert torch.equal(module(x), expected(layer, packed, x, timestep))


def test_a_row_depends_neither_on_its_batch_nor_on_the_other_layers() -> None:
    cursor = StepCursor(GRID)
    shared = StepRows(cursor)
    layers = []
    for seed in range(40):
        packed = random_layer(nn.Linear(3, 2), steps=len(GRID), seed=seed)
        layers.append((packed, packed_like(nn.Linear(3, 2), packed.entry().layer_format(), shared)))
        layers[-1][1].load_state_dict(packed.state())
    timesteps = torch.linspace(0, 999, 37)

    def rows(timestep: Tensor) -> list[tuple[Tensor, Tensor]]:
        with cursor.at(timestep):
            return [shared.of((module, "input")) for _, module in layers]

    together = rows(timesteps)
    for i, timestep in enumerate(timesteps):
        position = GRID.locate(timestep)
        for (packed, _), (scale, zero_point), alone in zip(layers, together, rows(timestep), strict=True):
            assert packed.input_scale is not None
            assert torch.equal(alone[0], scale[i : i + 1])
            assert torch.equal(alone[1], zero_point[i : i + 1])
            assert torch.equal(alone[0], interpolate_scale(packed.input_scale, position))


def test_a_static_layer_needs_no_timestep_and_a_table_does() -> None:
    layer, x, cursor = nn.Linear(4, 4), torch.randn(2, 4), StepCursor(GRID)
    static, table = (filled(layer, random_layer(layer, steps=steps), cursor) for steps in (1, len(GRID)))
    set_backend(static)
    set_backend(table)
    assert static(x).shape == (2, 4)
    with pytest.raises(StepError, match="no timestep is set"):
        table(x)


def test_it_stands_in_for_the_layer_it_replaces() -> None:
    layer = nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2)
    packed = random_layer(layer)
    module = filled(layer, packed)
    assert isinstance(module, nn.Conv2d)
    assert (module.in_channels, module.out_channels, module.stride, module.groups) == (6, 4, (2, 2), 2)
    assert list(module.parameters()) == []
    assert torch.equal(module.weight, packed.weight.dequantize())
    assert "W4A4" in repr(module)
    assert not isinstance(module, PackedLinear)
    assert isinstance(module, PackedConv2d)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(8, 3), torch.randn(2, 8).to(dtype)
    module = filled(layer, random_layer(layer))
    set_backend(module)
    assert torch.equal(module(x), module(x.float()).to(dtype))


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)])
def test_a_change_of_dtype_leaves_the_format_alone(move: Callable[[nn.Module], nn.Module]) -> None:
    layer, x, cursor = nn.Linear(8, 3), torch.randn(2, 8), StepCursor(GRID)
    model = nn.Sequential(filled(layer, random_layer(layer)), Preconditioning(cursor), nn.LayerNorm(3))
    PackedAttention(AttentionFormat(4, 8, 1), None).attach(model[2])
    set_backend(model)
    expected = model[0](x)
    before = [tensor.dtype for tensor in model.state_dict().values()]
    after = [tensor.dtype for tensor in move(model).state_dict().values()]
    assert [now for now, then in zip(after, before, strict=True) if now != then] == [model[2].weight.dtype] * 2
    assert torch.equal(model[0](x), expected)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3)])
def test_an_adapter_makes_a_plain_layer_of_its_type(layer: nn.Module) -> None:
    module: Any = filled(layer, random_layer(layer))
    made = type(module)(4, 2, *([] if isinstance(layer, nn.Linear) else [1]), bias=False)
    assert type(made) is type(layer)
    assert made.weight.requires_grad


def test_a_weight_is_computed_when_its_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_layer(nn.Linear(4, 3))
    weight = filled(nn.Linear(4, 3), packed).weight
    assert torch.equal(torch.from_numpy(weight.numpy()), packed.weight.dequantize())
    monkeypatch.setattr(PackedLinear, "tensors", None)
    assert (weight.shape, weight.dtype, weight.device.type) == ((3, 4), torch.float32, "cpu")


def test_an_adapter_cannot_be_fused() -> None:
    module = filled(nn.Linear(4, 3), random_layer(nn.Linear(4, 3)))
    assert type(module.weight * 2) is Tensor
    with pytest.raises(BitstepError, match="leave adapters unfused"):
        module.weight.data += torch.ones(3, 4)


def test_new_weights_are_prepared_again() -> None:
    layer, x = nn.Linear(8, 3), torch.randn(2, 8)
    module = filled(layer, random_layer(layer, seed=1))
    set_backend(module, "reference")
    first = module(x)
    twin = copy.deepcopy(module)
    other = random_layer(layer, seed=2)
    module.load_state_dict(other.state())
    assert torch.equal(module(x), expected(layer, other, x, 0))
    assert torch.equal(twin(x), first)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.Conv2d(2, 2, 3, padding="same"), nn.Bilinear(2, 2, 2)],
)
def test_what_cannot_be_packed_is_refused(layer: nn.Module) -> None:
    stand_in = random_layer(nn.Conv2d(2, 2, 3))
    with pytest.raises(BitstepError, match="cannot be packed"):
        filled(layer, stand_in)


def test_dispatch_takes_the_first_that_does_not_refuse() -> None:
    layer = nn.Linear(8, 3)
    module = filled(layer, random_layer(layer, 4, 4))
    table = reasons(module.problem)
    assert list(table) == list(KERNELS)
    assert list(table)[-1] == "reference"
    assert table["reference"] == []
    first = next(name for name, why in table.items() if not why)
    assert choose(module.problem).name == first
    set_backend(module)
    assert kernels_in_use(module) == {"": first}


@pytest.mark.parametrize(("backend", "kernel"), [(None, "float"), ("cuda", "float"), ("reference", "reference")])
def test_activations_in_floating_point_are_no_backend_s_business(backend: str | None, kernel: str) -> None:
    layer = nn.Linear(8, 3)
    module = filled(layer, random_layer(layer, 4, None))
    set_backend(module, backend)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.computed_weight(), module.bias))
    assert kernels_in_use(module) == {"": kernel}


def test_a_forced_backend_that_refuses_says_why() -> None:
    layer = nn.Linear(8, 3)
    model = nn.Sequential(*(filled(layer, random_layer(layer, 1, 4, bases=bases)) for bases in (1, 2, 2)))
    set_backend(model, "reference")
    with pytest.raises(BitstepError, match=r"^1 and 1 more: backend 'onednn' refuses: .*two sign bases.*reference"):
        set_backend(model, "onednn")
    assert set(kernels_in_use(model).values()) == {"reference"}
    with pytest.raises(UsageError, match="no backend named 'quantum': expected one of cpu, onednn, cuda, reference"):
        set_backend(model, "quantum")


@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(37, 21), nn.Conv1d(6, 40, 3), nn.Conv2d(5, 70, (3, 2)), nn.Conv2d(33, 3, 1)],
    ids=["linear", "conv1d", "conv2d", "pointwise"],
)
def test_codes_are_held_once_and_given_back(layer: nn.Module, bits: int, activation_bits: int) -> None:
    for options in ({"bases": 2} if bits == 1 else {"symmetric": False} if bits < 8 else {}, {}):
        packed = random_layer(layer, bits, activation_bits, **options)
        module = filled(layer, packed)
        before = module.state_dict()
        order = list(before)
        set_backend(module)
        module.prepare()
        held = sum(tensor.nbytes for tensor in module.buffers())
        if module.kernel.name == "cpu":
            assert held == sum(tensor.nbytes for name, tensor in before.items() if name != "weight_packed")
        for _ in range(2):
            assert list(module.state_dict()) == order
            for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state_dict().items())
            assert torch.equal(module.weight, packed.weight.dequantize())
            module.load_state_dict(before)
            module.prepare()
