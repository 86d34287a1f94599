"""Recorded calls, kept on disk, gathered into batches that mix timesteps.

Shards (:mod:`bitstep.trajectories.recording`), in memory or memory-mapped from a folder, make a :class:`Pool`. Not all
need have one form: pipelines that pad texts to the longest of a batch, or run guidance as a call by itself, call their
denoiser with tensors of several shapes. A batch holds samples of one form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitstep.denoiser.calls import Call, put_together
from bitstep.errors import BitstepError
from bitstep.files import replacing
from bitstep.randomness import draw
from bitstep.trajectories.recording import OUTPUT, Shard, fit_guidance

INDEX = "pool.json"
FORMAT_VERSION = 5


class Pool:
    """Recorded calls, one sample per image and call; batches may mix images, shards and timesteps, but not forms.

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
        self.guidance = fit_guidance(
            [gram for shard in shards for gram in shard.grams], torch.finfo(shards[0].tensors[OUTPUT].dtype).eps
        )
        self._chunks = 1 if self.guidance is None else len(self.guidance)
        self._handed = shards[0].handed
        # per sample: its shard, call and row; chunk j of the sample is j * stride rows further
        places, timesteps, images, forms = [], [], [], []
        firsts: list[Shard] = []  # one of each form
        for i, shard in enumerate(shards):
            stamps = shard.timesteps[:, : shard.timesteps.shape[1] // self._chunks]
            timesteps.append(stamps.double().flatten())
            places.append(torch.cartesian_prod(torch.tensor([i]), *map(torch.arange, stamps.shape)))
            images.append(torch.tensor(shard.images[: stamps.shape[1]]).repeat(len(stamps)))
            forms.append(torch.tensor(_form(shard, firsts)).expand(stamps.numel()))
        self._places, self._image_of, self._form_of = map(torch.cat, (places, images, forms))
        self._alike = [torch.nonzero(self._form_of == form).flatten() for form in range(len(firsts))]
        self._strides = torch.tensor([shard.tensors[OUTPUT].shape[1] // self._chunks for shard in shards])
        self.timesteps, self.step_of = torch.unique(torch.cat(timesteps), return_inverse=True)
        # (EDM's timesteps are logarithms of noise levels, from below 0 to above 1)
        whole = not shards[0].timesteps.is_floating_point()
        counted = whole or (self.timesteps[0] >= 0 and self.timesteps[-1] > 1)
        self.unit = float(train_timesteps) if counted else 1.0

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
        """A call's outputs ``[chunks * n, c, ...]`` as the pipeline hands them to its scheduler, ``[n, c', ...]``:
        guided, where there is guidance, and without a learned variance."""
        rows = rows[:, : self._handed]
        if self.guidance is None:
            return rows
        return torch.einsum("k,kb...->b...", self.guidance.to(rows), rows.unflatten(0, (self._chunks, -1)))

    def indices_at(self, step: int, images: int | None = None) -> Tensor:
        """Samples whose timestep is ``timesteps[step]``; of the first ``images`` images where that is given, and one of
        these has it (schedules may follow the size of a picture)."""
        found = torch.nonzero(self.step_of == step).flatten()
        chosen = found if images is None else found[self._image_of[found] < images]
        return chosen if len(chosen) else found

    @property
    def commonest(self) -> Tensor:
        """The samples of the form that most have: all of them, but for pipelines that call in several."""
        return max(self._alike, key=len)

    def draw(self, count: int, seed: int, purpose: str, iteration: int) -> Tensor:
        """Batch number ``iteration`` of ``count`` samples of one form, all samples equally often in the long run
        (:func:`bitstep.randomness.draw`; where there is only one form, once in every pass)."""
        first = draw(len(self), 1, seed, f"{purpose}.form", iteration)
        alike = self._alike[self._form_of[first]]
        return alike[draw(len(alike), count, seed, purpose, iteration)]

    def split(self, indices: Tensor, size: int) -> list[Tensor]:
        """``indices`` in batches of at most ``size``, each of one form."""
        forms = self._form_of[indices]
        return [batch for form in range(len(self._alike)) for batch in indices[forms == form].split(size) if len(batch)]

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Call, Tensor]:
        """One call for n samples of one form, and the outputs recorded for it, on the CPU.

        Guided samples take k rows each, chunk by chunk (``k * n`` rows: chunk 0 of all samples, then chunk 1).
        """
        indices = torch.as_tensor(indices)
        if len(self._form_of[indices].unique()) != 1:
            raise ValueError("a batch holds samples of one form: see Pool.split")
        where = self._places[indices]
        shard_of, call_of, image_of = where.unbind(1)
        row_of = image_of + torch.arange(self._chunks)[:, None] * self._strides[shard_of]
        parts = [(self._shards[i], torch.nonzero(shard_of == i).flatten()) for i in torch.unique(shard_of).tolist()]

        def gather(name: str) -> Tensor:
            rows: Tensor | None = None
            for shard, at in parts:
                tensor, share = shard.tensors[name], shard.batched.get(name, 1)
                if name == OUTPUT or name in shard.varying:
                    found = tensor.unflatten(1, (-1, share))[call_of[at], row_of[:, at]]
                else:
                    found = tensor.unflatten(0, (-1, share))[row_of[:, at]]
                if rows is None:
                    rows = found.new_empty(self._chunks, len(where), *found.shape[2:])
                rows[:, at] = found
            assert rows is not None
            return rows.flatten(0, 2)

        first, _ = parts[0]
        leaves = {
            name: gather(name) if name in first.batched else tensor
            for name, tensor in first.tensors.items()
            if name != OUTPUT
        }
        return Call(put_together(first.skeleton, leaves)), gather(OUTPUT)


class PoolWriter:
    """Writes shards to a folder one by one; what is listed in its index is complete, whatever happens meanwhile.

    ``plan`` says how the shards are made (JSON values). A folder that holds a pool with the same plan is continued,
    one with another plan refused.
    """

    def __init__(self, folder: str | Path, plan: Mapping[str, Any], train_timesteps: int) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._index: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "plan": dict(plan),
            "train_timesteps": train_timesteps,
            "batches": 0,
            "shards": [],
        }
        if (self._folder / INDEX).exists():
            self._index = _read_index(self._folder)
        if self._index["plan"] != json.loads(json.dumps(dict(plan))):
            raise BitstepError(f"{folder} holds calls recorded with other settings: delete it or choose another folder")

    def __len__(self) -> int:
        """Complete batches of the pipeline."""
        return int(self._index["batches"])

    @property
    def examples(self) -> list[Shard]:
        """The first shard with each skeleton."""
        skeletons = [entry["skeleton"] for entry in self._index["shards"]]
        firsts = [number for number, skeleton in enumerate(skeletons) if skeletons.index(skeleton) == number]
        return [_open_shard(self._folder, self._index, number) for number in firsts]

    def add(self, shards: Sequence[Shard]) -> None:
        """Append the shards of a pipeline batch. Raises BitstepError when they cannot be written (a full disk)."""
        start = len(self._index["shards"])
        index = self._index | {
            "batches": len(self) + 1,
            "shards": self._index["shards"] + [shard.described() for shard in shards],
        }
        path = self._folder
        try:
            for number, shard in enumerate(shards, start):
                path = _shard_path(self._folder, number)
                with replacing(path) as temporary:
                    save_file({name: tensor.contiguous() for name, tensor in shard.tensors.items()}, temporary)
            path = self._folder / INDEX
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(index))
        except (OSError, SafetensorError) as error:
            raise BitstepError(f"cannot write {path}: {error}") from error
        self._index = index


