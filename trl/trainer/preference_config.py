"""Fields that the configs of the preference methods share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..choices import check_choice
from .base_config import _BaseConfig, resolve_pad_to_multiple_of

LAYOUTS = ("auto", "padded", "packed", "shared_prefix")


@dataclass
class _PreferenceConfig(_BaseConfig):
    """Fields of every method that learns from preferences. Not for direct use."""

    _VALID_DICT_FIELDS = [*_BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    # --- Model ---
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
    disable_dropout: bool = field(default=True, metadata={"help": "Set the dropout of all layers to 0."})

    # --- Data ---
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the dataset."})
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest prompt with completion, in tokens. None: no limit."},
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto",
        metadata={"help": "Round the padded length up to a multiple of this. `auto`: 128 on Neuron, else none."},
    )

    # --- Training ---
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep activations in host memory between forward and backward."}
    )

    def __post_init__(self):
        self.pad_to_multiple_of = resolve_pad_to_multiple_of(self.pad_to_multiple_of)
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` is at least 1 token, or None for no limit. Found {self.max_length}.")
        super().__post_init__()


@dataclass
class _ReferenceConfig(_PreferenceConfig):
    """Fields of the methods that hold the policy against a reference. Not for direct use."""

    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture-of-experts model. By default the model config's "
            "own value; 0 turns it off."
        },
    )
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of AdamW."})
    beta: float = field(
        default=0.1,
        metadata={"help": "How strongly the policy is held to the reference: the higher, the less it moves."},
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

    # --- Reference ---
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute the reference's log-probs of the whole dataset before training, and keep them on disk: no "
            "reference is held while training."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows per batch for that, by default `per_device_train_batch_size`."},
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

    def __post_init__(self):
        check_choice("layout", self.layout, LAYOUTS)
        if not self.beta > 0:
            raise ValueError(f"`beta` is a number above 0. Found {self.beta}.")
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"`ref_model_mixup_alpha` is a share, from 0 to 1. Found {self.ref_model_mixup_alpha}.")
        if self.ref_model_sync_steps < 1:
            raise ValueError(f"`ref_model_sync_steps` is at least 1. Found {self.ref_model_sync_steps}.")
        super().__post_init__()
