"""The methods: one paper, one file, each a frozen composition of slots; the engine knows them by this table only."""

from __future__ import annotations

from bitstep.methods.adaround import ADAROUND
from bitstep.methods.base import Effort, Method
from bitstep.methods.baselines import LSQ, MINMAX, MSE
from bitstep.methods.best import BEST_ADAPTERS, BEST_BINARY, BEST_BLOCKS, BEST_WIDE
from bitstep.methods.binarydm import BINARY_BASELINE, BINARYDM, BINARYDM_EBB
from bitstep.methods.dilatequant import DILATEQUANT
from bitstep.methods.efficientdm import EFFICIENTDM

METHODS = {
    method.name: method
    for method in (
        MINMAX,
        MSE,
        ADAROUND,
        LSQ,
        EFFICIENTDM,
        DILATEQUANT,
        BEST_ADAPTERS,
        BEST_WIDE,
        BINARY_BASELINE,
        BINARYDM,
        BINARYDM_EBB,
        BEST_BINARY,
        BEST_BLOCKS,
    )
}
BEST = "best"
NAMES = (BEST, *METHODS)


def method_named(name: str, weight_bits: float, activation_bits: int, effort: Effort) -> Method:
    """The method of one of :data:`NAMES`; ``best`` is what wins at the width and the effort."""
    if name != BEST:
        return METHODS[name]
    if weight_bits <= 2:
        return BEST_BINARY
    if weight_bits >= activation_bits > 4:
        return BEST_WIDE
    return BEST_ADAPTERS if effort == "quick" else BEST_BLOCKS
