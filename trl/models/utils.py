"""Model helpers under the path users know; each lives in the room of its subject."""

import warnings
from typing import TYPE_CHECKING

from torch import nn

from .distributed import (
    _ForwardRedirection,
    add_hooks,
    get_all_parameters,
    iter_params,
    prepare_deepspeed,
    prepare_fsdp,
    remove_hooks,
)
from .generation import disable_gradient_checkpointing, unwrap_model_for_generation
from .reference import create_reference_model as _create_reference_model

__all__ = [
    "TYPE_CHECKING",
    "_ForwardRedirection",
    "add_hooks",
    "create_reference_model",
    "disable_gradient_checkpointing",
    "get_all_parameters",
    "iter_params",
    "prepare_deepspeed",
    "prepare_fsdp",
    "remove_hooks",
    "unwrap_model_for_generation",
]


def create_reference_model(
    model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None
) -> nn.Module:
    """`trl.models.reference.create_reference_model`, under a path that goes in 2.0."""
    warnings.warn(
        "`create_reference_model` leaves `trl` and `trl.models` in 2.0. Import it from `trl.models.reference`.",
        FutureWarning,
        stacklevel=2,
    )
    return _create_reference_model(model, num_shared_layers, pattern)
