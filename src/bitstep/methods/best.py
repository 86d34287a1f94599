"""What works best together, by width; ``best`` stands for the one that wins (:func:`bitstep.methods.method_named`).

Weights as wide as activations: EfficientDM, much of the inputs' ranges moved into the weights, and the output
preconditioned. Narrower weights, and activations of at most four bits: DilateQuant, the last blocks trained together in
the end, and such an output; at the quick effort, which has no time for every block, the former with less of the ranges
moved. One to two bits a weight: BinaryDM's bases and warm-up, activations with a zero point, EfficientDM's
distillation, and such an output.
"""

from __future__ import annotations

from bitstep.methods.base import Activations, LearningRates, Output, Phase
from bitstep.methods.binarydm import BINARY_BASELINE, BinaryWeights
from bitstep.methods.dilatequant import DILATEQUANT
from bitstep.methods.efficientdm import EFFICIENTDM
from bitstep.methods.objectives.trajectory import TrajectoryDistillation
from bitstep.methods.rewrites import Dilation, Smoothing
from bitstep.methods.techniques.warm_up import WarmUp

BEST_ADAPTERS = EFFICIENTDM.model_copy(
    update={"name": "best-adapters", "rewrites": (Smoothing(),), "output": Output(preconditioned=True)}
)

# wide weights can take more of the inputs' ranges; narrow ones pay for it on photographs (docs/log.md)
BEST_WIDE = BEST_ADAPTERS.model_copy(
    update={
        "name": "best-wide",
        "rewrites": (Smoothing(strength=0.65), Dilation(symmetric=True)),
        "efforts": {
            effort: {slot: value for slot, value in settings.items() if slot != "rewrites"}
            for effort, settings in BEST_ADAPTERS.efforts.items()
        },
    }
)

# its short efforts are DilateQuant's, which have such rewrites and last blocks too
BEST_BLOCKS = DILATEQUANT.model_copy(
    update={
        "name": "best-blocks",
        "rewrites": (Smoothing(), Dilation()),
        "output": Output(preconditioned=True),
        "training": (
            *DILATEQUANT.training,
            Phase(
                objective=TrajectoryDistillation(last=6, emphasis=0.5),
                iterations=16_000,
                batch_size=8,
                learning_rates=LearningRates(
                    weight=1e-2, weight_scale=1e-3, activation_scale=5e-3, activation_zero_point=1e-2
                ),
            ),
        ),
    }
)

_SHORT = {
    "training.0.learning_rates": {
        "weight": 1e-2,
        "weight_scale": 1e-2,
        "activation_scale": 1e-2,
        "activation_zero_point": 5e-2,
    }
}

BEST_BINARY = BINARY_BASELINE.model_copy(
    update={
        "name": "best-binary",
        "weights": BinaryWeights(allocation="measured"),
        "activations": Activations(per_step=False),  # signed codes would go unused by half behind a SiLU
        "output": Output(preconditioned=True),
        "training": (
            BINARY_BASELINE.training[0].model_copy(
                update={
                    "objective": TrajectoryDistillation(emphasis=0.5),
                    "techniques": (WarmUp(share=0.1),),
                    "learning_rates": LearningRates(
                        weight=3e-4, weight_scale=3e-4, activation_scale=3e-4, activation_zero_point=1e-3
                    ),
                }
            ),
        ),
        "efforts": {
            "quick": {**BINARY_BASELINE.efforts["quick"], **_SHORT},
            # on few trajectories more iterations fit those
            "standard": {
                **BINARY_BASELINE.efforts["standard"],
                **_SHORT,
                "calibration.images": 256,
                "training.0.iterations": 2_400,
            },
        },
    }
)
