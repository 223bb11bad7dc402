"""
Making a model under training ready to generate, and putting everything back afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from .distributed import add_hooks, remove_hooks

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


@contextlib.contextmanager
def disable_gradient_checkpointing(
    model: PreTrainedModel, gradient_checkpointing_kwargs: dict | None = None
) -> Iterator[None]:
    """
    Switch gradient checkpointing off inside the block: it forbids the key/value cache that generation lives on.

    Afterwards every layer that was checkpointed is again, with the same function and options.

    Args:
        model: the model, wrapped or not.
        gradient_checkpointing_kwargs: not needed; the options in use are kept as they are.
    """
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True


@contextlib.contextmanager
def unwrap_model_for_generation(
    model: DistributedDataParallel | DeepSpeedEngine,
    accelerator: Accelerator,
    gather_deepspeed3_params: bool = True,
    generation_kwargs: dict | None = None,
    gradient_checkpointing_kwargs: dict | None = None,
) -> Iterator[nn.Module]:
    """
    Give the model without its wrapper, ready to generate.

    Args:
        model: the model as the trainer has it (`model_wrapped`).
        accelerator: the trainer's accelerator.
        gather_deepspeed3_params: under ZeRO-3, gather all parameters once for the block instead of for every layer of
            every token; needs room for the whole model on each device.
        generation_kwargs: values of the model's `generation_config` inside the block.
        gradient_checkpointing_kwargs: not needed; the options in use are kept as they are.

    Yields:
        The inner model. Gradient checkpointing is off inside the block, and as before after it.
    """
    inner = accelerator.unwrap_model(model)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    with (
        disable_gradient_checkpointing(inner, gradient_checkpointing_kwargs),
        _generation_config(inner, generation_kwargs),
    ):
        if plugin is None or plugin.zero_stage != 3 or not gather_deepspeed3_params:
            yield inner
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(model.parameters()):
            remove_hooks(model)
            try:
                yield inner
            finally:
                add_hooks(model)


@contextlib.contextmanager
def _generation_config(model: nn.Module, values: dict[str, Any] | None) -> Iterator[None]:
    """Set values of the model's generation config inside the block; an adapter's model has its base's config."""
    config = getattr(model, "generation_config", None)
    names = [name for name in values or {} if config is not None and hasattr(config, name)]
    before = {name: getattr(config, name) for name in names}
    for name in names:
        setattr(config, name, values[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
