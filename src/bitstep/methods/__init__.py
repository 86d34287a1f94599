"""The methods: one paper, one file, each a frozen composition of slots; the engine knows them by this table only."""

from __future__ import annotations

from bitstep.methods.base import Method
from bitstep.methods.baselines import ADAROUND, LSQ, MINMAX, MSE
from bitstep.methods.best import BEST, BEST_BINARY
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
    )
}


def named(name: str, weight_bits: float) -> Method:
    """The method of that name. ``best`` stands for what wins at the width: up to two bits a weight, ``best-binary``.

    KeyError where there is none.
    """
    method = METHODS[name]
    return BEST_BINARY if method is BEST and weight_bits <= 2 else method
