"""BinaryDM: where second bases go, what training minimises, and the schedules that act on the layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from pipelines import build, source
from torch import Tensor, nn

from bitstep import run
from bitstep.denoiser.calls import run as call_denoiser
from bitstep.errors import BitstepError, UsageError
from bitstep.methods.base import Context, LearningRates, Phase, Technique, Unit
from bitstep.methods.binarydm import BINARYDM, BinaryWeights, EvolvableBasis
from bitstep.methods.objectives.trajectory import TrajectoryDistillation
from bitstep.methods.techniques.mimicking import Mimicking, block_features, feature_grams
from bitstep.methods.techniques.warm_up import WarmUp, outward
from bitstep.numerics.lowrank import principal_basis
from bitstep.planning import add_bases
from bitstep.quantizers.activations import ActivationQuantizer
from bitstep.quantizers.binary import BinaryWeight
from bitstep.quantizers.weights import WeightQuantizer
from bitstep.run_folder import LOSS
from bitstep.stages.calibrate import stream
from bitstep.stages.finetune import TrainingState, finetune, optimizers, roles, trained_tensors
from bitstep.stages.inspect import packed_manifest
from bitstep.stages.load import load
from bitstep.stages.prepare import Student, prepare
from bitstep.stages.sample import read
from bitstep.trajectories.images import TrainingImages, enlargement
from bitstep.trajectories.pool import Pool

PHASE = BINARYDM.training[0].model_copy(update={"iterations": 10, "batch_size": 2, "techniques": ()})


def prepared(name: str = "ddim", bits: float = 1.6, evolvable: bool = False) -> tuple[Student, Context, Pool]:
    given = source(name)
    given.denoiser.requires_grad_(False)
    pool = next(stream(given, images=4, batch_size=4, steps=3, seed=0))
    method = BINARYDM.model_copy(update={"weights": BinaryWeights(evolvable=evolvable)})
    student = prepare(given.denoiser, pool, method, weight_bits=bits, activation_bits=4)
    return student, student.context(given.denoiser, pool, Path(), seed=0), pool


def unit_of(context: Context, technique: Technique | None = None, phase: Phase = PHASE) -> Unit:
    (unit,) = phase.objective.units(context, phase, 0)
    return unit if technique is None else technique.applied(unit, context, phase)


def pictures(count: int = 6, size: int = 8) -> Tensor:
    shape = (count, size, size, 3)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("more", [0.02, 0.1, 0.4])
def test_second_bases_meet_the_average_at_the_ends_of_a_unet(more: float) -> None:
    student, _, _ = prepared(bits=1)
    bits = student.plan.average_weight_bits + more  # in so small a model the few layers with 8 bits weigh much
    plan = add_bases(student.plan, student.structure, bits)
    assert plan.average_weight_bits <= bits
    smallest = min(layer.weights for layer in plan.layers if layer.weight_bits == layer.bases == 1)
    assert plan.average_weight_bits > bits - smallest / sum(layer.weights for layer in plan.layers)
    positions = {info.name: info.positions for info in student.structure.layers}
    doubled = {positions[layer.name] for layer in plan.layers if layer.bases == 2}
    single = {positions[layer.name] for layer in plan.layers if layer.weight_bits == layer.bases == 1}
    assert max(doubled) == 64
    assert more < 0.4 or max(single) == 16


def test_second_bases_of_a_transformer_go_to_its_smallest_layers() -> None:
    student, _, _ = prepared("dit", bits=1)
    plan = add_bases(student.plan, student.structure, student.plan.average_weight_bits + 0.05)
    trunk = [layer for layer in plan.layers if ".attn1." in layer.name or ".ff." in layer.name]
    doubled = {layer.weights for layer in trunk if layer.bases == 2}
    assert doubled
    assert max(doubled) <= min(layer.weights for layer in trunk if layer.bases == 1)


def test_bits_decide_the_bases() -> None:
    assert {layer.bases for layer in prepared(bits=1)[0].plan.layers} == {1}
    plain, evolving = prepared(bits=1)[0], prepared(bits=1, evolvable=True)[0]
    assert evolving.plan == add_bases(plain.plan, plain.structure, plain.plan.average_weight_bits + 0.1)
    assert {layer.bases for layer in evolving.plan.layers} == {1, 2}
    with pytest.raises(ValueError, match=r"1 to 2 bits, got 2\.5"):
        BinaryWeights().layer_bits(2.5)
    with pytest.raises(ValueError, match=r"1 bit, got 1\.1"):
        BinaryWeights(evolvable=True).layer_bits(1.1)


def test_rules_with_more_bits_make_a_layer_uniform(tmp_path: Path) -> None:
    build("ddim").save_pretrained(tmp_path / "teacher")
    settings = ["calibration.images=2", "calibration.batch_size=2", "calibration.steps=2", "training=[]"]
    rule = "layers.rules=[{match: '*.conv2', weight_bits: 4}]"
    out = run.quantize(
        str(tmp_path / "teacher"),
        out=tmp_path / "out",
        recipe="binarydm",
        bits="W1A4",
        effort="full",
        overrides=[*settings, rule],
    )
    layers = packed_manifest(load(out)).layers
    assert {entry.weight_bits for name, entry in layers.items() if name.endswith(".conv2")} == {4}
    assert {entry.weight_bits for name, entry in layers.items() if name.endswith(".conv1")} == {1}


def test_signed_activations_start_as_lsq_says_and_keep_their_zero_point() -> None:
    student, context, _ = prepared()
    layer = student.layers["down_blocks.1.resnets.0.conv1"]
    quantizer = layer.input_quantizer
    assert quantizer is not None
    _, zero_point = quantizer.tables()
    assert zero_point.tolist() == [8]
    assert "zero_point" not in dict(quantizer.named_parameters())
    seen: list[Tensor] = []
    handle = context.teacher.get_submodule("down_blocks.1.resnets.0.conv1").register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    for step in range(len(context.pool.timesteps)):
        call_denoiser(context.teacher, context.pool.batch(context.pool.indices_at(step))[0])
    handle.remove()
    expected = 2 * torch.cat(seen).abs().mean() / 7**0.5
    assert quantizer.log_scale.exp().item() == pytest.approx(expected.item(), rel=0.1)  # ranges are set on a sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_training_images_are_noised_by_the_pipelines_schedule(prediction: str) -> None:
    pipeline = build("ddim")
    pipeline.scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type=prediction)
    images = TrainingImages.of_pipeline(pictures(), pipeline)
    indices = torch.tensor([4, 0, 4])
    noisy, timesteps, target = images.noised(indices, torch.Generator().manual_seed(3))
    clean = pictures()[indices].permute(0, 3, 1, 2) / 127.5 - 1
    alpha = pipeline.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    torch.testing.assert_close(pipeline.scheduler.add_noise(clean, noise, timesteps), noisy)
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    expected = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,
    }
    torch.testing.assert_close(target, expected[prediction], rtol=1e-3, atol=1e-3)


def test_latent_pipelines_train_on_encoded_images() -> None:
    pipeline = build("latent_vq")
    assert enlargement(pipeline) == 1
    images = TrainingImages.of_pipeline(pictures(), pipeline)
    noisy, _, target = images.noised(torch.tensor([1, 2]), torch.Generator().manual_seed(0))
    assert noisy.shape == target.shape == (2, 3, 8, 8)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(BitstepError, match="no noise schedule"):
        TrainingImages.of_pipeline(pictures(), pipeline)


def test_the_diffusion_loss_is_what_a_plain_training_script_computes() -> None:
    _, context, _ = prepared()
    images = TrainingImages(pictures(), lambda x: x, DDPMScheduler())
    unit = unit_of(replace(context, images=images))
    seen: list[Any] = []
    handle = context.student.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    loss = unit.loss(3)
    handle.remove()
    (call,) = seen
    with torch.no_grad():
        output = context.student(call["sample"], call["timestep"]).sample
    alpha = images.schedule.alphas_cumprod[call["timestep"]][:, None, None, None]
    clean = images.pixels.permute(0, 3, 1, 2) / 127.5 - 1
    noises = [(x - a.sqrt() * c) / (1 - a).sqrt() for x, a in zip(call["sample"], alpha, strict=True) for c in clean]
    errors = torch.stack([(o - n).square().mean() for o in output for n in noises]).view(2, 2, len(clean))
    candidates = errors[0, 0][:, None] + errors[1, 1][None]  # which image was drawn is not known here
    assert (candidates / 2 - loss.detach()).abs().min() < 1e-4
    assert torch.equal(unit.loss(3), loss)
    assert not torch.equal(unit.loss(4), loss)


def test_without_images_the_trajectories_are_distilled() -> None:
    _, context, _ = prepared()
    distillation = PHASE.model_copy(update={"objective": TrajectoryDistillation()})
    assert torch.equal(unit_of(context).loss(1), unit_of(context, phase=distillation).loss(1))


def test_images_alone_cannot_train_a_conditional_denoiser() -> None:
    _, context, _ = prepared("dit")
    images = TrainingImages(pictures(), lambda x: x, DDPMScheduler())
    with pytest.raises(BitstepError, match=r"conditional denoiser .*class_labels"):
        unit_of(replace(context, images=images))


def test_the_mimicking_basis_is_that_of_all_features_at_once() -> None:
    _, context, pool = prepared()
    name = "down_blocks.1.resnets.0"
    gram = feature_grams(context, [name], 5)[name]
    features: list[Tensor] = []
    handle = context.teacher.get_submodule(name).register_forward_hook(lambda _, args, output: features.append(output))
    call_denoiser(context.teacher, context.batch(torch.arange(len(pool)))[0])
    handle.remove()
    rows = features[0].movedim(1, -1).flatten(0, 2).double()
    torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
    basis = principal_basis(gram, 6).double()
    assert basis.shape == (24, 6)
    _, _, right = torch.linalg.svd(rows, full_matrices=False)
    projector = right[:6].T @ right[:6]
    torch.testing.assert_close(basis @ basis.T, projector, rtol=1e-4, atol=1e-5)


def test_of_blocks_that_return_text_and_sample_the_sample_is_mimicked() -> None:
    _, context, _ = prepared("sd3")
    loss = unit_of(context, Mimicking()).loss(0)  # the text that SD3's last block returns is None
    loss.backward()
    name = "transformer_blocks.0"
    gram = feature_grams(context, [name], 5)[name]
    found: list[Any] = []
    handle = context.teacher.get_submodule(name).register_forward_hook(lambda _, args, output: found.append(output))
    call_denoiser(context.teacher, context.batch(torch.arange(len(context.pool)))[0])
    handle.remove()
    _, sample = found[0]
    rows = sample.flatten(0, 1).double()
    torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_the_features_of_a_block_are_the_samples_with_channels_last() -> None:
    class Joint(nn.Module):
        """As CogVideoX's: the sample comes first."""

        def forward(self, hidden_states: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            return 2 * hidden_states, text

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joint, self.curve, self.map = Joint(), nn.Conv1d(3, 5, 1), nn.Conv2d(3, 5, 1)

        def forward(self, tokens: Tensor, text: Tensor, curve: Tensor, image: Tensor) -> None:
            self.joint(hidden_states=tokens, text=text)
            self.joint(tokens, text)
            self.curve(curve)
            self.map(image)

    denoiser, tokens = Denoiser(), torch.randn(2, 9, 4)
    with block_features(denoiser, ["joint", "curve", "map"]) as found:
        denoiser(tokens, torch.randn(2, 6, 4), torch.randn(2, 3, 8), torch.randn(2, 3, 8, 7))
    assert torch.equal(found["joint"], 2 * tokens)
    assert (found["curve"].shape, found["map"].shape) == ((2, 8, 5), (2, 8, 7, 5))


def test_mimicking_adds_the_distance_of_projected_features() -> None:
    """At full rank a projection is a rotation: the term is the plain distance of features; at low rank it is less."""
    _, context, _ = prepared()
    plain = unit_of(context).loss(0)

    def term(rank: float) -> Tensor:
        return unit_of(context, Mimicking(weight=1.0, rank=rank)).loss(0) - plain

    kept: dict[str, dict[str, Tensor]] = {"teacher": {}, "student": {}}
    handles = []
    kinds = ("resnets", "attentions")
    names = [name for name, _ in context.teacher.named_modules() if name.rpartition(".")[0].endswith(kinds)]
    for side in kept:
        for name in names:

            def keep(where: dict[str, Tensor], name: str, _: nn.Module, args: Any, output: Tensor) -> None:
                where[name] = output

            module = getattr(context, side).get_submodule(name)
            handles.append(module.register_forward_hook(partial(keep, kept[side], name)))
    arguments: list[Any] = []
    handles.append(
        context.student.register_forward_pre_hook(lambda _, a, kwargs: arguments.append(kwargs), with_kwargs=True)
    )
    unit_of(context).loss(0)
    context.teacher(**arguments[0])
    for handle in handles:
        handle.remove()
    distances = [(kept["teacher"][name] - kept["student"][name]).square().mean() for name in names]
    assert term(1.0).item() == pytest.approx(torch.stack(distances).mean().item(), rel=1e-3)
    loss = term(0.25)
    assert 0 < loss.item() < term(1.0).item() / 0.25  # a quarter of the directions, averaged over a quarter as many
    loss.backward()
    layer = context.layers["mid_block.resnets.0.conv1"].weight_quantizer
    assert isinstance(layer, BinaryWeight)
    assert layer.log_scale.grad is not None


def test_warm_up_goes_from_the_middle_outward_and_to_activations_last() -> None:
    _, context, _ = prepared()
    order = outward(context.layers, context.structure)
    names = {id(layer): name for name, layer in context.layers.items()}
    middle = [name.startswith("mid_block") for name in (names[id(layer)] for layer in order)]
    assert middle == sorted(middle, reverse=True)
    assert any(middle)
    assert {names[id(layer)].split(".")[1] for layer in order[-4:]} <= {"0", "1"}
    unit = unit_of(context, WarmUp(share=0.8))

    def switched(iteration: int) -> tuple[list[bool], list[bool]]:
        unit.begin(iteration)
        inputs = [layer.input_quantizer for layer in order if layer.input_quantizer is not None]
        return [layer.weight_quantizer.enabled for layer in order], [quantizer.enabled for quantizer in inputs]

    weights, inputs = switched(2)
    assert 0 < sum(weights) < len(order)
    assert weights == sorted(weights, reverse=True)
    assert not any(inputs)
    weights, inputs = switched(5)
    assert all(weights)
    assert 0 < sum(inputs) < len(inputs)
    assert all(switched(8)[1])
    assert switched(2)[0] == switched(2)[0] != switched(8)[0]


def test_warm_up_trains_what_is_binary_already() -> None:
    _, context, _ = prepared()
    unit = unit_of(context, WarmUp(share=0.8))
    unit.begin(2)
    unit.loss(2).backward()
    enabled, trained = {}, {}
    for name, layer in context.layers.items():
        assert isinstance(layer.weight_quantizer, BinaryWeight)
        enabled[name] = layer.weight_quantizer.enabled
        trained[name] = layer.weight_quantizer.log_scale.grad is not None
        assert trained[name] == (layer.weight_quantizer.source.weight.grad is not None)
    assert trained == enabled
    assert 0 < sum(trained.values()) < len(trained)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_warm_up_is_over_at_the_last_iteration(share: float) -> None:
    _, context, _ = prepared()
    quantizers = [part for part in context.student.modules() if isinstance(part, WeightQuantizer | ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.enabled = False
    unit_of(context, WarmUp(share=share)).begin(PHASE.iterations - 1)
    trained = {id(part) for module in context.trained.values() for part in module.modules()}
    assert all(quantizer.enabled for quantizer in quantizers if id(quantizer) in trained)


def test_an_evolvable_basis_is_pressed_then_dropped() -> None:
    _, context, _ = prepared(bits=1, evolvable=True)
    unit = unit_of(context, EvolvableBasis(penalty=0.5, share=0.5))
    quantizers = [layer.weight_quantizer for layer in context.layers.values()]
    assert all(isinstance(quantizer, BinaryWeight) for quantizer in quantizers)
    second = torch.cat([q.second_scale().flatten() for q in quantizers if isinstance(q, BinaryWeight)])
    assert unit.loss(4).item() == pytest.approx((unit_of(context).loss(4) + 0.5 * second.mean()).item(), rel=1e-5)
    unit.begin(4)
    assert {len(quantizer.codes().scale) for quantizer in quantizers} == {1, 2}
    unit.begin(5)
    assert unit.loss(5).item() == unit_of(context).loss(5).item()
    assert {len(quantizer.codes().scale) for quantizer in quantizers} == {1}


@pytest.mark.parametrize("evolvable", [False, True])
def test_an_evolvable_basis_leaves_units_without_second_bases_alone(evolvable: bool) -> None:
    _, context, _ = prepared(bits=1, evolvable=evolvable)
    unit = replace(unit_of(context), layers={} if evolvable else context.layers)
    assert EvolvableBasis().applied(unit, context, PHASE) is unit


def test_the_moving_average_starts_at_the_initial_scales_and_ends_in_the_parameters() -> None:
    _, context, _ = prepared()
    phase = PHASE.model_copy(
        update={"iterations": 4, "ema": 0.5, "learning_rates": LearningRates(weight=0.01, weight_scale=0.1)}
    )

    def values() -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in trained_tensors(context.layers).items()}

    history = [values()]
    for _ in finetune(context, [phase], TrainingState()):
        history.append(values())
    average = history[0]
    for number, current in enumerate(history[1:]):
        decay = min(0.5, (1 + number) / (10 + number))
        average = {name: decay * average[name] + (1 - decay) * current[name] for name in average}
    for name, value in values().items():
        torch.testing.assert_close(value, average[name])
    assert any(not torch.equal(values()[name], history[-1][name]) for name in average)


def test_weights_decay_and_scales_do_not() -> None:
    _, context, _ = prepared()
    built = optimizers(context.trained, PHASE.model_copy(update={"weight_decay": 0.3}))
    decays = {
        id(parameter): group.get("weight_decay", 0.0)
        for optimizer in built
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = {
        (role, decays[id(parameter)])
        for layer in context.layers.values()
        for role, parameters in roles(layer).items()
        for parameter in parameters
    }
    assert found == {("weight", 0.3), ("weight_scale", 0.0), ("activation_scale", 0.0)}


@pytest.fixture
def mosaics(tmp_path: Path) -> Path:
    folder = tmp_path / "mosaics"
    folder.mkdir()
    tiles = pictures(6)
    rows = tiles.view(2, 3, 8, 8, 3).permute(0, 2, 1, 3, 4).reshape(16, 24, 3)
    Image.fromarray(rows.numpy()).save(folder / "a.png")
    Image.fromarray(pictures(1).squeeze(0).numpy()).save(folder / "b.png")
    return folder


def test_data_is_a_folder_of_pictures_and_mosaics(mosaics: Path, tmp_path: Path) -> None:
    assert torch.equal(read(mosaics, tile=8), torch.cat([pictures(6), pictures(1)]))
    build("ddim").save_pretrained(tmp_path / "teacher")
    settings = [
        *("calibration.images=2", "calibration.batch_size=2", "calibration.steps=2"),
        *("training.0.iterations=2", "training.0.batch_size=2"),
    ]

    def quantize(out: str, **changes: Any) -> str:
        arguments: dict[str, Any] = {"recipe": "binarydm", "bits": "W1.1A4", "effort": "full", "overrides": settings}
        run.quantize(str(tmp_path / "teacher"), out=tmp_path / out, **(arguments | changes))
        return (tmp_path / out / "run" / LOSS).read_text()

    assert quantize("with", data=mosaics) != quantize("without")
    with pytest.raises(UsageError, match="trained without images"):
        quantize("unused", data=mosaics, recipe="mse", bits="W4A4", overrides=settings[:3])
    with pytest.raises(UsageError, match="holds no images"):
        quantize("empty", data=tmp_path)
    Image.new("RGB", (36, 27)).save(mosaics / "c.png")  # a photograph: cropped and scaled
    assert read(mosaics, tile=8, fit=True).shape == (8, 8, 8, 3)
    quantize("odd", data=mosaics)


def test_binarydm_beats_plain_binarization() -> None:
    """Equal iterations on recorded trajectories, error on others: untrained > single basis, plain loss > BinaryDM."""
    trajectories = prepared()[2]
    unseen = next(stream(source("ddim"), images=8, batch_size=8, steps=4, seed=9))
    phase = PHASE.model_copy(
        update={
            "iterations": 40,
            "batch_size": 8,
            "learning_rates": LearningRates(weight=0.02, weight_scale=0.02, activation_scale=0.02),
        }
    )

    def error(bits: float, *phases: Phase) -> float:
        student, context, _ = prepared(bits=bits)
        for _ in finetune(replace(context, pool=trajectories), phases, TrainingState()):
            pass
        call, target = unseen.batch(torch.arange(len(unseen)))
        with torch.no_grad():
            return (call_denoiser(student.denoiser, call) - target).square().mean().item()

    techniques = (WarmUp(share=0.2), Mimicking(weight=0.01))
    untrained, plain = error(1), error(1, phase)
    assert plain < 0.7 * untrained
    assert error(1.8, phase.model_copy(update={"techniques": techniques})) < 0.9 * plain
