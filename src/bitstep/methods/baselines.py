"""What the papers are measured against: plain rounding, without any training."""

from __future__ import annotations

from bitstep.methods.base import Activations, Calibration, Method, UniformWeights

MINMAX = Method(
    name="minmax",
    weights=UniformWeights(range="minmax"),
    activations=Activations(per_step=False, range="minmax"),
    calibration=Calibration(images=64, steps=50),
)

MSE = Method(
    name="mse",
    activations=Activations(per_step=False),
    calibration=Calibration(images=64, steps=50),
)
