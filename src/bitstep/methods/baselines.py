"""What the papers are measured against: plain rounding, and training of everything on images."""

from __future__ import annotations

from typing import Any

from bitstep.methods.base import Activations, Calibration, LearningRates, Method, Phase, UniformWeights
from bitstep.methods.objectives.diffusion import DiffusionLoss

MINMAX = Method(
    name="minmax",
    weights=UniformWeights(range="minmax"),
    activations=Activations(per_step=False, range="minmax"),
    calibration=Calibration(images=16, steps=50),
)

MSE = Method(
    name="mse",
    activations=Activations(per_step=False),
    calibration=Calibration(images=16, steps=50),
)

_SHORT: dict[str, Any] = {
    "calibration.steps": 50,
    # ten times as fast as the published schedule, which has a hundred times as long (docs/log.md)
    "training.0.learning_rates": {
        "weight": 1e-2,
        "weight_scale": 1e-3,
        "activation_scale": 1e-3,
        "activation_zero_point": 1e-2,
    },
}

LSQ = Method(
    name="lsq",
    activations=Activations(per_step=False),
    calibration=Calibration(images=16, steps=100),
    training=(
        Phase(
            objective=DiffusionLoss(),
            iterations=200_000,
            batch_size=64,
            learning_rates=LearningRates(
                weight=1e-3, weight_scale=1e-4, activation_scale=1e-4, activation_zero_point=1e-3
            ),
            decay="cosine",
            ema=0.999,
        ),
    ),
    efforts={
        "quick": {**_SHORT, "training.0.batch_size": 16, "training.0.iterations": 250},
        "standard": {**_SHORT, "training.0.batch_size": 32, "training.0.iterations": 2_000},
    },
)
"""Quantization-aware training of weights and step sizes (arXiv 1902.08153) on images (``--data``). As everywhere, the
first and the last layer, the time embedding, norms and biases stay as they are."""
