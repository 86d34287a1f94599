"""A function of tensors on the CPU, recorded as a flat list of calls into memory that never moves, and run again.

What CUDA graphs are to a GPU a tape is to the CPU: no module, no allocation and no decision of Python's is left
between two calls. Every operator that torch dispatches while the function runs, and every call into the native
library, becomes an entry, unless it depends on no argument (then its result is kept), gives a view (memory that does
not move needs none) or gives what nobody reads. Tensors that never live at the same time share memory.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from bitstep.runtime import native

_ALIGNMENT = 64
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_FILLS = {
    torch.ops.aten.full.default,
    torch.ops.aten.new_full.default,
    torch.ops.aten.new_ones.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.ones.default,
    torch.ops.aten.zeros.default,
}
_COPIES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
_TRANSFERS = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}  # from one device to another
_ESCAPES = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}  # what no dispatcher sees


@dataclass(frozen=True)
class View:
    """A recorded tensor: where it lies in which buffer, in elements."""

    buffer: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Entry:
    """``bind(*args)`` is a call that runs the entry, once tensors have taken the place of the views in ``args``.

    ``in_parts``: args[1] may be a tuple of the two tensors whose last dimensions are joined in it.
    """

    bind: Callable[..., native.Call]
    args: tuple[Any, ...]
    writes: frozenset[int]
    in_parts: bool = False

    @cached_property
    def reads(self) -> frozenset[int]:
        return frozenset(leaf.buffer for leaf in tree_leaves(self.args) if isinstance(leaf, View))


def record(function: Callable[..., Any], *args: Any) -> tuple[Any, Tape | None, str | None]:
    """``function(*args)``, and the tape that computes it for other values in ``args``, or why there is none.

    Everything but the values of tensors in ``args`` is taken to be the same whenever the tape runs.
    """
    result, recorder = listen(function, *args)
    if recorder.refusal:
        return result, None, recorder.refusal
    with torch.inference_mode(False), torch.no_grad():
        return result, Tape(recorder, result), None


def listen(function: Callable[..., Any], *args: Any) -> tuple[Any, Recorder]:
    """``function(*args)``, and what was seen of it."""
    leaves, spec = tree_flatten(args)
    with torch.inference_mode(False), torch.no_grad():
        copies = [copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        recorder = Recorder(tensors_of(copies))
        with recorder, _Escapes(recorder), native.listening(recorder.launched):
            result = function(*tree_unflatten(copies, spec))
    for given, taken in zip(tensors_of(leaves), tensors_of(copies), strict=True):
        if taken._version > 1:  # the function works in place
            distinct(given).copy_(distinct(taken))
    return result, recorder


class Recorder(TorchDispatchMode):
    """Collects entries; ``refusal`` says why what was seen cannot be replayed."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: list[Entry] = []
        self.nbytes: list[int] = []  # of every buffer
        self.constants: dict[int, Tensor] = {}  # what was read of memory that is not the function's own
        self.refusal: str | None = None
        self._buffers: dict[int, int] = {}  # by the address of the storage object,
        self._held: list[StorageWeakRef] = []  # which stays its own for as long as there is a reference
        self._filled: dict[int, tuple[Any, ...]] = {}  # constants that may be written to, and how they are made
        for tensor in inputs:
            self._add(tensor)
        self.inputs = [self.view(tensor) for tensor in inputs]

    def __torch_dispatch__(
        self, op: OpOverload[Any, Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors_of((args, kwargs))
        values = {a.name: a.default_value for a in op._schema.arguments}
        values |= dict(zip(values, args, strict=False)) | kwargs
        written = tensors_of(
            [values.get(a.name) for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        )
        for tensor in written:
            self._make_own(tensor)
        self.refusal = self.refusal or _opaque(given) or self._why_not(op, values, written)
        result = op(*args, **kwargs)
        self.refusal = self.refusal or _opaque(tensors_of(result)) or self._why_not_alone(op, given, tensors_of(result))
        if self.refusal:
            return result
        if op in _ALLOCATIONS:
            self._add(result)
        elif any(map(self.knows, given)):
            known = {_address(tensor) for tensor in given}
            fresh = [tensor for tensor in tensors_of(result) if _address(tensor) not in known]
            for tensor in fresh:
                self._add(tensor)
            if fresh or written:
                self._append(_bind, (op, args, kwargs, result), [*fresh, *written])
            if _gives_values(op):
                self.refusal = f"{op} depends on values"
        elif op in _FILLS:
            self._filled[_address(result)] = (op, args, kwargs, result)
        self._note(given)
        return result

    def launched(self, bind: Callable[..., native.Call], y: Tensor, *args: Any, in_parts: bool) -> None:
        """Hear of a call into the native library."""
        if not self.refusal:
            self._append(bind, (y, *args), [y], in_parts)
            self._note(tensors_of(args))

    def knows(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` depends on the inputs."""
        return _address(tensor) in self._buffers

    def view(self, tensor: Tensor) -> Any:
        """The view of a tensor that depends on the inputs; a constant is left as it is."""
        if not self.knows(tensor):
            return tensor
        buffer = self._buffers[_address(tensor)]
        return View(buffer, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._buffers[storage._cdata] = len(self.nbytes)
        self._held.append(StorageWeakRef(storage))
        self.nbytes.append(storage.nbytes())

    def _make_own(self, tensor: Tensor) -> None:
        """A constant that is written to is made anew in every replay."""
        made = self._filled.pop(_address(tensor), None)
        if made is not None:
            self._add(made[-1])
            self._append(_bind, made, [made[-1]])

    def _append(
        self,
        bind: Callable[..., native.Call],
        args: tuple[Any, ...],
        written: Iterable[Tensor],
        in_parts: bool = False,
    ) -> None:
        writes = frozenset(self._buffers[_address(tensor)] for tensor in written)
        self.entries.append(Entry(bind, tree_map_only(Tensor, self.view, args), writes, in_parts))

    def _note(self, given: Iterable[Tensor]) -> None:
        self.constants |= {id(tensor): tensor for tensor in given if not self.knows(tensor)}
        if any(tensor.is_inference() for tensor in self.constants.values()):
            self.refusal = "changes of inference tensors go unnoticed"

    def _why_not(self, op: OpOverload[Any, Any], values: dict[str, Any], written: list[Tensor]) -> str | None:
        tags = op.tags
        if torch.Tag.nondeterministic_seeded in tags and values.get("dropout_p") != 0:
            return f"{op} is random"
        own = {self._buffers.get(_address(tensor), -1) for tensor in written}
        if any(buffer < len(self.inputs) for buffer in own):
            return f"{op} changes memory that is not the function's own"
        by_value = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
        if op is torch.ops.aten.index.Tensor:  # by numbers its shape is known
            by_value = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors_of(values["indices"]))
        if by_value and any(self.knows(tensor) or tensor.is_cuda for tensor in tensors_of(values)):
            return f"{op} depends on values"
        return None

    def _why_not_alone(self, op: OpOverload[Any, Any], given: list[Tensor], results: list[Tensor]) -> str | None:
        """Why a GPU cannot run ``op`` without the CPU: only inputs may come from there (once, before a replay), and
        single numbers, which are handed over with the call."""
        if not any(tensor.is_cuda for tensor in (*given, *results)):
            return None
        elsewhere = [t for t in (*given, *results) if not t.is_cuda and not self.knows(t)]
        if op is torch.ops.aten.lift_fresh.default or any(t.ndim or op in _TRANSFERS for t in elsewhere):
            return f"{op} goes between the CPU and a GPU"
        return None


class _Escapes(TorchFunctionMode):
    """Refuses to let values out to Python past the dispatcher."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _ESCAPES and self._recorder.knows(args[0]):
            self._recorder.refusal = f"{function.__name__} depends on values"
        return function(*args, **(kwargs or {}))


class Tape:
    """Recorded ``entries`` in memory of their own; ``nbytes`` of it."""

    def __init__(self, recorder: Recorder, result: Any) -> None:
        leaves, self._spec = tree_flatten(tree_map_only(Tensor, recorder.view, result))
        outputs = {leaf.buffer for leaf in leaves if isinstance(leaf, View)}
        self.entries = _needed(_without_concatenations(recorder.entries), outputs)  # alive: the calls point to them
        offsets, self.nbytes = plan(_lives(recorder.inputs, self.entries, outputs), recorder.nbytes)
        memory = torch.empty(self.nbytes, dtype=torch.uint8)

        def place(view: View) -> Tensor:
            elements = memory.view(view.dtype)
            start = offsets[view.buffer] // elements.itemsize
            return elements.as_strided(view.size, view.stride, start + view.offset)

        self._inputs = [distinct(place(view)) for view in recorder.inputs]
        self._calls = [entry.bind(*tree_map_only(View, place, entry.args)) for entry in self.entries]
        self._outputs = [place(leaf) if isinstance(leaf, View) else leaf for leaf in leaves]
        self._constants = list(recorder.constants.values())
        self._versions = list(map(_version, self._constants))

    def is_stale(self) -> bool:
        """Whether a constant was changed in place."""
        return list(map(_version, self._constants)) != self._versions

    def run(self, *args: Any) -> Any:
        """What the recorded function gives for ``args``, in new tensors."""
        for static, given in zip(self._inputs, tensors_of(args), strict=True):
            static.copy_(distinct(given))
        for call in self._calls:
            call()
        return tree_unflatten([copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self._outputs], self._spec)


def plan(lives: Mapping[int, tuple[int, int]], nbytes: Sequence[int]) -> tuple[dict[int, int], int]:
    """Offsets of buffers that share memory where they are not alive together, and the bytes that all need.

    lives: for each buffer the first and the last moment at which it is used
    nbytes: the size of each buffer

    Greedy: the biggest buffer first, each at the lowest offset that is free throughout its life.
    """
    placed: list[tuple[int, int, int]] = []  # start, stop, buffer
    for buffer in sorted(lives, key=lambda buffer: -nbytes[buffer]):
        first, last = lives[buffer]
        size = -(-nbytes[buffer] // _ALIGNMENT) * _ALIGNMENT
        at = 0
        for start, stop, other in placed:
            if start < at + size and lives[other][0] <= last and first <= lives[other][1]:
                at = max(at, stop)
        insort(placed, (at, at + size, buffer))
    return {buffer: start for start, _, buffer in placed}, max((stop for _, stop, _ in placed), default=0)


def copy(x: Tensor, device: torch.device | None = None) -> Tensor:
    """``x`` in memory of its own, with the same strides."""
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device or x.device)
    distinct(y).copy_(distinct(x))
    return y


def _needed(entries: Sequence[Entry], outputs: Iterable[int]) -> list[Entry]:
    """The entries that ``outputs`` depend on."""
    wanted, needed = set(outputs), []
    for entry in reversed(entries):
        if entry.writes & wanted:
            wanted |= entry.reads
            needed.append(entry)
    return needed[::-1]


def _without_concatenations(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, those that can reading the two parts of a concatenation of channels instead of the whole."""
    writers = Counter(buffer for entry in entries for buffer in entry.writes)
    parts: dict[View, tuple[View, View]] = {}
    kept = []
    for entry in entries:
        if entry.bind is _bind and entry.args[0] is torch.ops.aten.cat.default and entry.args[1][1:] == (1,):
            maps = list(map(_channels_last, (entry.args[3], *entry.args[1][0])))
            lasting = [view for view in maps if view is not None and writers[view.buffer] <= 1]
            if len(maps) == len(lasting) == 3:
                parts[lasting[0]] = lasting[1], lasting[2]
        if entry.in_parts and entry.args[1] in parts:
            entry = replace(entry, args=(entry.args[0], parts[entry.args[1]], *entry.args[2:]))
        kept.append(entry)
    return kept


def _channels_last(x: Any) -> View | None:
    """The view ``[batch, height, width, channels]`` of a map ``[batch, channels, height, width]`` that lies so."""
    if not isinstance(x, View) or len(x.size) != 4:
        return None
    size, stride = (tuple(values[i] for i in (0, 2, 3, 1)) for values in (x.size, x.stride))
    dense = (prod(size[1:]), prod(size[2:]), size[3], 1)
    lies_so = all(s == d or count == 1 for s, d, count in zip(stride, dense, size, strict=True))
    return replace(x, size=torch.Size(size), stride=dense) if lies_so else None


def _lives(inputs: Iterable[View], entries: Sequence[Entry], outputs: Iterable[int]) -> dict[int, tuple[int, int]]:
    """The first and the last entry that uses each buffer; inputs are written before the first entry."""
    lives = {view.buffer: (-1, -1) for view in inputs}
    for at, entry in enumerate(entries):
        for buffer in entry.reads | entry.writes:
            lives[buffer] = (lives.get(buffer, (at, at))[0], at)
    return lives | {buffer: (lives[buffer][0], len(entries)) for buffer in outputs}


def _bind(op: OpOverload[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> native.Call:
    """The call of ``op`` that leaves its results in the tensors of ``result``."""
    if op._schema.is_mutable:
        return partial(op, *args, **kwargs)
    if op in _COPIES:
        return partial(result.copy_, args[0])
    results = tensors_of(result)
    out, names = _out_variant(op)
    if out is not None:
        return partial(out, *args, **kwargs, **dict(zip(names, results, strict=True)))

    def call() -> None:
        for static, value in zip(results, tensors_of(op(*args, **kwargs)), strict=True):
            static.copy_(value)

    return call


@cache
def _out_variant(op: OpOverload[Any, Any]) -> tuple[OpOverload[Any, Any] | None, list[str]]:
    """The overload of ``op`` that takes tensors for its results, and the names of those arguments."""
    taken = [(a.name, str(a.type)) for a in op._schema.arguments]
    for name in op.overloadpacket.overloads():
        other = getattr(op.overloadpacket, name)
        results = [a.name for a in other._schema.arguments if a.is_out]
        if len(results) == len(op._schema.returns) and taken == [
            (a.name, str(a.type)) for a in other._schema.arguments if not a.is_out
        ]:
            return other, results
    return None, []


def distinct(x: Tensor) -> Tensor:
    """The part of an expanded tensor that has memory of its own."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())] if 0 in x.stride() else x


@cache
def _gives_values(op: OpOverload[Any, Any]) -> bool:
    """Whether ``op`` returns numbers (but for those that shapes alone decide)."""
    return any(r.real_type.kind() in ("BoolType", "FloatType", "IntType", "NumberType") for r in op._schema.returns)


_version = attrgetter("_version")


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _opaque(tensors: Iterable[Tensor]) -> str | None:
    """Why tensors cannot be placed: oneDNN's packed weights, for one, have no memory that torch knows."""
    return next((f"a tensor is {t.layout}" for t in tensors if t.layout is not torch.strided), None)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
