"""Speed and memory of whole denoisers on the CPU: bitstep at several widths against eager PyTorch and other runtimes.

Three kinds of tables: one forward pass of models A to D; a whole pipeline of A; and the time that a fresh process
takes from ``from_pretrained`` to its first image.

    python benchmarks/cpu.py                      # every row that benchmarks/results/cpu.json lacks, then the tables
    python benchmarks/cpu.py --only A1 --rounds 3 --out smoke.json
    python benchmarks/cpu.py --out benchmarks/results/cpu-amx.json     # a machine with AMX has tables of its own
    python benchmarks/cpu.py --avx2               # the same for benchmarks/results/cpu-avx2.json, all held to AVX2

Each runtime lives in a process of its own and is visited in turn, so that all rows of a table see the same machine;
the medians over all rounds are kept. Weights are random: only shapes and bits matter. Every layer has the bits that
``bitstep quantize`` gives it, and attention is quantized where the recipe ``best`` does so. Nothing else should be
running. The other runtimes come with ``pip install bitstep[bench]``; ``--peers PYTHON`` names another interpreter that
has them and bitstep's own dependencies.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from host import memory_mb, processor
from pages import ROOT, markdown, put, write
from torch import Tensor, nn

if TYPE_CHECKING:
    from bitstep.denoiser.steps import StepGrid
    from bitstep.planning import Plan

RESULTS = ROOT / "benchmarks/results/cpu.json"
DOCUMENT = ROOT / "docs/performance.md"

MODELS = {
    "A": "DDPM for CIFAR-10, the configuration of google/ddpm-cifar10-32",
    "B": "latent diffusion UNet of the LDM-4 kind, 64x64 latents",
    "C": "DiT-B/2, 32x32 latents",
    "D": "UNet of Stable Diffusion 1.5, 64x64 latents",
}
COMPARISONS = [("A", 1), ("A", 4), ("A", 16), ("B", 1), ("C", 1), ("D", 1)]
REFERENCES = ("OpenVINO int8 + bf16", "OpenVINO int8 + f32")  # times the first of them that runs
AVX2 = {  # as bitstep's, oneDNN's and OpenVINO's, torch's and its MKL's variables say it
    "BITSTEP_INSTRUCTION_SET": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
WIDTHS = {"bitstep W8A8": (8, 8), "bitstep W4A8": (4, 8), "bitstep W4A4": (4, 4), "bitstep W1A4": (1, 4)}
SUMMARY = (
    "PyTorch eager fp32",
    "OpenVINO int8 + f32",
    "OpenVINO int8 + bf16",
    "bitstep W8A8",
    "bitstep W4A4",
    "bitstep W1A4",
)
STEPS = 50  # of DDIM in a pipeline
PATIENCE = 900  # seconds that a runtime may take to build a model or to answer

Denoise = Callable[[Tensor, Tensor], Tensor]


# ---- the models


def build(name: str) -> nn.Module:
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

    torch.manual_seed(0)
    if name == "C":
        model = DiTTransformer2DModel(
            num_attention_heads=12, attention_head_dim=64, out_channels=8, num_layers=12, norm_eps=1e-6
        )
    elif name == "D":
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    elif name == "B":
        attention = 3
        model = UNet2DModel(
            sample_size=64,
            layers_per_block=2,
            block_out_channels=(224, 448, 672, 896),
            down_block_types=("DownBlock2D", *("AttnDownBlock2D",) * attention),
            up_block_types=(*("AttnUpBlock2D",) * attention, "UpBlock2D"),
            attention_head_dim=32,
        )
    else:
        model = UNet2DModel(
            sample_size=32,
            layers_per_block=2,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
        )
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


class Denoiser(nn.Module):
    """A model as a function of two tensors: the sample, and a timestep for each of its images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(**arguments(self.model, x, t))[0]  # type: ignore[no-any-return]


