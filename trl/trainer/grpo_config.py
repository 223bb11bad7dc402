"""Config of group relative policy optimization."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..choices import check_choice
from ..losses.policy_options import (
    ENGINE_CORRECTION_MODES,
    IMPORTANCE_SAMPLING_LEVELS,
    MULTI_OBJECTIVE_AGGREGATIONS,
    POLICY_LOSS_TYPES,
    PolicyLossOptions,
    normalize_scale_rewards,
)
from .base_config import warn_deprecated
from .online_config import _OnlineConfig


@dataclass
class GRPOConfig(_OnlineConfig):
    """
    Arguments of [`GRPOTrainer`]: those of `transformers.TrainingArguments`, and the fields below.

    Defaults that differ from `TrainingArguments`: `logging_steps` 10, `gradient_checkpointing` True, `bf16` on where
    the hardware has it, `learning_rate` 1e-6, `remove_unused_columns` False.

    Raises:
        ValueError: for a value outside its range or choices, a JSON field that is not JSON, or options that exclude
            each other.
    """

    # --- Generation ---
    max_tool_calling_iterations: int | None = field(
        default=None, metadata={"help": "Most rounds of tool calls in a completion. By default as many as it likes."}
    )

    # --- Rewards ---
    scale_rewards: str | bool = field(
        default="group",
        metadata={
            "help": "What advantages are divided by: the standard deviation of rewards in the `group` (or True), in the "
            "`batch`, or `none` (or False)."
        },
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "With several rewards: normalise their weighted sum, or sum what was normalised one by one (GDPO, "
            "https://huggingface.co/papers/2601.05242).",
            "choices": list(MULTI_OBJECTIVE_AGGREGATIONS),
        },
    )

    # --- Loss ---
    loss_type: str = field(default="dapo", metadata={"help": f"One of {', '.join(POLICY_LOSS_TYPES)}."})
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": "What a ratio of new to old probabilities is of: a `token`, or the `sequence` (GSPO, "
            "https://huggingface.co/papers/2507.18071).",
            "choices": list(IMPORTANCE_SAMPLING_LEVELS),
        },
    )
    delta: float | None = field(
        default=None,
        metadata={
            "help": "Upper bound on the unclipped ratio (https://huggingface.co/papers/2505.07291). By default none."
        },
    )
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Multiply the KL estimate by the ratio, which makes it unbiased off policy."}
    )
    off_policy_mask_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Leave out completions with a negative advantage whose mean log-prob fell by more than this "
            "(https://huggingface.co/papers/2512.02556)."
        },
    )
    top_entropy_quantile: float = field(
        default=1.0,
        metadata={
            "help": "Train on this share of the tokens, those of the highest entropy "
            "(https://huggingface.co/papers/2506.01939)."
        },
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of an entropy bonus."})
    use_adaptive_entropy: bool = field(
        default=False, metadata={"help": "Steer that weight so that the entropy stays above `entropy_target`."}
    )
    entropy_target: float = field(default=0.2, metadata={"help": "The least entropy wanted, in nats per token."})
    entropy_coef_delta: float = field(default=0.005, metadata={"help": "How far one step moves the weight."})
    entropy_coef_min: float = field(default=0.0, metadata={"help": "Lowest weight."})
    entropy_coef_max: float = field(default=1.0, metadata={"help": "Highest weight."})
    sapo_temperature_pos: float = field(
        default=1.0, metadata={"help": "Steepness of `sapo`'s gate for positive advantages."}
    )
    sapo_temperature_neg: float = field(default=1.05, metadata={"help": "The same for the others."})
    vespo_k_pos: float = field(default=2.0, metadata={"help": "Power of `vespo`'s weight, advantages from 0."})
    vespo_lambda_pos: float = field(default=3.0, metadata={"help": "Decay of that weight."})
    vespo_k_neg: float = field(default=3.0, metadata={"help": "Power of `vespo`'s weight, negative advantages."})
    vespo_lambda_neg: float = field(default=2.0, metadata={"help": "Decay of that weight."})
    cast_lm_head_to_fp32: bool = field(
        default=False, metadata={"help": "Hold the output head in float32 and project in it."}
    )

    # --- Correction for the engine's log-probs ---
    vllm_importance_sampling_correction: bool = field(
        default=True, metadata={"help": "Correct the loss for how vLLM's probabilities differ from the trainer's."}
    )
    vllm_importance_sampling_mode: str = field(
        default="sequence_mask",
        metadata={
            "help": "Ratios of tokens or of sequences, truncated to the bounds or left out beyond them.",
            "choices": list(ENGINE_CORRECTION_MODES),
        },
    )
    vllm_importance_sampling_clip_min: float | None = field(default=None, metadata={"help": "Lowest ratio."})
    vllm_importance_sampling_clip_max: float | None = field(default=3.0, metadata={"help": "Highest ratio."})
    vllm_importance_sampling_cap: float | None = field(
        default=None, metadata={"help": "Deprecated name of `vllm_importance_sampling_clip_max`."}
    )

    # --- Logging ---
    log_completions_hub_repo: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub that logged completions are uploaded to."}
    )

    def __post_init__(self):
        if self.vllm_importance_sampling_cap is not None:
            warn_deprecated("`vllm_importance_sampling_cap` is an old name of `vllm_importance_sampling_clip_max`.")
            self.vllm_importance_sampling_clip_max = self.vllm_importance_sampling_cap
        self.scale_rewards = normalize_scale_rewards(self.scale_rewards)
        check_choice("multi_objective_aggregation", self.multi_objective_aggregation, MULTI_OBJECTIVE_AGGREGATIONS)
        if self.log_completions_hub_repo is not None and not self.log_completions:
            raise ValueError(
                "`log_completions_hub_repo` uploads logged completions, but `log_completions` is off. Turn it on."
            )
        PolicyLossOptions.of(self)  # says what is wrong with the loss
        super().__post_init__()
