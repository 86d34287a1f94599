"""Denoiser calls: recorded while the real pipeline runs, kept on disk, gathered into batches that mix timesteps.

A :class:`Recorder` hooks a denoiser and its scheduler, so no pipeline needs an adapter. What it saw of one pipeline
batch is a :class:`Shard`; shards, in memory or memory-mapped from a folder, make a :class:`Pool`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitstep.errors import BitstepError
from bitstep.steps import TIMESTEP_NAMES

INDEX = "pool.json"
OUTPUT = "output"  # a shard's tensor of outputs; the others are "call.NAME", so that no argument can collide
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Call:
    """The arguments of one denoiser forward, by name: tensors inside dicts, lists and tuples, and plain values."""

    arguments: Mapping[str, Any]

    @property
    def timestep(self) -> Tensor:
        """One timestep per row of the batch, ``[batch]``."""
        timestep: Tensor = self.arguments[_timestep_name(self.arguments)]
        return timestep

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor among the arguments, by its dotted path."""
        leaves: dict[str, Tensor] = {}
        _skeleton(dict(self.arguments), "call", leaves)
        return leaves

    def to(self, device: torch.device | str) -> Call:
        """The same call with every tensor on ``device``."""
        return self.map(lambda _, tensor: tensor.to(device))

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Call:
        """The same call with every tensor replaced by ``function(name, tensor)``; names are dotted paths."""
        leaves: dict[str, Tensor] = {}
        skeleton = _skeleton(dict(self.arguments), "call", leaves)
        return Call(_rebuild(skeleton, {name: function(name, tensor) for name, tensor in leaves.items()}))


def run(denoiser: nn.Module, call: Call) -> Tensor:
    """The denoiser's output tensor for ``call``, whether it returns a tensor, a tuple or an output object."""
    return first_tensor(denoiser(**call.arguments))


def first_tensor(output: Any) -> Tensor:
    """The tensor that a denoiser returned, as it is or first in a tuple or an output object."""
    tensor = output if isinstance(output, Tensor) else output[0]
    if not isinstance(tensor, Tensor):
        raise BitstepError(f"expected a denoiser that returns a tensor, got {type(tensor).__name__}")
    return tensor


