"""
What the doctor looks for in the rewards of a run that learns from them (GRPO, RLOO), one class per symptom.

Rewards have no scale of their own, so a reward is compared with where it has been in the same run. How long something
lasts is counted in steps and logs; the warm-up counts, since completions are sampled and judged during it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from .run_log import Phase, Rule, RunLog, rises, span, values_of

SOON = Phase(least_steps=50, least_share=0.1, least_logs=5, after_warmup=False)
LASTING = Phase(least_steps=50, least_share=0.1, least_logs=10, after_warmup=False)
LONG = Phase(least_steps=100, least_share=0.1, least_logs=20, after_warmup=False)

# Relative to a value (or to 1): closer than this is rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class RewardRange:
    """
    Where the total reward has been in this run: its least and greatest mean over a batch, and its largest standard
    deviation within one.
    """

    low: float
    top: float
    spread: float

    @classmethod
    def of(cls, log: RunLog) -> RewardRange | None:
        rewards = values_of(log.backwards("reward"))
        stds = values_of(log.backwards("reward_std"))
        return cls(min(rewards), max(rewards), max(stds)) if rewards and stds else None

    def height(self, reward: float) -> float | None:
        """0 at the least, 1 at the greatest; None while the reward has not moved."""
        width = self.top - self.low
        return (reward - self.low) / width if width > _ROUNDING * max(1, abs(self.top)) else None


@dataclass(frozen=True)
class RewardSaturated(Rule):
    """
    The reward has risen to its top, and (nearly) every completion has it.

    Args:
        spread: mean standard deviation of the reward in a batch, relative to the largest of the run.
        height: least height of the mean within the rewards of the run (0 to 1).
        zero_std: least share of groups without a difference, in the newest log.
        phase: how long.
    """

    spread: float = 0.05
    height: float = 0.95
    zero_std: float = 0.95
    phase: Phase = LASTING

    name = "reward_saturated"
    meaning = (
        "All completions get the best reward there is: the task is learnt, or a way to the reward is that has nothing "
        "to do with the task. Nothing is left to compare, so further steps teach nothing (and an entropy bonus or a "
        "KL penalty goes on moving the weights)."
    )
    advice = (
        "Read completions of this step (`log_completions=True`). If they are good, stop here, or go on with harder "
        "prompts or a stricter reward; if not, the reward can be had too cheaply: mend it and go back."
    )

    def check(self, log: RunLog) -> str | None:
        if (log.value("frac_reward_zero_std") or 0) < self.zero_std:  # most logs end here
            return None
        stds, rewards = log.phase("reward_std", self.phase), log.phase("reward", self.phase)
        if not rewards or not self.holds(log, values_of(stds), values_of(rewards)):
            return None
        low = RewardRange.of(log).low
        return (
            f"reward {np.mean(values_of(rewards)):.3g} with a standard deviation of {np.mean(values_of(stds)):.2g} over "
            f"{span(rewards)}; it has been as low as {low:.3g}"
        )

    def holds(self, log: RunLog, stds: Sequence[float], rewards: Sequence[float]) -> bool:
        known = RewardRange.of(log)
        if known is None or not stds or np.mean(stds) > self.spread * known.spread:
            return False
        height = known.height(float(np.mean(rewards)))
        return height is not None and height >= self.height


@dataclass(frozen=True)
class ZeroStdGroups(Rule):
    """
    Nearly all groups have one and the same reward, so nothing is learnt from them.

    Small groups agree by chance: of pairs with a reward that 90% get, 82% do. So the limit rises as groups shrink. A
    reward that has risen until every completion has it is left to `reward_saturated`.

    Args:
        share: least share of the completions.
        rate: if this share of all completions differs from the others, so many groups agree by chance; the limit
            where it is more than `share`.
        groups: so many groups are to be expected at the limit that do not agree; the phase is made long enough.
        phase: how long.
    """

    share: float = 0.85
    rate: float = 0.02
    groups: float = 5.0
    phase: Phase = SOON

    name = "zero_std_groups"
    meaning = (
        "Completions are compared with others of the same prompt, and where all get the same reward their advantage "
        "is 0: generated in vain. The prompts are too hard or too easy for this model, or the reward does not tell "
        "its completions apart."
    )
    advice = (
        "Choose prompts that the model solves sometimes, neither never nor always (sample each a few times before); "
        "too hard: SFT first, or a reward with partial credit; too easy: harder prompts. More `num_generations` or a "
        "higher `temperature` make groups differ."
    )

    def check(self, log: RunLog) -> str | None:
        if not log.is_online:
            return None
        size = max(2, getattr(log.args, "num_generations", None) or 2)
        limit = max(self.share, (1 - self.rate) ** size + self.rate**size)
        left = max(1 - limit, 0.001)
        steps = max(self.phase.least_steps, self.groups / left / groups_per_step(log))
        phase = replace(self.phase, least_steps=steps)
        points = log.phase("frac_reward_zero_std", phase)
        if not points or np.mean(values_of(points)) < limit:
            return None
        rewards, stds = log.recent("reward", len(points)), log.recent("reward_std", len(points))
        if RewardSaturated().holds(log, stds[-5:], rewards[-5:]):
            return None
        where = self._where(RewardRange.of(log), rewards, stds)
        share = np.mean(values_of(points))
        return f"{share:.0%} of completions were compared with none of another reward over {span(points)}{where}"

    @staticmethod
    def _where(known: RewardRange | None, rewards: Sequence[float], stds: Sequence[float]) -> str:
        if known is None or not rewards or not stds:
            return ""
        # Of the newer half: the reward may have moved in this time.
        level, spread = (float(np.mean(values[len(values) // 2 :])) for values in (rewards, stds))
        height = known.height(level)
        if spread > 0.5 * known.spread and known.spread > _ROUNDING * max(1, abs(level)):
            return f"; rewards differ between prompts ({level:.3g} ± {spread:.2g}): some always solved, others never"
        if height is not None and height > 0.9:
            return f"; the reward is near the top of what it has been ({level:.3g}): too easy by now"
        if height is not None and height < 0.1:
            return f"; the reward is near the bottom of what it has been ({level:.3g}): too hard"
        if height is None and level <= 0:
            return f"; the reward has been {level:.3g} all along: too hard, or never given"
        return f"; the reward is {level:.3g}"


def groups_per_step(log: RunLog) -> float:
    """New groups for each optimizer step; 1 where the settings do not say."""
    batch, size = getattr(log.args, "generation_batch_size", None), getattr(log.args, "num_generations", None)
    return batch / size * log.generations_per_step if batch and size else 1.0


@dataclass(frozen=True)
class RewardErrors(Rule):
    """
    A source of reward raises, or takes too long.

    Args:
        share: of the completions, above which it counts.
    """

    share: float = 0.0

    name = "reward_errors"
    meaning = (
        "A reward function fails for some completions; they count as if it did not apply to them. If it fails for a "
        "kind of completion (long, malformed, dangerous), the model is not taught to avoid that kind."
    )
    advice = (
        "See the warning that names the error. Make the function return a low reward, or None, for what it cannot "
        "judge; give slow ones a longer time limit or less work."
    )
    kinds = ("train", "eval")

    def check(self, log: RunLog) -> str | None:
        rates = {name: log.value(f"rewards/{name}/error_rate") for name in log.reward_sources()}
        failing = [
            f"{name} failed for {rate:.1%} of completions"
            for name, rate in rates.items()
            if rate and rate > self.share
        ]
        return "; ".join(failing) or None


@dataclass(frozen=True)
class DeadReward(Rule):
    """
    A source gives every completion the same value, or none, while others tell completions apart.

    A source whose value was once lower has been learnt, and is left alone.

    Args:
        phase: how long.
    """

    phase: Phase = LONG

    name = "dead_reward"
    meaning = (
        "The source has no say: it looks for something that never occurs (a format, a column that is missing, a tag "
        "spelled otherwise), or always does, or it returns the same for lack of what it needs."
    )
    advice = (
        "Call it by hand on a completion that deserves the reward and one that does not. If the model cannot get "
        "there yet, give partial credit, or teach the format by SFT or in the prompt; else remove it."
    )

    def check(self, log: RunLog) -> str | None:
        names = log.reward_sources()
        dead = [seen for name in names if (seen := self._seen(log, name)) is not None]
        return "; ".join(dead) if dead and any(self._varies(log, name) for name in names) else None

    def _varies(self, log: RunLog, name: str) -> bool:
        return any(point.value > _ROUNDING for point in log.phase(f"rewards/{name}/std", self.phase))

    def _seen(self, log: RunLog, name: str) -> str | None:
        if log.value(f"rewards/{name}/none_rate") == 1:
            nones = log.phase(f"rewards/{name}/none_rate", self.phase)
            if not nones or min(values_of(nones)) < 1 or log.value(f"rewards/{name}/error_rate"):
                return None  # of errors tells `reward_errors`
            return f"{name} gave no value over {span(nones)}"
        value, std = log.value(f"rewards/{name}/mean"), log.value(f"rewards/{name}/std")
        if value is None or std is None:
            return None
        rounding = _ROUNDING * max(1, abs(value))
        if std > rounding:
            return None
        means = log.phase(f"rewards/{name}/mean", self.phase)
        stds = log.phase(f"rewards/{name}/std", self.phase)
        if not means or not stds:
            return None
        if np.ptp(values_of(means)) > rounding or max(values_of(stds)) > rounding:
            return None
        if any(point.value < value - rounding for point in log.backwards(f"rewards/{name}/mean")):
            return None
        return f"{name} gave {value:.3g} to every completion over {span(means)}"


@dataclass(frozen=True)
class SlowReward(Rule):
    """
    The training waits for a source of reward.

    Args:
        share: of a step's time.
        seconds: for each step, least.
        logs: the median of so many logs counts, and the mean step since.
    """

    share: float = 0.5
    seconds: float = 1.0
    logs: int = 5

    name = "slow_reward"
    meaning = "The sources run side by side, and the slowest takes most of the step while the device is idle."
    advice = (
        "Make it `async` if it waits for a service; judge a batch at a time; cache; run programs and models elsewhere; "
        "set it a time limit."
    )

    def check(self, log: RunLog) -> str | None:
        # Where several steps train on one generation, only one of them waits: the mean over all of them.
        times = log.recent("step_time", math.ceil(self.logs / min(1, log.generations_per_step)))
        if len(times) < self.logs:
            return None
        step_time = float(np.mean(times))
        for name in log.reward_sources():
            latencies = log.recent(f"rewards/{name}/latency_s", self.logs)
            if len(latencies) < self.logs:
                continue
            each = median(latencies) * log.generations_per_step
            if each >= self.seconds and each >= self.share * step_time:
                return f"{name} takes {each:.1f} s of a step's {step_time:.1f} s (over {self.logs} logs of it)"
        return None


@dataclass(frozen=True)
class LengthHacking(Rule):
    """
    The reward rises because completions get longer: one source follows the length, up and down, and no other rises.

    With one source alone it cannot be told from thinking longer, and is not judged.

    Args:
        growth: how many times as long the newest quarter of the phase is as the oldest.
        follows: least correlation of a source with the length, ...
        follows_steps: ... and of its changes from log to log: what only grows at the same time has none.
        phase: how long.
    """

    growth: float = 1.3
    follows: float = 0.8
    follows_steps: float = 0.6
    phase: Phase = LONG

    name = "length_hacking"
    meaning = (
        "A source of reward pays for length itself, and the model gets its reward there, not from the task. The total "
        "rises, but what it should stand for does not."
    )
    advice = (
        "Give that source a bound or a smaller weight (`reward_weights`), or make it depend on the answer being right; "
        "compare the sources' curves, and a metric of your own in evaluation (`compute_metrics`), not the total."
    )

    def check(self, log: RunLog) -> str | None:
        points = log.phase("completions/mean_length", self.phase)
        if not points:
            return None
        lengths = np.asarray(values_of(points))
        quarters = np.array_split(lengths, 4)
        if quarters[-1].mean() < self.growth * quarters[0].mean():
            return None
        rewards = values_of(log.phase("reward", self.phase))
        if len(rewards) != len(points) or not rises(rewards):
            return None
        sources = {name: values_of(log.phase(f"rewards/{name}/mean", self.phase)) for name in log.reward_sources()}
        moving = {
            name: values for name, values in sources.items() if len(values) == len(points) and np.ptp(values) > 0
        }
        followers = [name for name, values in moving.items() if self._follows(lengths, np.asarray(values))]
        others = [name for name in moving if name not in followers]
        if not followers or not others or any(rises(moving[name]) for name in others):
            return None
        first, last = quarters[0].mean(), quarters[-1].mean()
        return (
            f"over {span(points)} completions grew from {first:.0f} to {last:.0f} tokens, and {', '.join(followers)} "
            f"rose with them (correlation {np.corrcoef(lengths, moving[followers[0]])[0, 1]:.2f}), while "
            f"{', '.join(others)} did not rise"
        )

    def _follows(self, lengths: np.ndarray, values: np.ndarray) -> bool:
        steps = np.diff(lengths), np.diff(values)
        if min(np.ptp(steps[0]), np.ptp(steps[1])) == 0:
            return False
        level, changes = np.corrcoef(lengths, values)[0, 1], np.corrcoef(*steps)[0, 1]
        return rises(values) and level >= self.follows and changes >= self.follows_steps


def reward_rules() -> list[Rule]:
    """Every rule on rewards, with its own thresholds."""
    return [ZeroStdGroups(), RewardSaturated(), RewardErrors(), DeadReward(), SlowReward(), LengthHacking()]
