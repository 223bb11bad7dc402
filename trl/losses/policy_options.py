"""
The settings of policy losses and advantages, and what is wrong with a combination of them.

They are checked where they are made, before any model is loaded. Nothing here needs torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from ..choices import check_choice, check_number

POLICY_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
# `trajectory` is of RLOO, which has no setting for it.
RATIO_LEVELS = ("token", "sequence", "trajectory")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
SCALE_REWARDS = ("group", "batch", "none")
MULTI_OBJECTIVE_AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
ENGINE_CORRECTION_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

# These compare the ratio with 1 − epsilon and 1 + epsilon_high; the other losses bound it in their own ways.
CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# These divide by tokens of the whole batch, so that a long sequence weighs more than a short one.
LOSSES_OVER_TOKENS = ("bnpo", "dr_grpo", "dapo", "cispo")


def _at_least(bound: float):
    return lambda value: value >= bound


@dataclass(frozen=True)
class PolicyLossOptions:
    """
    Which loss a trainer that learns from rewards minimises.

    Args:
        loss_type: one name of `POLICY_LOSS_TYPES`.
        importance_sampling_level: what one ratio of new to old probabilities is of: `"token"`; `"sequence"`, the
            geometric mean over a completion's tokens (GSPO, https://huggingface.co/papers/2507.18071); or
            `"trajectory"`, the product over them (RLOO).
        epsilon: by how much a ratio may fall below 1 before it is clipped, >= 0.
        epsilon_high: by how much it may exceed 1 (https://huggingface.co/papers/2503.14476), >= 0; `None` is
            `epsilon`. For `cispo` the largest weight itself.
        delta: upper bound on the unclipped ratio, > 0, which bounds the loss where the advantage is negative
            (https://huggingface.co/papers/2505.07291); `None` for no bound.
        beta: coefficient of the KL divergence from the reference, >= 0; 0 needs no reference.
        use_bias_correction_kl: multiply the KL estimate by the importance ratio, which makes it and its gradient
            unbiased off policy (https://huggingface.co/papers/2512.02556).
        off_policy_mask_threshold: sequences with a negative advantage whose mean log-prob fell by more than this, in
            nats per token, are left out (https://huggingface.co/papers/2512.02556); `None` keeps all.
        top_entropy_quantile: share of the tokens, those of the highest entropy, that are trained on, from 0 to 1
            (https://huggingface.co/papers/2506.01939).
        entropy_coef: coefficient of the entropy bonus; where it starts with `use_adaptive_entropy`.
        use_adaptive_entropy: steer the coefficient towards `entropy_target`.
        entropy_target: the least entropy wanted, in nats per token.
        entropy_coef_delta: how far one optimizer step moves the coefficient, >= 0.
        entropy_coef_min: lowest coefficient.
        entropy_coef_max: highest coefficient.
        sapo_temperature_pos: steepness of `sapo`'s gate for positive advantages, > 0.
        sapo_temperature_neg: the same for the others; higher forgets them sooner.
        vespo_k_pos: power k of `vespo`'s weight for advantages >= 0.
        vespo_lambda_pos: decay λ of that weight.
        vespo_k_neg: k for negative advantages.
        vespo_lambda_neg: λ for negative advantages.
        max_completion_length: tokens that `dr_grpo` divides each row by; needed by it alone.
        use_vllm: whether another engine than the trained model itself samples.
        vllm_importance_sampling_correction: whether the ratio of the trainer's to the engine's probabilities corrects
            the loss.
        vllm_importance_sampling_mode: one name of `ENGINE_CORRECTION_MODES`; see
            `trl.losses.engine_correction.engine_correction`.
        vllm_importance_sampling_clip_min: lowest ratio; `None` for no bound.
        vllm_importance_sampling_clip_max: highest ratio; `None` for no bound.

    Raises:
        ValueError: if a value is out of its range or two settings contradict each other.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    off_policy_mask_threshold: float | None = None
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    use_adaptive_entropy: bool = False
    entropy_target: float = 0.2
    entropy_coef_delta: float = 0.005
    entropy_coef_min: float = 0.0
    entropy_coef_max: float = 1.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    max_completion_length: int | None = 512
    use_vllm: bool = False
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_clip_max: float | None = 3.0

    @classmethod
    def of(cls, config: Any, **overrides: Any) -> PolicyLossOptions:
        """The options among a training config's fields; `overrides` win, and what it has not keeps its default."""
        values = {field.name: getattr(config, field.name) for field in fields(cls) if hasattr(config, field.name)}
        if "importance_sampling_level" in values:
            check_choice("importance_sampling_level", values["importance_sampling_level"], IMPORTANCE_SAMPLING_LEVELS)
        return cls(**{**values, **overrides})

    @classmethod
    def of_rloo(cls, config: Any) -> PolicyLossOptions:
        """
        The options of RLOO (https://huggingface.co/papers/2402.14740): one clipped ratio for the whole completion, the
        mean over rows; the KL divergence is in the reward, and the engine's log-probs are not looked at.
        """
        return cls(
            loss_type="grpo",
            importance_sampling_level="trajectory",
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            vllm_importance_sampling_correction=False,
        )

    @property
    def upper_epsilon(self) -> float:
        """`epsilon_high`, or what stands in for it."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def corrects_engine(self) -> bool:
        """Whether the engine's log-probs are needed."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether an entropy bonus may be part of the loss, so that entropies need a gradient."""
        return self.use_adaptive_entropy or self.entropy_coef != 0

    @property
    def needs_entropy_threshold(self) -> bool:
        """Whether the loss asks for the threshold of `trl.losses.entropy.entropy_threshold`."""
        return self.top_entropy_quantile < 1

    def __post_init__(self):
        check_choice("loss_type", self.loss_type, POLICY_LOSS_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, RATIO_LEVELS)
        check_choice("vllm_importance_sampling_mode", self.vllm_importance_sampling_mode, ENGINE_CORRECTION_MODES)
        self._check_numbers()
        self._check_entropy()
        self._check_engine_correction()
        self._warn_of_combinations()

    def _check_numbers(self) -> None:
        for name in ("epsilon", "beta", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"):
            check_number(name, getattr(self, name), "a number of at least 0", _at_least(0))
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            check_number(name, getattr(self, name), "a number above 0", lambda value: value > 0)
        if self.epsilon_high is not None:
            check_number("epsilon_high", self.epsilon_high, "a number of at least 0, or None", _at_least(0))
        if self.delta is not None:
            check_number("delta", self.delta, "a number above 0, or None", lambda value: value > 0)
        if self.off_policy_mask_threshold is not None:
            check_number("off_policy_mask_threshold", self.off_policy_mask_threshold, "a finite number, or None")
        if self.loss_type == "dr_grpo":
            if self.max_completion_length is None:
                raise ValueError(
                    "`loss_type='dr_grpo'` divides by `max_completion_length`, which is None. Set it to the longest "
                    "completion that may be sampled, or choose 'dapo', which divides by the tokens that were."
                )
            check_number("max_completion_length", self.max_completion_length, "a number above 0", lambda n: n > 0)

    def _check_entropy(self) -> None:
        check_number(
            "top_entropy_quantile", self.top_entropy_quantile, "a number from 0 to 1", lambda value: 0 <= value <= 1
        )
        for name in ("entropy_coef", "entropy_target", "entropy_coef_min", "entropy_coef_max"):
            check_number(name, getattr(self, name), "a finite number")
        check_number("entropy_coef_delta", self.entropy_coef_delta, "a number of at least 0", _at_least(0))
        if self.use_adaptive_entropy and self.entropy_coef_min > self.entropy_coef_max:
            raise ValueError(
                f"`entropy_coef_min={self.entropy_coef_min}` is above `entropy_coef_max={self.entropy_coef_max}`: no "
                "coefficient is between them. Exchange them."
            )

    def _check_engine_correction(self) -> None:
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        for name, value in (("clip_min", low), ("clip_max", high)):
            if value is not None:
                check_number(
                    f"vllm_importance_sampling_{name}", value, "a number of at least 0, or None", _at_least(0)
                )
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"`vllm_importance_sampling_clip_min={low}` is not below `vllm_importance_sampling_clip_max={high}`: no "
                "ratio is between them. On-policy ratios are about 1; for instance 0.5 and 3.0."
            )
        if not self.vllm_importance_sampling_correction:
            return
        mode = self.vllm_importance_sampling_mode
        if mode.endswith("_truncate") and low is None and high is None:
            raise ValueError(
                f"`vllm_importance_sampling_mode={mode!r}` truncates ratios, but both "
                "`vllm_importance_sampling_clip_min` and `vllm_importance_sampling_clip_max` are None. Set one, for "
                "instance clip_max=3.0."
            )
        if self.loss_type == "vespo" and self.use_vllm and not mode.startswith("token_"):
            raise ValueError(
                "`loss_type='vespo'` makes the sequence's weight itself and wants one ratio for each token. Found "
                f"`vllm_importance_sampling_mode={mode!r}`; use 'token_truncate' or 'token_mask', or set "
                "`vllm_importance_sampling_correction=False`."
            )

    def _warn_of_combinations(self) -> None:
        loss_type, level = self.loss_type, self.importance_sampling_level
        if loss_type == "luspo" and level != "sequence":
            self._warn(
                "`loss_type='luspo'` is made for ratios of sequences; set `importance_sampling_level='sequence'`. "
                f"Found {level!r}."
            )
        if loss_type == "vespo" and level != "token":
            self._warn(
                "`loss_type='vespo'` makes the weight of a sequence from its tokens; leave "
                f"`importance_sampling_level='token'`. Found {level!r}, which only the KL term will use."
            )
        if loss_type in LOSSES_OVER_TOKENS and level == "sequence":
            self._warn(
                f"`loss_type={loss_type!r}` is a mean over tokens, so with `importance_sampling_level='sequence'` a long "
                "sequence weighs more than a short one. GSPO is `loss_type='grpo'`, which weighs them alike."
            )
        if loss_type == "cispo" and self.upper_epsilon < 1:
            self._warn(
                f"`loss_type='cispo'` takes `epsilon_high` as the largest weight of a token. At {self.upper_epsilon} it "
                "cuts even on-policy tokens, whose ratio is 1, and only scales the gradient; 5.0 is usual."
            )

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(message, stacklevel=5)


# ---- Of advantages ----


def normalize_scale_rewards(scale_rewards: str | bool) -> str:
    """
    One name of `SCALE_REWARDS`; `True` is `"group"` and `False` is `"none"`.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(scale_rewards, bool):
        return "group" if scale_rewards else "none"
    check_choice("scale_rewards", scale_rewards, SCALE_REWARDS)
    return scale_rewards


def check_reward_clip_range(reward_clip_range: Sequence[float] | None) -> None:
    """
    Refuse what is not a lowest and a highest reward.

    Raises:
        ValueError: unless it is two numbers in order, or `None`.
    """
    if reward_clip_range is None:
        return
    if not isinstance(reward_clip_range, Sequence) or len(reward_clip_range) != 2:
        raise ValueError(
            f"`reward_clip_range` is two numbers, (lowest, highest), or None. Found {reward_clip_range!r}."
        )
    low, high = reward_clip_range
    if not all(isinstance(bound, Real) for bound in reward_clip_range) or not low < high:
        raise ValueError(
            f"`reward_clip_range` is (lowest, highest), the first below the second. Found ({low!r}, {high!r})."
        )
