"""Train a small unconditional diffusion model on 32x32 pictures, a teacher to quantize: a DDIMPipeline of diffusers.

    python examples/train_teacher.py ../shared/data/cifar10 --tile 32 --out models/cifar10

DATA is a folder of pictures, or of mosaics of 32x32 tiles with `--tile 32`. One GPU, or a CPU and patience; the state
is saved every minute into OUT.state, and the same command goes on from there. What is saved in the end is the
exponential moving average of the weights, in float16.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from bitstep.stages.sample import read

SIZE = 32
TIMESTEPS = 1000
SECONDS_BETWEEN_STATES = 60


@dataclass(frozen=True)
class Settings:
    """What a training run is; ``channels`` of the UNet's levels, of which the second has attention."""

    steps: int
    batch_size: int = 512
    channels: Sequence[int] = (64, 128, 192)
    learning_rate: float = 6e-4
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Up over the first steps, down over the last third."""
        rise, fall = min(500, self.steps // 10), self.steps // 3
        return self.learning_rate * min(1.0, (step + 1) / max(1, rise), (self.steps - step) / max(1, fall))


def unet(channels: Sequence[int]) -> UNet2DModel:
    """Two residual blocks a level; attention at the second level, and at the lowest as all of diffusers' UNets."""
    attends = [level == 1 for level in range(len(channels))]
    return UNet2DModel(
        sample_size=SIZE,
        block_out_channels=tuple(channels),
        down_block_types=[f"{'Attn' * a}DownBlock2D" for a in attends],
        up_block_types=[f"{'Attn' * a}UpBlock2D" for a in reversed(attends)],
        attention_head_dim=32,
        norm_num_groups=8,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=TIMESTEPS, beta_schedule="linear", timestep_spacing="trailing")


def batch(pixels: Tensor, settings: Settings, step: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Clean pictures in [-1, 1], half of them mirrored, noise, and timesteps: a pure function of the step."""
    random = torch.Generator(device).manual_seed(settings.seed * 2**32 + step)
    size = (settings.batch_size,)
    clean = pixels[torch.randint(len(pixels), size, generator=random, device=device)].float() / 127.5 - 1
    mirrored = torch.rand(size, generator=random, device=device) < 0.5
    clean = torch.where(mirrored[:, None, None, None], clean.flip(-1), clean)
    noise = torch.randn(clean.shape, generator=random, device=device)
    return clean, noise, torch.randint(TIMESTEPS, size, generator=random, device=device)


def train(pixels: Tensor, settings: Settings, out: Path) -> Iterator[tuple[int, Tensor]]:
    """Yields the steps done and the loss of the last, going on where an earlier run ended; then saves the pipeline.

    pixels: uint8 ``[N, 3, 32, 32]``
    """
    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(
        mixed_precision="bf16" if on_gpu else "no", dynamo_backend="inductor" if on_gpu else "no", cpu=not on_gpu
    )
    torch.manual_seed(settings.seed)
    plain = unet(settings.channels).to(accelerator.device, memory_format=torch.channels_last)
    average = EMAModel(plain.parameters(), decay=0.9995, foreach=True)
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=on_gpu)
    model, optimizer = accelerator.prepare(plain, optimizer)
    accelerator.register_for_checkpointing(average)
    schedule = scheduler()
    schedule.alphas_cumprod = schedule.alphas_cumprod.to(accelerator.device)
    pixels = pixels.to(accelerator.device)

    state = out.with_name(f"{out.name}.state")
    start, saved_at = 0, time.monotonic()
    if found := states(state):
        accelerator.load_state(str(found[-1]))
        start = int(found[-1].name)
        print(f"from step {start}", flush=True)
    for step in range(start, settings.steps):
        clean, noise, timesteps = batch(pixels, settings, step, accelerator.device)
        noisy = schedule.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        loss = (model(noisy, timesteps).sample - noise).square().mean()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        average.step(plain.parameters())
        if time.monotonic() - saved_at > SECONDS_BETWEEN_STATES:
            save_state(accelerator, state, step + 1)
            saved_at = time.monotonic()
        yield step + 1, loss.detach()
    averaged = unet(settings.channels)
    average.copy_to(averaged.parameters())
    DDIMPipeline(averaged.half(), scheduler()).save_pretrained(out)


def states(folder: Path) -> list[Path]:
    """What was saved completely, the last at the end; folders are named for the steps done."""
    return sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


def save_state(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Save all of it or nothing, then remove what was there before."""
    before = states(folder)
    temporary = folder / f"{step}.tmp"
    accelerator.save_state(str(temporary))
    temporary.rename(folder / str(step))
    for old in before:
        shutil.rmtree(old)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tile", type=int, help="the pictures are mosaics of such tiles")
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size)
    arguments = parser.parse_args()

    settings = Settings(arguments.steps, arguments.batch_size)
    pixels = read(arguments.data, arguments.tile).movedim(-1, 1).contiguous()
    size = sum(parameter.numel() for parameter in unet(settings.channels).parameters())
    print(f"{size / 1e6:.2f}M parameters, {len(pixels)} pictures", flush=True)
    begun, losses = time.monotonic(), []
    for step, loss in train(pixels, settings, arguments.out):
        losses.append(loss)
        if len(losses) == 500 or step == settings.steps:
            mean = float(torch.stack(losses).mean())
            speed = len(losses) * settings.batch_size / (time.monotonic() - begun)
            print(f"step {step}/{settings.steps}  loss {mean:.4f}  {speed:.0f} pictures/s", flush=True)
            begun, losses = time.monotonic(), []
    print(f"saved {arguments.out}")


if __name__ == "__main__":
    main()