def arguments(model: nn.Module, x: Tensor, t: Tensor) -> dict[str, Any]:
    """What such a model is called with, by name."""
    if "DiT" in type(model).__name__:
        return {"hidden_states": x, "timestep": t, "class_labels": torch.zeros_like(t), "return_dict": False}
    text = {"encoder_hidden_states": torch.ones(len(x), 77, 768)} if "Condition" in type(model).__name__ else {}
    return {"sample": x, "timestep": t, "return_dict": False, **text}


def example(name: str, batch: int) -> tuple[Tensor, Tensor]:
    channels, size = {"A": (3, 32), "B": (3, 64), "C": (4, 32), "D": (4, 64)}[name]
    return torch.randn(batch, channels, size, size), torch.full((batch,), 500)


# ---- the runtimes: each takes a model's name and a batch size, and gives a function of the sample and the timesteps


def eager(name: str, batch: int, dtype: torch.dtype) -> Denoise:
    model = Denoiser(build(name).to(dtype))
    return lambda x, t: model(x.to(dtype), t).float()


def plan_of(
    model: nn.Module, inputs: dict[str, Any], weight_bits: int, activation_bits: int, *, attention: bool = False
) -> Plan:
    """The bits that ``bitstep quantize`` gives every layer; a pass with ``inputs`` shows which layer is which."""
    from bitstep.denoiser.calls import Call
    from bitstep.denoiser.structure import trace
    from bitstep.planning import add_attention, plan_layers

    structure = trace(model, Call(inputs))
    plan = plan_layers(model, structure, weight_bits=weight_bits, activation_bits=activation_bits, coverage="full")
    return add_attention(plan, structure, bits=activation_bits, probability_bits=8) if attention else plan


def packed(model: nn.Module, plan: Plan, grid: StepGrid | None = None) -> nn.Module:
    """``model`` as ``from_pretrained`` gives it, its random weights rounded; a step size for each key of ``grid``."""
    from bitstep.checkpoint import PackedLayer, PackedOperands, pack_model
    from bitstep.denoiser.attention import OPERANDS
    from bitstep.methods.base import UniformWeights
    from bitstep.methods.binarydm import BinaryWeights

    steps = 1 if grid is None else len(grid)

    def table(bits: int) -> tuple[Tensor, Tensor]:
        return torch.full((steps,), 8 / 2**bits), torch.full((steps,), 2.0 ** (bits - 1))

    layers = {}
    for layer in plan.layers:
        module: Any = model.get_submodule(layer.name)
        weights = BinaryWeights() if layer.weight_bits == 1 else UniformWeights(range="minmax")
        bits = layer.activation_bits
        scale, zero_point = (None, None) if bits is None else table(bits)
        layers[layer.name] = PackedLayer(
            weight=weights.build(module.weight, layer).codes(),
            bias=module.bias,
            input_scale=scale,
            input_zero_point=zero_point,
            activation_bits=bits,
            channel_reciprocal=None,
            macs=layer.macs,
        )
    attention = {}
    for site in plan.attention:
        tables = dict.fromkeys(OPERANDS[:3], table(site.bits))
        tables["probability"] = torch.full((steps,), 1 / 255), torch.zeros(steps)
        attention[site.name] = PackedOperands(tables, site.bits, site.probability_bits, site.macs)
    return pack_model(  # type: ignore[no-any-return]
        model,
        layers,
        attention=attention,
        grid=grid,
        modules_to_not_convert=plan.left_alone,
        total_macs=plan.total_macs,
        recipe={"name": "random"},
    )


def planned(name: str, weight_bits: int, activation_bits: int) -> Plan:
    """:func:`plan_of` one of the models above; attention is quantized where ``best`` does so."""
    model = build(name)
    inputs = arguments(model, *example(name, 1))
    return plan_of(model, inputs, weight_bits, activation_bits, attention=weight_bits < 8)


