"""The loss that diffusion models are trained with, for methods that see images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from torch import Tensor

from bitstep.denoiser.calls import Call, run
from bitstep.methods.base import ALL, Context, Objective, Phase, Unit
from bitstep.methods.objectives.trajectory import TrajectoryDistillation
from bitstep.randomness import draw, generator
from bitstep.trajectories.images import unconditional


class DiffusionLoss(Objective):
    """The loss that diffusion models are trained with, on the user's images; without any, trajectory distillation.

    Only the latter knows an emphasis.
    """

    kind: Literal["diffusion"] = "diffusion"
    wants_images: ClassVar[bool] = True

    def units(self, context: Context, phase: Phase, start: int) -> Iterator[Unit]:
        images = context.images
        if images is None:
            yield from TrajectoryDistillation(emphasis=self.emphasis).units(context, phase, start)
            return
        call, _ = context.pool.batch([0])
        sample_name, timestep_name = unconditional(call)

        def loss(iteration: int, part: slice = ALL) -> Tensor:
            indices = draw(len(images), phase.batch_size, context.seed, "images", iteration)
            noised = images.noised(indices, generator(context.seed, "diffusion", iteration))
            sample, timestep, target = (tensor[part] for tensor in noised)
            arguments = {**call.arguments, sample_name: sample, timestep_name: timestep.to(call.timestep.dtype)}
            output = run(context.student, context.placed(Call(arguments)))[:, : target.shape[1]]
            return (output.float() - target.to(output.device)).square().mean()

        if start == 0:
            yield Unit("denoiser", context.layers, loss, context.attention)
