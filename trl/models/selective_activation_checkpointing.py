"""
Gradient checkpointing that keeps what attention computed and recomputes the rest.

Attention is the part of a block whose cost grows with the square of the length while its output does not: keeping
that output costs little memory and saves the most expensive recomputation.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

# By name, because the same kernels come from PyTorch, from the flash-attn packages, and from the Hub, each under its
# own namespace.
_ATTENTION_NAMES = ("scaled_dot_product", "flash_attn", "flash_attention", "flash_fwd", "efficient_attention",
                    "cudnn_attention", "flex_attention")  # fmt: skip


@functools.cache
def _is_attention(operator: Any) -> bool:
    name = str(operator).lower()
    return any(part in name for part in _ATTENTION_NAMES) and "backward" not in name and "bwd" not in name


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_attention(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def selective_contexts() -> tuple[Any, Any]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint` that keeps the outputs of attention kernels."""
    return create_selective_checkpoint_contexts(_keep_attention)


def _gradient_checkpointing_enable(
    self: PreTrainedModel, gradient_checkpointing_kwargs: dict[str, Any] | None = None, *args: Any, **kwargs: Any
) -> None:
    options = dict(gradient_checkpointing_kwargs or {})
    if options.get("use_reentrant"):
        raise ValueError(
            "Selective activation checkpointing needs non-reentrant checkpointing. Remove `use_reentrant=True` from "
            "`gradient_checkpointing_kwargs`."
        )
    options.update(use_reentrant=False, context_fn=selective_contexts)
    type(self).gradient_checkpointing_enable(self, options, *args, **kwargs)


def enable_selective_activation_checkpointing(model: nn.Module) -> None:
    """
    Make the model's gradient checkpointing selective: attention outputs are kept, everything else is recomputed.

    Works for attention that runs as a kernel (sdpa, flash attention); the `eager` form is recomputed as ever. Takes
    effect with the next `gradient_checkpointing_enable`, or at once where checkpointing is on.

    Args:
        model: a Transformers model, or one with a PEFT adapter.

    Raises:
        ValueError: the model has no gradient checkpointing.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(base).__name__} does not support gradient checkpointing.")
    # Bound to the model, so that a deep copy of it gets a method of its own.
    base.gradient_checkpointing_enable = MethodType(_gradient_checkpointing_enable, base)
    if base.is_gradient_checkpointing:
        base.gradient_checkpointing_enable()
