"""Denoiser calls, recorded while the real pipeline runs.

A :class:`Recorder` hooks a denoiser and its scheduler, so no pipeline needs an adapter. What it saw of one pipeline
batch is a :class:`Shard`, or several where the calls are not all of one form.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitstep.denoiser.calls import (
    Call,
    Samples,
    by_name,
    first_tensor,
    has_one_a_sample,
    put_together,
    run,
    take_apart,
    unwrapped,
    wrapped,
)
from bitstep.denoiser.steps import of_samples, timestep_name
from bitstep.errors import BitstepError

OUTPUT = "output"  # a shard's tensor of outputs; the others are "call.NAME", so that no argument can collide
SAME_ROW = 0.5
"""Relative error below which a row of a packed model, computed by itself, may still be the same row."""


@dataclass(frozen=True)
class Shard:
    """The calls of one pipeline batch that have one form, ``rows`` rows each (images times the chunks of guidance).

    tensors: ``output`` ``[calls, rows, ...]`` and one tensor per tensor argument: ``[calls, rows * share, ...]`` where
        its name is in ``varying``, else ``[rows * share, ...]`` where it is in ``batched``, else as it was passed
    skeleton: the call with names in the place of tensors, JSON
    batched: the arguments with a batch dimension, and how many entries of it, its share, belong to one row: 1, or the
        frames of a video whose text is repeated for each
    images: the number of the image that each row is part of
    grams: per call, the inner products of the output's chunks and what the scheduler was given, float64
        ``[chunks + 1, chunks + 1]`` (see :func:`fit_guidance`); None where there was no guidance to be read off
    handed: how many channels of the output, the first ones, the scheduler was given: half of them where it does
        without the variance that the denoiser learned, all of them where that was not to be seen
    """

    tensors: Mapping[str, Tensor]
    skeleton: Any
    batched: Mapping[str, int]
    varying: tuple[str, ...]
    images: tuple[int, ...]
    grams: tuple[Tensor | None, ...]
    handed: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Self:
        """The shard that :meth:`described` itself so."""
        grams = (None if g is None else torch.tensor(g, dtype=torch.float64) for g in description["grams"])
        images, varying = tuple(description["images"]), tuple(description["varying"])
        return cls(tensors, **{**description, "grams": tuple(grams), "images": images, "varying": varying})

    def described(self) -> dict[str, Any]:
        """All but the tensors, JSON."""
        description = {name: value for name, value in vars(self).items() if name != "tensors"}
        return description | {"grams": [None if gram is None else gram.tolist() for gram in self.grams]}

    @property
    def timesteps(self) -> Tensor:
        """``[calls, rows]``"""
        name = f"call.{timestep_name(self.skeleton['dict'])}"
        calls = self.tensors[name] if name in self.varying else [self.tensors[name]] * len(self.tensors[OUTPUT])
        return torch.stack(list(map(of_samples, calls)))


@dataclass
class _Form:
    """Calls that differ in nothing but what their tensors hold: those with a text of another length are of another."""

    skeleton: Any
    shapes: dict[str, torch.Size]
    images: tuple[int, ...]
    leaves: list[dict[str, Tensor]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    grams: list[Tensor | None] = field(default_factory=list)


class Recorder:
    """Records every call of ``denoiser`` while a pipeline makes the ``images`` of these numbers under this context
    manager.

    It also watches ``scheduler.step``: where one call's output, in chunks of as many rows, was combined into what
    the scheduler received, the weights of that combination are the pipeline's classifier-free guidance.

    Raises BitstepError on an output that is not finite, and on arguments that cannot be recorded.
    """

    def __init__(self, denoiser: nn.Module, scheduler: Any, images: Sequence[int]) -> None:
        self._denoiser = denoiser
        self._scheduler = scheduler
        self._images = images
        self._forms: list[_Form] = []
        self._latest: _Form
        self._handed: int | None = None
        self._pending = 0  # calls since the scheduler's last step
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        handle = self._denoiser.register_forward_hook(self._called, with_kwargs=True)
        self._exit.callback(handle.remove)
        self._exit.enter_context(wrapped(self._scheduler, "step", self._watch))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def shards(self, earlier: Iterable[Shard] = ()) -> list[Shard]:
        """What was recorded, form by form. What has a batch dimension is taken from ``earlier`` shards with the same
        arguments."""
        if not self._forms:
            raise BitstepError(f"the pipeline never called its {type(self._denoiser).__name__}")
        known = list(earlier)
        for form in self._forms:
            batched = next((shard.batched for shard in known if shard.skeleton == form.skeleton), None)
            known.append(self._shard(form, self._find_batched(form) if batched is None else batched))
        return known[-len(self._forms) :]

    def _shard(self, form: _Form, batched: Mapping[str, int]) -> Shard:
        tensors = {OUTPUT: torch.stack(form.outputs)}
        varying = []
        for name, first in form.leaves[0].items():
            if all(leaves[name] is first for leaves in form.leaves):
                tensors[name] = first
            elif name in batched:
                tensors[name] = torch.stack([leaves[name] for leaves in form.leaves])
                varying.append(name)
            else:
                raise BitstepError(f"the argument {name} has no batch dimension but changes between denoiser calls")
        handed = self._handed or form.outputs[0].shape[1]
        return Shard(tensors, form.skeleton, batched, tuple(varying), form.images, tuple(form.grams), handed)

    def _called(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        result = first_tensor(output).detach()
        rows = len(result)
        arguments = by_name(denoiser.forward, args, kwargs)
        name = timestep_name(arguments)
        timestep = torch.atleast_1d(torch.as_tensor(arguments[name]))
        if len(timestep) not in (1, rows):
            raise BitstepError(f"expected one timestep per sample of the batch of {rows}, got {list(timestep.shape)}")
        if not bool(result.isfinite().all()):
            raise BitstepError(
                f"the output of {type(self._denoiser).__name__} at timestep {timestep.flatten()[0].item():g} is not "
                "finite (NaN or infinity): check its weights, or load it in float32"
            )
        arguments[name] = timestep.expand(rows, *timestep.shape[1:])
        images = [self._images[row % len(self._images)] for row in range(rows)]
        if isinstance(unwrapped(output), list):
            for part, samples in _of_one_shape(arguments, rows):
                self._add(part, result[samples], tuple(images[row] for row in samples))
        else:
            self._add(arguments, result, tuple(images))
        self._pending += 1

    def _add(self, arguments: Mapping[str, Any], result: Tensor, images: tuple[int, ...]) -> None:
        leaves: dict[str, Tensor] = {}
        skeleton = take_apart(arguments, "call", leaves)
        shapes = {n: tensor.shape for n, tensor in leaves.items()} | {OUTPUT: result.shape}
        form = next((f for f in self._forms if (f.skeleton, f.shapes, f.images) == (skeleton, shapes, images)), None)
        if form is None:
            form = _Form(skeleton, shapes, images)
            self._forms.append(form)
        # what stays equal from call to call (embeddings, labels) is kept once; copies, since pipelines work in place
        previous = form.leaves[-1] if form.leaves else {}
        form.leaves.append({n: _keep(tensor, previous.get(n)) for n, tensor in leaves.items()})
        form.outputs.append(result.to("cpu", copy=True))
        form.grams.append(None)
        self._latest = form

    def _watch(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            handed = args[0] if args else kwargs["model_output"]
            if self._pending == 1:  # guidance in two passes is two independent calls
                form = self._latest
                form.grams[-1] = _gram(form.outputs[-1], handed.detach().cpu(), len(self._images))
            if self._pending:  # a step may follow another denoiser's call
                output = self._latest.outputs[-1]
                same = handed.shape[2:] == output.shape[2:]
                self._handed = min(handed.shape[1], output.shape[1]) if same else None
            self._pending = 0
            return step(*args, **kwargs)

        return watched

    def _find_batched(self, form: _Form) -> dict[str, int]:
        """The tensors whose first dimension is the batch, and their shares: those with which one row can be run by
        itself, or twice where it is the only one.

        Length alone does not tell (position ids of 16 tokens in a batch of 16). In a packed model sums in another order
        may change a code, and all that follows from it; there the best of all choices is taken.
        """
        leaves = form.leaves[0]
        device = next(itertools.chain(self._denoiser.parameters(), self._denoiser.buffers())).device

        def computed(tensors: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                return run(self._denoiser, Call(put_together(form.skeleton, tensors)).to(device)).cpu()

        output = computed(leaves)  # once more: the recorded one may have been computed in another precision
        other = 2 if len(output) == 1 else 1  # number of rows

        def last(tensor: Tensor, share: int) -> Tensor:
            return torch.cat([tensor[-share:]] * other)

        expected = last(output, 1)
        shares = {
            name: len(tensor) // len(output)
            for name, tensor in leaves.items()
            if tensor.ndim and len(tensor) and len(tensor) % len(output) == 0
        }
        # dropped first, from the end, is what is longer than the batch
        candidates = sorted(shares, key=lambda name: shares[name] > 1)
        found: list[tuple[float, dict[str, int]]] = []
        for kept in range(len(candidates), 0, -1):
            for names in itertools.combinations(candidates, kept):
                batched = {name: shares[name] for name in names}
                try:
                    alone = computed({n: last(t, batched[n]) if n in batched else t for n, t in leaves.items()})
                except (BitstepError, RuntimeError, ValueError, IndexError):
                    continue  # the shapes do not fit together: this was not the batch dimension
                if alone.shape != expected.shape:
                    continue
                error = float((alone - expected).float().norm() / expected.float().norm().clamp(min=1e-12))
                if error < torch.finfo(output.dtype).eps ** 0.5:
                    return batched
                found.append((error, batched))
        packed = getattr(self._denoiser, "hf_quantizer", None) is not None
        if packed and found:
            error, batched = min(found, key=lambda candidate: candidate[0])
            if error < SAME_ROW:
                return batched
        shapes = ", ".join(f"{name.removeprefix('call.')} {list(tensor.shape)}" for name, tensor in leaves.items())
        raise BitstepError(
            f"no row of a batch of {type(self._denoiser).__name__} can be computed by itself: expected arguments whose "
            f"first dimension is the batch, or that all rows share; got {shapes}"
        )


def _of_one_shape(arguments: Mapping[str, Any], rows: int) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """A call with lists of one tensor a sample as calls of samples whose tensors have the same shapes (the texts of
    others are longer), each with the samples' numbers."""
    lists = {name: value for name, value in arguments.items() if has_one_a_sample(value) and len(value) == rows}
    alike: dict[tuple[torch.Size, ...], list[int]] = {}
    for row in range(rows):
        alike.setdefault(tuple(tensors[row].shape for tensors in lists.values()), []).append(row)
    time = timestep_name(arguments)
    for samples in alike.values():
        parts = {name: Samples(tensors[row] for row in samples) for name, tensors in lists.items()}
        yield {**arguments, **parts, time: arguments[time][samples]}, samples


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
