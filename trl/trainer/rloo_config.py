"""Config of REINFORCE leave-one-out."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..losses.policy_options import check_reward_clip_range
from .online_config import _OnlineConfig


@dataclass
class RLOOConfig(_OnlineConfig):
    """
    Arguments of [`RLOOTrainer`]: those of `transformers.TrainingArguments`, and the fields below.

    Defaults that differ from `TrainingArguments`: `logging_steps` 10, `gradient_checkpointing` True, `bf16` on where
    the hardware has it, `learning_rate` 1e-6, `remove_unused_columns` False.

    Raises:
        ValueError: for a value outside its range or choices, a JSON field that is not JSON, or options that exclude
            each other.
    """

    num_generations: int | None = field(
        default=2,
        metadata={
            "help": "Completions for each prompt: a group, each of which is compared with the others. At least 2; "
            "`generation_batch_size` is a multiple of it."
        },
    )
    beta: float = field(
        default=0.05,
        metadata={"help": "Weight of the KL divergence from the reference in the reward. 0: no reference is loaded."},
    )
    normalize_advantages: bool = field(
        default=False, metadata={"help": "Bring advantages to mean 0 and standard deviation 1 over the whole batch."}
    )
    reward_clip_range: tuple[float, float] | None = field(
        default=None, metadata={"help": "Lowest and highest reward, before the KL penalty. By default no bound."}
    )

    def __post_init__(self):
        check_reward_clip_range(self.reward_clip_range)
        if self.reward_clip_range is not None:
            self.reward_clip_range = tuple(self.reward_clip_range)  # a command line gives a list
        super().__post_init__()
