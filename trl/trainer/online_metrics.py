"""
What is known of each completion of a generation, gathered from all processes, and the metrics that follow from it.

Shapes: N completions of a process, M of all processes, F sources of reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers.utils import logging

from ..losses.advantages import Advantages, reward_metrics
from ..losses.policy_metrics import PolicyMetrics
from ..reports.completions_log import CompletionsLog
from ..rewards.suite import RewardTable
from ..rollouts.types import Rollout
from .reducer import Reducer

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class CompletionFigures:
    """
    Figures of completions, those of all processes next to each other.

    Args:
        rewards_FM: values of the sources, NaN where one does not apply.
        penalties_M: taken from the total reward, 0 where there is none.
        lengths_M: tokens that the policy wrote.
        tokens_M: tokens of prompt and completion.
        truncated_M: 1 where the completion was cut off.
        tool_calls_M: calls of tools.
        tool_failures_M: how many of them failed.
        broken_M: 1 where the sample cannot be trained on.
    """

    rewards_FM: Tensor
    penalties_M: Tensor
    lengths_M: Tensor
    tokens_M: Tensor
    truncated_M: Tensor
    tool_calls_M: Tensor
    tool_failures_M: Tensor
    broken_M: Tensor


def gather_figures(
    rollouts: Sequence[Rollout], table: RewardTable, penalties_N: Tensor | None, accelerator: Accelerator, real: int
) -> CompletionFigures:
    """
    The figures of the completions of all processes. All processes call this together.

    Args:
        rollouts: of this process.
        table: their rewards.
        penalties_N: taken from their total rewards.
        accelerator: gathers.
        real: how many of all count; the others fill a batch up.
    """
    columns = [
        [
            len(rollout.completion_ids) if rollout.error else rollout.generated_length,
            len(rollout.prompt_ids) + len(rollout.completion_ids),
            rollout.is_truncated,
            rollout.tool_calls,
            rollout.tool_failures,
            rollout.error is not None,
        ]
        for rollout in rollouts
    ]
    penalties_N = torch.zeros(len(rollouts)) if penalties_N is None else penalties_N.float().cpu()
    local = torch.cat([table.values_FN.T.cpu(), penalties_N[:, None], torch.tensor(columns).float()], dim=1)
    together = accelerator.gather(local.to(accelerator.device))[:real].cpu()
    others = len(fields(CompletionFigures)) - 1
    return CompletionFigures(together[:, :-others].T, *together[:, -others:].T)


def completion_metrics(figures: CompletionFigures, with_tools: bool) -> PolicyMetrics:
    """
    How long completions are and whether they end, and how tools fare.

    Args:
        figures: of all processes.
        with_tools: whether there are tools.
    """
    lengths_M, ended_M = figures.lengths_M, figures.truncated_M == 0
    count, ended = torch.tensor(len(lengths_M)), ended_M.sum()
    metrics = PolicyMetrics()
    metrics.means["completions/mean_length"] = (lengths_M.sum(), count)
    metrics.means["completions/clipped_ratio"] = (count - ended, count)
    metrics.means["completions/mean_terminated_length"] = (lengths_M[ended_M].sum(), ended.clamp(min=1))
    metrics.minima["completions/min_length"] = lengths_M.min()
    metrics.maxima["completions/max_length"] = lengths_M.max()
    # Where none has ended, the least is that of other generations of the log.
    metrics.minima["completions/min_terminated_length"] = (
        lengths_M[ended_M].min() if ended else torch.tensor(torch.inf)
    )
    metrics.maxima["completions/max_terminated_length"] = lengths_M[ended_M].max() if ended else torch.tensor(0.0)
    if figures.broken_M.any():
        metrics.means["completions/error_rate"] = (figures.broken_M.sum(), count)
    if with_tools:
        calls = figures.tool_calls_M.sum()
        metrics.means["tools/call_frequency"] = (calls, count)
        metrics.means["tools/failure_frequency"] = (figures.tool_failures_M.sum(), calls.clamp(min=1))
    return metrics


def add_metrics(reducer: Reducer, mode: str, metrics: PolicyMetrics) -> None:
    """Hand sums and extremes to the reducer."""
    for name, (total, count) in metrics.means.items():
        reducer.add(mode, name, total, count)
    for name, value in metrics.minima.items():
        reducer.add_extreme(mode, name, value, "min")
    for name, value in metrics.maxima.items():
        reducer.add_extreme(mode, name, value, "max")


def add_reward_metrics(
    reducer: Reducer, mode: str, figures: CompletionFigures, table: RewardTable, result: Advantages
) -> None:
    """
    Hand what the rewards say to the reducer.

    Args:
        reducer: takes it.
        mode: "train" or "eval".
        figures: of all processes; every one of them adds the same.
        table: of this process: how its sources fared.
        result: totals and advantages.
    """
    count = figures.rewards_FM.shape[1]
    scored = dict(zip(table.names, figures.rewards_FM.isfinite().sum(1).tolist(), strict=True))
    for name, value in reward_metrics(figures.rewards_FM, table.names, result).items():
        source = name.removeprefix("rewards/").removesuffix("/mean")
        weight = scored.get(source, count) if name.endswith("/mean") else count
        if value == value:  # not NaN: there was something to take a mean of
            reducer.add(mode, name, value * weight, weight)
    for name, (total, calls) in table.health().items():
        reducer.add(mode, name, total, calls)
    for name, values in table.metrics.items():
        known = [value for value in values if value == value]
        reducer.add(mode, name, sum(known), len(known))


def warn_of_broken(rollouts: Sequence[Rollout]) -> None:
    """Say which samples cannot be trained on, and why."""
    errors = [rollout.error for rollout in rollouts if rollout.error is not None]
    if errors:
        logger.warning(
            f"{len(errors)} of {len(rollouts)} samples cannot be trained on and count as if no reward function applied. "
            f"The first: {errors[0]}."
        )


def add_completions(
    log: CompletionsLog | None,
    rollouts: Sequence[Rollout],
    table: RewardTable,
    figures: CompletionFigures,
    result: Advantages,
) -> None:
    """
    Hand the texts of a generation to the completions log. All processes call this together.

    Args:
        log: of the main process; None on the others.
        rollouts: of this process.
        table: their rewards, with columns that reward functions reported.
        figures: of all processes.
        result: their advantages.
    """
    local = [
        (
            rollout.prompt,
            rollout.completion,
            rollout.images,
            {name: table.extras[name][index] for name in table.extras},
        )
        for index, rollout in enumerate(rollouts)
    ]
    together = gather_object(local)[: figures.rewards_FM.shape[1]]
    if log is None:
        return
    prompts, completions, images, extras = zip(*together, strict=True)
    names = sorted(
        {name for row in extras for name in row}
    )  # a function that failed on one process reported none there
    log.add(
        prompts,
        completions,
        dict(zip(table.names, figures.rewards_FM.tolist(), strict=True)),
        result.advantages_N.tolist(),
        {name: [row.get(name) for row in extras] for name in names},
        images,
    )