def timestep_of(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The timestep in the arguments of a call of ``forward``, a denoiser's forward."""
    arguments = dict(zip(inspect.signature(forward).parameters, args, strict=False)) | dict(kwargs)
    return torch.as_tensor(arguments[_timestep_name(arguments)])


@dataclass(frozen=True)
class Shard:
    """The calls of one pipeline batch, ``rows`` rows each (images times the chunks of guidance).

    tensors: ``output`` ``[calls, rows, ...]`` and one tensor per tensor argument: ``[calls, rows, ...]`` where its
        name is in ``varying``, else ``[rows, ...]`` where it is in ``batched``, else as it was passed
    skeleton: the call with names in the place of tensors, JSON
    grams: per call, the inner products of the output's chunks and what the scheduler was given, float64
        ``[chunks + 1, chunks + 1]`` (see :func:`fit_guidance`); None where there was no guidance to be read off
    """

    tensors: Mapping[str, Tensor]
    skeleton: Any
    batched: tuple[str, ...]
    varying: tuple[str, ...]
    grams: tuple[Tensor | None, ...]

    @property
    def timesteps(self) -> Tensor:
        """``[calls, rows]``"""
        name = f"call.{_timestep_name(self.skeleton['dict'])}"
        timesteps = self.tensors[name]
        return timesteps if name in self.varying else timesteps.expand(len(self.tensors[OUTPUT]), -1)


class Recorder:
    """Records every call of ``denoiser`` while a pipeline makes ``images`` images under this context manager.

    It also watches ``scheduler.step``: where one call's output, in chunks of ``images`` rows, was combined into what
    the scheduler received, the weights of that combination are the pipeline's classifier-free guidance.

    Raises BitstepError on an output that is not finite, and on arguments that cannot be recorded.
    """

    def __init__(self, denoiser: nn.Module, scheduler: Any, images: int) -> None:
        self._denoiser = denoiser
        self._scheduler = scheduler
        self._images = images
        self._names = list(inspect.signature(denoiser.forward).parameters)
        self._skeleton: Any = None
        self._shapes: dict[str, torch.Size] = {}
        self._leaves: list[dict[str, Tensor]] = []
        self._outputs: list[Tensor] = []
        self._grams: list[Tensor | None] = []
        self._pending = 0  # calls since the scheduler's last step
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        handle = self._denoiser.register_forward_hook(self._called, with_kwargs=True)
        self._exit.callback(handle.remove)
        self._exit.enter_context(wrapped(self._scheduler, "step", self._watch))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def shard(self, batched: tuple[str, ...] | None = None) -> Shard:
        """What was recorded. ``batched`` names the arguments with a batch dimension where an earlier shard knows."""
        if not self._outputs:
            raise BitstepError(f"the pipeline never called its {type(self._denoiser).__name__}")
        if batched is None:
            batched = self._find_batched()
        tensors = {OUTPUT: torch.stack(self._outputs)}
        varying = []
        for name, first in self._leaves[0].items():
            if all(leaves[name] is first for leaves in self._leaves):
                tensors[name] = first
            elif name in batched:
                tensors[name] = torch.stack([leaves[name] for leaves in self._leaves])
                varying.append(name)
            else:
                raise BitstepError(f"the argument {name} has no batch dimension but changes between denoiser calls")
        return Shard(tensors, self._skeleton, batched, tuple(varying), tuple(self._grams))

    def _called(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        result = first_tensor(output).detach()
        rows = len(result)
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        name = _timestep_name(arguments)
        timestep = torch.as_tensor(arguments[name])
        if timestep.ndim > 1 or timestep.numel() not in (1, rows):
            raise BitstepError(f"expected one timestep per sample of the batch of {rows}, got {list(timestep.shape)}")
        if not bool(result.isfinite().all()):
            raise BitstepError(
                f"the output of {type(self._denoiser).__name__} at timestep {timestep.flatten()[0].item():g} is not "
                "finite (NaN or infinity): check its weights, or load it in float32"
            )
        arguments[name] = timestep.reshape(-1).expand(rows)
        leaves: dict[str, Tensor] = {}
        skeleton = _skeleton(arguments, "call", leaves)
        shapes = {n: tensor.shape for n, tensor in leaves.items()}
        if self._outputs and (skeleton, shapes) != (self._skeleton, self._shapes):
            raise BitstepError("the pipeline's denoiser calls differ in arguments or shapes, so no batch can mix them")
        self._skeleton, self._shapes = skeleton, shapes
        # what stays equal from call to call (embeddings, labels) is kept once; copies, since pipelines work in place
        previous = self._leaves[-1] if self._leaves else {}
        self._leaves.append({n: _keep(tensor, previous.get(n)) for n, tensor in leaves.items()})
        self._outputs.append(result.to("cpu", copy=True))
        self._grams.append(None)
        self._pending += 1

    def _watch(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            handed = args[0] if args else kwargs["model_output"]
            if self._pending == 1:  # guidance in two passes is two independent calls
                self._grams[-1] = _gram(self._outputs[-1], handed.detach().cpu(), self._images)
            self._pending = 0
            return step(*args, **kwargs)

        return watched

    def _find_batched(self) -> tuple[str, ...]:
        """Names of the tensors whose first dimension is the batch: those with which one row can be run by itself.

        Length alone does not tell (position ids of 16 tokens in a batch of 16).
        """
        leaves = self._leaves[0]
        device = next(self._denoiser.parameters()).device

        def computed(tensors: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                return run(self._denoiser, Call(_rebuild(self._skeleton, tensors)).to(device)).cpu()

        output = computed(leaves)  # once more: the recorded one may have been computed in another precision
        candidates = [n for n, tensor in leaves.items() if tensor.ndim and len(tensor) == len(output)]
        for dropped in range(len(candidates) if len(output) > 1 else 1):
            for batched in itertools.combinations(candidates, len(candidates) - dropped):
                try:
                    alone = computed({n: tensor[-1:] if n in batched else tensor for n, tensor in leaves.items()})
                except (RuntimeError, ValueError, IndexError):
                    continue  # the shapes do not fit together: this was not the batch dimension
                error = (alone - output[-1:]).float().norm() / output[-1:].float().norm().clamp(min=1e-12)
                if alone.shape == output[-1:].shape and error < torch.finfo(output.dtype).eps ** 0.5:
                    return batched
        raise BitstepError(f"no row of a batch of {type(self._denoiser).__name__} can be computed by itself")


class Pool:
    """Recorded calls, one sample per image and call; batches may mix images, shards and timesteps.

    timesteps: the distinct timesteps, float64, ascending
    unit: the timestep that counts as 1: the schedule's length, or 1 where timesteps are fractions
    step_of: per sample, the index of its timestep in ``timesteps``
    guidance: weights ``[k]`` of the k chunks of an output (conditional, unconditional, ...) in what the scheduler
        receives; None without guidance, or where the combination is not linear. A guided sample is k rows of a call.
    """

    def __init__(self, shards: Sequence[Shard], train_timesteps: int) -> None:
        if not shards:
            raise BitstepError("the pool of recorded calls is empty")
        self._shards = shards
        for shard in shards[1:]:
            _check_gatherable(shards[0], shard)
        self.guidance = fit_guidance(
            [gram for shard in shards for gram in shard.grams], torch.finfo(shards[0].tensors[OUTPUT].dtype).eps
        )
        self._chunks = 1 if self.guidance is None else len(self.guidance)
        # per sample: its shard, call and row; chunk j of the sample is j * stride rows further
        places, timesteps = [], []
        for i, shard in enumerate(shards):
            stamps = shard.timesteps[:, : shard.timesteps.shape[1] // self._chunks]
            timesteps.append(stamps.double().flatten())
            places.append(torch.cartesian_prod(torch.tensor([i]), *map(torch.arange, stamps.shape)))
        self._places = torch.cat(places)
        self._strides = torch.tensor([shard.tensors[OUTPUT].shape[1] // self._chunks for shard in shards])
        self.timesteps, self.step_of = torch.unique(torch.cat(timesteps), return_inverse=True)
        self.unit = float(train_timesteps) if self.timesteps[-1] > 1 else 1.0

    def __len__(self) -> int:
        return len(self._places)

    @classmethod
    def open(cls, folder: str | Path) -> Pool:
        """Memory-map the pool that :class:`PoolWriter` wrote to ``folder``."""
        folder = Path(folder)
        index = _read_index(folder)
        shards = [_open_shard(folder, index, i) for i in range(len(index["shards"]))]
        return cls(shards, index["train_timesteps"])

    def guided(self, rows: Tensor) -> Tensor:
        """``[chunks * n, ...]``, as calls hold them, -> ``[n, ...]``: the chunks as the pipeline combines them for its
        scheduler, or the rows as they are where there is no guidance."""
        if self.guidance is None:
            return rows
        return torch.einsum("k,kb...->b...", self.guidance.to(rows), rows.unflatten(0, (self._chunks, -1)))

    def indices_at(self, step: int) -> Tensor:
        """Samples whose timestep is ``timesteps[step]``."""
        return torch.nonzero(self.step_of == step).flatten()

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Call, Tensor]:
        """One call for n samples, and the outputs recorded for it, on the CPU.

        Guided samples take k rows each, chunk by chunk (``k * n`` rows: chunk 0 of all samples, then chunk 1).
        """
        where = self._places[torch.as_tensor(indices)]
        shard_of, call_of, image_of = where.unbind(1)
        row_of = image_of + torch.arange(self._chunks)[:, None] * self._strides[shard_of]
        parts = [(self._shards[i], torch.nonzero(shard_of == i).flatten()) for i in torch.unique(shard_of).tolist()]

        def gather(name: str) -> Tensor:
            rows: Tensor | None = None
            for shard, at in parts:
                tensor = shard.tensors[name]
                if name == OUTPUT or name in shard.varying:
                    found = tensor[call_of[at], row_of[:, at]]
                else:
                    found = tensor[row_of[:, at]]
                if rows is None:
                    rows = found.new_empty(self._chunks, len(where), *found.shape[2:])
                rows[:, at] = found
            assert rows is not None
            return rows.flatten(0, 1)

        first = self._shards[0]
        leaves = {
            name: gather(name) if name in first.batched else tensor
            for name, tensor in first.tensors.items()
            if name != OUTPUT
        }
        return Call(_rebuild(first.skeleton, leaves)), gather(OUTPUT)


class PoolWriter:
    """Writes shards to a folder one by one; what is listed in its index is complete, whatever happens meanwhile.

    ``plan`` says how the shards are made (JSON values). A folder that holds a pool with the same plan is continued,
    one with another plan refused.
    """

    def __init__(self, folder: str | Path, plan: Mapping[str, Any], train_timesteps: int) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        fresh = {"format_version": FORMAT_VERSION, "plan": dict(plan), "train_timesteps": train_timesteps, "shards": []}
        self._index: dict[str, Any] = _read_index(self._folder) if (self._folder / INDEX).exists() else fresh
        if self._index["plan"] != json.loads(json.dumps(dict(plan))):
            raise BitstepError(f"{folder} holds calls recorded with other settings: delete it or choose another folder")

    def __len__(self) -> int:
        """Complete shards."""
        return len(self._index["shards"])

    @property
    def batched(self) -> tuple[str, ...] | None:
        """Names of the arguments with a batch dimension, once a shard is there."""
        return tuple(self._index["batched"]) if len(self) else None

    def add(self, shard: Shard) -> None:
        """Append ``shard``. Raises BitstepError when it cannot be written, a full disk for one."""
        entry = {
            "varying": list(shard.varying),
            "grams": [None if gram is None else gram.tolist() for gram in shard.grams],
        }
        index = self._index | {
            "call": shard.skeleton,
            "batched": list(shard.batched),
            "shards": [*self._index["shards"], entry],
        }
        path = _shard_path(self._folder, len(self))
        tensors = {name: tensor.contiguous() for name, tensor in shard.tensors.items()}
        _write_atomically(path, lambda temporary: save_file(tensors, temporary))
        _write_atomically(self._folder / INDEX, lambda temporary: temporary.write_text(json.dumps(index)))
        self._index = index


def fit_guidance(grams: Sequence[Tensor | None], eps: float) -> Tensor | None:
    """Weights ``w`` with ``sum_j w_j chunk_j = y`` in every call, float32 ``[k]``, or None.

    Each gram holds the inner products of the k chunks and y (last), ``[k + 1, k + 1]``. One least-squares fit over
    all calls, since single ones are ill-conditioned where the chunks are nearly equal. None when a call has no gram,
    k differs, or a call's residual exceeds what rounding its terms to precision ``eps`` explains.
    """
    known = [gram for gram in grams if gram is not None]
    if len(known) < len(grams) or len({len(gram) for gram in known}) != 1:
        return None
    stacked = torch.stack(known)
    total = stacked.sum(0)
    weights = torch.linalg.lstsq(total[:-1, :-1], total[:-1, -1:], driver="gelsd").solution[:, 0]
    combined = torch.cat([weights, weights.new_tensor([-1.0])])
    residual = torch.einsum("i,cij,j->c", combined, stacked, combined)
    terms = stacked.diagonal(dim1=1, dim2=2) @ combined.square()
    return weights.float() if bool((residual <= (4 * eps) ** 2 * terms).all()) else None


@contextmanager
def wrapped(owner: Any, method: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace ``owner.method`` by ``wrap(owner.method)`` for a while; its signature stays visible."""
    original, own = getattr(owner, method), method in vars(owner)
    setattr(owner, method, functools.wraps(original)(wrap(original)))
    try:
        yield
    finally:
        if own:
            setattr(owner, method, original)
        else:
            delattr(owner, method)


def _timestep_name(arguments: Mapping[str, Any]) -> str:
    name = next((name for name in TIMESTEP_NAMES if name in arguments), None)
    if name is None:
        raise BitstepError(f"the denoiser is called without an argument named {' or '.join(TIMESTEP_NAMES)}")
    return name


def _keep(tensor: Tensor, previous: Tensor | None) -> Tensor:
    tensor = tensor.detach().cpu()
    if previous is not None and previous.dtype == tensor.dtype and torch.equal(previous, tensor):
        return previous
    return tensor.clone(memory_format=torch.contiguous_format)


def _gram(output: Tensor, handed: Tensor, images: int) -> Tensor | None:
    chunked = len(output) > images and len(output) % images == 0
    if not chunked or len(handed) < images or handed.shape[1] > output.shape[1]:
        return None
    # leading channels: a learned variance doubles the output's channels, and the scheduler gets the first half
    chunks = output[:, : handed.shape[1]].reshape(len(output) // images, -1)
    combined = handed[:images].flatten()
    if chunks.shape[1] != len(combined):
        return None
    vectors = torch.cat([chunks, combined[None]]).double()
    return vectors @ vectors.T


def _skeleton(value: Any, name: str, leaves: dict[str, Tensor]) -> Any:
    """``value`` as JSON, tensors replaced by their names and collected in ``leaves``."""
    if isinstance(value, Tensor):
        leaves[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": {key: _skeleton(item, f"{name}.{key}", leaves) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_skeleton(item, f"{name}.{i}", leaves) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise BitstepError(f"cannot record the denoiser's argument {name}: a {type(value).__name__} is no tensor or value")


def _rebuild(skeleton: Any, leaves: Mapping[str, Tensor]) -> Any:
    """Inverse of :func:`_skeleton`."""
    ((kind, content),) = skeleton.items()
    match kind:
        case "tensor":
            return leaves[content]
        case "dict":
            return {key: _rebuild(item, leaves) for key, item in content.items()}
        case "list":
            return [_rebuild(item, leaves) for item in content]
        case "tuple":
            return tuple(_rebuild(item, leaves) for item in content)
        case _:
            return content


def _check_gatherable(first: Shard, other: Shard) -> None:
    same = first.skeleton == other.skeleton and first.tensors.keys() == other.tensors.keys()
    for name, tensor in first.tensors.items() if same else ():
        if name != OUTPUT and name not in first.batched and not torch.equal(tensor, other.tensors[name]):
            same = False
    if not same:
        raise BitstepError("the recorded shards differ in the denoiser's arguments, so no batch can mix them")


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"calls-{number:05d}.safetensors"


def _open_shard(folder: Path, index: Mapping[str, Any], number: int) -> Shard:
    path, entry = _shard_path(folder, number), index["shards"][number]
    try:
        with safe_open(path, "pt") as file:  # tensors stay mapped after the file is closed
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BitstepError(f"cannot read {path} ({error}): delete {folder} and calibrate again") from error
    grams = tuple(None if g is None else torch.tensor(g, dtype=torch.float64) for g in entry["grams"])
    return Shard(tensors, index["call"], tuple(index["batched"]), tuple(entry["varying"]), grams)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BitstepError(f"{folder} holds no pool of recorded calls: cannot read {path.name} ({error})") from error
    if not isinstance(index, dict) or index.get("format_version") != FORMAT_VERSION:
        raise BitstepError(f"{path} is not a pool of format version {FORMAT_VERSION}: calibrate again")
    return index


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise BitstepError(f"cannot write {path}: {error}") from error
