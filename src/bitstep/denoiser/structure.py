"""What a denoiser computes, found by running it: layers in order, their sizes and roles, attention, blocks.

Nothing here goes by names or positions of particular models: which layer is the first or belongs to the time embedding
follows from what was executed when, and from whether its input changes with the sample or with the timestep.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.downsampling import Downsample1D, Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bitstep.denoiser.attention import given_operands
from bitstep.denoiser.calls import Call, run, sample_name, wrapped
from bitstep.denoiser.layers import QUANTIZABLE, channel_axis, input_of, refusal, weight_of
from bitstep.denoiser.origins import Origin, Origins, scaled
from bitstep.denoiser.steps import timestep_name

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class LayerInfo:
    """One executed Linear, Conv1d or Conv2d.

    macs: multiply-accumulates of one sample, over all runs of the layer
    positions: how often the weight is applied to one sample (output pixels or tokens), in the first run
    parts: channels of each tensor that was concatenated into the layer's input directly before it; else empty
    sees_sample, sees_timestep: whether its input changes with the noisy sample, and with the timestep
    origin: the channels of a norm or a layer before that become this layer's input, if nothing but layers read them,
        so that scales can be folded into them; else None
    """

    name: str
    macs: int
    positions: int
    parts: tuple[int, ...]
    sees_sample: bool
    sees_timestep: bool
    origin: Origin | None


@dataclass(frozen=True)
class AttentionSite:
    """A module that computes scaled dot-product attention itself (not in a child); ``macs`` of both matrix products
    of one sample, over all runs."""

    name: str
    macs: int


@dataclass(frozen=True)
class Structure:
    """A denoiser as its execution shows it; layers are named by their path in the denoiser.

    layers: in order of execution; a module that runs several times, or sits at several paths, once
    first, last: the first layer whose input depends on the sample, and the last one executed
    time_embedding: layers that turn the timestep into an embedding, before the sample is looked at
    skip: 1x1 convolutions beside the main path of a block whose channel count changes
    downsample: convolutions that lower the resolution
    left_alone: layers with weights that are not in ``layers``, and why
    asked: modules that are asked for their parameters, which some denoisers learn a dtype from
    total_macs: all matrix products and convolutions of one sample, attention included
    """

    layers: tuple[LayerInfo, ...]
    first: str
    last: str
    time_embedding: tuple[str, ...]
    skip: tuple[str, ...]
    downsample: tuple[str, ...]
    attention: tuple[AttentionSite, ...]
    left_alone: Mapping[str, str]
    asked: tuple[str, ...]
    total_macs: int


@dataclass(frozen=True)
class Block:
    """A part of the denoiser to be fitted by itself: a module and the quantizable layers in it, in execution order."""

    name: str
    layers: tuple[str, ...]


@torch.no_grad()
def trace(denoiser: nn.Module, call: Call) -> Structure:
    """Run ``denoiser`` on ``call`` as it is, with another sample, with other timesteps, and scaled at its origins."""
    with _observed(denoiser) as seen, FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        output = run(denoiser, call)
    batch = len(output)
    other_sample, other_timestep = (_layer_runs(denoiser, other) for other in _perturbed(denoiser, call))
    origins = _verified(denoiser, call, seen, output)
    layers = []
    for name, runs in seen.layers.items():
        weight = weight_of(denoiser.get_submodule(name))
        positions = [layer_run.output_shape.numel() // len(weight) for layer_run in runs]
        layers.append(
            LayerInfo(
                name,
                macs=sum(positions) * weight.numel() // batch,
                positions=positions[0] // batch,
                parts=runs[0].parts,
                sees_sample=runs != other_sample.get(name),
                sees_timestep=runs != other_timestep.get(name),
                origin=origins.get(name),
            )
        )
    first = next(i for i, layer in enumerate(layers) if layer.sees_sample)
    convolutions = [layer.name for layer in layers if _is_convolution(denoiser.get_submodule(layer.name))]
    return Structure(
        layers=tuple(layers),
        first=layers[first].name,
        last=seen.last,
        time_embedding=tuple(
            layer.name
            for i, layer in enumerate(layers)
            if _inside(denoiser, layer.name, TimestepEmbedding)
            or (i < first and layer.sees_timestep and not layer.sees_sample)
        ),
        skip=tuple(name for name in convolutions if _is_skip(denoiser, name)),
        downsample=tuple(
            name
            for name in convolutions
            if (_strided(denoiser, name) and name != layers[first].name)  # the first strided one cuts patches
            or _inside(denoiser, name, Downsample1D, Downsample2D)
        ),
        attention=tuple(AttentionSite(name, macs // batch) for name, macs in seen.attention.items()),
        left_alone=_left_alone(denoiser, seen.layers),
        asked=tuple(seen.asked),
        total_macs=counter.get_total_flops() // 2 // batch,
    )


def blocks(denoiser: nn.Module, structure: Structure) -> tuple[Block, ...]:
    """The parts that block-wise distillation fits one after another, in execution order; every layer is in one.

    A block is an element of a ModuleList with a normalisation and at least two layers in it, and no such block inside:
    a residual block, an attention or transformer block. Every other layer is a block of its own.
    """
    names = [layer.name for layer in structure.layers]
    elements = {
        f"{path}.{child}": [name for name in names if name.startswith(f"{path}.{child}.")]
        for path, module in denoiser.named_modules()
        if isinstance(module, nn.ModuleList)
        for child, element in module.named_children()
        if any(map(_is_norm, element.modules()))
    }
    candidates = {path: layers for path, layers in elements.items() if len(layers) >= 2}
    innermost = {
        path: layers
        for path, layers in candidates.items()
        if not any(other.startswith(f"{path}.") for other in candidates)
    }
    owner = {name: path for path, layers in innermost.items() for name in layers}
    ordered = dict.fromkeys(owner.get(name, name) for name in names)
    return tuple(Block(path, tuple(innermost.get(path, [path]))) for path in ordered)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is one of torch's, or a leaf that has nothing but vectors, as those of diffusers' and others' own."""
    parameters = list(module.parameters())
    own = parameters and all(p.ndim == 1 for p in parameters) and next(module.children(), None) is None
    return bool(own) or isinstance(module, NORMS)


