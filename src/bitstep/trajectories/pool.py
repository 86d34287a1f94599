"""Recorded calls, kept on disk, gathered into batches that mix timesteps.

Shards (:mod:`bitstep.trajectories.recording`), in memory or memory-mapped from a folder, make a :class:`Pool`.
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
from bitstep.trajectories.recording import OUTPUT, Shard, fit_guidance

INDEX = "pool.json"
FORMAT_VERSION = 3


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
        self._handed = shards[0].handed
        # per sample: its shard, call and row; chunk j of the sample is j * stride rows further
        places, timesteps = [], []
        for i, shard in enumerate(shards):
            stamps = shard.timesteps[:, : shard.timesteps.shape[1] // self._chunks]
            timesteps.append(stamps.double().flatten())
            places.append(torch.cartesian_prod(torch.tensor([i]), *map(torch.arange, stamps.shape)))
        self._places = torch.cat(places)
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
        """``[chunks * n, c, ...]``, as calls hold them, -> ``[n, c', ...]``, what the pipeline hands to its scheduler:
        the chunks as it combines them, or the rows where there is no guidance, of the channels that it hands on."""
        rows = rows[:, : self._handed]
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

        first = self._shards[0]
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
        fresh = {"format_version": FORMAT_VERSION, "plan": dict(plan), "train_timesteps": train_timesteps, "shards": []}
        self._index: dict[str, Any] = _read_index(self._folder) if (self._folder / INDEX).exists() else fresh
        if self._index["plan"] != json.loads(json.dumps(dict(plan))):
            raise BitstepError(f"{folder} holds calls recorded with other settings: delete it or choose another folder")

    def __len__(self) -> int:
        """Complete shards."""
        return len(self._index["shards"])

    @property
    def batched(self) -> Mapping[str, int] | None:
        """The arguments with a batch dimension, and their shares, once a shard is there."""
        return self._index["batched"] if len(self) else None

    def add(self, shard: Shard) -> None:
        """Append ``shard``. Raises BitstepError when it cannot be written, a full disk for one, or does not go together
        with those that are there."""
        if len(self):
            _check_gatherable(_open_shard(self._folder, self._index, 0), shard)
        entry = {
            "varying": list(shard.varying),
            "grams": [None if gram is None else gram.tolist() for gram in shard.grams],
        }
        index = self._index | {
            "call": shard.skeleton,
            "batched": dict(shard.batched),
            "handed": shard.handed,
            "shards": [*self._index["shards"], entry],
        }
        path = _shard_path(self._folder, len(self))
        tensors = {name: tensor.contiguous() for name, tensor in shard.tensors.items()}
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary)
            path = self._folder / INDEX
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(index))
        except (OSError, SafetensorError) as error:
            raise BitstepError(f"cannot write {path}: {error}") from error
        self._index = index


def _check_gatherable(first: Shard, other: Shard) -> None:
    for name in (name for name in first.tensors if name in other.tensors):
        here, there = _shape_of_a_row(first, name), _shape_of_a_row(other, name)
        if here != there:
            raise BitstepError(
                f"{name.removeprefix('call.')} comes in shapes {here} and {there}, so no batch can mix them: "
                "where they are those of prompts, give prompts of equally many tokens, or only one"
            )
    same = first.skeleton == other.skeleton and first.tensors.keys() == other.tensors.keys()
    for name, tensor in first.tensors.items() if same else ():
        if name != OUTPUT and name not in first.batched and not torch.equal(tensor, other.tensors[name]):
            same = False
    if not same:
        raise BitstepError("the recorded shards differ in the denoiser's arguments, so no batch can mix them")


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
    grams = tuple(None if g is None else torch.tensor(g, dtype=torch.float64) for g in entry["grams"])
    return Shard(tensors, index["call"], index["batched"], tuple(entry["varying"]), grams, index["handed"])


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BitstepError(f"{folder} holds no pool of recorded calls: cannot read {path.name} ({error})") from error
    if not isinstance(index, dict) or index.get("format_version") != FORMAT_VERSION:
        raise BitstepError(f"{path} is not a pool of format version {FORMAT_VERSION}: calibrate again")
    return index
