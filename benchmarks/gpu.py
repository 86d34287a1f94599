"""Speed and memory on an NVIDIA GPU: single layers and whole denoisers beside half precision.

    python benchmarks/gpu.py            # layers and models: benchmarks/results/gpu.json, tables in docs/performance.md
    python benchmarks/gpu.py layers     # one of them; the results of the other stay
    python benchmarks/gpu.py models --models sd15
    python benchmarks/gpu.py tables     # no GPU needed: the tables once more, from the results

Programs are compiled in many processes before anything is timed. Single layers are timed by the device's clock, with
all calls waiting in its queue, so that what it takes to start them from Python does not count; their operands stay in
the second-level cache where they fit. Models are timed by the wall clock, one after another, round after round; every
layer of theirs has the bits that ``bitstep quantize`` gives it.
"""

# not cuda.py: torch itself looks for a module of that name, and this folder is where Python looks first

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from pages import ROOT, markdown, put, write
from torch import Tensor, nn

from bitstep.denoiser.steps import StepGrid
from bitstep.runtime import cuda
from bitstep.runtime.dispatch import kernels_in_use, set_backend
from bitstep.runtime.layers import LayerFormat, PackedModule, packed_like

RESULTS = ROOT / "benchmarks/results/gpu.json"
DOCUMENT = ROOT / "docs/performance.md"
DEVICE = "cuda"

CALLS, REPEATS = 10, 3  # of a timed layer
ROUNDS = 10  # visits to every variant of a model, of 5 calls each
BATCHES = (1, 8)
WIDTHS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W2A4": (2, 4), "W1A4": (1, 4)}
MODELS = {"fruits32": ("W4A4",), "sd15": ("W8A8", "W4A4", "W1A4")}
TITLES = {"fruits32": "the UNet of `demo:fruits32`", "sd15": "a UNet of the size of Stable Diffusion 1.5"}
BASELINE = "fp16, CUDA graph"

DEMO = ROOT / "src/bitstep/demo/fruits32/unet"
SD15 = {"sample_size": 64, "cross_attention_dim": 768}  # the rest is what diffusers takes where nothing is said

Denoise = Callable[[], Tensor]
Variant = tuple[nn.Module, Denoise]


# ---- single layers


