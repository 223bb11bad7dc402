"""Fields that the configs of the preference methods share."""

from __future__ import annotations

from dataclasses import dataclass, field

from .base_config import _OfflineConfig, _PolicyFields


@dataclass
class _PreferenceConfig(_OfflineConfig):
    """Fields of every method that learns from preferences. Not for direct use."""

    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set the dropout of all layers to 0, so that equal completions are judged equally."},
    )


@dataclass
class _ReferenceConfig(_PolicyFields, _PreferenceConfig):
    """Fields of the methods that hold the policy against a reference. Not for direct use."""

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of AdamW."})
    beta: float = field(
        default=0.1,
        metadata={"help": "How strongly the policy is held to the reference: the higher, the less it moves."},
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

    def __post_init__(self):
        self._check_policy_fields()
        if not self.beta > 0:
            raise ValueError(f"`beta` is a number above 0. Found {self.beta}.")
        super().__post_init__()
