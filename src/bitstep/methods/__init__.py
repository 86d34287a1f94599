"""The methods: one paper, one file, each a frozen composition of slots; the engine knows them by this table only."""

from __future__ import annotations

from bitstep.methods.adaround import ADAROUND
from bitstep.methods.base import Effort, Method
from bitstep.methods.baselines import LSQ, MINMAX, MSE
from bitstep.methods.best import BEST, BEST_BINARY, BEST_BLOCKS
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
        BEST,
        BINARY_BASELINE,
        BINARYDM,
        BINARYDM_EBB,
        BEST_BINARY,
        BEST_BLOCKS,
    )
}


def named(name: str, weight_bits: float, activation_bits: int, effort: Effort) -> Method:
    """The method of that name. ``best`` stands for what wins at the width and the effort
    (:mod:`bitstep.methods.best`).

    KeyError where there is none.
    """
    method = METHODS[name]
    if method is not BEST:
        return method
    if weight_bits <= 2:
        return BEST_BINARY
    every_block_pays = weight_bits < activation_bits or activation_bits <= 4
    return BEST_BLOCKS if every_block_pays and effort != "quick" else BEST
