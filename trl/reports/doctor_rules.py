"""
What the doctor looks for in a run's log, one class per symptom.

A rule sees the log and the run's settings, never tensors, and keeps nothing between calls: what it finds follows from
the log alone, so a resumed run is judged like one that was never stopped. Its thresholds are its fields. To add a rule,
write a class and name it in `default_rules`. Those for runs that learn from rewards are in `doctor_online_rules.py`.

A healthy run must stay silent, so a rule waits for enough logs and leaves alone what it cannot judge.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from itertools import islice
from statistics import median

import numpy as np
import torch

from ..losses.preference import PairLogps, PreferenceLossInputs, preference_loss
from ..losses.preference_options import PREFERENCE_LOSS_TYPES, PreferenceLossOptions
from ..losses.unpaired import UNPAIRED_LOSSES, unpaired_loss
from .doctor_online_rules import online_rules
from .run_log import Phase, Rule, RunLog, is_number

LASTING = Phase()


@dataclass(frozen=True)
class NotFinite(Rule):
    """
    A NaN or an infinity anywhere in the log.

    Args:
        fp16_logs: in fp16, so many logs in a row may have a gradient norm that overflowed: the loss scaler skips such
            steps while it looks for its scale.
    """

    fp16_logs: int = 5

    name = "not_finite"
    meaning = (
        "The numbers overflowed (fp16, or a learning rate too high) or something divided by zero. A loss or gradient "
        "that is NaN once usually stays NaN, and so do the weights."
    )
    advice = (
        "Stop, go back to the last checkpoint before it, and look at the rows of this step. Then: bf16 instead of "
        "fp16, a lower learning rate, a longer warm-up, `max_grad_norm=1.0`."
    )
    kinds = ("train", "eval", "other")

    def check(self, log: RunLog) -> str | None:
        found = {key: value for key, value in log.newest.items() if is_number(value) and not math.isfinite(value)}
        if "grad_norm" in found and log.args.fp16 and not self._keeps_overflowing(log):
            del found["grad_norm"]
        if not found:
            return None
        named = ", ".join(f"{key} = {value}" for key, value in list(found.items())[:4])
        return named + (f", and {len(found) - 4} more" if len(found) > 4 else "")

    def _keeps_overflowing(self, log: RunLog) -> bool:
        norms = (entry["grad_norm"] for entry in reversed(log.entries) if is_number(entry.get("grad_norm")))
        last = list(islice(norms, self.fp16_logs))
        return len(last) == self.fp16_logs and not any(map(math.isfinite, last))


@dataclass(frozen=True)
class GradNormSpike(Rule):
    """
    A gradient norm far above those before it.

    Judged on the logarithm, against median and median absolute deviation of the last logs, so that neither a trend nor
    an earlier spike moves the measure much. A norm that is not clipped (below `max_grad_norm`) is no spike.

    Args:
        score: robust standard deviations above the median.
        window: logs that it is compared with.
        least_logs: logs before the first judgement.
        least_spread: lower bound of the deviation of ln(norm), so that a very even run is not judged by its noise.
    """

    score: float = 6.0
    window: int = 64
    least_logs: int = 20
    least_spread: float = 0.2

    name = "grad_norm_spike"
    meaning = (
        "A batch unlike the others (broken or very long rows, wrong labels), or a learning rate near the limit of what "
        "is stable. The gradient was clipped, but this step followed that batch alone."
    )
    advice = (
        "If the loss comes back, nothing; if spikes repeat: look at the rows of this step, lower the learning rate or "
        "`max_grad_norm`, lengthen the warm-up, or enlarge the batch."
    )

    def check(self, log: RunLog) -> str | None:
        norms = self.recent_positive(log)
        if len(norms) <= self.least_logs or norms[-1] <= (log.args.max_grad_norm or 0):
            return None
        *before, now = map(math.log, norms)
        center = median(before)
        # 1.4826 makes the median absolute deviation of a normal distribution its standard deviation.
        spread = 1.4826 * max(median(abs(value - center) for value in before), self.least_spread)
        if (now - center) / spread <= self.score:
            return None
        usual = math.exp(center)
        return (
            f"gradient norm {norms[-1]:.3g}, {norms[-1] / usual:.1f} times the median {usual:.3g} of the last "
            f"{len(before)} logs ({(now - center) / spread:.1f} robust standard deviations above it)"
        )

    def recent_positive(self, log: RunLog) -> list[float]:
        return [norm for norm in log.recent("grad_norm", self.window + 1) if norm > 0]


@dataclass(frozen=True)
class FirstLoss(Rule):
    """
    The first loss of a run whose policy is its reference is not what the loss gives for two equal models (DPO: ln 2).

    Only the first step alone, or an evaluation before it, is judged exactly; of a first log that covers several steps
    only a loss far above.

    Args:
        noise: nats per completion by which two computations of the same log-prob may differ in float32.
        reduced_noise: the same in lower precision.
        noise_share: the same relative to the log-prob, in float32.
        reduced_noise_share: the same in lower precision.
        window_ratio: how many times the expected loss the mean over several first steps may be.
    """

    noise: float = 0.05
    reduced_noise: float = 1.0
    noise_share: float = 1e-4
    reduced_noise_share: float = 5e-3
    window_ratio: float = 1.5

    name = "first_loss"
    meaning = (
        "Policy and reference are the same model before the first step, and should score answers alike. Often a "
        "dropout is on that is no layer but a number in the model's config, or the reference was loaded from other "
        "weights or in another precision. (After several steps: the learning rate is too high.)"
    )
    advice = (
        "Set `attention_dropout` and the like to 0 in the model's config (`model_init_kwargs`); the same `dtype` and "
        "`attn_implementation` for both. If the reference is meant to be another model, pass it as `ref_model`."
    )
    kinds = ("train", "eval")

    def check(self, log: RunLog) -> str | None:
        if not log.starts_at_reference or not self._is_first(log):
            return None
        expected = expected_first_loss(log)
        loss = log.value("loss")
        if log.step > 1:
            if expected is None or loss is None or not loss > self.window_ratio * expected:
                return None
            return (
                f"mean loss {loss:.4f} over the first {log.step} steps, where {expected:.4f} is expected at the start"
            )
        beta = getattr(log.args, "beta", None)
        if not beta:
            return None
        noise = self._noise(log)
        seen = []
        if expected is not None and loss is not None and abs(loss - expected) > expected * (0.01 + 2 * beta * noise):
            seen.append(f"loss {loss:.6f} instead of {expected:.6f}")
        for side in ("chosen", "rejected"):
            reward = log.value(f"rewards/{side}")
            if reward is not None and abs(reward) > beta * noise:
                seen.append(f"rewards/{side} {reward:.4g} instead of 0, {abs(reward) / beta:.3g} nats per completion")
        return "; ".join(seen) or None

    @staticmethod
    def _is_first(log: RunLog) -> bool:
        if log.prefix:
            return log.step == 0
        return sum(1 for _ in islice(log.backwards("loss"), 2)) == 1

    def _noise(self, log: RunLog) -> float:
        least, share = self.noise, self.noise_share
        if not log.full_precision:
            least, share = self.reduced_noise, self.reduced_noise_share
        logps = [abs(log.value(f"logps/{side}") or 0) for side in ("chosen", "rejected")]
        return max(least, share * max(logps))


def expected_first_loss(log: RunLog) -> float | None:
    """
    The loss of a policy that is its reference, from the loss functions themselves.

    Returns:
        None where it depends on the data: `sft` among the losses, weighted pairs, an auxiliary loss, other methods.
    """
    args, names = log.args, set(log.loss_types)
    if not names or log.value("aux_loss") is not None:
        return None
    zeros_B = torch.zeros(2, dtype=torch.float64)
    if names <= set(UNPAIRED_LOSSES) and args.desirable_weight == args.undesirable_weight:
        options = {name: getattr(args, name) for name in ("beta", "desirable_weight", "undesirable_weight")}
        labels_B = torch.tensor([True, False])
        (loss_type,) = names
        return unpaired_loss(zeros_B, labels_B, zeros_B.sum(), loss_type=loss_type, **options).mean().item()
    if not names <= set(PREFERENCE_LOSS_TYPES) or "sft" in names or getattr(args, "use_weighting", False):
        return None
    lengths_B, logps = torch.ones(2, dtype=torch.float64), PairLogps(zeros_B, zeros_B)
    inputs = PreferenceLossInputs(logps, logps, lengths_B, lengths_B)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the config has warned of its values
        terms = preference_loss(inputs, PreferenceLossOptions.of(args))
    return sum(term.weight * term.total.item() for term in terms) / len(zeros_B)


@dataclass(frozen=True)
class AccuracyStuck(Rule):
    """
    The share of pairs with the chosen answer in front does not leave one half.

    Args:
        ceiling: accuracy that the mean, with two standard errors, stays below.
        phase: how long; the first half of it is time to learn, the second is judged.
    """

    ceiling: float = 0.55
    phase: Phase = LASTING

    name = "accuracy_stuck"
    meaning = (
        "The pairs teach nothing that the model can pick up: chosen and rejected are mixed up in part of the data, are "
        "nearly the same (perhaps truncated to the same), or the learning rate is too small."
    )
    advice = (
        "Read some pairs and the pre-flight report; check `max_length`; raise the learning rate (an adapter wants "
        "about ten times that of all weights), or lower `beta`."
    )

    def check(self, log: RunLog) -> str | None:
        key = log.pair_key("accuracies")
        if key is None or set(log.loss_types) == {"sft"}:
            return None
        points = log.phase(key, self.phase)
        points = points[len(points) // 2 :]
        if len(points) < 2:
            return None
        values = [point.value for point in points]
        mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))
        if mean + 2 * error >= self.ceiling:
            return None
        return f"{key} {mean:.3f} ± {error:.3f} over steps {points[0].step} to {points[-1].step} ({len(points)} logs)"


@dataclass(frozen=True)
class MarginsExploding(Rule):
    """
    Reward margins beyond any use: the logistic losses are saturated long before.

    The margin is the logit of the preferred answer's probability, so one limit fits any `beta`. Losses on mean
    log-ratios (`ipo`, `sigmoid_norm`) aim at a mean per token, and their margins grow with the length: not judged.

    Args:
        limit: margin.
        logs: the median of so many logs counts.
    """

    limit: float = 20.0
    logs: int = 3

    name = "margins_exploding"
    meaning = (
        "The policy runs away from the reference on a difference that is too easy to tell (a length, a format, a "
        "signature), or it has learnt the pairs by heart. More steps change the answers, not the preference."
    )
    advice = (
        "Stop earlier (compare `eval_rewards/accuracies` of the checkpoints), fewer epochs, a lower learning rate, a "
        "larger `beta`; for a reward model `center_rewards_coefficient=0.01`."
    )
    kinds = ("train", "eval")

    def check(self, log: RunLog) -> str | None:
        key = log.pair_key("margins")
        if key is None or {"ipo", "sigmoid_norm"} & set(log.loss_types):
            return None
        margins = log.recent(key, self.logs)
        if len(margins) < self.logs or median(margins) <= self.limit:
            return None
        return (
            f"{log.prefix}{key} {margins[-1]:.3g} (median {median(margins):.3g} of the last {self.logs} logs, limit "
            f"{self.limit:g})"
        )


@dataclass(frozen=True)
class ChosenCollapse(Rule):
    """
    The chosen answers become improbable while the margins grow: the rejected ones only fall faster.

    The drop is measured against the reference's log-prob of the same answers, which follows from the log:
    `logps/chosen` - `rewards/chosen` / β. So the lengths of the batch do not matter.

    Args:
        share: drop relative to the reference's log-prob; 0.5 is a perplexity of p^1.5 where it was p.
        nats: drop per completion that counts in any case; 3 nats are a probability 20 times smaller.
        logs: medians are over so many logs, against as many before them.
    """

    share: float = 0.5
    nats: float = 3.0
    logs: int = 5

    name = "chosen_collapse"
    meaning = (
        "The loss asks only for a difference, and pushing both answers down is the easy way to it. The probability "
        "goes to texts that nobody compared, so samples get worse while accuracy and margins look good."
    )
    advice = (
        'Hold the chosen answers up: `loss_type=["sigmoid", "sft"]` with `loss_weights`, or "apo_zero"; a larger '
        "`beta`, a lower learning rate, fewer epochs; SFT on the chosen answers first."
    )

    def check(self, log: RunLog) -> str | None:
        beta = getattr(log.args, "beta", None)
        if not beta or any(log.value(key) is None for key in ("rewards/chosen", "logps/chosen", "rewards/margins")):
            return None
        margins = log.recent("rewards/margins", 2 * self.logs)
        if len(margins) < 2 * self.logs:
            return None
        earlier, now = median(margins[: self.logs]), median(margins[self.logs :])
        drop = -median(log.recent("rewards/chosen", self.logs)) / beta
        logps = median(log.recent("logps/chosen", self.logs))
        reference = logps + drop
        if not (now > max(earlier, 0) and drop >= self.nats and drop >= self.share * abs(reference)):
            return None
        return (
            f"chosen answers at {logps:.1f} nats, {drop:.1f} below the reference's {reference:.1f}, while "
            f"rewards/margins rose from {earlier:.3g} to {now:.3g} (medians of {self.logs} logs)"
        )


@dataclass(frozen=True)
class KLAtClamp(Rule):
    """
    KTO's KL estimate is exactly 0, log after log, though the policy has moved.

    Args:
        phase: how long.
        moved: size of the median reward from which on the policy has moved.
    """

    phase: Phase = LASTING
    moved: float = 0.05

    name = "kl_clamped"
    meaning = (
        "The estimate comes from prompts with other prompts' answers. It is below 0 all the time, and so is set to 0: "
        "the policy finds such answers less probable than the reference does. KTO then has no reference point but 0, "
        "like `apo_zero_unpaired`."
    )
    advice = (
        "Harmless while rewards/chosen and rewards/rejected move apart. Else a larger `per_device_train_batch_size` "
        "(more mismatched pairs), a lower learning rate, a larger `beta`, or a better balance of the classes "
        "(`desirable_weight`, `undesirable_weight`)."
    )

    def check(self, log: RunLog) -> str | None:
        if "kto" not in log.loss_types or log.value("kl") != 0:
            return None
        points = log.phase("kl", self.phase)
        if not points or any(point.value > 0 for point in points):
            return None
        rewards = {side: log.recent(f"rewards/{side}", 5) for side in ("chosen", "rejected")}
        medians = {side: median(values) for side, values in rewards.items() if values}
        if max(map(abs, medians.values()), default=0) < self.moved:
            return None
        moved = ", ".join(f"rewards/{side} is at {value:.3g}" for side, value in medians.items())
        return f"kl is 0 in all {len(points)} logs of steps {points[0].step} to {points[-1].step}, while {moved}"


def default_rules() -> list[Rule]:
    """Every rule, with its own thresholds."""
    return [
        NotFinite(),
        GradNormSpike(),
        FirstLoss(),
        AccuracyStuck(),
        MarginsExploding(),
        ChosenCollapse(),
        KLAtClamp(),
        *online_rules(),
    ]
