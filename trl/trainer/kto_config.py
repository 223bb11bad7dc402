"""Config of Kahneman-Tversky optimization."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..choices import check_choice
from .preference_config import _ReferenceConfig

LOSS_TYPES = ("kto", "apo_zero_unpaired")


@dataclass
class KTOConfig(_ReferenceConfig):
    """
    Arguments of [`KTOTrainer`]: those of `transformers.TrainingArguments`, and the fields below.

    Defaults that differ from `TrainingArguments`: `logging_steps` 10, `gradient_checkpointing` True, `bf16` on where
    the hardware has it, `learning_rate` 1e-6, `train_sampling_strategy` `"sequential"`.

    Raises:
        ValueError: for a value outside its range or choices, or a JSON field that is not JSON.
    """

    loss_type: str = field(
        default="kto",
        metadata={
            "help": "`kto` (https://huggingface.co/papers/2402.01306), or `apo_zero_unpaired` "
            "(https://huggingface.co/papers/2408.06266), which needs no estimate of the KL divergence.",
            "choices": list(LOSS_TYPES),
        },
    )
    desirable_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the desirable rows' losses; raise it where they are the fewer."},
    )
    undesirable_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the undesirable rows' losses; raise it where they are the fewer."},
    )
    train_sampling_strategy: str = field(
        default="sequential",
        metadata={
            "help": "Order of the training rows. The `kto` loss needs `sequential`: its KL estimate pairs a prompt with "
            "the completion of another row of its step.",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )

    def __post_init__(self):
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        for name in ("desirable_weight", "undesirable_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` is 0 or more. Found {getattr(self, name)}.")
        super().__post_init__()
