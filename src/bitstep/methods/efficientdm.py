"""EfficientDM (arXiv 2310.03270): quantization-aware low-rank adapters, distilled without data.

    Y = Q(X; s_x[t]) * Q(W0 + up @ down; s_w)
    minimise || eps_fp(x_t, t, c) - eps_q(x_t, t, c) ||^2  on the full-precision model's own x_t

Merged adapters (:class:`bitstep.quantizers.weights.MergedLoRA`), learning rates relative to each layer's weight step
size ("scale-aware optimization": the paper multiplies gradients by it, which Adam would undo), an activation step size
per timestep (TALSQ: :class:`bitstep.quantizers.activations.ActivationQuantizer`), and the objective
:class:`bitstep.methods.objectives.trajectory.TrajectoryDistillation`. Concatenated skip connections have split
quantizers, as in Q-Diffusion, on which the authors build.
"""

from __future__ import annotations

from typing import Any

from bitstep.methods.base import Calibration, LearningRates, Method, Phase, UniformWeights
from bitstep.methods.objectives.trajectory import TrajectoryDistillation
from bitstep.methods.rewrites import SplitConcatenation

_SHORT: dict[str, Any] = {
    "rewrites": [{"kind": "smoothing"}],
    # a short schedule visits each row a few dozen times: everything has to move faster than in the published one, and
    # what little can be learned is better spent on the steps whose errors carry; smoothing takes the place of splitting
    "calibration.steps": 50,
    "calibration.eta": 0.0,
    "training.0.objective.emphasis": 0.5,
    "training.0.batch_size": 8,
    "training.0.learning_rates": {
        "adapter": 0.1,
        "weight_scale": 5e-3,
        "activation_scale": 2e-2,
        "activation_zero_point": 5e-2,
    },
}

EFFICIENTDM = Method(
    name="efficientdm",
    rewrites=(SplitConcatenation(),),
    weights=UniformWeights(rank=32),
    calibration=Calibration(images=640, steps=100, eta=1.0),
    training=(
        Phase(
            objective=TrajectoryDistillation(),
            iterations=16_000,
            batch_size=4,
            # (the paper's 1e-6 for weight scales is absolute; a median step of 0.016 makes 6e-5 of it)
            learning_rates=LearningRates(
                adapter=4e-4, weight_scale=6e-5, activation_scale=5e-4, activation_zero_point=5e-4
            ),
            weight_decay=0.01,
        ),
    ),
    efforts={
        "quick": {**_SHORT, "calibration.images": 32, "training.0.iterations": 250},
        "standard": {**_SHORT, "calibration.images": 128, "training.0.iterations": 1_200},
    },
)
