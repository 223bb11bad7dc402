"""Config of training a reward model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from .base_config import _BaseConfig, resolve_pad_to_multiple_of


@dataclass
class RewardConfig(_BaseConfig):
    """
    Arguments of [`RewardTrainer`]: those of `transformers.TrainingArguments`, and the fields below.

    Defaults that differ from `TrainingArguments`: `logging_steps` 10, `gradient_checkpointing` True, `bf16` on where
    the hardware has it, `learning_rate` 1e-4.

    Raises:
        ValueError: for a value that cannot work, or a JSON field that is not JSON.
    """

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
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Where to take a chat template from: a `.jinja` file, or a tokenizer's name or folder (then its "
            "special tokens are added as well and the embeddings resized)."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Switch off every dropout layer of the model, so that equal answers score equally."},
    )

    # --- Data ---
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the dataset."})
    eos_token: str | None = field(
        default=None, metadata={"help": "Token that ends a turn or a text. By default the tokenizer's own."}
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Deprecated: set `pad_token` on the tokenizer that you pass in."}
    )
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Longest answer in tokens, its prompt included. A pair with a longer side is left out: cut, its "
            "score would be that of another text. None: no limit."
        },
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto",
        metadata={"help": "Round the padded length up to a multiple of this. `auto`: 128 on Neuron, else none."},
    )

    # --- Training ---
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate of AdamW."})
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the squared sum of a pair's two rewards, which pulls rewards towards a mean of 0 "
            "(https://huggingface.co/papers/2312.09244; 0.01 is usual). None: no such term."
        },
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep activations in host memory between forward and backward."}
    )

    def __post_init__(self):
        if self.pad_token is not None:
            warnings.warn(
                "`pad_token` is deprecated: set it on the tokenizer and pass that as `processing_class`. It will be "
                "removed in version 2.0.",
                FutureWarning,
                stacklevel=3,
            )
        self.pad_to_multiple_of = resolve_pad_to_multiple_of(self.pad_to_multiple_of)
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` is at least 1, or None for no limit. Found {self.max_length!r}.")
        coefficient = self.center_rewards_coefficient
        if coefficient is not None and not (isfinite(coefficient) and coefficient >= 0):
            raise ValueError(
                f"`center_rewards_coefficient` is a number of at least 0, or None. Found {coefficient!r}: a negative "
                "weight would push rewards away from 0 without bound."
            )
        super().__post_init__()