def bitstep(name: str, batch: int, weight_bits: int, activation_bits: int) -> Denoise:
    with get_context("spawn").Pool(1) as other:  # running a model in floating point leaves megabytes behind
        plan = other.apply(planned, (name, weight_bits, activation_bits))
    return Denoiser(packed(build(name), plan))


def peer(name: str, batch: int, runtime: str) -> Denoise:
    from bitstep.stages.peers import PEERS

    return PEERS[runtime].compile(Denoiser(build(name)), example(name, batch))


OURS: dict[str, Callable[[str, int], Denoise]] = {
    "PyTorch eager fp32": lambda name, batch: eager(name, batch, torch.float32),
    "PyTorch eager bf16": lambda name, batch: eager(name, batch, torch.bfloat16),
    **{width: partial(bitstep, weight_bits=bits[0], activation_bits=bits[1]) for width, bits in WIDTHS.items()},
}
PEERS: dict[str, Callable[[str, int], Denoise]] = {
    "OpenVINO f32": partial(peer, runtime="openvino"),
    "OpenVINO int8 + f32": partial(peer, runtime="openvino-int8"),
    "OpenVINO int8 + bf16": partial(peer, runtime="openvino-int8-bf16"),
    "ONNX Runtime int8": partial(peer, runtime="onnxruntime-int8"),
    "torchao int8": partial(peer, runtime="torchao-int8"),
    "optimum-quanto int8": partial(peer, runtime="quanto-int8"),
}
EVERYWHERE = [  # imported before anything is measured
    "diffusers.models.transformers.dit_transformer_2d",
    "diffusers.pipelines.ddim.pipeline_ddim",
    "diffusers.schedulers.scheduling_ddim",
]
IMPORTS = {  # by the first word of the runtime's name
    "bitstep": ["bitstep.checkpoint", "bitstep.methods"],
    "OpenVINO": ["openvino", "nncf"],
    "ONNX": ["onnxruntime.quantization"],
    "torchao": ["torchao.quantization"],
    "optimum-quanto": ["optimum.quanto"],
}


# ---- one process per runtime


def step_of(runtime: str, name: str, batch: int, pipeline: bool) -> Callable[[], Any]:
    """What is timed: a forward pass, or all of a pipeline."""
    from diffusers import DDIMPipeline, DDIMScheduler
    from diffusers.models.unets.unet_2d import UNet2DOutput

    denoise = {**OURS, **PEERS}[runtime](name, batch)
    if not pipeline:
        inputs = example(name, batch)
        return lambda: denoise(*inputs)
    whole = DDIMPipeline(build(name), DDIMScheduler())
    whole.set_progress_bar_config(disable=True)
    whole.unet.forward = lambda x, t, *_, **__: UNet2DOutput(denoise(x, t.expand(len(x))))
    return lambda: whole(batch_size=batch, num_inference_steps=STEPS, output_type="np")


def resident_mb() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory_mb("VmRSS")


