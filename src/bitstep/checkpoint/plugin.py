"""The diffusers plug-in: ``from_pretrained`` builds packed layers, ``save_pretrained`` writes them back."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor

from bitstep.checkpoint.config import BitstepConfig
from bitstep.checkpoint.tensors import narrow, refusal
from bitstep.denoiser.preconditioning import Preconditioning
from bitstep.denoiser.steps import StepCursor
from bitstep.errors import BitstepError, UsageError
from bitstep.runtime import fused
from bitstep.runtime.attention import PackedAttention
from bitstep.runtime.dispatch import packed_layers, set_backend
from bitstep.runtime.layers import PackedModule, packed_like
from bitstep.runtime.replay import enable_replay
from bitstep.runtime.tables import StepRows

_OWNERS = PackedModule | PackedAttention | Preconditioning  # of tensors that the format describes


class BitstepQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """What ``from_pretrained`` calls, in the order of the methods below."""

    quantization_config: BitstepConfig
    requires_calibration = True

    def __init__(self, quantization_config: BitstepConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise UsageError("bitstep does not quantize while loading: run `bitstep quantize`, then load its output")
        super().__init__(quantization_config, **kwargs)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        others = [file for file in map(str, checkpoint_files) if not file.endswith(".safetensors")]
        if others:
            raise BitstepError(f"packed weights are safetensors files only, got {others[0]!r}")
        return loaded_keys

    def _process_model_before_weight_loading(self, model: ModelMixin, **_: Any) -> None:
        manifest = self.quantization_config.manifest
        cursor = None if manifest.step_grid is None else StepCursor(manifest.step_grid.grid())
        rows = None if cursor is None else StepRows(cursor)
        modules = dict(model.named_modules())
        for name, entry in manifest.layers.items():
            if name not in modules:
                raise BitstepError(f"the checkpoint packs a layer {name!r} which {type(model).__name__} does not have")
            try:
                model.set_submodule(name, packed_like(modules[name], entry.layer_format(), rows))
            except BitstepError as error:
                raise BitstepError(f"{name}: {error}") from None
        for name, attention in manifest.attention.items():
            if name not in modules:
                raise BitstepError(f"the checkpoint packs attention in {name!r} which {type(model).__name__} has not")
            PackedAttention(attention.attention_format(), rows).attach(modules[name])
        if cursor is not None:
            if manifest.preconditioned:
                Preconditioning(cursor).attach(model)
            cursor.attach(model)

    def update_missing_keys(self, model: ModelMixin, missing_keys: list[str], prefix: str) -> list[str]:
        _refuse_missing(model, missing_keys)
        return missing_keys

    def check_if_quantized_param(self, model: ModelMixin, _: Tensor, param_name: str, *__: Any, **___: Any) -> bool:
        return isinstance(model.get_submodule(param_name.rpartition(".")[0]), _OWNERS)

    def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> bool:
        return True  # create_quantized_param looks at shape, dtype and values together

    def create_quantized_param(
        self,
        model: ModelMixin,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Tensor],
        *_: Any,
        **__: Any,
    ) -> None:
        tensor = state_dict[param_name]  # param_value was cast to torch_dtype already
        owner, name = param_name.rsplit(".", 1)
        layer = model.get_submodule(owner)
        assert isinstance(layer, _OWNERS)
        if why := refusal(layer, name, tensor):
            raise BitstepError(f"{param_name}: {why}")
        # a copy: a mapped tensor keeps the whole file in memory, beside what kernels make of the codes
        setattr(layer, name, tensor.to(device=target_device, dtype=getattr(layer, name).dtype, copy=True))

    def _process_model_after_weight_loading(self, model: ModelMixin, **_: Any) -> None:
        # an index may promise what its shards do not hold
        _refuse_missing(model, [key for key, tensor in model.state_dict().items() if tensor.is_meta])
        model.requires_grad_(False)  # what would train the rest would get no gradients through packed layers
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # likewise
        set_backend(model)
        fused.fuse(model)
        enable_replay(model)
        model.get_memory_footprint = MemoryFootprint(model)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        if not safe_serialization:
            raise UsageError("packed models are saved as safetensors only: leave safe_serialization on")
        manifest = self.quantization_config.manifest
        packed = {
            *manifest.layers,
            *(f"{name}.{PackedAttention.NAME}" for name in manifest.attention),
            Preconditioning.NAME,
        }

        def stored(key: str, tensor: Tensor) -> Tensor:
            owner, _, name = key.rpartition(".")
            return tensor if owner in packed and name != "bias" else narrow(tensor)

        return {key: stored(key, tensor) for key, tensor in state_dict.items()}, {}

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class MemoryFootprint:
    """Stands in for ``get_memory_footprint`` of a packed model: codes that a kernel holds, which are no buffers then,
    count as what they are on disk."""

    def __init__(self, model: ModelMixin) -> None:
        self.model = model

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model,)

    def __call__(self, return_buffers: bool = True) -> int:
        counted: int = type(self.model).get_memory_footprint(self.model, return_buffers)
        layers = packed_layers(self.model).values()
        held = (layer.packed_nbytes for layer in layers if layer._buffers["weight_packed"] is None)
        return counted + (sum(held) if return_buffers else 0)


def _refuse_missing(model: ModelMixin, keys: list[str]) -> None:
    if keys:
        raise BitstepError(
            f"the weights lack {len(keys)} tensors of {type(model).__name__}, {min(keys)} among them: "
            "the checkpoint is incomplete"
        )
