"""
Training a small adapter (PEFT) on a frozen model: wrapping, quantized bases, and switching adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_peft_available, logging

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.get_logger(__name__)

INSTALL_HINT = "PEFT is not installed. `pip install peft` (or `pip install trl[peft]`)."


# ---- From a command line to a config ----


def get_peft_config(model_args: Any) -> PeftConfig | None:
    """
    The adapter asked for by a `ModelConfig`.

    Args:
        model_args: a `ModelConfig` (`use_peft`, `lora_*`, `use_dora`, `use_rslora`).

    Returns:
        A `LoraConfig`, or None where `use_peft` is False. LoRA: https://huggingface.co/papers/2106.09685.

    Raises:
        ValueError: an adapter is asked for and PEFT is not installed.
    """
    if not model_args.use_peft:
        return None
    if not is_peft_available():
        raise ValueError(f"`use_peft` asks for an adapter, but {INSTALL_HINT}")
    from peft import LoraConfig

    optional = {}
    if model_args.lora_target_parameters is not None:
        optional["target_parameters"] = model_args.lora_target_parameters
    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        bias="none",
        **optional,
    )


# ---- Wrapping a model ----


def prepare_peft_model(
    model: PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None,
    args: TrainingArguments,
    *,
    is_zero3: bool | None = None,
) -> PeftModel | PreTrainedModel:
    """
    Put an adapter on a model and make both ready to train. A model that has an adapter is only made ready.

    Args:
        model: the model; a PeftModel when `peft_config` is None.
        peft_config: kind and size of the adapter.
        args: the trainer's arguments. Under ZeRO-3 with gradient checkpointing, `use_reentrant` is set to True in
            `args.gradient_checkpointing_kwargs`.
        is_zero3: whether DeepSpeed shards the parameters (stage 3); default: as the process was started.

    Returns:
        The PeftModel; `model` as it was where it has no adapter and none is asked for.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: `peft_config` is not a `PeftConfig`.
        ValueError: two adapters; an adapter on the output head; prefix tuning on a model cut over devices, with a PEFT
            that cannot.
    """
    if not is_peft_available():
        if peft_config is None:
            return model
        raise ImportError(f"`peft_config` asks for an adapter, but {INSTALL_HINT}")
    from peft import PeftModel

    is_zero3 = is_deepspeed_zero3_enabled() if is_zero3 is None else is_zero3
    _check_peft_arguments(model, peft_config)
    if peft_config is not None:
        model = _add_adapter(model, peft_config, is_zero3)
    if not isinstance(model, PeftModel):
        return model
    _check_no_adapter_on_head(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        warnings.warn(
            "The model has an adapter, but none of its parameters is trained. To train an adapter that was loaded, "
            "pass `is_trainable=True` to `PeftModel.from_pretrained`."
        )
    if args.gradient_checkpointing:
        if is_zero3:
            _force_reentrant(args)
        # The embeddings are frozen: without this, checkpointed blocks would see no input that wants a gradient.
        model.enable_input_require_grads()
    if is_quantized(model):
        cast_adapter_to_bf16(model)
    return model


def _check_peft_arguments(model: nn.Module, peft_config: PeftConfig | None) -> None:
    import peft

    if peft_config is None:
        return
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(
            f"`peft_config` is a peft.PeftConfig (e.g. LoraConfig), found {type(peft_config).__name__}. From a "
            "dictionary: `peft.LoraConfig(**values)`."
        )
    if isinstance(model, peft.PeftModel):
        raise ValueError(
            "`model` has an adapter already, and `peft_config` asks for another. To train the one it has, leave out "
            "`peft_config`; to train a new one on top of it, pass `model.merge_and_unload()`."
        )
    if (
        isinstance(peft_config, peft.PrefixTuningConfig)
        and Version(peft.__version__) <= Version("0.17.1")
        and getattr(model, "hf_device_map", None) is not None
    ):
        raise ValueError(
            f"Prefix tuning cannot train a model with a device map under PEFT {peft.__version__}. Update PEFT, or pass "
            '`model_init_kwargs={"device_map": None}`.'
        )


def _add_adapter(model: PreTrainedModel, peft_config: PeftConfig, is_zero3: bool) -> PeftModel:
    from peft import get_peft_model

    if is_zero3 and not is_quantized(model):
        # ZeRO-3 wants one dtype: an adapter raised to float32 would differ from a base in half precision.
        return get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    return get_peft_model(model, peft_config)


def _check_no_adapter_on_head(model: PeftModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = model.get_base_model().get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            "The adapter covers the output head (`lm_head`), which the trainer's fused loss reads as a plain weight. "
            'Take it out of `target_modules` ("all-linear" leaves it out by itself); to train the whole head, put it '
            "in `modules_to_save`."
        )


def _force_reentrant(args: TrainingArguments) -> None:
    kwargs = dict(args.gradient_checkpointing_kwargs or {})
    if kwargs.get("use_reentrant") is False:
        warnings.warn(
            "An adapter under DeepSpeed ZeRO-3 needs re-entrant gradient checkpointing: `use_reentrant=False` in "
            "`gradient_checkpointing_kwargs` is set to True."
        )
    args.gradient_checkpointing_kwargs = {**kwargs, "use_reentrant": True}


# ---- Quantized bases ----


def is_quantized(model: nn.Module) -> bool:
    """Whether the (base) model's weights are held in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def cast_adapter_to_bf16(model: nn.Module) -> None:
    """
    Hold the trained parameters in bfloat16, as QLoRA does (https://huggingface.co/papers/2305.14314).

    DoRA's magnitude vectors stay as they are: they are norms of whole weight columns, too coarse in bfloat16.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


# ---- Switching ----


@contextmanager
def use_adapter(model: PeftModel, adapter_name: str | None) -> Iterator[None]:
    """
    Use another adapter inside the block, or none; afterwards what was active is active again.

    Args:
        model: a PeftModel.
        adapter_name: the adapter, or None for the base model alone.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: `model` has no adapters.
        ValueError: it has no adapter of that name.
    """
    if not is_peft_available():
        raise ImportError(INSTALL_HINT)
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(f"`use_adapter` takes a PeftModel, found {type(model).__name__}.")
    if adapter_name is not None and adapter_name not in model.peft_config:
        raise ValueError(f"The model has no adapter {adapter_name!r}. It has: {', '.join(model.peft_config)}.")
    # Switching adapters makes the active one trainable and freezes the others; a frozen reference must stay frozen.
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    previous = model.active_adapter
    try:
        if adapter_name is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(adapter_name)
            yield
    finally:
        if adapter_name is not None:
            model.set_adapter(previous)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = trained[name]
