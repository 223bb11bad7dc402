"""
The config every method shares: `transformers.TrainingArguments` with the defaults that post-training wants.

A field is documented once, in its `help`. The command line, the YAML reader and the documentation all read it there.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.utils import (
    is_torch_bf16_gpu_available,
    is_torch_neuroncore_available,
    is_torch_npu_available,
    is_torch_xla_available,
    is_torch_xpu_available,
    logging,
)

from ..choices import LAYOUTS, check_choice

logger = logging.get_logger(__name__)

# What these accept besides JSON is a path, which TrainingArguments resolves.
_PATH_OR_JSON_FIELDS = {"accelerator_config", "fsdp_config", "deepspeed"}


def parse_json_dict(name: str, value: Any) -> Any:
    """Decode a dictionary given as JSON text (a command line has no other way); other values pass unchanged."""
    if not isinstance(value, str):
        return value
    try:
        decoded = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`{name}` takes a dictionary, or a JSON object as text. Found {value!r}, which is not JSON: {error}. "
            f"""On a command line: --{name} '{{"key": "value"}}' (double quotes inside, single quotes outside)."""
        ) from error
    if not isinstance(decoded, dict):
        raise ValueError(f'`{name}` takes a JSON object such as {{"key": 1}}, found {type(decoded).__name__}: {value}')
    return decoded


def resolve_pad_to_multiple_of(value: int | str | None) -> int | None:
    """`"auto"` is 128 on Neuron devices, whose compiler wants few shapes, and no rounding elsewhere."""
    if value is None or isinstance(value, int):
        return value
    text = value.strip().lower()
    if text in ("none", "null"):
        return None
    if text == "auto":
        return 128 if is_torch_neuroncore_available() else None
    if text.isdigit():
        return int(text)
    raise ValueError(f"`pad_to_multiple_of` takes a whole number, 'auto' or 'none'. Found {value!r}.")


def warn_deprecated(message: str) -> None:
    """Warn, from a config's `__post_init__`, where the config is made."""
    warnings.warn(f"{message} It will be removed in version 2.0.", FutureWarning, stacklevel=4)


def _bf16_runs_here(use_cpu: bool) -> bool:
    return (
        use_cpu
        or is_torch_bf16_gpu_available()
        or is_torch_xla_available()
        or is_torch_npu_available()
        or is_torch_xpu_available()
    )


@dataclass
class _BaseConfig(TrainingArguments):
    """Training arguments shared by all trainers. Not for direct use: each method has its own config."""

    # Fields whose value may be a JSON object given as text; a subclass adds its own.
    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
    ]

    logging_steps: float = field(
        default=10,
        metadata={
            "help": "Log every X update steps. Should be an integer or a float in range `[0,1)`. If smaller than 1, "
            "it is a share of the total training steps."
        },
    )
    gradient_checkpointing: bool = field(
        default=True,
        metadata={
            "help": "Recompute activations in the backward pass instead of keeping them: less memory, about a third "
            "more compute."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Train in bfloat16 mixed precision. By default on, unless `fp16` is set or the hardware at hand "
            "has no bfloat16."
        },
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Extra arguments of the learning rate scheduler, as a dictionary or JSON text."},
    )
    use_liger_kernel: bool = field(
        default=False,
        metadata={"help": "Patch the model with Liger kernels. Deprecated where the trainer has a fused head itself."},
    )
    torch_empty_cache_steps: int | None = field(
        default=None,
        metadata={"help": "Empty the device's memory cache every X steps. By default never."},
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and _bf16_runs_here(self.use_cpu)
            if not (self.bf16 or self.fp16):
                logger.info("No bfloat16 on this machine: training in float32. Set `bf16` or `fp16` to choose.")
        for name in self._VALID_DICT_FIELDS:
            if name not in _PATH_OR_JSON_FIELDS:
                setattr(self, name, parse_json_dict(name, getattr(self, name)))
        super().__post_init__()
        self._check_liger()

    def _check_liger(self) -> None:
        """Our fused head replaces Liger's fused cross-entropy; both at once would patch the same forward twice."""
        if not self.use_liger_kernel:
            return
        warnings.warn(
            "`use_liger_kernel` is deprecated: the trainer projects to the vocabulary in chunks by itself. Liger's "
            "other kernels are applied; its fused linear cross-entropy is switched off.",
            FutureWarning,
            stacklevel=3,
        )
        kernels = dict(self.liger_kernel_config or {})
        if kernels.get("fused_linear_cross_entropy"):
            raise ValueError(
                "`liger_kernel_config` asks for `fused_linear_cross_entropy=True`, but this trainer computes the loss "
                "with its own fused head. Remove the key, or set it to False."
            )
        self.liger_kernel_config = {**kernels, "fused_linear_cross_entropy": False}


@dataclass
class _ModelConfig(_BaseConfig):
    """Fields of every method, whatever it trains on. Not for direct use."""

    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of `from_pretrained`, used when `model` is given as a name or path, as a "
            "dictionary or JSON text."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Allow model and tokenizer code from the Hub repository to run on this machine."},
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto",
        metadata={"help": "Round the padded length up to a multiple of this. `auto`: 128 on Neuron, else none."},
    )

    def __post_init__(self):
        self.pad_to_multiple_of = resolve_pad_to_multiple_of(self.pad_to_multiple_of)
        super().__post_init__()


@dataclass
class _OfflineConfig(_ModelConfig):
    """Fields of every method that trains on the completions of a dataset. Not for direct use."""

    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the dataset."})
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest prompt with completion, in tokens; longer ones are cut. None: no limit."},
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep activations in host memory between forward and backward."}
    )

    def __post_init__(self):
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` is at least 1 token, or None for no limit. Found {self.max_length}.")
        super().__post_init__()


# ---- Fields that some methods have in common, whatever else they are ----


@dataclass
class _TemplateFields:
    """Chat template and special tokens, of methods that may start from a base model."""

    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Where to take a chat template from: a `.jinja` file, or a tokenizer's name or folder (then its "
            "special tokens are added as well and the embeddings resized)."
        },
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "Token that ends a turn or a text. By default the tokenizer's own."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Deprecated: set `pad_token` on the tokenizer that you pass in."}
    )

    def _check_template_fields(self) -> None:
        if self.pad_token is not None:
            warn_deprecated("`pad_token` is deprecated: set it on the tokenizer and pass that as `processing_class`.")


@dataclass
class _PolicyFields:
    """A policy, how its batches are laid out, and the reference that may follow it."""

    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture-of-experts model. By default the model config's "
            "own value; 0 turns it off."
        },
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "How a batch is laid out for the model. `padded`: a row for each completion; `packed`: completions "
            "end to end, without padding; `shared_prefix`: a prompt once for all its completions; `auto`: what costs "
            "least for the model and the batch. The numbers are the same.",
            "choices": list(LAYOUTS),
        },
    )
    sync_ref_model: bool = field(
        default=False,
        metadata={
            "help": "Let the reference follow the policy (TR-DPO, https://huggingface.co/papers/2404.09656), every "
            "`ref_model_sync_steps` steps."
        },
    )
    ref_model_mixup_alpha: float = field(
        default=0.6,
        metadata={"help": "Share of the policy's weights in the new reference, the rest is the old one's."},
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Steps between two mixtures."})

    def _check_policy_fields(self) -> None:
        check_choice("layout", self.layout, LAYOUTS)
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"`ref_model_mixup_alpha` is a share, from 0 to 1. Found {self.ref_model_mixup_alpha}.")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"`ref_model_sync_steps` is at least 1. Found {self.ref_model_sync_steps}.")
