"""Benchmark: the packed denoiser against the same architecture in full precision and under other runtimes, each in a
process of its own.

The processes wait for each other and take turns, so that a machine that slows down slows all of them; nothing of one
model is in another's memory. Run as a program, this module is one such process: it reads its task from its arguments,
and for every line on stdin times one forward pass.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from bitstep.arguments import as_list, at_least, check_device
from bitstep.denoiser.calls import run
from bitstep.denoiser.steps import TIMESTEP_NAMES
from bitstep.errors import BitstepError, UsageError
from bitstep.progress import Progress, silent
from bitstep.runtime.dispatch import kernels_in_use, named, set_backend
from bitstep.slots import nearest
from bitstep.stages.calibrate import record
from bitstep.stages.evaluate import check_comparable
from bitstep.stages.generate import FEW_STEPS, Sampling
from bitstep.stages.inspect import architecture, component_folder, model_class, packed_manifest
from bitstep.stages.load import Source, load
from bitstep.stages.peers import PEERS, OfTensors
from bitstep.stages.pictures import find_pictures
from bitstep.trajectories.pool import Pool

PACKED = "packed"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 3


def benchmark(
    directory: str | Path,
    *,
    against: str | Sequence[str] = ("fp32", "bf16"),
    batch_size: int = 1,
    rounds: int = 20,
    pictures: str | Path | None = None,
    size: str | None = None,
    backend: str | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time ``rounds`` forward passes of each, on a call of the denoiser that its pipeline made.

    On CUDA what a packed model does not quantize computes in float16, as pipelines do there; on a CPU in float32.

    against: precisions (``fp32``, ``bf16``, ``fp16``) of eager PyTorch, names of :data:`bitstep.stages.peers.PEERS`,
        and folders of other packed pipelines, say of other widths
    size: of the pictures or videos, WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES; None for the pipeline's own

    Returns a dictionary:

    rows: name, median_ms, spread_ms (interquartile range), ratio_to_fp32 (median over the rounds of the time against
        float32's in the same round; below 1 is faster), peak_memory_mb (of the process; on CUDA, of torch's allocator)
    kernels: how many layers each kernel runs
    layers: the kernel of every packed layer
    """
    at_least(1, batch_size=batch_size, rounds=rounds)
    check_device(device)
    against = as_list(against)
    for name in against:
        _check(name)
    if backend is not None:
        named(backend)
    source = _packed(directory)
    sampling: Sampling = {"steps": FEW_STEPS, "seed": 0, "pictures": find_pictures(pictures), "size": size}
    others = {name: _packed(name) for name in against if _is_folder(name)}
    if others:
        check_comparable(list(others.values()), source, **sampling)
    packed = {PACKED: source} | others
    with tempfile.TemporaryDirectory() as calls, ExitStack() as stack:
        record(source, calls, images=batch_size, batch_size=batch_size, **sampling)
        tasks = [
            Task(name, str(component_folder(packed.get(name, source))), name in packed, calls, backend, device)
            for name in (PACKED, *dict.fromkeys(against))
        ]
        workers = [stack.enter_context(closing(_Worker(task))) for task in tasks]
        for worker in workers:
            worker.wait()
        for done in range(rounds):
            for worker in workers:
                worker.time()
            progress(done + 1, rounds)
    baseline = next((worker.times for worker in workers if worker.name == "fp32"), None)
    layers = workers[0].kernels
    return {
        "batch_size": batch_size,
        "rounds": rounds,
        "device": device,
        "threads": torch.get_num_threads(),
        "rows": [worker.row(baseline) for worker in workers],
        "kernels": dict(Counter(layers.values())),
        "layers": layers,
    }


def _check(name: str) -> None:
    """Raise UsageError where nothing of that name can be timed here."""
    known = (*DTYPES, *PEERS)
    if name not in known and not _is_folder(name):
        raise UsageError(
            f"cannot compare with {name!r}{nearest(name, known)}: expected {', '.join(known)} or a packed folder"
        )
    if name in PEERS and (missing := PEERS[name].missing()):
        raise UsageError(f"{name} needs packages that are not installed: pip install {' '.join(missing)}")