@dataclass(frozen=True)
class _Run:
    """One execution of a layer; the checksum tells whether its input was the same in another forward."""

    output_shape: torch.Size
    parts: tuple[int, ...]
    checksum: tuple[float, float]


class _Observation(TorchFunctionMode):
    """What happened in one forward, filled in by hooks; as a mode, it sees attention and concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[str, list[_Run]] = {}
        self.attention: Counter[str] = Counter()  # multiply-accumulates of the whole batch, by module
        self.last = ""
        self.origins = Origins()
        self.asked: dict[str, None] = {}
        self._running = [""]  # modules, by name
        self._concatenated: dict[int, tuple[Tensor, list[Tensor], int]] = {}  # holding a tensor keeps its id its own

    def enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def leave(self, *_: Any) -> None:
        self._running.pop()

    def layer_ran(
        self, name: str, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        x = input_of(args, kwargs)
        checksum = x.double().sum().item(), x.double().square().sum().item()
        parts = self._parts(x, channel_axis(layer))
        self.layers.setdefault(name, []).append(_Run(output.shape, parts, checksum))
        self.last = name
        self.origins.given(name, x, channel_axis(layer))

    def returned(self, name: str, channels: int, *call: Any) -> None:
        self.origins.returned(name, channels, call[-1])

    def _parts(self, x: Tensor, axis: int) -> tuple[int, ...]:
        _, tensors, dim = self._concatenated.get(id(x), (x, [], axis))
        return tuple(tensor.shape[axis] for tensor in tensors) if dim % x.ndim == axis % x.ndim else ()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            query, key, value = (operand.shape for operand in given_operands(args, kwargs))
            # every query meets every key (of the query's width) and every value (of its own)
            self.attention[self._running[-1]] += query[:-1].numel() * key[-2] * (query[-1] + value[-1])
        result = function(*args, **kwargs)
        self.origins.follow(function, args, kwargs, result, self._running[-1])
        if function in (torch.cat, torch.concat, torch.concatenate):
            tensors = args[0] if args else kwargs["tensors"]
            self._concatenated[id(result)] = result, list(tensors), kwargs.get("dim", (*args, 0)[1])
        return result


@contextmanager
def _observed(denoiser: nn.Module) -> Iterator[_Observation]:
    seen = _Observation()
    names = {id(module): name for name, module in denoiser.named_modules()}

    def watched(parameters: Callable[..., Any]) -> Callable[..., Any]:
        def ask(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if id(module) in names:
                seen.asked[names[id(module)]] = None
            return parameters(module, *args, **kwargs)

        return ask

    with ExitStack() as stack:
        for name, module in denoiser.named_modules():
            stack.callback(module.register_forward_pre_hook(functools.partial(seen.enter, name)).remove)
            if isinstance(module, QUANTIZABLE):
                ran = functools.partial(seen.layer_ran, name)
                stack.callback(module.register_forward_hook(ran, with_kwargs=True).remove)
            parameter = next(module.parameters(), None)
            if parameter is not None and (isinstance(module, QUANTIZABLE) or _is_norm(module)):
                returned = functools.partial(seen.returned, name, len(parameter))
                stack.callback(module.register_forward_hook(returned).remove)
            stack.callback(module.register_forward_hook(seen.leave, always_call=True).remove)
        stack.enter_context(wrapped(nn.Module, "parameters", watched))
        stack.enter_context(seen)
        yield seen


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""What FlopCounterMode has no formula for: the fused attention of the CPU."""


