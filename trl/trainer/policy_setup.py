"""
What the methods that train a policy do before the first step: load and prepare it, and give it a reference.

A reference that follows the policy (`sync_ref_model`) has moved by the time a checkpoint is written, so it is saved and
restored with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ..models.adapters import prepare_peft_model
from ..models.distributed import load_full_state_dict
from ..models.loading import create_model_from_path, get_config_model_id
from ..models.moe import resolve_router_aux_loss
from ..models.reference import ReferencePolicy, disable_dropout_in_model
from ..ops.layouts import PackingNotSupportedError, why_not_packed, why_not_shared_prefix
from ..ops.scoring import find_causal_lm, install_scoring
from .base_config import _BaseConfig
from .base_trainer import is_peft_model
from .setup import (
    ProcessingClass,
    check_is_processor,
    expect_unused_parameters,
    resolve_model,
    resolve_processing_class,
    set_pad_token,
)

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import BitsAndBytesConfig

# Folder inside a checkpoint for a reference that follows the policy.
REFERENCE_DIR = "reference_model"


@dataclass(frozen=True)
class PreparedPolicy:
    """
    A policy that is ready to be trained.

    Args:
        model: with its adapter, able to score tokens.
        processing_class: tokenizer or processor.
        came_with_adapter: whether `model` was given with an adapter.
        router_aux_loss_coef: weight of the router's auxiliary loss.
        aux_loss_enabled: whether it is computed.
    """

    model: nn.Module
    processing_class: ProcessingClass
    came_with_adapter: bool
    router_aux_loss_coef: float
    aux_loss_enabled: bool


def prepare_policy(
    model: str | nn.Module,
    processing_class: ProcessingClass | None,
    args: _BaseConfig,
    *,
    with_images: bool,
    quantization_config: BitsAndBytesConfig | None = None,
    peft_config: PeftConfig | None = None,
    **load_kwargs: Any,
) -> PreparedPolicy:
    """
    Load a policy and make it ready.

    Args:
        model: a model, or its name or path.
        processing_class: default: as published with the model.
        args: the config.
        with_images: whether the data has images.
        quantization_config: quantize the model while it is loaded.
        peft_config: train an adapter of this kind.
        **load_kwargs: for loading the processing class.

    Raises:
        ValueError: a layout that the model cannot have, images without a processor, and what the steps refuse.
    """
    model = resolve_model(model, args, quantization_config)
    processing_class = resolve_processing_class(processing_class, model, args, **load_kwargs)
    if with_images:
        check_is_processor(processing_class)
        expect_unused_parameters(args)
    set_pad_token(processing_class, model, getattr(args, "pad_token", None))
    came_with_adapter = is_peft_model(model)
    if peft_config is not None or came_with_adapter:
        model = prepare_peft_model(model, peft_config, args)
    model.config.use_cache = False
    if args.disable_dropout:
        disable_dropout_in_model(model)
    install_scoring(model)  # before the accelerator puts its autocast around the forward that it finds
    check_layout(model, args.layout, with_images)
    coefficient, is_enabled = resolve_router_aux_loss(model, args.router_aux_loss_coef)
    return PreparedPolicy(model, processing_class, came_with_adapter, coefficient, is_enabled)


def load_again(model: nn.Module, disable_dropout: bool, init_kwargs: dict[str, Any]) -> nn.Module:
    """The model as it was published, with the dtype and the attention that `model` has."""
    inner = find_causal_lm(model)
    kwargs = {**init_kwargs, "dtype": inner.dtype, "attn_implementation": inner.config._attn_implementation}
    loaded = create_model_from_path(get_config_model_id(inner.config), type(inner), **kwargs)
    if disable_dropout:
        disable_dropout_in_model(loaded)
    return loaded


def reference_loader(
    model: nn.Module, args: _BaseConfig, quantization_config: BitsAndBytesConfig | None
) -> Callable[[], nn.Module]:
    """How to load the policy's base once more, where a reference cannot be copied from it."""
    init_kwargs = {
        **(args.model_init_kwargs or {}),
        "device_map": None,
        "trust_remote_code": args.trust_remote_code,
    }
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    return partial(load_again, model, args.disable_dropout, init_kwargs)


def check_layout(model: nn.Module, layout: str, with_images: bool) -> None:
    """Refuse, before the first step, a layout that the model or its batches cannot have."""
    if layout not in ("packed", "shared_prefix"):
        return
    why_not = why_not_packed if layout == "packed" else why_not_shared_prefix
    reason = "Images have their place in a row" if with_images else why_not(install_scoring(model))
    if reason is not None:
        raise PackingNotSupportedError(f"{reason}, so `layout={layout!r}` cannot be. Use 'auto', or 'padded'.")


def check_reference_sync(args: _BaseConfig, model: str | nn.Module, peft_config: PeftConfig | None) -> None:
    """Refuse a reference that follows the policy where there is none that could."""
    has_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
    if args.sync_ref_model and has_adapter:
        raise NotImplementedError(
            "`sync_ref_model=True` mixes all weights of the policy into those of a reference model. With an "
            "adapter the reference is the base model itself, which must not change. Train all weights, or turn "
            "it off."
        )


class ReferenceMixin:
    """Trainer methods that keep a reference which follows the policy in the checkpoints."""

    reference: ReferencePolicy | None = None

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference where it is a model of its own; None without one, or where it is the policy's own base."""
        return None if self.reference is None else self.reference.model

    def _save_extra_files(self, folder: str) -> None:
        super()._save_extra_files(folder)
        if not self.args.sync_ref_model:
            return
        # The reference has moved since the start, and a resumed run has to find it where it was.
        state = self.accelerator.get_state_dict(self.ref_model)
        if self.args.should_save:
            reference = self.accelerator.unwrap_model(self.ref_model)
            reference.save_pretrained(os.path.join(folder, REFERENCE_DIR), state_dict=state)

    def _load_extra_files(self, checkpoint: str) -> None:
        super()._load_extra_files(checkpoint)
        folder = os.path.join(checkpoint, REFERENCE_DIR)
        if not self.args.sync_ref_model or not os.path.isdir(folder):
            return
        load_full_state_dict(self.accelerator.unwrap_model(self.ref_model), folder)
