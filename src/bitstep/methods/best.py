"""What works best together.

For weights of 2 bits and more EfficientDM's adapters and step sizes per timestep, ranges smoothed, and the output
preconditioned before training, which so learns what the noisy sample does not say, and fitted again after it. For
weights of about one bit BinaryDM with such an output.
"""

from __future__ import annotations

from bitstep.methods.base import Output
from bitstep.methods.binarydm import BINARYDM
from bitstep.methods.efficientdm import EFFICIENTDM
from bitstep.methods.rewrites import Smoothing

BEST = EFFICIENTDM.model_copy(
    update={"name": "best", "rewrites": (Smoothing(),), "output": Output(preconditioned=True)}
)

BEST_BINARY = BINARYDM.model_copy(update={"name": "best-binary", "output": Output(preconditioned=True)})
