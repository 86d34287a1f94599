"""Blocks of diffusers models that run fused, on the CPU and on GPUs: normalization and activation go straight to codes,
and biases, gates and residuals are added where a layer's sums leave the registers.

A block is recognised by its type and by the layers it holds; :func:`fuse` gives it a subclass of its own class whose
forward pass is fused. What the subclass does not know (a mask, a hook on a layer inside) runs layer by layer.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, TimestepEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from bitstep.runtime.attention import PackedAttention, attention, attention_in_torch, is_watched
from bitstep.runtime.convolution import PLAIN_INPUT, PLAIN_OUTPUT, Activation, After, Before, Convolution
from bitstep.runtime.cpu import NativeConvolution
from bitstep.runtime.layers import PackedModule


def fuse(model: nn.Module) -> None:
    """Fuse every block of ``model`` that is recognised.

    Call it once the kernels are chosen: a block is fused when all of its packed layers run as a
    :class:`~bitstep.runtime.convolution.Convolution`.
    """
    for block in model.modules():
        for kind in _FUSED:
            if type(block) is kind.__base__ and kind.recognises(block):
                block.__class__ = kind


def fused_blocks(model: nn.Module) -> list[str]:
    """The names of the blocks of ``model`` that run fused."""
    return [name for name, module in model.named_modules() if isinstance(module, _FUSED)]


class FusedResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]
    """Two convolutions, each after group normalization and SiLU, with the time embedding and the shortcut added."""

    @staticmethod
    def recognises(block: ResnetBlock2D) -> bool:
        return (
            block.upsample is None
            and block.downsample is None
            and block.time_embedding_norm == "default"
            and isinstance(block.nonlinearity, nn.SiLU)
            and isinstance(block.norm1, nn.GroupNorm)
            and isinstance(block.norm2, nn.GroupNorm)
            and _fusable(block.conv1, block.conv2)
            and (block.conv_shortcut is None or _fusable(block.conv_shortcut))
        )

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        parts = (self.norm1, self.nonlinearity, self.norm2, self.dropout)
        unknown = args or kwargs or (temb is not None and self.time_emb_proj is None)
        if unknown or not _runs_fused(input_tensor, (self.conv1, self.conv2), *parts):
            return super().forward(input_tensor, temb, *args, **kwargs)  # type: ignore[no-any-return]
        x = _nhwc(input_tensor)
        bias = None
        if self.time_emb_proj is not None and temb is not None:
            bias = _project(
                self.time_emb_proj, temb, None if self.skip_time_act else self.nonlinearity, self.conv1.bias
            )
            bias = bias.expand(len(x), -1).contiguous()
        h = _run(self.conv1, x, _group_norm(self.norm1, "silu"), After(bias=bias))
        residual = x if self.conv_shortcut is None else _nhwc(self.conv_shortcut(input_tensor))
        y = _run(self.conv2, h, _group_norm(self.norm2, "silu"), After(residual=residual))
        return _nchw(y) if self.output_scale_factor == 1 else _nchw(y) / self.output_scale_factor


class FusedAttention(Attention):  # type: ignore[misc]
    """Attention, of quantized operands too, whose normalization, bias and residual are fused into its projections."""

    @staticmethod
    def recognises(block: Attention) -> bool:
        unknown = (block.spatial_norm, block.norm_q, block.norm_k, block.norm_cross)
        return (
            type(block.processor) is AttnProcessor2_0
            and not any(unknown)
            and (block.group_norm is None or isinstance(block.group_norm, nn.GroupNorm))
            and _fusable(block.to_q, block.to_k, block.to_v, block.to_out[0])
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not self.runs_fused(hidden_states, attention_mask):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **kwargs
            )
        is_map = hidden_states.ndim == 4
        x = _nhwc(hidden_states) if is_map else hidden_states.contiguous()
        tokens = x.reshape(len(x), 1, -1, x.shape[-1])
        before = PLAIN_INPUT if self.group_norm is None else _group_norm(self.group_norm)
        after = After(residual=tokens if self.residual_connection else None)
        y = self.attend(tokens, before, after, encoder_hidden_states)
        if self.rescale_output_factor != 1:
            y = y / self.rescale_output_factor
        y = y.reshape(*x.shape[:-1], -1)
        return _nchw(y) if is_map else y

    def runs_fused(self, x: Tensor, mask: Tensor | None) -> bool:
        return (
            mask is None
            and type(self.processor) is AttnProcessor2_0
            and _runs_fused(x, (self.to_q, self.to_k, self.to_v, self.to_out[0]), self.group_norm, *self.to_out)
        )

    def attend(self, x: Tensor, before: Before, after: After, context: Tensor | None = None) -> Tensor:
        """``after(attention(before(x)))``; x ``[batch, 1, tokens, channels]``.

        ``context`` ``[batch, tokens, channels]`` gives keys and values, as it is; without it they come from x.
        """
        before = self.to_q.run.ahead(x, before)
        source, prepare = x, before
        if context is not None:
            source, prepare = context.to(x.dtype).contiguous()[:, None], PLAIN_INPUT
        q = _run(self.to_q, x, before)[:, 0]
        k, v = (_run(layer, source, prepare)[:, 0] for layer in (self.to_k, self.to_v))
        rounding: PackedAttention | None = getattr(self, PackedAttention.NAME, None)
        if isinstance(self.to_q.run, NativeConvolution):
            mixed = attention(q, k, v, self.heads, () if rounding is None else rounding.operands(q))
        else:
            mixed = attention_in_torch(q, k, v, self.heads, rounding)
        return _run(self.to_out[0], mixed[:, None], after=after)


class _Modulation(NamedTuple):
    """Of adaptive layer normalization, each ``[batch, channels]``: what is added after it, its gain, and the gate of
    what it feeds."""

    shift: Tensor | None
    gain: Tensor | None
    gate: Tensor | None


_PLAIN = _Modulation(None, None, None)


class FusedBasicTransformerBlock(BasicTransformerBlock):  # type: ignore[misc]
    """Self-attention, cross-attention and feed-forward, with plain or adaptive (zero) layer normalization."""

    @staticmethod
    def recognises(block: BasicTransformerBlock) -> bool:
        ada = block.norm_type == "ada_norm_zero" and isinstance(block.norm1, AdaLayerNormZero)
        norms = (block.norm1.norm if ada else block.norm1, getattr(block, "norm3", None))
        net = block.ff.net
        return (
            (ada or block.norm_type == "layer_norm")
            and all(type(norm) is nn.LayerNorm for norm in norms)
            and (block.attn2 is None or (type(block.norm2) is nn.LayerNorm and FusedAttention.recognises(block.attn2)))
            and block.pos_embed is None
            and not block.only_cross_attention
            and getattr(block, "fuser", None) is None
            and FusedAttention.recognises(block.attn1)
            and type(block.ff) is FeedForward
            and type(net[0]) in (GELU, GEGLU)
            and _fusable(net[0].proj, net[2])
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        project, out = self.ff.net[0], self.ff.net[2]
        if (
            cross_attention_kwargs
            or self._chunk_size is not None
            or hidden_states.ndim != 3
            or not self.attn1.runs_fused(hidden_states, attention_mask)
            or (self.attn2 is not None and not self.attn2.runs_fused(hidden_states, encoder_attention_mask))
            or not _runs_fused(hidden_states, (project.proj, out), *self._between())
        ):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
        x = hidden_states.contiguous()[:, None]
        adaptive = self.norm_type == "ada_norm_zero"
        early, late = self._modulations(x, timestep, class_labels) if adaptive else (_PLAIN, _PLAIN)
        norm1 = self.norm1.norm if adaptive else self.norm1
        x = self.attn1.attend(x, _layer_norm(norm1, early.gain, early.shift), After(gain=early.gate, residual=x))
        if self.attn2 is not None:
            x = self.attn2.attend(x, _layer_norm(self.norm2), After(residual=x), encoder_hidden_states)
        hidden, activate = _run(project.proj, x, _layer_norm(self.norm3, late.gain, late.shift)), PLAIN_INPUT
        if isinstance(project, GEGLU):
            activate = Before(activation="geglu")
        elif project.approximate == "tanh":
            activate = Before(activation="gelu")
        else:
            hidden = F.gelu(hidden)
        return _run(out, hidden, activate, After(gain=late.gate, residual=x))[:, 0]

    def _modulations(
        self, x: Tensor, timestep: Tensor | None, labels: Tensor | None
    ) -> tuple[_Modulation, _Modulation]:
        """Of attention and of the feed-forward."""
        norm = self.norm1
        embedding: Any = norm.emb(timestep, labels, hidden_dtype=x.dtype) if norm.emb is not None else timestep
        rows = _project(norm.linear, embedding, norm.silu, None).expand(len(x), -1).chunk(6, dim=1)
        early, late = (
            _Modulation(shift.contiguous(), 1 + scale, gate.contiguous()) for shift, scale, gate in (rows[:3], rows[3:])
        )
        return early, late

    def _between(self) -> list[nn.Module | None]:
        """The modules that do not run, or only parts of them, when the block does."""
        norm = self.norm1.norm if self.norm_type == "ada_norm_zero" else None
        return [self.attn1, self.attn2, self.norm1, norm, self.norm2, self.norm3, self.ff, *self.ff.net]


class FusedTransformer2DModel(Transformer2DModel):  # type: ignore[misc]
    """Transformer blocks on the pixels of a map, projected in after group normalization, and out onto the map."""

    @staticmethod
    def recognises(block: Transformer2DModel) -> bool:
        return (
            block.is_input_continuous
            and isinstance(block.norm, nn.GroupNorm)
            and _fusable(block.proj_in, block.proj_out)
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        unknown = any(argument is not None and argument != {} for argument in (*args, *kwargs.values()))
        if unknown or not _runs_fused(hidden_states, (self.proj_in, self.proj_out), self.norm):
            return super().forward(
                hidden_states, encoder_hidden_states, timestep, *args, return_dict=return_dict, **kwargs
            )
        x = _nhwc(hidden_states)
        pixels = x.reshape(len(x), 1, -1, x.shape[-1])
        tokens = _run(self.proj_in, pixels, _group_norm(self.norm))[:, 0]
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=encoder_hidden_states, timestep=timestep)
        y = _nchw(_run(self.proj_out, tokens.contiguous()[:, None], after=After(residual=pixels)).reshape(x.shape))
        return Transformer2DModelOutput(sample=y) if return_dict else (y,)


class FusedTimestepEmbedding(TimestepEmbedding):  # type: ignore[misc]
    """Two linear layers with SiLU between them."""

    @staticmethod
    def recognises(block: TimestepEmbedding) -> bool:
        return (
            block.cond_proj is None
            and block.post_act is None
            and isinstance(block.act, nn.SiLU)
            and _fusable(block.linear_1, block.linear_2)
        )

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        return _project(self.linear_2, self.linear_1(sample), self.act, None)


class FusedLabelEmbedding(CombinedTimestepLabelEmbeddings):  # type: ignore[misc]
    """The embedding of the timestep plus that of the label."""

    @staticmethod
    def recognises(block: CombinedTimestepLabelEmbeddings) -> bool:
        return FusedTimestepEmbedding.recognises(block.timestep_embedder)

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        embedder = self.timestep_embedder
        if type(embedder) is not FusedTimestepEmbedding or is_watched(embedder):
            return super().forward(timestep, class_labels, hidden_dtype)  # type: ignore[no-any-return]
        hidden = embedder.linear_1(self.time_proj(timestep).to(dtype=hidden_dtype))
        return _project(embedder.linear_2, hidden, embedder.act, self.class_embedder(class_labels))


class FusedDownsample2D(Downsample2D):  # type: ignore[misc]
    """A strided convolution after a row and a column of zeros, which are written around a map as it lies in memory."""

    @staticmethod
    def recognises(block: Downsample2D) -> bool:
        return block.use_conv and block.padding == 0 and block.norm is None and _fusable(block.conv)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not _runs_fused(hidden_states, (self.conv,)):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        x = _nhwc(hidden_states)
        batch, height, width, channels = x.shape
        padded = x.new_empty(batch, height + 1, width + 1, channels)
        padded[:, height:] = 0
        padded[:, :height, width:] = 0
        padded[:, :height, :width] = x
        return _nchw(_run(self.conv, padded))


class FusedUpsample2D(Upsample2D):  # type: ignore[misc]
    """A convolution of a map twice as high and wide, whose pixels are repeated as codes."""

    @staticmethod
    def recognises(block: Upsample2D) -> bool:
        return (
            block.name == "conv"
            and block.use_conv
            and not block.use_conv_transpose
            and block.interpolate
            and block.norm is None
            and _fusable(block.conv)
        )

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or output_size is not None or not _runs_fused(hidden_states, (self.conv,)):
            return super().forward(hidden_states, output_size, *args, **kwargs)  # type: ignore[no-any-return]
        return _nchw(_run(self.conv, _nhwc(hidden_states), repeat=2))


_FUSED = (
    FusedResnetBlock2D,
    FusedAttention,
    FusedBasicTransformerBlock,
    FusedTransformer2DModel,
    FusedTimestepEmbedding,
    FusedLabelEmbedding,
    FusedDownsample2D,
    FusedUpsample2D,
)


def _fusable(*layers: nn.Module) -> bool:
    return all(isinstance(layer, PackedModule) and isinstance(layer.run, Convolution) for layer in layers)


def _runs_fused(x: Tensor, layers: tuple[Any, ...], *others: nn.Module | None) -> bool:
    """Whether the kernel of ``layers`` still takes x, nobody watches them or the others between them, and none of
    those drops out."""
    if not _fusable(*layers) or any(is_watched(module) for module in (*layers, *others) if module is not None):
        return False
    if any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in others):
        return False
    if any(x.device != layer.weight_scale.device for layer in layers):
        return False
    taken = all(x.dtype in layer.kernel.dtypes for layer in layers)
    if not taken and x.is_cpu:
        warnings.warn(f"{x.dtype} is slow on a CPU: load the packed model with torch_dtype=torch.float32", stacklevel=1)
    return taken


def _run(
    layer: PackedModule, x: Tensor, before: Before = PLAIN_INPUT, after: After = PLAIN_OUTPUT, *, repeat: int = 1
) -> Tensor:
    assert isinstance(layer.run, Convolution)
    return layer.run.convolve(x, *layer.input_rows(x), before, after, repeat=repeat)


def _group_norm(norm: nn.GroupNorm, activation: Activation = "none") -> Before:
    return Before(eps=norm.eps, groups=norm.num_groups, gain=norm.weight, shift=norm.bias, activation=activation)


def _layer_norm(norm: nn.LayerNorm, gain: Tensor | None = None, shift: Tensor | None = None) -> Before:
    """``norm(x) * gain + shift``; gain and shift ``[batch, channels]``."""
    if gain is None or shift is None:
        return Before(eps=norm.eps, gain=norm.weight, shift=norm.bias)
    if norm.bias is not None:
        shift = norm.bias * gain + shift
    return Before(eps=norm.eps, gain=gain if norm.weight is None else norm.weight * gain, shift=shift)


def _project(layer: nn.Module, x: Tensor, activation: nn.Module | None, extra: Tensor | None) -> Tensor:
    """``layer(activation(x)) + extra``; x ``[batch, in]``, extra ``[out]`` or ``[batch, out]``."""
    alike = extra is None or extra.ndim == 1 or len(extra) == len(x)
    known = isinstance(activation, nn.SiLU | None) and alike
    if known and x.ndim == 2 and isinstance(layer, PackedModule) and _runs_fused(x, (layer,), activation):
        residual = None if extra is None else extra.expand(len(x), -1).contiguous()[:, None, None]
        before = PLAIN_INPUT if activation is None else Before(activation="silu")
        return _run(layer, x.contiguous()[:, None, None], before, After(residual=residual))[:, 0, 0]
    y: Tensor = layer(x if activation is None else activation(x))
    return y if extra is None else y + extra


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)
