"""Training images in the denoiser's own space, noised by the pipeline's own schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from bitstep.denoiser.calls import Call
from bitstep.denoiser.steps import timestep_name
from bitstep.errors import BitstepError


@dataclass(frozen=True)
class TrainingImages:
    """Pictures and the diffusion process that a denoiser learned on them.

    pixels: uint8 ``[N, H, W, C]``
    encode: from pictures in [-1, 1] ``[n, C, H, W]`` to what the denoiser works on (a latent, or the pictures)
    schedule: the forward process with the betas and the prediction type of the pipeline's scheduler
    """

    pixels: Tensor
    encode: Callable[[Tensor], Tensor]
    schedule: DDPMScheduler

    @classmethod
    def of_pipeline(cls, pixels: Tensor, pipeline: Any) -> TrainingImages:
        """``pixels`` as the denoiser of a diffusers ``pipeline`` sees them, through its VAE if it has one.

        Raises BitstepError for a pipeline whose scheduler has no variance-preserving forward process (flow matching).
        """
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise BitstepError(
                f"{type(pipeline.scheduler).__name__} has no noise schedule for the diffusion loss: leave --data out"
            )
        return cls(pixels, _encoder(_autoencoder(pipeline)), DDPMScheduler.from_config(pipeline.scheduler.config))

    def __len__(self) -> int:
        return len(self.pixels)

    def clean(self, indices: Tensor) -> Tensor:
        """Images ``indices`` as the denoiser learned them, without noise."""
        pictures = self.pixels[indices].movedim(-1, 1).float() / 127.5 - 1
        with torch.no_grad():
            return self.encode(pictures)

    def noised(self, indices: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Images ``indices`` at random training timesteps: noisy samples, timesteps ``[n]``, and the targets."""
        clean = self.clean(indices)
        noise = torch.randn(clean.shape, generator=random)
        timesteps = torch.randint(len(self.schedule.betas), (len(clean),), generator=random)
        targets: dict[str, Callable[[], Tensor]] = {
            "epsilon": lambda: noise,
            "sample": lambda: clean,
            "v_prediction": lambda: self.schedule.get_velocity(clean, noise, timesteps),
        }
        target = targets[self.schedule.config.prediction_type]()
        return self.schedule.add_noise(clean, noise, timesteps), timesteps, target


def unconditional(call: Call) -> tuple[str, str]:
    """Names of the sample and of the timestep, the only tensors of an unconditional denoiser's call."""
    tensors = [name for name, value in call.arguments.items() if isinstance(value, Tensor)]
    timestep = timestep_name(call.arguments)
    if len(tensors) != 2:
        others = ", ".join(name for name in tensors if name != timestep)
        raise BitstepError(f"images alone cannot train a conditional denoiser (it takes {others}): leave --data out")
    return next(name for name in tensors if name != timestep), timestep


def enlargement(pipeline: Any) -> int:
    """Sides of a picture over sides of the denoiser's sample."""
    vae = _autoencoder(pipeline)
    return 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)


def _autoencoder(pipeline: Any) -> Any:
    return pipeline.components.get("vae") or pipeline.components.get("vqvae")


def _encoder(vae: Any) -> Callable[[Tensor], Tensor]:
    if vae is None:
        return lambda pictures: pictures

    def encode(pictures: Tensor) -> Tensor:
        encoded = vae.encode(pictures.to(vae.device))
        # the mean of the posterior: a pure function of the picture; vector-quantized autoencoders have latents only
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        shifted = latents - (getattr(vae.config, "shift_factor", None) or 0.0)
        scaled: Tensor = shifted * vae.config.scaling_factor
        return scaled.cpu()

    return encode
