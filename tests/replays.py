"""What the replay of forward passes has to notice, and what it has to refuse, on a CPU and on a GPU alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def replace_parameter(model: Any) -> None:
    model.conv_norm_out.weight = nn.Parameter(2 * model.conv_norm_out.weight)


def change_parameter_in_place(model: Any) -> None:
    model.conv_norm_out.weight.mul_(2)


def change_table_in_place(model: Any) -> None:
    model.conv_out.input_scale.mul_(2)


def load_state(model: Any) -> None:
    model.load_state_dict(
        {name: 2 * value for name, value in model.state_dict().items() if "norm" in name}, strict=False
    )


CHANGES = (replace_parameter, change_parameter_in_place, change_table_in_place, load_state)
"""Each makes a packed UNet compute something else."""


def scale_by_mean(x: Tensor) -> Tensor:
    return x * float(x.mean())


def add_noise(x: Tensor) -> Tensor:
    return x + torch.randn(3, device=x.device)


def keep_positive(x: Tensor) -> Tensor:
    return x[x > 0]


NOT_REPLAYED = (scale_by_mean, add_noise, keep_positive)
"""Functions of three numbers whose operators depend on values, or on chance."""
