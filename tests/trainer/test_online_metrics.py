"""Figures of completions, gathered and logged."""

from __future__ import annotations

import pandas
import pytest
import torch
from accelerate import Accelerator

from trl.losses.advantages import Advantages
from trl.reports.completions_log import CompletionsLog
from trl.rewards.suite import RewardTable
from trl.rollouts.types import Rollout
from trl.trainer import online_metrics
from trl.trainer.online_metrics import add_completions, add_metrics, completion_metrics, gather_figures
from trl.trainer.reducer import Reducer


def rollout(length, is_truncated=False, **options):
    return Rollout(
        [5, 6], list(range(7, 7 + length)), prompt="p", completion="c", is_truncated=is_truncated, **options
    )


def table_of(rewards, **extras):
    return RewardTable(["judge"], torch.ones(1), torch.tensor([rewards]), extras=extras)


def figures_of(rollouts, real=None):
    table = table_of([0.0] * len(rollouts))
    return gather_figures(rollouts, table, None, Accelerator(cpu=True), len(rollouts) if real is None else real)


def test_what_fills_a_batch_up_does_not_count():
    figures = figures_of([rollout(3), rollout(5), rollout(9)], real=2)
    assert figures.lengths_M.tolist() == [3, 5]
    assert figures.rewards_FM.shape == (1, 2)
    assert figures.tokens_M.tolist() == [5, 7]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_generation_that_never_ends_does_not_hide_the_shortest_answer(order):
    reducer = Reducer(Accelerator(cpu=True))
    generations = [[rollout(4), rollout(8, is_truncated=True)], [rollout(8, is_truncated=True)] * 2]
    for index in order:
        add_metrics(reducer, "train", completion_metrics(figures_of(generations[index]), with_tools=False))
    logged = reducer.reduce("train")
    assert logged["completions/min_terminated_length"] == 4
    assert logged["completions/max_terminated_length"] == 4
    assert logged["completions/clipped_ratio"] == 0.75
    add_metrics(reducer, "train", completion_metrics(figures_of(generations[1]), with_tools=False))
    assert reducer.reduce("train")["completions/min_terminated_length"] == 0


def test_a_column_that_only_one_process_reported(tmp_path, monkeypatch):
    """A function that failed on the other process, and was counted, reported nothing there."""
    ours = [rollout(3), rollout(4)]
    theirs = [(one.prompt, one.completion, None, {}) for one in ours]
    monkeypatch.setattr(online_metrics, "gather_object", lambda local: theirs + local)
    figures = figures_of([*ours, *ours])
    result = Advantages(torch.zeros(4), torch.zeros(4), torch.zeros(4, dtype=torch.bool))
    log = CompletionsLog(tmp_path, maxlen=4, print_table=False)
    add_completions(log, ours, table_of([0.0, 0.0], note=["a", "b"]), figures, result)
    log.write(1)
    written = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert [value if isinstance(value, str) else None for value in written["note"]] == [None, None, "a", "b"]
