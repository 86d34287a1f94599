"""Speed and memory of whole denoisers on the CPU: bitstep at several widths against eager PyTorch and other runtimes.

    python benchmarks/cpu.py                      # every row that benchmarks/results/cpu.json lacks, then the tables
    python benchmarks/cpu.py --only A1 --rounds 3 --out smoke.json

Each runtime lives in a process of its own and is visited in turn, so that all rows of a table see the same machine;
the medians over all rounds are kept. Weights are random: only the shapes matter. Nothing else should be running.
The other runtimes come with ``pip install bitstep[bench]``; ``--peers PYTHON`` names another interpreter that has them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/cpu.json"
DOCUMENT = ROOT / "docs/performance.md"

MODELS = {
    "A": "DDPM for CIFAR-10, the configuration of google/ddpm-cifar10-32",
    "B": "latent diffusion UNet of the LDM-4 kind, 64x64 latents",
    "C": "DiT-B/2, 32x32 latents",
}
COMPARISONS = [("A", 1), ("A", 4), ("A", 16), ("B", 1), ("C", 1)]
PEER = "OpenVINO int8 + bf16"


# ---- the models


def build(name: str) -> nn.Module:
    from diffusers import DiTTransformer2DModel, UNet2DModel

    torch.manual_seed(0)
    if name == "C":
        model = DiTTransformer2DModel(
            num_attention_heads=12, attention_head_dim=64, out_channels=8, num_layers=12, norm_eps=1e-6
        )
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
    sample = Sample(model.eval(), labels=name == "C")
    return sample.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Sample(nn.Module):
    """A denoiser as a function of its input alone."""

    def __init__(self, model: nn.Module, labels: bool) -> None:
        super().__init__()
        self.model = model
        self.labels = labels

    def forward(self, x: Tensor) -> Tensor:
        time_and_label: dict[str, Tensor] = {"timestep": torch.full((x.shape[0],), 500)}
        if self.labels:
            time_and_label["class_labels"] = torch.zeros(x.shape[0], dtype=torch.long)
        return self.model(x, **time_and_label, return_dict=False)[0]  # type: ignore[no-any-return]


def example(name: str, batch: int) -> Tensor:
    channels, size = {"A": (3, 32), "B": (3, 64), "C": (4, 32)}[name]
    return torch.randn(batch, channels, size, size)


# ---- the runtimes: each takes a model's name and a batch size, and gives a function to time


def eager(name: str, batch: int, dtype: torch.dtype) -> Callable[[], Any]:
    model, x = build(name).to(dtype), example(name, batch).to(dtype)
    return lambda: model(x)


def bitstep(name: str, batch: int, weight_bits: int, activation_bits: int) -> Callable[[], Any]:
    from bitstep.numerics.packing import pack
    from bitstep.numerics.uniform import quantize, search_range
    from bitstep.runtime.dispatch import set_backend
    from bitstep.runtime.fused import fuse
    from bitstep.runtime.layers import LayerFormat, packed_like
    from bitstep.runtime.replay import enable_replay

    model, x = build(name), example(name, batch)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer_name in layers:
        layer = model.get_submodule(layer_name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        outer = layer_name in (layers[0], layers[-1]) or ".time_" in layer_name
        bits, codes_bits = (8, 8) if outer else (weight_bits, activation_bits)
        weight = layer.weight.detach().flatten(1)
        if bits == 1:
            codes, scale = (weight >= 0).to(torch.uint8), weight.abs().mean(1)
        else:
            scale, zero_point = search_range(weight, bits, symmetric=True, method="minmax")
            codes = quantize(weight, scale[:, None], zero_point[:, None], bits)
        packed = packed_like(layer, LayerFormat(bits, 1, True, codes_bits, 1, False), None)
        assert packed.input_scale is not None
        assert packed.input_zero_point is not None
        packed.weight_packed.copy_(pack(codes, bits)[None])
        packed.weight_scale.copy_(scale[None])
        packed.input_scale.fill_(8 / 2**codes_bits)
        packed.input_zero_point.fill_(2 ** (codes_bits - 1))
        if layer.bias is not None:
            assert packed.bias is not None
            packed.bias.copy_(layer.bias.detach())
        parent, _, child = layer_name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
    set_backend(model)
    fuse(model)
    enable_replay(model)
    return lambda: model(x)


def openvino(name: str, batch: int, int8: bool, precision: str) -> Callable[[], Any]:
    import openvino as ov

    x = example(name, batch)
    converted = ov.convert_model(build(name), example_input=x, input=[x.shape])
    if int8:
        import nncf

        transformer = nncf.ModelType.TRANSFORMER if name == "C" else None
        converted = nncf.quantize(converted, nncf.Dataset([x.numpy()]), model_type=transformer, subset_size=1)
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(converted, "CPU", settings)
    request, array = compiled.create_infer_request(), x.numpy()
    return lambda: request.infer([array], share_inputs=True, share_outputs=True)


def torchao(name: str, batch: int) -> Callable[[], Any]:
    from torchao.quantization import (  # type: ignore[import-not-found, unused-ignore]
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    model, x = build(name), example(name, batch)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(model)
    return lambda: compiled(x)


def quanto(name: str, batch: int) -> Callable[[], Any]:
    from optimum.quanto import freeze, qint8, quantize  # type: ignore[import-not-found, unused-ignore]

    model, x = build(name), example(name, batch)
    quantize(model, weights=qint8, activations=qint8)
    freeze(model)
    return lambda: model(x)


def onnxruntime(name: str, batch: int) -> Callable[[], Any]:
    import tempfile

    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    x = example(name, batch)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"x": x.numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/model.onnx", f"{folder}/int8.onnx"
        torch.onnx.export(build(name), (x,), source, input_names=["x"], dynamo=False)
        quantize_static(source, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)


OURS: dict[str, Callable[[str, int], Callable[[], Any]]] = {
    "PyTorch eager fp32": lambda name, batch: eager(name, batch, torch.float32),
    "PyTorch eager bf16": lambda name, batch: eager(name, batch, torch.bfloat16),
    "bitstep W8A8": lambda name, batch: bitstep(name, batch, 8, 8),
    "bitstep W4A8": lambda name, batch: bitstep(name, batch, 4, 8),
    "bitstep W4A4": lambda name, batch: bitstep(name, batch, 4, 4),
    "bitstep W1A4": lambda name, batch: bitstep(name, batch, 1, 4),
}
PEERS: dict[str, Callable[[str, int], Callable[[], Any]]] = {
    "OpenVINO f32": lambda name, batch: openvino(name, batch, False, "f32"),
    "OpenVINO int8 + f32": lambda name, batch: openvino(name, batch, True, "f32"),
    PEER: lambda name, batch: openvino(name, batch, True, "bf16"),
    "ONNX Runtime int8": onnxruntime,
    "torchao int8": torchao,
    "optimum-quanto int8": quanto,
}


# ---- one process per runtime


def work(runtime: str, name: str, batch: int) -> None:
    """Build, say so, then time a visit for every line on standard input; one line of JSON for each."""
    torch.set_grad_enabled(False)
    reply = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    try:
        step = {**OURS, **PEERS}[runtime](name, batch)
        for _ in range(3):
            step()
    except Exception as error:  # a runtime that is missing or cannot run the model is a row of its own
        reply.write(json.dumps({"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}) + "\n")
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert resident is not None
    reply.write(json.dumps({"resident_mb": int(resident[1]) / 1024}) + "\n")
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1000)
        reply.write(json.dumps(times) + "\n")


class Worker:
    def __init__(self, python: str, runtime: str, name: str, batch: int) -> None:
        command = [python, str(Path(__file__)), "--worker", runtime, name, str(batch)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.row: dict[str, Any] = {"name": runtime, **(self.read() or {"failed": "the process died"})}
        self.times: list[float] = []

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def visit(self, calls: int) -> None:
        if "failed" in self.row:
            return
        assert self.process.stdin is not None
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        times = self.read()
        if times is None:
            self.row["failed"] = "the process died"
        else:
            self.times += times

    def finish(self) -> dict[str, Any]:
        self.process.kill()
        self.process.wait()
        if "failed" not in self.row:
            low, _, high = statistics.quantiles(self.times, n=4)
            self.row |= {"median_ms": statistics.median(self.times), "spread_ms": high - low, "calls": len(self.times)}
        return self.row


def compare(name: str, batch: int, rounds: int, peers: str) -> dict[str, Any]:
    """All runtimes on one model, interleaved."""
    workers = []
    for runtime in [*OURS, *PEERS]:
        print(f"{name} batch {batch}: {runtime}", end="", flush=True)
        workers.append(Worker(sys.executable if runtime in OURS else peers, runtime, name, batch))
        print(" -", workers[-1].row.get("failed", "ready"), flush=True)
    for _ in range(rounds):
        for worker in workers:
            worker.visit(5)
    return {"model": name, "batch": batch, "rows": [worker.finish() for worker in workers]}


# ---- the document


def table(comparison: dict[str, Any]) -> str:
    rows = comparison["rows"]
    median = {row["name"]: row["median_ms"] for row in rows if "median_ms" in row}
    lines = [
        f"### {comparison['model']}, batch {comparison['batch']}",
        "",
        f"| runtime | median ms | quartiles apart ms | {PEER} = 1 | resident MB |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.get("median_ms", float("inf"))):
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['failed']} | | | |")
            continue
        ratio = f"{median[PEER] / row['median_ms']:.2f}x" if PEER in median else ""
        lines.append(
            f"| {row['name']} | {row['median_ms']:.1f} | {row['spread_ms']:.1f} | {ratio} | {row['resident_mb']:.0f} |"
        )
    return "\n".join(lines)


def document(results: dict[str, Any]) -> str:
    machine = results["machine"]
    about = f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}; {machine['flags']}."
    models = "\n".join(f"- **{name}**: {text}" for name, text in MODELS.items())
    return "\n\n".join([about, models, *(table(comparison) for comparison in results["comparisons"])])


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", info)
    flags = [flag for flag in ("avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_int8", "avx_vnni") if flag in info]
    return {
        "cpu": model[1] if model else platform.processor(),
        "flags": " ".join(flags) or "no AVX512",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    names = [f"{name}{batch}" for name, batch in COMPARISONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="model and batch size")
    parser.add_argument("--rounds", type=int, default=20, help="visits to every runtime, of 5 calls each")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has the other runtimes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.worker:
        runtime, name, batch = arguments.worker
        work(runtime, name, int(batch))
        return
    results: dict[str, Any] = {"machine": machine(), "comparisons": []}
    if arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    comparisons = results["comparisons"]
    for name, batch in COMPARISONS:
        done = any(c["model"] == name and c["batch"] == batch for c in comparisons)
        if f"{name}{batch}" in arguments.only and not done:
            comparisons.append(compare(name, batch, arguments.rounds, arguments.peers))
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.out == RESULTS:
        before, _, rest = DOCUMENT.read_text().partition("<!-- results -->")
        _, _, after = rest.partition("<!-- end of results -->")
        DOCUMENT.write_text(f"{before}<!-- results -->\n{document(results)}\n<!-- end of results -->{after}")
    else:
        print(document(results))


if __name__ == "__main__":
    main()
