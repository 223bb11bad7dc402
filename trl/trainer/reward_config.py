"""Config of training a reward model."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from .base_config import _TemplateFields
from .preference_config import _PreferenceConfig


@dataclass
class RewardConfig(_TemplateFields, _PreferenceConfig):
    """
    Arguments of [`RewardTrainer`]: those of `transformers.TrainingArguments`, and the fields below.

    Defaults that differ from `TrainingArguments`: `logging_steps` 10, `gradient_checkpointing` True, `bf16` on where
    the hardware has it, `learning_rate` 1e-4.

    Raises:
        ValueError: for a value that cannot work, or a JSON field that is not JSON.
    """

    # --- Data ---
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Longest answer in tokens, its prompt included. A pair with a longer side is left out: cut, its "
            "score would be that of another text. None: no limit."
        },
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

    def __post_init__(self):
        self._check_template_fields()
        coefficient = self.center_rewards_coefficient
        if coefficient is not None and not (isfinite(coefficient) and coefficient >= 0):
            raise ValueError(
                f"`center_rewards_coefficient` is a number of at least 0, or None. Found {coefficient!r}: a negative "
                "weight would push rewards away from 0 without bound."
            )
        super().__post_init__()
