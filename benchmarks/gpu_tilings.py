"""A sweep of tilings of single layers on an NVIDIA GPU: what bitstep.runtime.cuda.tiling_of should be written by.

    python benchmarks/gpu_tilings.py    # build/tilings.json

Layers, and how they are timed, are those of gpu.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu import SHAPES, Shape, in_processes, machine, microseconds, packed_layer, product_of, require_gpu, tried
from pages import ROOT, write

from bitstep.runtime import cuda
from bitstep.runtime.cuda import Tiling

SWEPT = "W8A8"  # other weights become such bytes before the product


def _is_sensible(tiling: Tiling) -> bool:
    area = tiling.rows * tiling.columns
    sums = area // (32 * tiling.warps)  # in the registers of a thread
    lopsided = max(tiling.rows, tiling.columns) > 4 * min(tiling.rows, tiling.columns)
    small = area <= 64 * 64
    return not lopsided and (8 if tiling.warps == 4 else 32) <= sums <= 128 and (small or tiling.stages < 5)


GRID = product((32, 64, 128), (32, 64, 128), (4, 8), (3, 4, 5), (1, 2, 4, 8))
TILINGS = [tiling for tiling in map(Tiling._make, GRID) if _is_sensible(tiling)]


def with_tiling(tiling: Tiling, call: Callable[[], Any]) -> Any:
    def fixed(*_: Any) -> Tiling:  # a mock's own answer would take longer than many a product
        return tiling

    with mock.patch.object(cuda, "tiling_of", fixed):
        return call()


def compile_tilings(job: tuple[Shape, list[Tiling]]) -> None:
    torch.set_grad_enabled(False)
    shape, tilings = job
    call = product_of(packed_layer(shape, SWEPT), shape.input())
    for tiling in tilings:
        tried(partial(with_tiling, tiling, call))


def sweep_jobs() -> list[tuple[Shape, list[Tiling]]]:
    """Every program of the sweep once: layers of one kernel size that take as many channels at a time share it."""
    alike = {(shape.kernel, cuda._tile_of(shape.channels)): shape for shape in reversed(SHAPES)}
    chunks = [TILINGS[i : i + 5] for i in range(0, len(TILINGS), 5)]
    return [(shape, chunk) for chunk in chunks for shape in alike.values()]


def sweep(shape: Shape) -> dict[str, Any]:
    """Microseconds of the product with every tiling."""
    call = product_of(packed_layer(shape, SWEPT), shape.input())
    with mock.patch.object(cuda, "tiling_of", wraps=cuda.tiling_of) as seen:
        call()
    rule = cuda.tiling_of(*seen.call_args.args)
    times = {tiling: tried(partial(with_tiling, tiling, partial(microseconds, call))) for tiling in {*TILINGS, rule}}
    return {
        "shape": shape._asdict(),
        "rows": shape.rows,
        "rule": rule,
        "times": [[*tiling, us] for tiling, us in times.items() if isinstance(us, float)],
        "failed": [[*tiling, why] for tiling, why in times.items() if isinstance(why, str)],
    }


def swept_line(row: dict[str, Any]) -> str:
    """The rule's time and the best tilings, as multiples of the best time."""
    times = {Tiling(*tiling): us for *tiling, us in row["times"]}
    best = sorted(times, key=times.__getitem__)
    if not best:
        return f"{Shape(**row['shape'])}: {row['failed'][0][-1]}"
    ratio = {tiling: us / times[best[0]] for tiling, us in times.items()}
    rule = f"{ratio[row['rule']]:.2f}" if row["rule"] in ratio else "failed"
    five = " ".join(f"{'.'.join(map(str, tiling))}={ratio[tiling]:.2f}" for tiling in best[:5])
    return f"{Shape(**row['shape'])}: {times[best[0]]:.1f} us, rule {rule} | {five}"


def measure_tilings(out: Path, seconds: float) -> None:
    began = time.monotonic()
    in_processes(compile_tilings, sweep_jobs(), seconds / 2)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        if time.monotonic() - began > seconds:
            print(f"stopped after {seconds:.0f} s, before {shape}")
            break
        rows.append(sweep(shape))
    write(out, json.dumps({"machine": machine(), "tilings": rows}) + "\n")
    print("rows.columns.warps.stages.splits=time, the best being 1")
    print("\n".join(map(swept_line, rows)))
    print(f"{sum(len(row['failed']) for row in rows)} failures; {time.monotonic() - began:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build/tilings.json")
    parser.add_argument("--seconds", type=float, default=120, help="after which the sweep starts no new shape")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    require_gpu()
    measure_tilings(arguments.out, arguments.seconds)


if __name__ == "__main__":
    main()
