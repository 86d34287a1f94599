"""Packed models through plain diffusers: what is saved is what is loaded, bit for bit, for every kind of denoiser."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from packed import GRID, random_layer, random_model
from pipelines import BUILDERS, build, unet
from safetensors import safe_open
from torch import Tensor, nn

from bitstep.checkpoint import PackedLayer, PackedOperands, pack_model
from bitstep.denoiser.attention import OPERANDS
from bitstep.errors import BitstepError, UsageError
from bitstep.runtime.dispatch import packed_layers, set_backend
from bitstep.stages.generate import denoiser_name, generate_batch

MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module")
def model() -> UNet2DModel:
    torch.manual_seed(0)
    return random_model(unet().eval(), steps=len(GRID), dilated=True)


def output(model: UNet2DModel, timestep: float | Tensor = 420.0) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(x.to(model.dtype), timestep).sample
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder``; without the path that diffusers notes in JSON when it has loaded a model."""
    found = {}
    for file in folder.rglob("*.*"):
        content = file.read_bytes()
        if file.suffix == ".json":
            note = json.loads(content)
            note.pop("_name_or_path", None)
            content = json.dumps(note).encode()
        found[str(file.relative_to(folder))] = content
    return found


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_denoiser_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    pipeline = build(kind)
    name = denoiser_name(pipeline)
    packed = random_model(getattr(pipeline, name), 4, 8, steps=len(GRID))
    packed.save_pretrained(tmp_path / "first")
    loaded = type(packed).from_pretrained(tmp_path / "first")
    assert packed_layers(loaded).keys() == packed_layers(packed).keys()
    images = []
    for denoiser in (packed, loaded):
        setattr(pipeline, name, denoiser)
        images.append(generate_batch(pipeline, range(2), output_type="latent", steps=2, seed=0))
    assert bool(images[0].isfinite().all())
    assert torch.equal(*images)
    loaded.save_pretrained(tmp_path / "second")
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_a_pipeline_folder_loads_with_plain_diffusers(model: UNet2DModel, tmp_path: Path) -> None:
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(output(loaded.unet), output(model))


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
def test_a_component_alone_loads(model: UNet2DModel, tmp_path: Path, options: dict[str, object]) -> None:
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path, **options)
    mixed = torch.tensor([0.0, 731.0])
    assert torch.equal(output(loaded), output(model))
    assert torch.equal(output(loaded, mixed), output(model, mixed))


@pytest.mark.skipif(not MAPS.exists(), reason="reads what Linux tells of a process's memory")
def test_a_loaded_model_keeps_nothing_of_its_file_in_memory(model: UNet2DModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert packed_layers(loaded)
    assert str(tmp_path) not in MAPS.read_text()


def test_shards_hold_the_same_model(model: UNet2DModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "first", max_shard_size="20KB")
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 1
    loaded = UNet2DModel.from_pretrained(tmp_path / "first")
    assert torch.equal(output(loaded), output(model))
    loaded.save_pretrained(tmp_path / "second", max_shard_size="20KB")
    assert files(tmp_path / "first") == files(tmp_path / "second")


@pytest.mark.filterwarnings("ignore:.* is slow on a CPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_scales_in_float32(model: UNet2DModel, tmp_path: Path, dtype: torch.dtype) -> None:
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.dtype == dtype
    for name, layer in packed_layers(loaded).items():
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, model.get_submodule(name).get_buffer(key))
    assert output(loaded).dtype == dtype
    assert bool(output(loaded).isfinite().all())


def test_bytes_are_what_the_bits_promise(tmp_path: Path) -> None:
    for bits in (1, 4, 8):
        packed = random_model(unet(), bits)
        packed.save_pretrained(tmp_path)
        weights = sum(layer.weight_shape[0] * layer.weight[0].numel() for layer in packed_layers(packed).values())
        with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
            sizes = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
        codes = sum(size for key, size in sizes.items() if key.endswith("weight_packed"))
        assert weights * bits / 8 <= codes < 1.02 * weights * bits / 8


def test_the_memory_footprint_counts_codes_that_kernels_hold(tmp_path: Path) -> None:
    random_model(unet(), 4).save_pretrained(tmp_path)
    model = UNet2DModel.from_pretrained(tmp_path)
    tensors = sum(tensor.nbytes for tensor in model.state_dict().values())
    parameters = sum(tensor.nbytes for tensor in model.parameters())
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same.get_memory_footprint() == tensors
        assert same.get_memory_footprint(return_buffers=False) == parameters
    set_backend(model, "reference")  # which leaves them where they are
    output(model)
    assert model.get_memory_footprint() == tensors


def test_float16_storage_loses_nothing(tmp_path: Path) -> None:
    source = unet()
    source.half().float()  # what a float16 checkpoint holds
    odd = source.conv_norm_out.weight
    with torch.no_grad():
        odd.fill_(1 / 3)
    model = random_model(source)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_tensor("conv_norm_out.weight").dtype == torch.float32
        assert file.get_tensor("conv_norm_out.bias").dtype == torch.float16
        assert file.get_tensor("conv_in.bias").dtype == torch.float16
        assert file.get_tensor("conv_in.weight_scale").dtype == torch.float32
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32, torch.uint8}
    assert torch.equal(output(loaded), output(model))


