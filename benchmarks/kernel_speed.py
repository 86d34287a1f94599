"""What part of the processor's arithmetic each native kernel reaches, one by one, in one thread.

    python benchmarks/kernel_speed.py    # writes benchmarks/results/kernels.json and the tables of docs/performance.md

The peak is measured too, by a loop of nothing but byte dot products on registers, compiled on the spot with ``cc``.
Times are the least of many calls, in processor time of the thread, so that other work on the machine costs little.
"""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from host import processor
from pages import ROOT, markdown, put, write

from bitstep.library import instruction_set, instruction_sets
from bitstep.numerics.packing import QuantizedWeight
from bitstep.runtime.attention import Operand, attention
from bitstep.runtime.convolution import PLAIN_INPUT, Before
from bitstep.runtime.cpu import NativeConvolution
from bitstep.runtime.kernel import LayerTensors, Problem

RESULTS = ROOT / "benchmarks/results/kernels.json"
DOCUMENT = ROOT / "docs/performance.md"

PEAK = """
#include <immintrin.h>
#define STEP(x) asm volatile("vpdpbusd %%zmm30, %%zmm31, %%zmm" #x ::: "zmm" #x);
void dots(long count) {
  for (long i = 0; i < count; ++i) {
    STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
  }
}
"""
OPERATIONS = 12 * 128  # of a pass through that loop: 64 multiplications and 64 additions an instruction

ROUNDS = 8
WIDTHS = ("W8A8", "W4A8", "W4A4", "W2A4", "W1A4")
CONVOLUTIONS = (  # kernel, height, width, channels in and out
    (3, 32, 32, 128, 128),
    (3, 16, 16, 256, 256),
    (3, 4, 4, 256, 256),
    (3, 64, 64, 224, 224),
    (3, 32, 32, 448, 448),
    (3, 16, 16, 672, 672),
    (3, 8, 8, 896, 896),
    (1, 32, 32, 448, 448),
    (1, 64, 64, 448, 224),
    (1, 1, 256, 768, 3072),
)
ATTENTIONS = ((1024, 14, 32), (256, 21, 32), (256, 12, 64), (256, 1, 256))  # tokens, heads, channels of a head
OPERANDS = (  # query, key, value; probability
    *[Operand(torch.tensor([6 / 15]), torch.tensor([8.0]), 4)] * 3,
    Operand(torch.tensor([1 / 255]), torch.tensor([0.0]), 8),
)
MAP = (64, 64, 224)  # of the passes that only quantize
EXAMPLE = CONVOLUTIONS[1]  # that every instruction set computes


@dataclass(frozen=True)
class Row:
    """One kernel at one shape: milliseconds of a call, and the multiply-adds of a call times two (0 for none)."""

    kernel: str
    shape: str
    milliseconds: float
    operations: int


def least(call: Callable[[], object], seconds: float = 0.1) -> float:
    """The shortest of the calls made in some seconds of processor time, in milliseconds."""
    call()
    best, start, calls = math.inf, time.thread_time(), 0
    while time.thread_time() - start < seconds or calls < 5:
        before = time.thread_time_ns()
        call()
        best, calls = min(best, (time.thread_time_ns() - before) / 1e6), calls + 1
    return best


