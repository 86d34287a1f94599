"""The folder of a run that survives being killed: what it was asked, what it has found, how far training has come.

OUT.partial/           while the run is under way
    lock               held by the process that runs
    run.json           source, seed, resolved recipe, library versions: what a resumed run must agree with
    pool/              recorded full-precision trajectories
    block/             inputs and outputs of the block that is being distilled
    sensitivity.safetensors  how far errors at each timestep carry, where the recipe asks
    state.safetensors  trained tensors and optimizer moments (the position in its metadata)
    loss.csv           the loss curve
    packed/            the result, until it is moved
    whole              says that the result is all there: if it is gone, it was moved
OUT/                   appears whole, by a rename, when all is done; run.json, plan.json and loss.csv go to OUT/run/,
                       and files.json, which names everything in OUT that is bitstep's
"""

from __future__ import annotations

import csv
import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitstep
from bitstep.errors import BitstepError, UsageError
from bitstep.files import replacing
from bitstep.methods.base import Context
from bitstep.stages.finetune import TrainingState, load_trained_tensors, moments, trained_tensors
from bitstep.trajectories.pool import INDEX

LOCK, RUN, POOL, STATE, LOSS, PLAN = "lock", "run.json", "pool", "state.safetensors", "loss.csv", "plan.json"
PACKED, WHOLE, FILES = "packed", "whole", "files.json"

Loss = tuple[int, int, int, float]
"""Phase, unit, iteration, loss."""


