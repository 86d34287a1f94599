"""The command line: arguments in, one verb of :mod:`bitstep.api`, a table out.

Exit code 0, 2 for a usage error, 1 for a failure; errors are one line on stderr, and ``--verbose`` adds the traceback.
The verbs are imported when they run, so that help and mistyped options do not wait for PyTorch.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bitstep import __version__
from bitstep.errors import BitstepError, UsageError
from bitstep.files import check_path, write_atomically
from bitstep.progress import Noted

WIDEST = 10_000  # of a table that nobody looks at in a terminal
INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Source = Annotated[
    str, typer.Argument(help="A diffusers pipeline folder, a Hub id, demo:NAME, or the folder of a single component.")
]
Packed = Annotated[str, typer.Argument(help="A folder written by `bitstep quantize`, or its Hub id.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same noise for every model, image by image.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps; the pipeline's own default if not given.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time; does not change them.")]
Backend = Annotated[str | None, typer.Option(help="Force one kernel for every packed layer, or fail with its reasons.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...")]
Prompts = Annotated[Path | None, typer.Option(help="Text file with one prompt a line; built-in ones if not given.")]
Pictures = Annotated[
    Path | None,
    typer.Option(help="Folder of pictures that the pipeline starts from, in turn (inpainting, editing, ...)."),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="WIDTHxHEIGHT[xFRAMES]", help="Of the pictures or videos; the pipeline's own default if not given."
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        callback=lambda path: path and check_path(path, "numbers", (".json",)),
        help="Also write the numbers to this .json file.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what bitstep wrote to the output folder.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bitstep {__version__}")
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the full traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Few-bit diffusion models."""


@app.command()
def quantize(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder of the packed pipeline; must be empty or new.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a YAML file.")] = "best",
    bits: Annotated[str, typer.Option(help="Bits of weights and activations.", metavar="WxAy")] = "W4A4",
    effort: Annotated[
        Literal["quick", "standard", "full"], typer.Option(help="Minutes; a good result; the published setting.")
    ] = "standard",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SLOT.KEY=VALUE", help="Change one value of the recipe.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder or .npz file of training images, for recipes that use them.")
    ] = None,
    prompts: Prompts = None,
    pictures: Pictures = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to run; CUDA where there is one, if not given.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the interrupted run in the folder; its other options are repeated."),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Turn a diffusion pipeline into a low-bit one."""
    from bitstep import api

    folder = api.quantize(
        source,
        recipe=recipe,
        bits=bits,
        out=out,
        effort=effort,
        overrides=set_ or (),
        data=data,
        prompts=prompts,
        pictures=pictures,
        seed=seed,
        device=device,
        resume=resume,
        overwrite=overwrite,
        progress=Bars(),
    )
    print(f"packed pipeline: {folder}")


@app.command()
def sample(
    source: Source,
    out: Annotated[Path, typer.Option(help="A .png grid, or a .npz with uint8 NHWC `images`.")],
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 16,
    steps: Steps = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    prompts: Prompts = None,
    pictures: Pictures = None,
    size: Size = None,
    backend: Backend = None,
    device: Device = "cpu",
) -> None:
    """Sample images from a pipeline, packed or not."""
    from bitstep import api

    with Bars(transient=True).stage("sampling") as progress:
        api.sample(
            source,
            num=num,
            steps=steps,
            seed=seed,
            out=out,
            batch_size=batch_size,
            prompts=prompts,
            pictures=pictures,
            size=size,
            backend=backend,
            device=device,
            progress=progress,
        )
    print(f"{num} images: {out}")


