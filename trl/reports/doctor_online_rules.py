"""
What the doctor looks for in the policy and the completions of a run that learns from rewards (GRPO, RLOO), one class per
symptom. The rules on rewards are in `doctor_reward_rules.py`.

Many of these curves move in healthy runs too: entropy falls and answers grow while a model learns. So a curve is
compared with its own beginning, and with what the reward does meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np

from .doctor_reward_rules import LASTING, SOON, RewardRange, reward_rules
from .run_log import Phase, Rule, RunLog, rises, span, values_of


@dataclass(frozen=True)
class EntropyCollapse(Rule):
    """
    The policy has lost nearly all of its entropy, and the reward does not rise (any more) and is not at its top.

    Args:
        share: of the entropy at the beginning.
        floor: entropy, in nats per token, that is too low wherever it began.
        logs: the median of so many, here and at the beginning, counts.
        solved_height: height within the run's rewards (0 to 1) above which the reward may be at its top, ...
        solved_spread: ... if its standard deviation has fallen to this share of its largest, too: certainty is then
            what was to be learnt.
        phase: how long the reward has not risen.
    """

    share: float = 0.1
    floor: float = 0.01
    logs: int = 5
    solved_height: float = 0.75
    solved_spread: float = 0.65
    phase: Phase = LASTING

    name = "entropy_collapse"
    meaning = (
        "The model gives nearly the same completion to a prompt each time. It no longer tries anything that could be "
        "better, so the reward stays where it is (https://huggingface.co/papers/2505.22617)."
    )
    advice = (
        "Go back to a checkpoint with more entropy. Then: `epsilon_high=0.28` (rare tokens may gain more), an entropy "
        "bonus (`use_adaptive_entropy=True`), a lower learning rate, fewer `num_iterations`, `beta` > 0, more varied "
        "prompts; see that `temperature` is near 1."
    )

    def check(self, log: RunLog) -> str | None:
        entropies = log.recent("entropy", self.logs)
        if not log.is_online or len(entropies) < self.logs:
            return None
        now, begun = median(entropies), median(log.earliest("entropy", self.logs))
        if now > max(self.share * begun, self.floor):
            return None
        rewards = log.phase("reward", self.phase)
        if not rewards or rises(values_of(rewards)) or self._is_solved(log):
            return None
        level = np.mean(values_of(rewards))
        return (
            f"entropy {now:.3g} nats per token (median of {self.logs} logs), where the run began with {begun:.3g}; the "
            f"reward stays at {level:.3g} over {span(rewards)}"
        )

    def _is_solved(self, log: RunLog) -> bool:
        known = RewardRange.of(log)
        rewards, stds = log.recent("reward", self.logs), log.recent("reward_std", self.logs)
        height = known.height(float(np.mean(rewards))) if known else None
        if height is None or not stds:
            return False
        return height >= self.solved_height and float(np.mean(stds)) <= self.solved_spread * known.spread


@dataclass(frozen=True)
class KLDrift(Rule):
    """
    The KL divergence from the reference is large, or runs away, though there is a penalty on it.

    Args:
        limit: nats per token.
        logs: the median of so many logs counts.
        growth: how many times its value at the beginning of the phase it is at the end, if it runs away, ...
        least: ... is at least this, in nats per token, since at first it multiplies in every run, ...
        faster: ... and rises so many times as fast as at the beginning of the phase: learning slows down.
        phase: in which it grows.
    """

    limit: float = 1.0
    logs: int = 5
    growth: float = 4.0
    least: float = 0.3
    faster: float = 2.0
    phase: Phase = LASTING

    name = "kl_drift"
    meaning = (
        "The policy is far from the reference, and the penalty does not hold it: `beta` is too small for these rewards "
        "or this learning rate. What the reference could do besides is being lost, and so is the meaning of a learnt "
        "reward, which was trained near the reference."
    )
    advice = (
        "A lower learning rate, a larger `beta`, fewer steps on a generation (`num_iterations`, "
        "`steps_per_generation`), `max_grad_norm=0.2`; if the reference should follow, `sync_ref_model=True`. Read "
        "completions: a sudden rise often is a reward being tricked."
    )

    def check(self, log: RunLog) -> str | None:
        if not log.is_online or not getattr(log.args, "beta", None):
            return None
        newest = log.recent("kl", self.logs)
        if len(newest) < self.logs:
            return None
        if median(newest) > self.limit:
            return f"kl {median(newest):.3g} nats per token (median of {self.logs} logs, limit {self.limit:g})"
        points = log.phase("kl", self.phase)
        if not points:
            return None
        first, *_, last = quarters = [median(quarter) for quarter in np.array_split(values_of(points), 4)]
        increments = np.diff(quarters)
        if last < max(self.least, self.growth * first) or increments[-1] < self.faster * max(increments[0], 0):
            return None
        return f"kl grew from {first:.3g} to {last:.3g} nats per token over {span(points)}"


@dataclass(frozen=True)
class ClipRatio(Rule):
    """
    A large part of the ratios is clipped and teaches nothing.

    Args:
        token_limit: mean share of tokens.
        sequence_limit: mean share of sequences, where a ratio is of a sequence; that is clipped far more often.
        phase: how long.
    """

    token_limit: float = 0.1
    sequence_limit: float = 0.5
    phase: Phase = SOON

    name = "clip_ratio"
    meaning = (
        "The policy moves away from the one that sampled the completions before they are used up: too many or too "
        "large updates on one generation. Clipped tokens have no gradient."
    )
    advice = (
        "A lower learning rate, fewer `num_iterations` or `steps_per_generation`, a smaller `max_grad_norm`; or wider "
        "bounds (`epsilon`, `epsilon_high`)."
    )

    def check(self, log: RunLog) -> str | None:
        level = getattr(log.args, "importance_sampling_level", "sequence")  # RLOO has no choice
        for key in ("clip_ratio/region_mean", "cispo_clip_ratio"):
            points = log.phase(key, self.phase)
            limit = self.token_limit if level == "token" else self.sequence_limit
            if points and np.mean(values_of(points)) > limit:
                return f"{key} {np.mean(values_of(points)):.2f} over {span(points)} (limit {limit:g} of {level}s)"
        return None


@dataclass(frozen=True)
class LogpMismatch(Rule):
    """
    The engine that samples and the trainer disagree about the probability of the sampled tokens.

    Args:
        mean: nats per token, between the log-probs.
        largest: the same for the worst token.
        lowest_ratio: least mean importance ratio; where ratios beyond the bounds are set to 0, what is lost.
        highest_ratio: greatest mean importance ratio.
        logs: the median of so many logs counts.
    """

    mean: float = 0.1
    largest: float = 10.0
    lowest_ratio: float = 0.5
    highest_ratio: float = 2.0
    logs: int = 3

    name = "logp_mismatch"
    meaning = (
        "The completions are off policy from the start: the engine has old weights, another precision or quantization, "
        "another temperature, or its model code differs. Small differences are normal (bf16: about 0.01 to 0.05)."
    )
    advice = (
        "Check that the weights are synchronised, and that engine and trainer agree in `dtype` and adapter. Lasting "
        'small differences: `cast_lm_head_to_fp32=True`, fp16 in place of bf16, `vllm_model_impl="transformers"`, '
        '`vllm_importance_sampling_mode="token_truncate"` for long completions.'
    )

    def check(self, log: RunLog) -> str | None:
        difference, ratio = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"
        bounds = {
            f"{difference}/mean": (0.0, self.mean),
            f"{difference}/max": (0.0, self.largest),
            f"{ratio}/mean": (self.lowest_ratio, self.highest_ratio),
        }
        seen = []
        for key, (low, high) in bounds.items():
            values = log.recent(key, self.logs)
            if len(values) == self.logs and not low <= median(values) <= high:
                usual = f"at most {high:g}" if low == 0 else f"{low:g} to {high:g}"
                seen.append(f"{key} {median(values):.3g} (median of {self.logs} logs, usual {usual})")
        return "; ".join(seen) or None


@dataclass(frozen=True)
class TruncatedCompletions(Rule):
    """
    Many completions reach `max_completion_length`, and their share does not fall.

    Args:
        share: mean share of the completions.
        phase: how long.
    """

    share: float = 0.5
    phase: Phase = LASTING

    name = "truncated_completions"
    meaning = (
        "The answer is cut before it is given, so the reward judges a fragment. Either `max_completion_length` is too "
        "short for the task, or the model does not end its answers: a base model without its stop token, a chat "
        "template that does not fit, another `eos_token`."
    )
    advice = (
        "Read some completions. If they are on the way to an answer: a larger `max_completion_length`, or a penalty "
        "on length (`get_soft_overlong_punishment`). If they ramble: check `eos_token` and the chat template, SFT first."
    )

    def check(self, log: RunLog) -> str | None:
        points = log.phase("completions/clipped_ratio", self.phase)
        shares = values_of(points)
        if not points or np.mean(shares) < self.share or rises([-share for share in shares]):
            return None
        masked = getattr(log.args, "mask_truncated_completions", False)
        lost = ", which `mask_truncated_completions` leaves out of the loss" if masked else ""
        longest = getattr(log.args, "max_completion_length", None)
        at = f" at {longest} tokens" if longest else ""
        return f"{np.mean(shares):.0%} of completions were cut{at} over {span(points)}{lost}"


@dataclass(frozen=True)
class LengthExplosion(Rule):
    """
    Completions have become several times as long as at the beginning and still grow, while the reward does not; or
    they have grown up to `max_completion_length`.

    Args:
        factor: how many times the length at the beginning.
        growth: how many times as long the newer half of the phase is as the older one.
        limit_share: share of `max_completion_length` that the mean reaches if they have grown up to it ...
        limit_factor: ... from a length so many times smaller.
        logs: the median of so many, here and at the beginning, counts.
        phase: in which they grow and the reward does not.
    """

    factor: float = 3.0
    growth: float = 1.1
    limit_share: float = 0.9
    limit_factor: float = 1.5
    logs: int = 5
    phase: Phase = LASTING

    name = "length_explosion"
    meaning = (
        "Longer completions are no longer better ones. A loss that averages over each completion favours long wrong "
        "ones, a reward may pay for length, or the model repeats itself until it is cut."
    )
    advice = (
        'Read some completions. `loss_type="dapo"` or "dr_grpo" do not favour length; a penalty on it '
        "(`get_soft_overlong_punishment`, `get_repetition_penalty_reward`); a lower learning rate."
    )

    def check(self, log: RunLog) -> str | None:
        key = "completions/mean_length"
        lengths = log.recent(key, self.logs)
        if len(lengths) < self.logs:
            return None
        now, begun = median(lengths), median(log.earliest(key, self.logs))
        if now < min(self.factor, self.limit_factor) * begun:
            return None
        longest = getattr(log.args, "max_completion_length", None)
        seen = f"mean length {now:.0f} tokens (median of {self.logs} logs), where the run began with {begun:.0f}"
        if longest and now >= self.limit_share * longest and now >= self.limit_factor * begun:
            return f"{seen}; `max_completion_length` is {longest}"
        points = log.phase(key, self.phase)
        if not points or now < self.factor * begun:
            return None
        older, newer = (median(half) for half in np.array_split(values_of(points), 2))
        rewards = values_of(log.phase("reward", self.phase))
        if newer < self.growth * older or not rewards or rises(rewards):
            return None
        return f"{seen}; the reward stays at {np.mean(rewards):.3g} meanwhile, over {span(points)}"


def online_rules() -> list[Rule]:
    """Every rule for runs that learn from rewards, with its own thresholds."""
    return [
        *reward_rules(),
        EntropyCollapse(),
        KLDrift(),
        ClipRatio(),
        LogpMismatch(),
        TruncatedCompletions(),
        LengthExplosion(),
    ]