def _form(shard: Shard, firsts: list[Shard]) -> int:
    """The number of its form, ``firsts`` being one of each; a new one is added to them."""
    number = next((i for i, first in enumerate(firsts) if _go_together(first, shard)), len(firsts))
    if number == len(firsts):
        firsts.append(shard)
    return number


def _go_together(one: Shard, other: Shard) -> bool:
    """Whether a batch can mix the calls of both."""
    if (one.skeleton, one.batched) != (other.skeleton, other.batched):
        return False
    if any(_shape_of_a_row(one, name) != _shape_of_a_row(other, name) for name in one.tensors):
        return False
    shared = (name for name in one.tensors if name != OUTPUT and name not in one.batched)
    return all(torch.equal(one.tensors[name], other.tensors[name]) for name in shared)


def _shape_of_a_row(shard: Shard, name: str) -> list[int]:
    shape = list(shard.tensors[name].shape)
    if name == OUTPUT or name in shard.varying:
        return shape[2:]
    return shape[1:] if name in shard.batched else shape


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"calls-{number:05d}.safetensors"


def _open_shard(folder: Path, index: Mapping[str, Any], number: int) -> Shard:
    path, entry = _shard_path(folder, number), index["shards"][number]
    try:
        with safe_open(path, "pt") as file:  # tensors stay mapped after the file is closed
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BitstepError(f"cannot read {path} ({error}): delete {folder} and calibrate again") from error
    return Shard.of(tensors, entry)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BitstepError(f"{folder} holds no pool of recorded calls: cannot read {path.name} ({error})") from error
    if not isinstance(index, dict) or index.get("format_version") != FORMAT_VERSION:
        raise BitstepError(f"{path} is not a pool of format version {FORMAT_VERSION}: calibrate again")
    return index