class Shape(NamedTuple):
    """A convolution over square maps or, where ``kernel`` is 0, a linear layer over tokens."""

    kernel: int
    size: int  # of a side, or tokens
    channels: int
    out: int
    batch: int = 1

    def __str__(self) -> str:
        of = f"3x3 {self.size}x{self.size}" if self.kernel else f"linear {self.size}"
        return f"{of}, {self.channels} to {self.out}, batch {self.batch}"

    @property
    def rows(self) -> int:
        return self.batch * (self.size**2 if self.kernel else self.size)

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.channels * self.out * max(self.kernel, 1) ** 2

    def layer(self) -> nn.Linear | nn.Conv2d:
        if not self.kernel:
            return nn.Linear(self.channels, self.out, device=DEVICE)
        return nn.Conv2d(self.channels, self.out, self.kernel, padding=self.kernel // 2, device=DEVICE)

    def input(self) -> Tensor:
        if not self.kernel:
            return torch.randn(self.batch, self.size, self.channels, device=DEVICE, dtype=torch.float16)
        x = torch.randn(self.batch, self.channels, self.size, self.size, device=DEVICE, dtype=torch.float16)
        return x.contiguous(memory_format=torch.channels_last)


SHAPES = [
    shape._replace(batch=batch)
    for batch in BATCHES
    for shape in (
        Shape(3, 64, 320, 320),
        Shape(3, 32, 640, 640),
        Shape(3, 16, 1280, 1280),
        Shape(3, 8, 1280, 1280),
        Shape(3, 64, 960, 320),
        Shape(0, 4096, 320, 2560),
        Shape(0, 4096, 320, 320),
        Shape(0, 4096, 640, 640),
        Shape(0, 1024, 640, 5120),
        Shape(0, 256, 1280, 10240),
        Shape(0, 256, 1152, 4608),
        Shape(0, 77, 768, 320),
    )
]


def packed_layer(shape: Shape, width: str) -> PackedModule:
    """A layer of random codes on our kernel."""
    weight_bits, activation_bits = WIDTHS[width]
    layer_format = LayerFormat(
        weight_bits=weight_bits,
        bases=1,
        symmetric=True,
        activation_bits=activation_bits,
        steps=1,
        channel_reciprocal=False,
    )
    module = packed_like(shape.layer(), layer_format, None)
    module.get_buffer("weight_packed").random_(0, 256)
    values = {
        "weight_scale": 0.01,
        "input_scale": 8 / 2**activation_bits,
        "input_zero_point": 2 ** (activation_bits - 1),
    }
    for name, value in {**values, "bias": 0}.items():
        module.get_buffer(name).fill_(value)
    set_backend(module, "cuda")
    return module


def product_of(module: PackedModule, x: Tensor) -> Callable[[], None]:
    """The product alone of a layer, with the codes and whatever else the layer gives it."""
    whole: Any = module.run
    with mock.patch.object(whole, "_multiply", wraps=whole._multiply) as seen:
        module(x)
    return partial(whole._multiply, *seen.call_args.args, **seen.call_args.kwargs)


def microseconds(call: Callable[[], object]) -> float:
    """Of one call, by the device's clock."""
    call()
    return statistics.median(_queued(call) for _ in range(REPEATS)) / CALLS * 1000


def _queued(call: Callable[[], object]) -> float:
    """Milliseconds of all calls. The device is kept busy until the last one is queued, however long that takes."""
    for cycles in (2**21, 2**23, 2**25, 2**27):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        still_asleep = not start.query()
        end.synchronize()
        if still_asleep:
            return float(start.elapsed_time(end))
    raise RuntimeError("the calls wait for the device")


def tried(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, or the text of its failure."""
    try:
        return call()
    except Exception as error:  # of a compiler, of the device, of a model: whatever it is, the other rows are measured
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]


def in_processes(work: Callable[[Any], None], jobs: list[Any], seconds: float) -> None:
    """Do the jobs in many processes, for what they leave in Triton's cache on disk; what fails will fail again."""
    began = time.monotonic()
    workers = min(len(jobs), max(1, (os.cpu_count() or 1) - 2))
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    futures = [pool.submit(work, job) for job in jobs]
    done, unfinished = wait(futures, seconds)
    pool.shutdown(cancel_futures=True)
    errors = Counter(repr(future.exception())[:200] for future in done if future.exception())
    print(f"compiled in {workers} processes, {time.monotonic() - began:.0f} s; {len(unfinished)} jobs unfinished")
    for error, count in errors.items():
        print(f"  {count} jobs failed: {error}")


# ---- layers against half precision


def compile_layer(job: tuple[Shape, str]) -> None:
    torch.set_grad_enabled(False)
    shape, width = job
    packed_layer(shape, width)(shape.input())


def measure_ours(shape: Shape, width: str) -> dict[str, float]:
    module, x = packed_layer(shape, width), shape.input()
    return {"layer_us": microseconds(lambda: module(x)), "product_us": microseconds(product_of(module, x))}


def measure_half(shape: Shape) -> float:
    layer: Any = shape.layer().half()
    layer, x = layer.to(memory_format=torch.channels_last), shape.input()
    return microseconds(lambda: layer(x))


def ceilings() -> dict[str, Any]:
    """Tera-operations a second of large products, and terabytes a second, read and written, of a copy."""
    size = 8192
    half = torch.randn(size, size, device=DEVICE, dtype=torch.float16)
    byte = half.to(torch.int8)
    copied = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    calls: dict[str, tuple[float, Callable[[], object]]] = {
        "fp16_tops": (2 * size**3, lambda: half @ half.T),
        "int8_tops": (2 * size**3, lambda: torch._int_mm(byte, byte.T)),
        "copy_tb_s": (2 * copied.numel(), partial(copied.copy_, torch.empty_like(copied))),
    }
    return {name: tried(lambda: work / microseconds(call) / 1e6) for name, (work, call) in calls.items()}  # noqa: B023


def measure_layers(results: dict[str, Any]) -> None:
    in_processes(compile_layer, list(product(SHAPES, WIDTHS)), 200)
    results["ceilings"] = ceilings()
    results["layers"] = [
        {
            "shape": shape._asdict(),
            "fp16_us": tried(partial(measure_half, shape)),
            "widths": {width: tried(partial(measure_ours, shape, width)) for width in WIDTHS},
        }
        for shape in SHAPES
    ]


# ---- whole models


def kind_of(name: str) -> Any:
    from diffusers import UNet2DConditionModel, UNet2DModel

    return UNet2DModel if name == "fruits32" else UNet2DConditionModel


def build(name: str, dtype: torch.dtype) -> Any:
    if name == "fruits32":
        model = kind_of(name).from_pretrained(DEMO)
    else:
        with torch.device(DEVICE):
            model = kind_of(name)(**SD15)
    return nn.Module.to(model, DEVICE, dtype).eval()  # the model's own warns that some modules may want float32


def example(name: str, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    channels, size = (3, 32) if name == "fruits32" else (4, SD15["sample_size"])
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, channels, size, size, device=DEVICE, dtype=dtype),
        "timestep": torch.tensor(500, device=DEVICE),
        "return_dict": False,
    }
    if name == "sd15":
        text = torch.randn(batch, 77, SD15["cross_attention_dim"], device=DEVICE, dtype=dtype)
        inputs["encoder_hidden_states"] = text
    return inputs


def pack(name: str, width: str, folder: Path) -> None:
    """Write ``folder``/unet: the demo's denoiser calibrated, the other's random weights rounded; 50 key steps each."""
    from cpu import packed, plan_of

    if name == "fruits32":
        what = ["demo:fruits32", "--recipe", "minmax", "--bits", width, "--effort", "quick", "--out", str(folder)]
        subprocess.run([sys.executable, "-m", "bitstep", "quantize", *what], check=True, capture_output=True)
    else:
        grid = StepGrid(tuple((step + 0.5) / 50 for step in range(50)), 1000.0)
        model = build(name, torch.float32)
        plan = plan_of(model, example(name, 1, torch.float32), *WIDTHS[width])
        rounded: Any = packed(model, plan, grid)
        rounded.save_pretrained(folder / "unet")


def plain(name: str, batch: int, dtype: torch.dtype) -> Variant:
    model = build(name, dtype)
    if dtype == torch.float16:
        model.to(memory_format=torch.channels_last)
    return model, denoiser(model, example(name, batch, dtype))


def packed_from(folder: Path, name: str, batch: int, replayed: bool) -> Variant:
    """As a user loads it. Its forward method is a Replay, an attribute that hides the one of its class."""
    model = kind_of(name).from_pretrained(folder / "unet", torch_dtype=torch.float16).to(DEVICE)
    if not replayed:
        del model.forward
    return model, denoiser(model, example(name, batch, torch.float16))


def denoiser(model: Callable[..., Any], inputs: dict[str, Any]) -> Denoise:
    return lambda: model(**inputs)[0]


def in_a_graph(name: str, batch: int) -> Variant:
    model, denoise = plain(name, batch, torch.float16)
    return model, partial(next, _captured(denoise))


def _captured(denoise: Denoise) -> Iterator[Tensor]:
    yield denoise()  # as it is, for libraries to choose their algorithms
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = denoise()
    while True:
        graph.replay()
        yield y


def compiled(name: str, batch: int) -> Variant:
    model, _ = plain(name, batch, torch.float16)
    return model, denoiser(torch.compile(model), example(name, batch, torch.float16))


def variants(name: str, batch: int, folders: dict[str, Path], with_compile: bool) -> dict[str, Callable[[], Variant]]:
    """What is compared, by name: functions that build it, ready to be called."""
    found: dict[str, Callable[[], Variant]] = {
        "fp32": partial(plain, name, batch, torch.float32),
        "fp16": partial(plain, name, batch, torch.float16),
        BASELINE: partial(in_a_graph, name, batch),
    }
    if with_compile:
        found["fp16, torch.compile"] = partial(compiled, name, batch)
    for width, folder in folders.items():
        found[f"{width}, layer by layer"] = partial(packed_from, folder, name, batch, replayed=False)
        found[width] = partial(packed_from, folder, name, batch, replayed=True)
    return found


def start(make: Callable[[], Variant]) -> tuple[Denoise, dict[str, Any]]:
    """Build a variant and call it until it is at its speed; what memory that took, of what lives on this device."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model, denoise = make()
    denoise()  # compiles programs and tries algorithms: their memory is no part of the peak
    torch.cuda.reset_peak_memory_stats()
    for _ in range(4):  # captured or recorded, compared, replayed
        y = denoise()
    return denoise, {
        "held_mb": (torch.cuda.memory_allocated() - before) / 1e6,
        "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6,
        "finite": bool(y.isfinite().all()),
        "kernels": dict(Counter(kernels_in_use(model).values())),
    }


def visit(denoise: Denoise, calls: int = 5) -> float:
    """Milliseconds of one call, by the clock on the wall."""
    denoise()  # fills the caches again, which the others had meanwhile
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        denoise()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1000 / calls


def compare(makers: dict[str, Callable[[], Variant]]) -> list[dict[str, Any]]:
    """All variants of a model, interleaved; a row of their own for those that fail."""
    tried(partial(start, next(iter(makers.values()))))  # what libraries allocate once belongs to no variant
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, Denoise] = {}
    for name, make in makers.items():
        outcome = tried(partial(start, make))
        if isinstance(outcome, str):
            rows[name] = {"failed": outcome}
        else:
            running[name], rows[name] = outcome
        print(f"  {name}: {rows[name]}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in running}
    for _, name in product(range(ROUNDS), list(running)):
        if "failed" in rows[name]:
            continue
        took = tried(partial(visit, running[name]))
        if isinstance(took, str):
            rows[name]["failed"] = took
        else:
            times[name].append(took)
    for name, all_times in times.items():
        if "failed" not in rows[name]:
            rows[name]["median_ms"] = statistics.median(all_times)
    return [{"name": name, **row} for name, row in rows.items()]


def _order(comparison: dict[str, Any]) -> tuple[int, int]:
    return list(MODELS).index(comparison["model"]), comparison["batch"]


def compile_model(job: tuple[Path, str, int]) -> None:
    torch.set_grad_enabled(False)
    _, denoise = packed_from(*job, replayed=False)
    denoise()


def measure_models(names: list[str], results: dict[str, Any], save: Callable[[], None], with_compile: bool) -> None:
    """Tables of other models stay as they are."""
    with tempfile.TemporaryDirectory() as temporary:
        folders: dict[str, dict[str, Path]] = {name: {} for name in names}
        for name in names:
            for width in MODELS[name]:
                folder = folders[name][width] = Path(temporary, f"{name}-{width}")
                if failure := tried(partial(pack, name, width, folder)):
                    print(f"{name} {width}: {failure}")
        jobs = [(f, name, batch) for name in names for f in folders[name].values() for batch in BATCHES]
        in_processes(compile_model, jobs, 200)
        for name, batch in product(names, BATCHES):
            print(f"{name}, batch {batch}:", flush=True)
            rows = compare(variants(name, batch, folders[name], with_compile))
            others = [old for old in results.get("models", []) if (old["model"], old["batch"]) != (name, batch)]
            results["models"] = sorted([*others, {"model": name, "batch": batch, "rows": rows}], key=_order)
            save()


# ---- the document


def layers_table(results: dict[str, Any]) -> str:
    columns = ["layer", "fp16 us", *(f"{width} us" for width in WIDTHS), "W4A4 product us", "its TOPS"]
    lines = [_layer_line(**row) for row in results["layers"]]
    unit = {"fp16_tops": "TFLOPS, float16", "int8_tops": "TOPS, int8", "copy_tb_s": "TB/s, a copy read and written"}
    tops = [f"{_number(results['ceilings'][name], 1)} {text}" for name, text in unit.items()]
    about = f"Ceilings: {'; '.join(tops)}. In brackets: how many times as fast as the layer in float16."
    return f"### Single layers\n\n{about}\n\n{markdown(columns, lines)}"


def _layer_line(shape: dict[str, int], fp16_us: float | str, widths: dict[str, Any]) -> list[str]:
    line = [str(Shape(**shape)), _number(fp16_us, 1)]
    for ours in widths.values():
        ratio = f" ({fp16_us / ours['layer_us']:.2f}x)" if isinstance(ours, dict) and isinstance(fp16_us, float) else ""
        line.append(_number(ours["layer_us"] if isinstance(ours, dict) else ours, 1) + ratio)
    ours = widths["W4A4"]
    if isinstance(ours, str):
        return [*line, "", ""]
    return [*line, _number(ours["product_us"], 1), _number(Shape(**shape).operations / ours["product_us"] / 1e6, 0)]


def _number(value: float | str, digits: int) -> str:
    return "failed" if isinstance(value, str) else f"{value:.{digits}f}"


def model_table(comparison: dict[str, Any]) -> str:
    rows = comparison["rows"]
    columns = ["variant", "median ms", f"{BASELINE} = 1", "holds MB", "peak MB"]
    median = {row["name"]: row["median_ms"] for row in rows if "median_ms" in row}
    lines = []
    for row in rows:
        if row["name"] not in median:
            lines.append([row["name"], row["failed"], "", "", ""])
            continue
        ratio = f"{median[BASELINE] / row['median_ms']:.2f}x" if BASELINE in median else ""
        memory = f"{row['held_mb']:.0f}", f"{row['peak_mb']:.0f}"
        lines.append([row["name"], f"{row['median_ms']:.2f}", ratio, *memory])
    return f"### {TITLES[comparison['model']]}, batch {comparison['batch']}\n\n{markdown(columns, lines)}"


def document(results: dict[str, Any]) -> str:
    there = results["machine"]
    parts = [f"{there['gpu']}, driver {there['driver']}, PyTorch {there['torch']}, Triton {there['triton']}."]
    if "layers" in results:
        parts.append(layers_table(results))
    return "\n\n".join([*parts, *map(model_table, results.get("models", []))])


def machine() -> dict[str, str]:
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = tried(lambda: subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0])
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(f"no NVIDIA GPU that PyTorch {torch.__version__} can use: there is nothing to measure")
    if fault := cuda.programs_fault():
        raise SystemExit(f"bitstep does not use this GPU: {fault}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "layers", "models", "tables"], default="all")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes minutes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where they are kept")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cudnn.benchmark = True
    if arguments.what != "tables":
        require_gpu()
    results: dict[str, Any] = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}

    def save() -> None:
        write(arguments.results, json.dumps(results, indent=1) + "\n")

    if arguments.what != "tables":
        results["machine"] = machine()
    elif not results:
        raise SystemExit(f"{arguments.results} is not there: nothing was measured yet")
    if arguments.what in ("all", "layers"):
        measure_layers(results)
        save()
    if arguments.what in ("all", "models"):
        measure_models(arguments.models, results, save, arguments.compile)
    if arguments.results == RESULTS:
        put(DOCUMENT, RESULTS.stem, document(results))
    print(document(results))


if __name__ == "__main__":
    main()
