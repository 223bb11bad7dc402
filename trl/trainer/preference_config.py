"""Fields that the configs of the preference methods share."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..choices import check_choice
from .base_config import _OfflineConfig

LAYOUTS = ("auto", "padded", "packed", "shared_prefix")


@dataclass
class _PreferenceConfig(_OfflineConfig):
    """Fields of every method that learns from preferences. Not for direct use."""

    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Set the dropout of all layers to 0, so that equal completions are judged equally."},
    )


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
