"""Peak memory of training: block-wise distillation, and that of the last blocks alone, against end-to-end distillation.

    python benchmarks/memory.py

The model is a diffusers UNet of the size of google/ddpm-cifar10-32 with random weights. Each objective trains a student
in a process of its own, with the same slots (W4A4, batch size, dense weights, a step size per timestep), for a few
iterations of every unit; what is compared is the growth of the peak resident memory from the moment training starts.
Block-wise distillation keeps the inputs and outputs of the block at hand on disk; their size is reported beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from host import memory_mb
from pages import ROOT, markdown, put, write
from torch import nn

from bitstep.methods.base import Calibration, LearningRates, Method, Objective, Phase
from bitstep.methods.objectives.blockwise import BlockwiseDistillation
from bitstep.methods.objectives.trajectory import TrajectoryDistillation
from bitstep.stages.calibrate import record
from bitstep.stages.finetune import TrainingState, finetune
from bitstep.stages.load import Source
from bitstep.stages.prepare import prepare

RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
PAGE = ROOT / "docs" / "results.md"
SAMPLES, BATCH, ITERATIONS = 64, 16, 2
OBJECTIVES: dict[str, Objective] = {
    "end to end": TrajectoryDistillation(),
    "block-wise": BlockwiseDistillation(samples=SAMPLES),
    "the last six blocks": TrajectoryDistillation(last=6),
}


def measure(objective: Objective) -> dict[str, float]:
    """Megabytes that training adds to the resident memory at its peak, and that it keeps on disk."""
    from cpu import build

    torch.manual_seed(0)
    denoiser: nn.Module = build("A").requires_grad_(False)
    source = Source("random", DDIMPipeline(denoiser, DDIMScheduler()))
    phase = Phase(
        objective=objective,
        iterations=ITERATIONS,
        batch_size=BATCH,
        learning_rates=LearningRates(weight=1e-3, weight_scale=1e-3, activation_scale=1e-3),
    )
    method = Method(name="memory", calibration=Calibration(range_images=2), training=(phase,))
    with tempfile.TemporaryDirectory() as folder:
        pool = record(source, Path(folder) / "pool", images=SAMPLES // 4, batch_size=BATCH, steps=4, seed=0)
        student = prepare(denoiser, pool, method, weight_bits=4, activation_bits=4)
        context = student.context(denoiser, pool, Path(folder), seed=0)
        before, disk = _reset_peak(), 0
        for _ in finetune(context, method.training, TrainingState()):
            disk = max(disk, sum(file.stat().st_size for file in (Path(folder) / "block").glob("*")))
        return {"memory_mb": memory_mb("VmHWM") - before, "disk_mb": disk / 1e6}


def _reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now (Linux)
    return memory_mb("VmHWM")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--objective", choices=OBJECTIVES, help=argparse.SUPPRESS)
    chosen = arguments.parse_args().objective
    if chosen:
        print(json.dumps(measure(OBJECTIVES[chosen])))
        return
    rows = {}
    for name in OBJECTIVES:
        process = subprocess.run([sys.executable, __file__, "--objective", name], stdout=subprocess.PIPE, check=True)
        rows[name] = json.loads(process.stdout.splitlines()[-1])
        print(name, rows[name])
    settings = {"bits": "W4A4", "batch_size": BATCH, "samples": SAMPLES, "torch": torch.__version__}
    write(RESULTS, json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    put(PAGE, RESULTS.stem, table(settings, rows))


def table(settings: dict[str, Any], rows: dict[str, dict[str, float]]) -> str:
    lines = [[name, f"{row['memory_mb']:,.0f}", f"{row['disk_mb']:,.0f}"] for name, row in rows.items()]
    cells = markdown(["distillation", "memory while training (MB)", "kept on disk (MB)"], lines)
    whole = rows["end to end"]["memory_mb"]
    shares = [f"{name} {row['memory_mb'] / whole:.2f}" for name, row in rows.items() if name != "end to end"]
    about = ", ".join(f"{key} {value}" for key, value in settings.items())
    return f"{cells}\n\nOf end to end: {', '.join(shares)}. {about}."


if __name__ == "__main__":
    main()
