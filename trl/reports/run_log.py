"""
A run's log history, as rules and reports read it, and what a rule is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import TrainingArguments

# What is logged of each source of reward, as `rewards/<name>/<figure>`.
REWARD_FIGURES = ("mean", "std", "none_rate", "error_rate", "latency_s")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def log_prefix(entry: Mapping[str, Any]) -> str | None:
    """
    What the keys of a log entry begin with: "" in a training log, "eval_" (or "eval_<dataset>_") in an evaluation's.
    None for any other entry, such as the summary at the end.
    """
    if "loss" in entry:
        return ""
    for key in entry:
        if key.endswith("_runtime") and key != "train_runtime":
            return key.removesuffix("runtime")
    return None


class Point(NamedTuple):
    """One logged value."""

    step: int
    value: float


@dataclass(frozen=True)
class Phase:
    """
    How long something has to last.

    Args:
        least_steps: optimizer steps.
        least_share: the same as a share of the run; the larger one counts.
        least_logs: logs in that time.
        after_warmup: all of it after the warm-up of the learning rate.
    """

    least_steps: int = 100
    least_share: float = 0.1
    least_logs: int = 20
    after_warmup: bool = True


@dataclass(frozen=True)
class RunLog:
    """
    A run as a rule sees it.

    Args:
        entries: the log history with the entry to judge at the end; each has its `step`.
        args: the trainer's arguments.
        max_steps: optimizer steps of the whole run.
        model: the trained model; tells the precision.
        starts_at_reference: whether the policy is the reference before the first step.
    """

    entries: Sequence[Mapping[str, Any]]
    args: TrainingArguments
    max_steps: int = 0
    model: nn.Module | None = None
    starts_at_reference: bool = False

    @property
    def newest(self) -> Mapping[str, Any]:
        return self.entries[-1]

    @property
    def step(self) -> int:
        return self.newest["step"]

    @property
    def prefix(self) -> str:
        return log_prefix(self.newest) or ""

    @property
    def warmup_steps(self) -> int:
        return self.args.get_warmup_steps(self.max_steps)

    @property
    def loss_types(self) -> tuple[str, ...]:
        loss_type = getattr(self.args, "loss_type", None) or ()
        return (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)

    @property
    def full_precision(self) -> bool:
        """Whether log-probs are computed in float32 throughout."""
        args = self.args
        if args.bf16 or args.fp16 or args.tf32 or self.model is None:
            return False
        return all(parameter.dtype in (torch.float32, torch.float64) for parameter in self.model.parameters())

    def value(self, key: str) -> float | None:
        """The newest entry's value; None where it has none."""
        value = self.newest.get(self.prefix + key)
        return float(value) if is_number(value) else None

    def backwards(self, key: str) -> Iterator[Point]:
        """The finite values, newest first; nothing where the newest entry has none."""
        newest = self.value(key)
        if newest is None or not math.isfinite(newest):
            return
        name = self.prefix + key
        for entry in reversed(self.entries):
            value = entry.get(name)
            if is_number(value) and math.isfinite(value):
                yield Point(entry["step"], float(value))

    def recent(self, key: str, most: int) -> list[float]:
        """The newest `most` finite values, oldest first."""
        return [point.value for point in islice(self.backwards(key), most)][::-1]

    def earliest(self, key: str, most: int) -> list[float]:
        """The first `most` finite values of the run."""
        values = (entry.get(self.prefix + key) for entry in self.entries)
        return list(islice((float(value) for value in values if is_number(value) and math.isfinite(value)), most))

    def phase(self, key: str, phase: Phase) -> list[Point]:
        """The values of a phase that ends now, oldest first; none while it does not fit in (behind the warm-up)."""
        least_steps = max(phase.least_steps, phase.least_share * self.max_steps)
        first_step = self.warmup_steps if phase.after_warmup else 0
        points: list[Point] = []
        for point in self.backwards(key):
            start = max(point.step, first_step)
            if len(points) >= phase.least_logs and self.step - start >= least_steps:
                return points[::-1]
            if point.step <= first_step:
                return []
            points.append(point)
        fits = len(points) >= phase.least_logs and self.step - first_step >= least_steps
        return points[::-1] if fits else []

    def pair_key(self, name: str) -> str | None:
        """The key of `accuracies` or `margins` over pairs, as DPO or the reward trainer logs it."""
        if self.value(f"rewards/{name}") is not None:
            return f"rewards/{name}"
        other = {"accuracies": "accuracy", "margins": "margin"}[name]
        # Those are common names; together with the others they are the reward trainer's.
        if all(self.value(key) is not None for key in ("accuracy", "margin", "mean_reward")):
            return other
        return None

    def reward_sources(self) -> list[str]:
        """Names of the reward functions and models that the newest entry tells of."""
        found: dict[str, None] = {}
        for key in self.newest:
            if key.startswith(f"{self.prefix}rewards/"):
                name, _, figure = key.removeprefix(f"{self.prefix}rewards/").rpartition("/")
                if name and figure in REWARD_FIGURES:
                    found[name] = None
        return list(found)

    @property
    def is_online(self) -> bool:
        """Whether completions were sampled and rewarded; other runs log some of the same names."""
        return self.value("frac_reward_zero_std") is not None

    @property
    def generations_per_step(self) -> float:
        """Generation batches for each optimizer step; 1 where the settings do not say."""
        micro_batches = getattr(self.args, "steps_per_generation", None)
        if not micro_batches:
            return 1.0
        iterations = getattr(self.args, "num_iterations", None) or 1
        return self.args.gradient_accumulation_steps / (micro_batches * iterations)


def values_of(points: Iterable[Point]) -> list[float]:
    return [point.value for point in points]


def span(points: Sequence[Point]) -> str:
    return f"steps {points[0].step} to {points[-1].step} ({len(points)} logs)"


def rises(values: Sequence[float]) -> bool:
    """Whether the newer half is above the older one, by more than two standard errors."""
    older, newer = np.array_split(np.asarray(values), 2)
    if min(len(older), len(newer)) < 2:
        return False
    error = math.sqrt(older.var(ddof=1) / len(older) + newer.var(ddof=1) / len(newer))
    return bool(newer.mean() - older.mean() > 2 * error)


@dataclass(frozen=True)
class Rule:
    """
    One symptom: `check` returns what was seen, or None.

    `name` is the key in the log (`doctor/<name>`), `meaning` says what it usually comes from, `advice` what to try,
    `kinds` which logs are judged: "train", "eval", "other" (what a user logs).
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    advice: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("train",)

    def check(self, log: RunLog) -> str | None:
        raise NotImplementedError