def peak() -> float:
    """Operations a nanosecond of 512-bit byte dot products on registers."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(PEAK)
        subprocess.run(
            ["cc", "-O2", "-mavx512f", "-mavx512vnni", "-shared", "-fPIC", source, "-o", library], check=True
        )
        dots, count = ctypes.CDLL(str(library)).dots, 100_000
        return OPERATIONS * count / least(lambda: dots(ctypes.c_long(count)), 1.0) / 1e6


def layer(kernel: int, channels: int, out: int, width: str) -> NativeConvolution:
    weight_bits, activation_bits = int(width[1]), int(width[3])
    shape = (out, channels, kernel, kernel)
    codes = torch.randint(0, 2**weight_bits, (1, out, channels * kernel**2), dtype=torch.uint8)
    zero_point = torch.full((out,), 2 ** (weight_bits - 1), dtype=torch.uint8) if weight_bits > 1 else None
    problem = Problem(
        op="conv2d",
        in_channels=channels,
        out_channels=out,
        kernel_size=(kernel, kernel),
        stride=(1, 1),
        padding=(kernel // 2,) * 2,
        dilation=(1, 1),
        groups=1,
        weight_bits=weight_bits,
        bases=1,
        symmetric=True,
        activation_bits=activation_bits,
        channel_reciprocal=False,
        device="cpu",
    )
    weight = QuantizedWeight(codes, torch.full((1, out), 0.01), zero_point, weight_bits, shape)
    return NativeConvolution(problem, LayerTensors(weight, torch.zeros(out), None))


def convolve(convolution: NativeConvolution, x: torch.Tensor, before: Before = PLAIN_INPUT) -> Callable[[], object]:
    levels = convolution.top + 1
    scale, zero_point = torch.tensor([8 / levels]), torch.tensor([levels / 2])
    return lambda: convolution.convolve(x, scale, zero_point, before)


def measure(once: Callable[[], list[Row]]) -> list[Row]:
    """Every kernel in turn, some rounds over, so that a busy moment of the machine spoils no row."""
    rounds = [once() for _ in range(ROUNDS)]
    return [min(row, key=lambda one: one.milliseconds) for row in zip(*rounds, strict=True)]


def one_by_one() -> list[Row]:
    torch.manual_seed(0)
    rows = []
    height, width, channels = MAP
    x = torch.randn(1, height, width, channels)
    # a layer of one output channel is nearly nothing but the quantization of its input
    narrow, shape = layer(1, channels, 1, "W8A8"), f"{height}x{width}, {channels}"
    norm = Before(eps=1e-5, groups=32, gain=torch.ones(channels), shift=torch.zeros(channels), activation="silu")
    rows.append(Row("quantize", shape, least(convolve(narrow, x)), 0))
    rows.append(Row("GroupNorm + SiLU + quantize", shape, least(convolve(narrow, x, norm)), 0))
    for convolution in CONVOLUTIONS:
        rows += at_every_width(*convolution)
    for tokens, heads, channels in ATTENTIONS:
        q, k, v = (torch.randn(1, tokens, heads * channels) for _ in range(3))
        shape, operations = f"{tokens} tokens, heads: {heads} of {channels}", 4 * tokens**2 * heads * channels
        rows.append(Row("attention", shape, least(partial(attention, q, k, v, heads)), operations))
        coded = partial(attention, q, k, v, heads, OPERANDS)
        rows.append(Row("attention, operands A4", shape, least(coded), operations))
    return rows


def at_every_width(kernel: int, height: int, width: int, channels: int, out: int) -> list[Row]:
    x = torch.randn(1, height, width, channels)
    shape, operations = f"{height}x{width}, {channels} to {out}", 2 * height * width * channels * out * kernel**2
    calls = {bits: convolve(layer(kernel, channels, out, bits), x) for bits in WIDTHS}
    return [Row(f"{kernel}x{kernel} {bits}", shape, least(call), operations) for bits, call in calls.items()]


def by_instruction_set() -> dict[str, list[Row]]:
    """The example under each that this machine offers."""
    rows = {}
    for name in instruction_sets():
        with instruction_set(name):
            rows[name] = measure(lambda: at_every_width(*EXAMPLE))
    return rows


def instruction_set_table(results: dict[str, object]) -> str:
    rows = results["instruction_sets"]
    assert isinstance(rows, dict)
    kernel, height, width, channels, out = EXAMPLE
    shape = f"A {kernel}x{kernel} convolution, {height}x{width}, {channels} to {out} channels"
    lines = [[f"`{name}`", *(f"{row['milliseconds']:.2f}" for row in found)] for name, found in rows.items()]
    return f"{shape}, in milliseconds; {results['processor']}.\n\n{markdown(['instruction set', *WIDTHS], lines)}"


def table(results: dict[str, object]) -> str:
    top = float(str(results["peak"]))
    lines = []
    rows = results["rows"]
    assert isinstance(rows, list)
    for row in (Row(**row) for row in rows):
        rate = row.operations / row.milliseconds / 1e6
        reached = (f"{rate:.0f}", f"{rate / top:.2f}") if rate else ("", "")
        lines.append([row.kernel, row.shape, f"{row.milliseconds:.3f}", *reached])
    about = (
        f"{results['processor']}. Peak: {top:.0f} GOP/s a thread, `vpdpbusd` on registers; quantization of the input "
        "is in every time."
    )
    return f"{about}\n\n{markdown(['kernel', 'shape', 'ms', 'GOP/s', 'of the peak'], lines)}"


def main() -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    results: dict[str, object] = {
        "processor": processor(),
        "peak": peak(),
        "rows": [asdict(row) for row in measure(one_by_one)],
        "instruction_sets": {name: [asdict(row) for row in rows] for name, rows in by_instruction_set().items()},
    }
    write(RESULTS, json.dumps(results, indent=1) + "\n")
    put(DOCUMENT, RESULTS.stem, table(results))
    put(DOCUMENT, "instruction-sets", instruction_set_table(results))


if __name__ == "__main__":
    main()
