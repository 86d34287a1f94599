"""What works best together: for weights of 2 bits and more EfficientDM, ranges smoothed and the output preconditioned;
for weights of about one bit BinaryDM with such an output."""

from __future__ import annotations

from bitstep.methods.base import Output
from bitstep.methods.binarydm import BINARYDM
from bitstep.methods.efficientdm import EFFICIENTDM
from bitstep.methods.rewrites import Smoothing

BEST = EFFICIENTDM.model_copy(
    update={"name": "best", "rewrites": (Smoothing(),), "output": Output(preconditioned=True)}
)

BEST_BINARY = BINARYDM.model_copy(update={"name": "best-binary", "output": Output(preconditioned=True)})
