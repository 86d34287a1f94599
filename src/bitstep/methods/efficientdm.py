"""EfficientDM (arXiv 2310.03270): quantization-aware low-rank adapters, distilled without data.

    Y = Q(X; s_x[t]) * Q(W0 + up @ down; s_w)
    minimise || eps_fp(x_t, t, c) - eps_q(x_t, t, c) ||^2  on the full-precision model's own x_t

Merged adapters (:class:`bitstep.quantizers.weights.MergedLoRA`), learning rates relative to each layer's weight step
size ("scale-aware optimization": the paper multiplies gradients by it, which Adam would undo), an activation step size
per timestep (TALSQ: :class:`bitstep.quantizers.activations.ActivationQuantizer`). Concatenated skip connections have
split quantizers, as in Q-Diffusion, on which the authors build.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import PositiveInt
from torch import Tensor

from bitstep.calls import run
from bitstep.layers import frozen
from bitstep.methods.base import Calibration, Context, LearningRates, Method, Objective, Phase, UniformWeights, Unit
from bitstep.methods.rewrites import SplitConcatenation
from bitstep.randomness import draw


class TrajectoryDistillation(Objective):
    """End-to-end distillation of the denoiser's output along full-precision trajectories.

    The loss is on what the pipeline hands to its scheduler: guided, and without a learned variance that nobody uses.
    x_{t-1} never depends on the student, so the trajectories are recorded ahead, and batches mix timesteps.

    last: only the last so many blocks are trained, and gradients and their memory end there; None trains all
    """

    kind: Literal["trajectory"] = "trajectory"
    last: PositiveInt | None = None

    def units(self, context: Context, phase: Phase, start: int) -> Iterator[Unit]:
        layers, attention, pool = context.layers, context.attention, context.pool
        if self.last is not None:
            layers, attention = context.within(*context.blocks()[-self.last :])
        others = [module for name, module in context.trained.items() if name not in {*layers, *attention}]

        def loss(iteration: int) -> Tensor:
            indices = draw(len(pool), phase.batch_size, context.seed, "trajectory", iteration)
            call, target = context.batch(indices)
            weights = context.loss_weights(pool.timesteps[pool.step_of[indices]], self.emphasis)
            with frozen(others):
                output = run(context.student, call)
            error = pool.guided(output.float() - target.float())
            return (error.square().flatten(1).mean(1) * weights.to(error)).mean()

        if start == 0:
            yield Unit("denoiser", layers, loss, attention)


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
