"""Forward passes of a whole model, replayed while nothing but the values of tensors differs: on the CPU from a tape,
on a GPU as a CUDA graph.

A call whose arguments look like those of an earlier call is recorded; the next one is run both ways, and from then on
such calls are replayed if the two agreed bit for bit. What cannot be recorded, is observed, or has changed since runs
layer by layer. The timestep's position in the step grid is an argument like any other.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.hooks import RemovableHandle

from bitstep.denoiser.steps import Position, StepCursor
from bitstep.library import current_instruction_set
from bitstep.runtime import graph, tape
from bitstep.runtime.adapters import fit_adapters
from bitstep.runtime.attention import PackedAttention, is_watched
from bitstep.runtime.fused import fuse
from bitstep.runtime.graph import Graph
from bitstep.runtime.layers import PackedModule
from bitstep.runtime.tape import Tape

_KEPT = 4  # signatures of a model: with guidance and without, timesteps on the keys of the grid and between them
_HOOKS = {name for name in vars(nn.Module()) if "hook" in name}
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def enable_replay(model: nn.Module) -> None:
    """Replay the forward passes of ``model`` from now on, where that is possible."""
    model.forward = Replay(model)


@dataclass
class Known:
    """What is known of calls with one signature: a recording, whether it was seen to agree, or why there is none."""

    recording: Tape | Graph | None = None
    proven: bool = False
    refusal: str | None = None


class Replay:
    """Stands in for a model's forward method; ``known`` is what it knows, by signature. A copy starts anew."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.known: dict[Hashable, Known] = {}
        self._watch: Watch | None = None
        self._lock = threading.Lock()  # the memory of a tape serves one call at a time

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model,)

    # a compiler would follow the calls into the library, and break at each
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_observed() or not self._lock.acquire(blocking=False):
            return self._forward(*args, **kwargs)
        try:
            return self._call(*args, **kwargs)
        finally:
            self._lock.release()

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(partial(type(self.model).forward, self.model))

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Layer by layer; whatever is recorded ran so before."""
        fit_adapters(self.model)
        return type(self.model).forward(self.model, *args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._watch is None or self._watch.sees_change():
            self.known.clear()
            self._watch = Watch(self.model)
        watch = self._watch
        inputs = (args, kwargs, watch.position())
        signature = _signature(inputs)
        if watch.refusal or signature is None:
            return self._forward(*args, **kwargs)
        known = self.known.pop(signature, None)
        first = known is None
        self.known[signature] = known = known or Known()  # the last of all
        if len(self.known) > _KEPT:
            del self.known[next(iter(self.known))]
        if first or known.refusal:
            return self._forward(*args, **kwargs)
        if known.recording is None or known.recording.is_stale():

            def forward(args: Any, kwargs: Any, position: Any) -> Any:
                with watch.at(position):
                    return self._forward(*args, **kwargs)

            recorder = graph if any(map(_is_on_gpu, tree_leaves(inputs))) else tape
            result, known.recording, known.refusal = recorder.record(forward, *inputs)
            known.proven = False
            return result
        if known.proven:
            return known.recording.run(*inputs)
        result = self._forward(*args, **kwargs)
        known.proven = _same(result, known.recording.run(*inputs))
        if not known.proven:
            known.recording, known.refusal = None, "the recorded pass gave another result"
        return result


class Watch:
    """Sees whether a model was changed since: its modules, tensors, hooks and attributes, lists and dictionaries
    among them. ``refusal`` says why its forward passes cannot be recorded."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        for module in modules:
            if isinstance(module, PackedModule):
                module.run  # noqa: B018  (prepared now, not while a forward pass is recorded)
        fuse(model)  # where a device has kernels that the one before had not
        rows = (module.rows for module in modules if isinstance(module, PackedModule | PackedAttention))
        cursors = {found.cursor for found in rows if found is not None}
        self._inner = modules[1:]
        self._handles = RemovableHandle.next_id
        self._hooked = self._has_hooks()
        self.refusal = self._why_not(cursors)
        self._cursor: StepCursor | None = next(iter(cursors), None)
        self._live = [part for module in modules for part in _parts(module)]
        self._then = [part.copy() for part in self._live]
        self._tensors = [d for m in modules for d in (m._parameters, m._buffers) if d]
        self._tensors_then = list(chain.from_iterable(d.values() for d in self._tensors))

    def _why_not(self, cursors: set[StepCursor]) -> str | None:
        processors = filter(None, (getattr(module, "processor", None) for module in self._inner))
        if any(not type(processor).__module__.startswith("diffusers.") for processor in processors):
            return "an attention processor may do more than compute"
        if self._hooked:
            return "there are hooks inside"
        return "layers of several models share it" if len(cursors) > 1 else None

    def _has_hooks(self) -> bool:
        return any(map(is_watched, self._inner))

    def sees_change(self) -> bool:
        # torch numbers all hooks in the order in which they are registered
        if self._hooked or self._handles != RemovableHandle.next_id:
            self._handles = RemovableHandle.next_id
            if self._has_hooks() != self._hooked:
                return True
        # equality of tensors is no identity, so those come first
        if any(map(is_not, chain.from_iterable(d.values() for d in self._tensors), self._tensors_then)):
            return True
        try:
            return self._live != self._then
        except RuntimeError:  # an attribute is another tensor now, and their equality a tensor too
            return True

    def position(self) -> tuple[Tensor | None, ...] | None:
        """Where the forward pass under way stands in the step grid."""
        if self._cursor is None:
            return None
        position = self._cursor.position
        return position.lower, position.upper, position.fraction

    def at(self, position: Any) -> AbstractContextManager[None]:
        """Run forward passes with the model's step cursor at ``position``."""
        return nullcontext() if self._cursor is None else self._cursor.hold(Position(*position))


