"""Few-bit diffusion models: quantize, pack, sample.

The verbs of the command line, but for its demo, are functions of this package, and after ``import bitstep`` plain
``DiffusionPipeline.from_pretrained`` loads packed folders. Both wait until they are used: PyTorch is slow to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitstep import registration

if TYPE_CHECKING:
    from bitstep.api import benchmark as benchmark
    from bitstep.api import evaluate as evaluate
    from bitstep.api import inspect as inspect
    from bitstep.api import load as load
    from bitstep.api import quantize as quantize
    from bitstep.api import report as report
    from bitstep.api import sample as sample

__version__ = "0.1.0"
_VERBS = ("benchmark", "evaluate", "inspect", "load", "quantize", "report", "sample")

registration.install()


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return getattr(importlib.import_module("bitstep.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_VERBS})