@app.command()
def inspect(
    directory: Packed,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show the size, the operations and the kernel of every layer of a packed pipeline."""
    from bitstep import api

    facts = api.inspect(directory)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    layers = facts.pop("layers")
    _print(facts)
    _print_rows(layers)


@app.command()
def evaluate(
    source: Source,
    against: Annotated[
        str, typer.Option(help="The full-precision SOURCE, or real images: an .npz file or a folder of pictures.")
    ],
    num: Annotated[int, typer.Option(min=2, help="Number of images.")] = 64,
    steps: Steps = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    features: Annotated[
        str | None,
        typer.Option(
            help="Compare as sets too: inception (FID, sFID, Inception Score, precision, recall; needs the extra fid), "
            "or a TorchScript network, images [N,3,H,W] in 0..255 -> [N,D]."
        ),
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=1, help="The real images are mosaics of tiles this many pixels wide.")
    ] = None,
    prompts: Prompts = None,
    pictures: Pictures = None,
    size: Size = None,
    backend: Backend = None,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Compare a pipeline with another one on the same noise, or with real images."""
    from bitstep import api

    with Bars(transient=True).stage("evaluating") as progress:
        numbers = api.evaluate(
            source,
            against=against,
            num=num,
            steps=steps,
            seed=seed,
            batch_size=batch_size,
            features=features,
            tile=tile,
            prompts=prompts,
            pictures=pictures,
            size=size,
            backend=backend,
            device=device,
            progress=progress,
        )
    _print(numbers)
    _write(numbers, json_file)


@app.command()
def benchmark(
    directory: Packed,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME...",
            help="fp32, bf16, fp16, openvino, openvino-int8, openvino-int8-bf16, onnxruntime-int8, torchao-int8, "
            "quanto-int8, or other packed folders; fp32 and bf16 if not given.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a forward pass.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Forward passes of each, taken in turns.")] = 20,
    pictures: Pictures = None,
    size: Size = None,
    backend: Backend = None,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Time the denoiser against the same architecture in full precision and under other runtimes."""
    from bitstep import api

    # `--against fp32 bf16`: an option takes one value, so the words after the first arrive as arguments
    baselines = [*(against or ()), *(more or ())]
    if more and not against:
        raise UsageError(f"unexpected argument {more[0]!r}: what to compare with is given with --against")
    with Bars(transient=True).stage("timing") as progress:
        numbers = api.benchmark(
            directory,
            against=baselines or ("fp32", "bf16"),
            batch_size=batch_size,
            rounds=rounds,
            pictures=pictures,
            size=size,
            backend=backend,
            device=device,
            progress=progress,
        )
    _print_rows(numbers["rows"])
    _print({f"layers run by {name}": count for name, count in numbers["kernels"].items()})
    _write(numbers, json_file)


@app.command()
def report(
    directories: Annotated[list[str], typer.Argument(help="Folders written by `bitstep quantize`, or their Hub ids.")],
    out: Annotated[Path, typer.Option(help="The .html page, which needs no other file.")] = Path("report.html"),
    against: Annotated[
        str | None, typer.Option(help="The full-precision SOURCE they were made from: adds pictures and errors.")
    ] = None,
    num: Annotated[int, typer.Option(min=2, help="Pictures of each.")] = 16,
    steps: Steps = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    prompts: Prompts = None,
    pictures: Pictures = None,
    size: Size = None,
    device: Device = "cpu",
) -> None:
    """Show packed pipelines side by side on one page: size, kernels, step sizes over time, pictures, errors."""
    from bitstep import api

    with Bars(transient=True).stage("sampling") as progress:
        path = api.report(
            directories,
            out=out,
            against=against,
            num=num,
            steps=steps,
            seed=seed,
            batch_size=batch_size,
            prompts=prompts,
            pictures=pictures,
            size=size,
            device=device,
            progress=progress,
        )
    print(f"report: {path}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the packed pipelines and the picture.")] = Path("demo"),
    overwrite: Overwrite = False,
) -> None:
    """Quantize the small model that comes with the package to W4A4, and show what that did to its pictures."""
    from bitstep import api

    result = api.demo(out, overwrite=overwrite, progress=Bars())
    _print_rows(result["rows"])
    print(f"picture: {result['picture']}")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point: runs one command and exits."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = "--verbose" in arguments  # before or after the command
    if not verbose:
        _quieten_libraries()
    try:
        code = app([argument for argument in arguments if argument != "--verbose"], standalone_mode=False)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        _fail(*_explain(error))
    if code == INTERRUPTED:
        _fail("interrupted", code)
    sys.exit(code or 0)


class Bars:
    """A :class:`bitstep.progress.Reporter` on stderr. Where it is no terminal a bar is one line, when it is done.

    transient: bars are gone when they are done, and where there is no terminal nothing is shown
    """

    def __init__(self, *, transient: bool = False) -> None:
        self._console, self._transient = Console(stderr=True), transient

    def line(self, text: str) -> None:
        self._console.print(text, soft_wrap=not self._console.is_terminal)

    @contextmanager
    def stage(self, title: str) -> Iterator[Noted]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        hidden = self._transient and not self._console.is_terminal
        quiet = self._console.quiet
        try:
            with Progress(*columns, console=self._console, transient=self._transient, disable=hidden) as bars:
                bar = bars.add_task(title, total=None, note="")

                def update(done: int, total: int, note: str = "") -> None:
                    bars.update(bar, completed=done, total=total, note=note)

                try:
                    yield update
                except BaseException:  # an unfinished bar is not worth a line
                    bars.live.transient = True
                    self._console.quiet |= not self._console.is_terminal
                    raise
        finally:
            self._console.quiet = quiet


def _explain(error: Exception) -> tuple[str, int]:
    """The one line that an error is worth, and its exit code."""
    if isinstance(error, typer.TyperException):
        return error.format_message().replace("Value error, ", ""), error.exit_code
    if isinstance(error, UsageError):
        return str(error), 2
    if isinstance(error, BitstepError):
        return str(error), 1
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.strerror, error.filename) if part), 1
    return f"{type(error).__name__}: {error} (--verbose shows where)", 1


def _fail(message: str, code: int) -> NoReturn:
    if message:  # `bitstep` alone is a usage error without one: the help has been shown
        print("bitstep: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def _quieten_libraries() -> None:
    """Other people's warnings, and errors logged before they are raised, would drown the one line that matters."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")


def _write(numbers: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        text = json.dumps(numbers, indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))


def _print(numbers: Mapping[str, Any]) -> None:
    table = Table(show_header=False)
    for name, value in numbers.items():
        table.add_row(name.replace("_", " "), _show(value))
    _put(table)


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_show(value) for value in row.values()))
    _put(table)


def _put(table: Table) -> None:
    """To standard output, each row on a line of its own where that is no terminal."""
    Console(width=None if sys.stdout.isatty() else WIDEST).print(table)


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, list):
        return " ".join(_show(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else str(value)