def _parts(module: nn.Module) -> list[Any]:
    """The dictionaries and lists that hold what ``module`` is, but for its hooks."""
    own = vars(module)
    parts = [own, *(v for name, v in own.items() if isinstance(v, dict | list) and name not in _HOOKS)]
    processor = own.get("processor")  # of attention
    return parts if processor is None else [*parts, vars(processor)]


def _is_observed() -> bool:
    """Whether something looks at, changes or differentiates the single operations of this thread."""
    return (
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
        or _has_any_global_hook()
    )


def _signature(inputs: Any) -> Hashable | None:
    """What the operations of a forward pass depend on besides the model; None where it cannot be replayed."""
    leaves, spec = tree_flatten(inputs)
    on_gpu = any(map(_is_on_gpu, leaves))
    if on_gpu and not _gpu_is_free():
        return None
    parts: list[Hashable] = [spec, torch.get_default_dtype(), *(_gpu_settings() if on_gpu else _cpu_settings())]
    gpus = set()
    for leaf in leaves:
        if type(leaf) is Tensor and leaf.device.type in ("cpu", "cuda") and leaf.layout is torch.strided:
            if leaf.is_cuda:
                gpus.add(leaf.device)
            elif on_gpu and leaf.ndim > 1:  # a timestep and its position may stay on the CPU
                return None
            parts.append((leaf.dtype, leaf.device, leaf.shape, leaf.stride()))
        elif isinstance(leaf, _PLAIN):
            parts.append((type(leaf), leaf))
        else:
            return None
    return tuple(parts) if len(gpus) <= 1 else None


def _is_on_gpu(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_cuda


def _gpu_is_free() -> bool:
    """Whether a graph may be captured: nobody captures already, and no casts of weights are kept outside of it."""
    return not torch.cuda.is_current_stream_capturing() and not torch.is_autocast_enabled("cuda")


def _cpu_settings() -> tuple[Hashable, ...]:
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    return torch.get_num_threads(), current_instruction_set(), autocast


def _gpu_settings() -> tuple[Hashable, ...]:
    """What decides which programs libraries run."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        cuda.matmul.fp32_precision,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        *(cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        *(cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        *(cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled()),
    )


def _same(a: Any, b: Any) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)
