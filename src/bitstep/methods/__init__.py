"""The methods: one paper, one file, each a frozen composition of slots; this table is all that the engine knows of them."""

from __future__ import annotations

from bitstep.methods.baselines import MINMAX, MSE
from bitstep.methods.efficientdm import EFFICIENTDM

METHODS = {method.name: method for method in (MINMAX, MSE, EFFICIENTDM)}