def test_every_layer_of_a_kernel_can_be_forced(model: UNet2DModel) -> None:
    set_backend(model, "reference")
    reference = output(model)
    set_backend(model, "onednn")
    torch.testing.assert_close(output(model), reference, rtol=1e-3, atol=1e-3)
    set_backend(model)


def test_a_copy_keeps_its_own_time(model: UNet2DModel) -> None:
    twin = copy.deepcopy(model)
    rows = {id(layer.rows) for layer in packed_layers(twin).values()}
    assert len(rows) == 1
    assert rows.isdisjoint(id(layer.rows) for layer in packed_layers(model).values())
    assert torch.equal(output(twin, 777.0), output(model, 777.0))


def test_moving_to_another_dtype_is_refused_as_for_every_quantized_model(model: UNet2DModel) -> None:
    with pytest.raises(ValueError, match="Casting a quantized model"):
        model.to(torch.float16)


def test_the_manifest_says_what_was_packed(tmp_path: Path) -> None:
    source = unet()
    layer = random_layer(source.conv_in, 1, 4, bases=2, steps=4)
    mean = random_layer(source.conv_out, 3, None, symmetric=False, dilated=True)
    operands = {name: (torch.full((4,), 0.1), torch.zeros(4)) for name in OPERANDS}
    packed = pack_model(
        source,
        {"conv_in": layer, "conv_out": mean},
        grid=GRID,
        modules_to_not_convert={"time_embedding.linear_1": "kept by rule"},
        total_macs=10**6,
        recipe={"name": "test", "seed": 0},
        attention={"mid_block.attentions.0": PackedOperands(operands, 4, 8, 20)},
    )
    packed.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written == {
        "quant_method": "bitstep",
        "format_version": 1,
        "compute_dtype": "float32",
        "step_grid": {"keys": [0.05, 0.3, 0.55, 0.9], "unit": 1000.0},
        "layers": {
            "conv_in": {
                "weight_bits": 1,
                "bases": 2,
                "symmetric": True,
                "activation_bits": 4,
                "steps": 4,
                "channel_reciprocal": False,
                "input_divided": False,
                "output_divided": False,
                "macs": 540,
            },
            "conv_out": {
                "weight_bits": 3,
                "bases": 1,
                "symmetric": False,
                "activation_bits": None,
                "steps": 0,
                "channel_reciprocal": True,
                "input_divided": False,
                "output_divided": False,
                "macs": 540,
            },
        },
        "attention": {"mid_block.attentions.0": {"bits": 4, "probability_bits": 8, "steps": 4, "macs": 20}},
        "preconditioned": False,
        "modules_to_not_convert": {"time_embedding.linear_1": "kept by rule"},
        "macs": {"total": 10**6, "quantized": 560},
        "recipe": {"name": "test", "seed": 0},
    }
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        headers = {
            key: (file.get_slice(key).get_dtype(), file.get_slice(key).get_shape())
            for key in file.keys()  # noqa: SIM118
            if key.startswith(("conv_in.", "conv_out.")) or "attention_operands.probability" in key
        }
    assert headers == {
        "mid_block.attentions.0.attention_operands.probability_scale": ("F32", [4]),
        "mid_block.attentions.0.attention_operands.probability_zero_point": ("U8", [4]),
        "conv_in.weight_packed": ("U8", [2, 20, 4]),
        "conv_in.weight_scale": ("F32", [2, 20]),
        "conv_in.input_scale": ("F32", [4]),
        "conv_in.input_zero_point": ("U8", [4]),
        "conv_in.bias": ("F32", [20]),
        "conv_out.weight_packed": ("U8", [1, 3, 68]),
        "conv_out.weight_scale": ("F32", [1, 3]),
        "conv_out.weight_zero_point": ("U8", [3]),
        "conv_out.input_channel_reciprocal": ("F32", [20]),
        "conv_out.bias": ("F32", [3]),
    }


def test_layers_that_do_not_fit_are_refused() -> None:
    source, layer = unet(), random_layer(nn.Conv2d(3, 20, 3))

    def pack(layers: dict[str, PackedLayer]) -> None:
        pack_model(source, layers, grid=None, modules_to_not_convert={}, total_macs=10**6, recipe={})

    with pytest.raises(BitstepError, match="'conv_first' which UNet2DModel does not have"):
        pack({"conv_first": layer})
    with pytest.raises(BitstepError, match=r"conv_out.weight_packed: expected the shape \[1, 3, 90\]"):
        pack({"conv_out": layer})
    with pytest.raises(BitstepError, match="mid_block: a UNetMidBlock2D cannot be packed"):
        pack({"mid_block": layer})


def test_only_safetensors_are_written(model: UNet2DModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)
