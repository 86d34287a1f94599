"""DilateQuant (arXiv 2409.14307): dilated weights, a step size per timestep, blocks distilled one after another.

    Y = Q(X / s; s_x[t]) * Q(s W; s_w),   s >= 1 per input channel, the range of s W that of W

Weight dilation (:mod:`bitstep.numerics.dilation`), the temporal parallel quantizer
(:class:`bitstep.quantizers.activations.ActivationQuantizer`, batches mixing timesteps) and block-wise distillation
(:class:`bitstep.methods.objectives.blockwise.BlockwiseDistillation`) are slots that any recipe may use.

1 / s is folded into the norm or layer before where that is exact (:mod:`bitstep.stages.rewrite`). Elsewhere, behind the
SiLU of a residual block for one, it is a vector that kernels apply in the same pass that turns the input into codes.
"""

from __future__ import annotations

from typing import Any

from bitstep.methods.base import (
    Activations,
    AttentionOperands,
    Calibration,
    LearningRates,
    Method,
    Phase,
    UniformWeights,
)
from bitstep.methods.objectives.blockwise import BlockwiseDistillation
from bitstep.methods.objectives.trajectory import TrajectoryDistillation
from bitstep.methods.rewrites import Dilation, Smoothing, SplitConcatenation


def _short(images: int, samples: int, block_iterations: int, iterations: int) -> dict[str, Any]:
    """A short effort: smoothing takes the place of splitting, everything moves faster than in the published schedule,
    and in the end the last blocks are trained together: at high noise, where pictures are decided, most of the output's
    error is made in them (docs/log.md), and only the output tells which of their errors show."""
    block_by_block = Phase(
        objective=BlockwiseDistillation(samples=samples),
        iterations=block_iterations,
        batch_size=16,
        learning_rates=LearningRates(weight=1e-1, weight_scale=1e-3, activation_scale=1e-2, activation_zero_point=2e-2),
        decay="cosine",
    )
    last_blocks = Phase(
        objective=TrajectoryDistillation(last=6, emphasis=0.5),
        iterations=iterations,
        batch_size=8,
        learning_rates=LearningRates(weight=3e-2, weight_scale=5e-3, activation_scale=2e-2, activation_zero_point=5e-2),
    )
    return {
        "rewrites": [change.model_dump() for change in (Smoothing(), Dilation())],
        "calibration.steps": 50,
        "calibration.images": images,
        "training": [phase.model_dump() for phase in (block_by_block, last_blocks)],
    }


DILATEQUANT = Method(
    name="dilatequant",
    rewrites=(SplitConcatenation(), Dilation()),
    weights=UniformWeights(),
    activations=Activations(per_step=True),
    attention=AttentionOperands(quantized=True),
    calibration=Calibration(images=256, steps=100),
    training=(
        Phase(
            objective=BlockwiseDistillation(samples=5120),
            iterations=5000,
            batch_size=32,
            learning_rates=LearningRates(
                weight=1e-2, weight_scale=1e-4, activation_scale=1e-3, activation_zero_point=1e-3
            ),
            decay="cosine",
        ),
    ),
    efforts={
        "quick": _short(images=32, samples=128, block_iterations=20, iterations=150),
        "standard": _short(images=128, samples=256, block_iterations=100, iterations=1_500),
    },
)