@dataclass(frozen=True)
class RunFolder:
    """The folder ``path`` of an unfinished run whose result will be ``out``, and the lock on it."""

    path: Path
    out: Path
    lock: FileLock

    @classmethod
    def claim(
        cls, out: Path, identity: Mapping[str, Any], *, keep: Sequence[Path], resume: bool, overwrite: bool
    ) -> Self | None:
        """A new folder, or the one to be resumed; None when a resumed run is already finished.

        Raises UsageError where a run is under way, where anything in ``keep`` or not written by bitstep would be
        destroyed, or where ``identity`` is not that of the resumed run.
        """
        out = out.resolve()
        path = out.parent / f"{out.name}.partial"
        identity = json.loads(json.dumps(identity))
        if _holds(path) - {LOCK}:
            _check_replaceable(path, [path / RUN, path / LOCK], keep)
        if resume and _finished(path) and _read_identity(out / "run" / RUN) == identity:
            if path.exists():  # the run was killed while it cleared up
                work = cls(path, out, _locked(path))
                (work.pool / INDEX).unlink(missing_ok=True)
                work.leave()
            return None
        if _holds(out):
            if not overwrite:
                raise UsageError(f"{out} is not empty: choose another folder, or give --overwrite")
            _check_replaceable(out, [out / "run" / RUN], keep)
            _check_own(out)
        work = cls(path, out, _locked(path))
        try:
            work._begin(identity, resume=resume, overwrite=overwrite)
        except BaseException:
            work.leave()
            raise
        return work

    def _begin(self, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        if self.can_go_on:
            if not (resume or overwrite):
                raise UsageError(
                    f"{self.path} holds an unfinished run: give --resume to go on with it, or --overwrite to discard it"
                )
            stored = _read_identity(self.path / RUN) or {}
            if resume and stored != identity:
                other = [name for name in identity if stored.get(name) != identity[name]]
                said = " and ".join(other).replace("recipe", "recipe (its bits and settings included)")
                raise UsageError(f"{self.path} holds a run with another {said}: repeat its options, or --overwrite")
            if resume:
                return
        try:
            self._clear()
            _write_json(self.path / RUN, {**identity, "versions": _versions()})
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def _clear(self) -> None:
        for name in _holds(self.path) - {LOCK}:
            entry = self.path / name
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    @property
    def can_go_on(self) -> bool:
        """Whether there is anything recorded that a resumed run would go on with."""
        return _recorded(self.path)

    @property
    def pool(self) -> Path:
        return self.path / POOL

    def once(self, name: str, find: Callable[[], Tensor]) -> Tensor:
        """``find()``, or what it found before the run was interrupted."""
        path = self.path / f"{name}.safetensors"
        if not path.exists():
            found = {name: find()}
            with replacing(path) as temporary:
                save_file(found, temporary)
        return load_file(path)[name]

    def save(self, context: Context, state: TrainingState, losses: Sequence[Loss]) -> None:
        """Write what is trained, how far, and the losses on the way."""
        tensors = {f"trained.{name}": tensor for name, tensor in trained_tensors(context.trained).items()}
        tensors |= {f"moments.{name}": tensor for name, tensor in moments(state).items()}
        tensors |= {f"average.{name}": tensor for name, tensor in state.average.items()}
        position = {"phase": state.phase, "unit": state.unit, "iteration": state.iteration}
        if state.at_once is not None:
            position["at_once"] = state.at_once
        with replacing(self.path / LOSS) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([("phase", "unit", "iteration", "loss"), *losses])
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        with replacing(self.path / STATE) as temporary:
            save_file(contiguous, temporary, {key: str(value) for key, value in position.items()})

    def restore(self, context: Context) -> tuple[TrainingState, list[Loss]]:
        """Put what was saved into ``context``: how far training had come, and the losses up to there."""
        path = self.path / STATE
        if not path.exists():
            return TrainingState(), []
        try:
            with safe_open(path, "pt") as file:
                position = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            load_trained_tensors(context.trained, _under("trained.", tensors))
            trained = trained_tensors(context.trained)
            average = {name: x.to(trained[name].device) for name, x in _under("average.", tensors).items()}
            reached = (int(position["phase"]), int(position["unit"]), int(position["iteration"]))
            at_once = int(position["at_once"]) if "at_once" in position else None
            state = TrainingState(*reached, at_once, moments=_under("moments.", tensors), average=average)
            with (self.path / LOSS).open(newline="") as file:
                losses = [(int(p), int(u), int(i), float(x)) for p, u, i, x in list(csv.reader(file))[1:]]
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise BitstepError(f"the saved state {path} is damaged ({error}): start again with --overwrite") from error
        return state, [row for row in losses if row[:3] <= reached]

    def publish(self, save: Callable[[Path], object], plan: Mapping[str, Any]) -> None:
        """Have ``save`` write the packed pipeline beside the run, add the run's records, rename it into place."""
        folder, replaced = self.path / PACKED, self.path / "replaced"
        (self.path / WHOLE).unlink(missing_ok=True)
        for left in (folder, replaced):  # by a run that was killed here
            shutil.rmtree(left, ignore_errors=True)
        save(folder)
        (folder / "run").mkdir()
        for name in (RUN, LOSS):
            if (self.path / name).exists():
                shutil.copy(self.path / name, folder / "run" / name)
        _write_json(folder / "run" / PLAN, plan)
        _write_json(folder / "run" / FILES, sorted(_files(folder)))
        (self.path / WHOLE).touch()
        if self.out.exists():
            self.out.rename(replaced)
        folder.rename(self.out)
        (self.pool / INDEX).unlink(missing_ok=True)  # there is nothing to go on with

    def leave(self) -> None:
        """Let go of the folder, and remove it where there is nothing recorded to go on with; the lock goes last."""
        if not self.can_go_on:
            with suppress(OSError):
                self._clear()
                (self.path / LOCK).unlink()
                self.path.rmdir()  # (whoever claims it meanwhile has put a lock of his own into it)
        self.lock.release()


def _recorded(folder: Path) -> bool:
    """Whether an unfinished run in ``folder`` has recorded anything to go on with."""
    return (folder / POOL / INDEX).exists()


def _finished(folder: Path) -> bool:
    """Whether the run in ``folder`` has moved its result to where it belongs, or there is no run."""
    return not _recorded(folder) or ((folder / WHOLE).exists() and not (folder / PACKED).exists())


def _holds(folder: Path) -> set[str]:
    """The names of what is in ``folder``; of itself, where it is a file."""
    if folder.is_dir():
        return {entry.name for entry in folder.iterdir()}
    return {folder.name} if folder.exists() else set()


def _check_replaceable(folder: Path, marks: Sequence[Path], keep: Sequence[Path]) -> None:
    """Raise UsageError unless ``folder`` may be deleted: it has a mark of bitstep's and holds nothing to ``keep``."""
    for kept in keep:
        if kept.resolve().is_relative_to(folder):
            raise UsageError(f"{folder} cannot be replaced, it holds {kept} that is to be read: choose another folder")
    if not any(mark.is_file() for mark in marks):
        raise UsageError(f"{folder} was not written by bitstep: choose another folder, or remove this one yourself")


def _check_own(folder: Path) -> None:
    """Raise UsageError where the result ``folder`` holds a file that is not bitstep's."""
    try:
        own = set(json.loads((folder / "run" / FILES).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{folder} does not say which of its files are bitstep's: remove it yourself") from error
    if others := _files(folder) - own - {f"run/{FILES}"}:
        raise UsageError(
            f"{folder} holds {min(others)}, which bitstep did not write: move it away, or choose another folder"
        )


def _files(folder: Path) -> set[str]:
    """All files in ``folder``, by their paths from there."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _locked(folder: Path) -> FileLock:
    """The lock of ``folder``, which is made where it is missing; a process that is killed lets go of it."""
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UsageError(f"a run is under way in {folder}: wait for it, or choose another folder") from error
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return lock


def _cannot_write(folder: Path, error: OSError) -> BitstepError:
    return BitstepError(f"cannot write {folder}: {error.strerror}")


def _write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _read_identity(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    content.pop("versions", None)
    return content


def _versions() -> dict[str, str]:
    return {
        "bitstep": bitstep.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "machine": platform.machine(),
    }


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