def work(runtime: str, name: str, batch: int, pipeline: bool) -> None:
    """Build, say so, then time a visit for every line on standard input; one line of JSON for each."""
    torch.set_grad_enabled(False)
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    try:
        for module in [*EVERYWHERE, *IMPORTS.get(runtime.split()[0], [])]:
            import_module(module)
        imported = resident_mb()
        step = step_of(runtime, name, batch, pipeline)
        for _ in range(1 if pipeline else 5):
            step()
    except Exception as error:  # a runtime that is missing or cannot run the model is a row of its own
        reply.write(json.dumps({"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}) + "\n")
        return
    resident = resident_mb()
    reply.write(json.dumps({"resident_mb": resident, "model_mb": resident - imported}) + "\n")
    for line in sys.stdin:
        times = []
        if not pipeline:
            step()  # fills the caches again, which the others had meanwhile
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1000)
        reply.write(json.dumps(times) + "\n")


class Worker:
    def __init__(self, python: str, runtime: str, name: str, batch: int, pipeline: bool) -> None:
        command = [python, __file__, "--worker", runtime, name, str(batch), "pipeline" if pipeline else "forward"]
        env = None if python == sys.executable else {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        self.row: dict[str, Any] = {"name": runtime}
        self.row |= self.read() or {}
        self.times: list[float] = []

    def read(self) -> Any:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.row["failed"] = f"no answer in {PATIENCE} s"
            self.process.kill()
            return None
        line = self.process.stdout.readline()
        if not line:
            self.row["failed"] = "the process died"
            return None
        return json.loads(line)

    def visit(self, calls: int) -> None:
        if "failed" in self.row:
            return
        assert self.process.stdin is not None
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        self.times += self.read() or []

    def finish(self) -> dict[str, Any]:
        self.process.kill()
        self.process.wait()
        if "failed" not in self.row:
            low, _, high = statistics.quantiles(self.times, n=4)
            self.row |= {"median_ms": statistics.median(self.times), "spread_ms": high - low, "calls": len(self.times)}
        return self.row


def compare(name: str, batch: int, settings: argparse.Namespace, pipeline: bool = False) -> dict[str, Any]:
    """All runtimes on one model, interleaved."""
    workers = []
    for runtime in settings.runtimes:
        print(f"{name} batch {batch}: {runtime}", end="", flush=True)
        python = sys.executable if runtime in OURS else settings.peers
        workers.append(Worker(python, runtime, name, batch, pipeline))
        print(" -", workers[-1].row.get("failed", "ready"), flush=True)
    for _ in range(settings.rounds):
        for worker in workers:
            worker.visit(1 if pipeline else 5)
    return {"model": name, "batch": batch, "rows": [worker.finish() for worker in workers]}


def first_image(folder: str, begin: float) -> None:
    """Print the seconds from ``begin`` (of the epoch), and from the end of the imports, to an image of the pipeline."""
    import_module("bitstep")
    from diffusers import DDIMPipeline

    imported = time.time()
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(num_inference_steps=STEPS)
    end = time.time()
    print(json.dumps({"with_imports_s": end - begin, "without_s": end - imported}))


def compare_first_images(rounds: int) -> list[dict[str, Any]]:
    """Fresh processes, each loading a folder of model A, interleaved over the widths."""
    from diffusers import DDIMPipeline, DDIMScheduler

    measured: dict[str, list[dict[str, float]]] = {width: [] for width in WIDTHS}
    with tempfile.TemporaryDirectory() as folder:
        for width, bits in WIDTHS.items():
            DDIMPipeline(packed(build("A"), planned("A", *bits)), DDIMScheduler()).save_pretrained(f"{folder}/{width}")
        for _ in range(rounds):
            for width, runs in measured.items():
                command = [sys.executable, __file__, "--first-image", f"{folder}/{width}", str(time.time())]
                done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    keys = ("with_imports_s", "without_s")
    return [{"name": n, **{k: statistics.median(run[k] for run in runs) for k in keys}} for n, runs in measured.items()]


# ---- the document


def table(comparison: dict[str, Any], of: str = "") -> str:
    rows = comparison["rows"]
    median = {row["name"]: row["median_ms"] for row in rows if "median_ms" in row}
    reference = next((name for name in REFERENCES if name in median), REFERENCES[0])
    columns = ["runtime", "median ms", "quartiles apart ms", f"{reference} = 1", "resident MB", "less imports MB"]
    lines = []
    for row in sorted(rows, key=lambda row: row.get("median_ms", float("inf"))):
        if "failed" in row:
            lines.append([row["name"], row["failed"], "", "", "", ""])
            continue
        ratio = f"{median[reference] / row['median_ms']:.2f}x" if reference in median else ""
        times = f"{row['median_ms']:.1f}", f"{row['spread_ms']:.1f}"
        lines.append([row["name"], *times, ratio, f"{row['resident_mb']:.0f}", f"{row['model_mb']:.0f}"])
    return f"### {comparison['model']}, batch {comparison['batch']}{of}\n\n{markdown(columns, lines)}"


def document(results: dict[str, Any]) -> str:
    machine = results["machine"]
    about = f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}; {machine['flags']}."
    models = "\n".join(f"- **{name}**: {text}" for name, text in MODELS.items())
    parts = [about, models, *map(table, results["comparisons"])]
    if "sampling" in results:
        parts.append(table(results["sampling"], f": {STEPS} steps of DDIM, the whole pipeline"))
    if "first_image" in results:
        parts.append(f"### A: from `from_pretrained` to an image of {STEPS} steps, in a fresh process")
        lines = [[r["name"], f"{r['without_s']:.2f}", f"{r['with_imports_s']:.2f}"] for r in results["first_image"]]
        parts.append(markdown(["runtime", "seconds", "with all imports"], lines))
    return "\n\n".join(parts)


def summary(results: dict[str, Any]) -> str:
    """The README's few rows: milliseconds of one forward pass at batch 1."""
    single = {c["model"]: {row["name"]: row for row in c["rows"]} for c in results["comparisons"] if c["batch"] == 1}
    measured = [name for name in SUMMARY if all("median_ms" in rows.get(name, {}) for rows in single.values())]
    lines = [[name, *(f"{rows[name]['median_ms']:.0f}" for rows in single.values())] for name in measured]
    return markdown(["runtime", *(MODELS[name].partition(",")[0] for name in single)], lines)


def machine(avx2: bool) -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    flags = [flag for flag in ("avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_int8", "avx_vnni") if flag in info]
    return {
        "cpu": processor(),
        "flags": "held to AVX2" if avx2 else " ".join(flags) or "no AVX512",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--first-image", nargs=2, help=argparse.SUPPRESS)
    names = [*(f"{name}{batch}" for name, batch in COMPARISONS), "sampling", "first_image"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="the tables to measure")
    runtimes = [*OURS, *PEERS]
    parser.add_argument("--runtimes", nargs="+", choices=runtimes, default=runtimes, help="some take long to build")
    parser.add_argument("--rounds", type=int, default=20, help="visits to every runtime, of 5 calls each")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has the other runtimes")
    parser.add_argument("--avx2", action="store_true", help="let no runtime use more")
    parser.add_argument("--out", type=lambda path: Path(path).resolve())
    arguments = parser.parse_args()
    arguments.out = arguments.out or (RESULTS.with_name("cpu-avx2.json") if arguments.avx2 else RESULTS)
    if arguments.worker:
        runtime, name, batch, kind = arguments.worker
        work(runtime, name, int(batch), kind == "pipeline")
        return
    if arguments.first_image:
        first_image(arguments.first_image[0], float(arguments.first_image[1]))
        return
    if arguments.avx2:
        os.environ |= AVX2  # of the processes to come
    results: dict[str, Any] = {"machine": machine(arguments.avx2), "comparisons": []}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    comparisons = results["comparisons"]

    def save() -> None:
        write(arguments.out, json.dumps(results, indent=1) + "\n")

    for name, batch in COMPARISONS:
        done = any(c["model"] == name and c["batch"] == batch for c in comparisons)
        if f"{name}{batch}" in arguments.only and not done:
            comparisons.append(compare(name, batch, arguments))
            comparisons.sort(key=lambda c: COMPARISONS.index((c["model"], c["batch"])))
            save()
    if "sampling" in arguments.only and "sampling" not in results:
        results["sampling"] = compare("A", 1, arguments, pipeline=True)
        save()
    if "first_image" in arguments.only and "first_image" not in results:
        results["first_image"] = compare_first_images(arguments.rounds)
        save()
    if arguments.out.parent == RESULTS.parent:
        put(DOCUMENT, arguments.out.stem, document(results))
        put(ROOT / "README.md", arguments.out.stem.replace("cpu", "speed"), summary(results))
    else:
        print(document(results))


if __name__ == "__main__":
    main()
