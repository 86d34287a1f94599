"""The methods: one paper, one file, each a frozen composition of slots; the engine knows them by this table only."""

from __future__ import annotations

from bitstep.methods.baselines import MINMAX, MSE
from bitstep.methods.efficientdm import EFFICIENTDM

METHODS = {method.name: method for method in (MINMAX, MSE, EFFICIENTDM)}
