"""Tiny diffusers pipelines with random weights, built in code: every kind of denoiser, milliseconds per forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    MotionAdapter,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UNetMotionModel,
    VQModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from bitstep.stages.load import Source

WIDTH = 16  # of every text embedding
FRAMES = 16  # of AnimateDiff's videos, unless it is told otherwise


def unet(channels: int = 3, size: int = 8) -> UNet2DModel:
    """An unconditional UNet with an odd channel count, an attention level, a strided and an up-sampling conv."""
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(20, 24),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def ddpm() -> DDPMPipeline:
    return DDPMPipeline(unet(), DDPMScheduler())


def ddim() -> DDIMPipeline:
    return DDIMPipeline(unet(), DDIMScheduler(timestep_spacing="trailing"))


def latent_vq() -> LDMPipeline:
    vqvae = VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=3, num_vq_embeddings=16)
    return LDMPipeline(vqvae, unet(), DDIMScheduler())


def stable_diffusion() -> StableDiffusionPipeline:
    denoiser = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(20, 24),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return StableDiffusionPipeline(
        vae=autoencoder(4),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        unet=denoiser,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def animatediff() -> AnimateDiffPipeline:
    """A video: the text of every sample repeated for its frames, layers that are called with ``input=``."""
    still = stable_diffusion()
    channels, layers = still.unet.config.block_out_channels, still.unet.config.layers_per_block
    adapter = MotionAdapter(
        block_out_channels=channels,
        motion_layers_per_block=layers,
        motion_mid_block_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=FRAMES,
    )
    return AnimateDiffPipeline(
        vae=still.vae,
        text_encoder=still.text_encoder,
        tokenizer=still.tokenizer,
        unet=UNetMotionModel.from_unet2d(still.unet, adapter),
        motion_adapter=adapter,
        scheduler=still.scheduler,
    )


def dit() -> DiTPipeline:
    """Class labels, learned variance (twice the output channels), guidance as [conditional, unconditional]."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer, autoencoder(4), DDIMScheduler())


def pixart() -> PixArtSigmaPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(T5Tokenizer(), t5_encoder(), autoencoder(4), transformer, DDIMScheduler())


def sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(4),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(t5_config(2 * WIDTH)),
        tokenizer_3=T5Tokenizer(),
    )


def flux() -> FluxPipeline:
    """``timestep`` in [0, 1], tensors without a batch dimension (``img_ids``, ``txt_ids``), packed latents."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(1),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=T5Tokenizer(),
        transformer=transformer,
    )
    pipeline.default_sample_size = 8  # 128, whatever the transformer
    return pipeline


class _SmallZImagePipeline(ZImagePipeline):  # type: ignore[misc]
    """Of 8x8 pixels, whose default is 1024x1024 whatever the transformer."""

    def __call__(  # type: ignore[no-untyped-def]
        self, prompt, num_inference_steps=50, guidance_scale=5.0, generator=None, output_type="pil"
    ) -> Any:
        settings = {"generator": generator, "output_type": output_type, "guidance_scale": guidance_scale}
        return super().__call__(prompt, 8, 8, num_inference_steps, **settings)


def z_image() -> ZImagePipeline:
    """Lists of one tensor a sample go in and come out, texts as long as they are, those without words among them."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 16, 16],
    )
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    text = Qwen3Config(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    tokenizer = clip_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return _SmallZImagePipeline(
        FlowMatchEulerDiscreteScheduler(), autoencoder(4), Qwen3Model(text), tokenizer, transformer
    )


def autoencoder(channels: int) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, shift_factor=0.0)


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def clip_tokenizer() -> CLIPTokenizer:
    letters = [c + end for c in "abcdeforst" for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def t5_config(width: int = WIDTH) -> T5Config:
    return T5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)


def t5_encoder() -> T5EncoderModel:
    return T5EncoderModel(t5_config())


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    f.__name__: f for f in (ddpm, ddim, latent_vq, stable_diffusion, animatediff, dit, pixart, sd3, flux, z_image)
}


def build(name: str, seed: int = 0) -> DiffusionPipeline:
    """The pipeline ``name`` of :data:`BUILDERS`, the same weights for the same seed, ready to run on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = BUILDERS[name]()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def source(name: str) -> Source:
    """:func:`build`'s pipeline as if it had been loaded."""
    return Source(name, build(name))
