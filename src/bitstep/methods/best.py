"""What should work best together: smoothed ranges and a step size per timestep, blocks distilled one after another,
then everything end to end on the teacher's trajectories. In its short efforts it does not yet: EfficientDM's are
ahead."""

from __future__ import annotations

from bitstep.methods.base import Calibration, LearningRates, Method, Phase
from bitstep.methods.blockwise import BlockwiseDistillation
from bitstep.methods.efficientdm import TrajectoryDistillation
from bitstep.methods.rewrites import Smoothing

_BLOCKS = LearningRates(weight=5e-2, weight_scale=1e-3, activation_scale=5e-3, activation_zero_point=1e-2)
_WHOLE = LearningRates(weight=2e-2, weight_scale=1e-3, activation_scale=5e-3, activation_zero_point=1e-2)

BEST = Method(
    name="best",
    rewrites=(Smoothing(),),
    calibration=Calibration(images=640, steps=100),
    training=(
        Phase(
            objective=BlockwiseDistillation(samples=5120),
            iterations=2000,
            batch_size=32,
            learning_rates=_BLOCKS,
            decay="cosine",
        ),
        Phase(
            objective=TrajectoryDistillation(emphasis=0.5),
            iterations=16_000,
            batch_size=16,
            learning_rates=_WHOLE,
            decay="cosine",
        ),
    ),
    efforts={
        "quick": {
            "calibration.images": 32,
            "calibration.steps": 50,
            "training.0.objective.samples": 128,
            "training.0.batch_size": 8,
            "training.0.iterations": 10,
            "training.1.batch_size": 8,
            "training.1.iterations": 150,
        },
        "standard": {
            "calibration.images": 64,
            "calibration.steps": 50,
            "training.0.objective.samples": 512,
            "training.0.batch_size": 8,
            "training.0.iterations": 40,
            "training.1.batch_size": 8,
            "training.1.iterations": 900,
        },
    },
)