def _is_folder(name: str) -> bool:
    return name not in DTYPES and name not in PEERS and Path(name).is_dir()


def _packed(directory: str | Path) -> Source:
    """The pipeline in a folder or on the Hub; raises BitstepError where it is not packed."""
    source = load(directory)
    packed_manifest(source)
    return source


@dataclass(frozen=True)
class Task:
    """What one process times: the packed model in ``component``, or its architecture in a precision or under a peer."""

    name: str
    component: str
    packed: bool
    calls: str
    backend: str | None
    device: str


class _Worker:
    """The process of one task, seen from outside: a line to it, a line of JSON back."""

    def __init__(self, task: Task) -> None:
        self.name = task.name
        self.times: list[float] = []
        self.kernels: dict[str, str] = {}
        self._peak = 0.0
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bitstep.stages.benchmark", json.dumps(asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def wait(self) -> None:
        """Until it is ready."""
        self.kernels = self._answer()["kernels"]

    def close(self) -> None:
        self._process.communicate()  # closes its stdin, upon which it ends
        self._stderr.close()

    def time(self) -> None:
        """One more forward pass."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.times.append(answer["ms"])
        self._peak = answer["peak_memory_mb"]

    def row(self, baseline: list[float] | None) -> dict[str, Any]:
        low, _, high = statistics.quantiles(self.times, n=4) if len(self.times) > 1 else self.times * 3
        ratios = baseline and [mine / theirs for mine, theirs in zip(self.times, baseline, strict=True)]
        return {
            "name": self.name,
            "median_ms": statistics.median(self.times),
            "spread_ms": high - low,
            "ratio_to_fp32": ratios and statistics.median(ratios),
            "peak_memory_mb": self._peak,
        }

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._stderr.seek(0)
        *_, last = self._stderr.read().strip().splitlines() or ["it ended without a word"]
        raise BitstepError(f"the benchmark of {self.name} failed: {last}")


@torch.no_grad()
def _work(task: Task) -> None:
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the libraries of peers print
    model = _model(task)
    pool = Pool.open(task.calls)
    last = pool.indices_at(len(pool.timesteps) - 1)
    call, _ = pool.batch(pool.split(last, len(last))[0])
    call = call.map(lambda name, tensor: _cast(name, tensor, model.dtype)).to(task.device)
    step: Callable[[], Tensor] = partial(run, model, call)
    if task.name in PEERS:
        module = OfTensors(model, call)
        step = partial(PEERS[task.name].compile(module, module.inputs), *module.inputs)
    for _ in range(WARM_UP):
        step()
    reply.write(json.dumps({"kernels": kernels_in_use(model)}) + "\n")
    for _ in sys.stdin:
        step()  # fills the caches again, which the others had meanwhile
        _synchronize(task.device)
        start = time.perf_counter()
        step()
        _synchronize(task.device)
        milliseconds = 1e3 * (time.perf_counter() - start)
        reply.write(json.dumps({"ms": milliseconds, "peak_memory_mb": _peak_memory(task.device)}) + "\n")


def _model(task: Task) -> ModelMixin:
    component = Path(task.component)
    if task.packed:
        dtype = torch.float16 if _is_gpu(task.device) else torch.float32
        model = model_class(component).from_pretrained(component, dtype=dtype)
        set_backend(model, task.backend)
    else:
        torch.set_default_dtype(DTYPES.get(task.name, torch.float32))
        model = architecture(component).eval()
    return model.to(task.device)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As pipelines do: everything in the model's precision but the timestep."""
    keep = not tensor.is_floating_point() or name.split(".")[-1] in TIMESTEP_NAMES
    return tensor if keep else tensor.to(dtype)


def _is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def _synchronize(device: str) -> None:
    if _is_gpu(device):
        torch.cuda.synchronize(device)


def _peak_memory(device: str) -> float:
    """Largest resident set of this process so far, in MB; on CUDA the most that torch had allocated."""
    if _is_gpu(device):
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with the size of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


if __name__ == "__main__":
    _work(Task(**json.loads(sys.argv[1])))