def _layer_runs(denoiser: nn.Module, call: Call) -> dict[str, list[_Run]]:
    with _observed(denoiser) as seen:
        run(denoiser, call)
    return seen.layers


def _verified(denoiser: nn.Module, call: Call, seen: _Observation, output: Tensor) -> dict[str, Origin]:
    """The origins that are really such: when they are scaled, another order of channels in between shows in what the
    layer reads (and in all that follows, which counts as none either), another reader in the output."""
    origins = seen.origins.found()
    while origins:
        with scaled(denoiser, origins), _observed(denoiser) as again:
            scaled_output = run(denoiser, call)
        alike = {
            layer: origin
            for layer, origin in origins.items()
            if math.isclose(seen.layers[layer][0].checksum[1], again.layers[layer][0].checksum[1], rel_tol=1e-4)
        }
        if alike == origins:
            same = (scaled_output - output).norm() <= 1e-3 * output.norm()
            return origins if bool(same) else {}
        origins = alike
    return {}


def _perturbed(denoiser: nn.Module, call: Call) -> tuple[Call, Call]:
    """``call`` with another sample, and with other timesteps within the schedule."""
    name, time = sample_name(denoiser), timestep_name(call.arguments)
    random = torch.Generator().manual_seed(0)

    def other_sample(path: str, tensor: Tensor) -> Tensor:
        return tensor + torch.randn(tensor.shape, generator=random).to(tensor) if path == f"call.{name}" else tensor

    def halved(path: str, tensor: Tensor) -> Tensor:
        return torch.where(tensor > 0, tensor / 2, 1).to(tensor) if path == f"call.{time}" else tensor

    return call.map(other_sample), call.map(halved)


def _left_alone(denoiser: nn.Module, executed: Container[str]) -> dict[str, str]:
    reasons = {}
    for name, module in denoiser.named_modules():
        matrices = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
        if not matrices or next(module.children(), None) is not None or name in executed:
            continue
        reasons[name] = refusal(module) or "never ran"
    return reasons


def _inside(denoiser: nn.Module, name: str, *types: type[nn.Module]) -> bool:
    """Whether a module of these types holds the layer ``name`` directly or further up."""
    parts = name.split(".")
    return any(isinstance(denoiser.get_submodule(".".join(parts[:i])), types) for i in range(len(parts)))


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d)


def _strided(denoiser: nn.Module, name: str) -> bool:
    convolution = denoiser.get_submodule(name)
    return isinstance(convolution, nn.Conv1d | nn.Conv2d) and max(convolution.stride) > 1


def _is_skip(denoiser: nn.Module, name: str) -> bool:
    convolution, parent = denoiser.get_submodule(name), denoiser.get_submodule(name.rpartition(".")[0])
    assert isinstance(convolution, nn.Conv1d | nn.Conv2d)
    wide = [c for c in parent.children() if isinstance(c, nn.Conv1d | nn.Conv2d) and max(c.kernel_size) > 1]
    changes_channels = convolution.in_channels != convolution.out_channels
    return max(convolution.kernel_size) == 1 and changes_channels and bool(wide) and parent is not denoiser
