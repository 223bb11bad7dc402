"""
Metrics on text for the trainers that sample: how good the completions of the evaluation set are, apart from the reward.

The reward is what training climbs; whether that is what was wanted, another measure has to tell. `compute_metrics` of a
trainer that samples gets all prompts and completions of an evaluation, with every other column of the dataset, and
returns figures, which are logged with the prefix `eval_` and can be the `metric_for_best_model`. `pass_at_k_metric`
makes one of any verifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ..rewards.suite import RewardFunc, RewardSuite
from ..rewards.texts import Completion

ComputeMetrics: TypeAlias = "Callable[[TextEvalPrediction], Mapping[str, float]]"

# Columns that have a field of their own.
_OWN_COLUMNS = ("prompt", "completion", "completion_ids")


@dataclass(frozen=True)
class TextEvalPrediction:
    """
    What was generated for an evaluation set: N completions, in the order of sampling, which is the same every time.

    Args:
        prompts: of each completion, its prompt as in the dataset: text or messages.
        completions: text or messages.
        completion_ids: their tokens.
        columns: every other column of the dataset, a value for each completion.
        rewards: values by source of reward, None where a source did not apply; the weighted total is `"reward"`.
        num_generations: completions per prompt; those of one prompt stand side by side.
    """

    prompts: list[Any]
    completions: list[Completion]
    completion_ids: list[list[int]]
    columns: dict[str, list] = field(default_factory=dict)
    rewards: dict[str, list[float | None]] = field(default_factory=dict)
    num_generations: int = 1

    def __len__(self) -> int:
        return len(self.completions)


# ---- Collecting ----


@dataclass(frozen=True)
class _Row:
    prompt: Any
    completion: Any
    completion_ids: list[int]
    columns: dict[str, Any]
    rewards: dict[str, float | None]


class TextEvalCollector:
    """
    Collects the completions of an evaluation, batch by batch, from all processes.

    Args:
        num_generations: completions per prompt; those of one prompt stand side by side.
    """

    def __init__(self, num_generations: int = 1):
        self.num_generations = num_generations
        self._rows: list[_Row] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        rewards: Mapping[str, Sequence[float | None]] | None = None,
        count: int | None = None,
    ) -> None:
        """
        Take this process's part of a batch. All processes call it together, each with its own part.

        Args:
            prompts: of its M completions.
            completions: M.
            completion_ids: M.
            columns: other columns of their rows, M values each.
            rewards: values by source, M each, None or NaN where a source does not apply.
            count: number of completions of the whole batch, over all processes, that are of the dataset. They come
                first; the rest only fill the batch up, and are dropped. Default: all.

        Raises:
            ValueError: a part has another length than the others.
        """
        columns = {name: values for name, values in (columns or {}).items() if name not in _OWN_COLUMNS}
        rewards = rewards or {}
        parts = {"prompts": prompts, "completion_ids": completion_ids, **columns, **rewards}
        for name, values in parts.items():
            if len(values) != len(completions):
                raise ValueError(f"`{name}` has {len(values)} values for {len(completions)} completions.")
        local = [
            _Row(
                prompts[index],
                completions[index],
                list(map(int, completion_ids[index])),
                {name: values[index] for name, values in columns.items()},
                {name: _value(values[index]) for name, values in rewards.items()},
            )
            for index in range(len(completions))
        ]
        # Each process takes a block of the batch, in the order of their ranks, which is the order gathered in.
        self._rows += gather_object(local)[:count]

    def result(self) -> TextEvalPrediction:
        """All that was collected; the same on every process."""
        rows = self._rows
        columns = list(dict.fromkeys(name for row in rows for name in row.columns))
        sources = list(dict.fromkeys(name for row in rows for name in row.rewards))
        return TextEvalPrediction(
            prompts=[row.prompt for row in rows],
            completions=[row.completion for row in rows],
            completion_ids=[row.completion_ids for row in rows],
            columns={name: [row.columns.get(name) for row in rows] for name in columns},
            rewards={name: [row.rewards.get(name) for row in rows] for name in sources},
            num_generations=self.num_generations,
        )

    def clear(self) -> None:
        """Forget everything, before the next evaluation."""
        self._rows.clear()


def _value(reward: Any) -> float | None:
    if reward is None or math.isnan(reward):
        return None
    return float(reward)


# ---- Computing ----


def evaluate_text(compute_metrics: ComputeMetrics, prediction: TextEvalPrediction, prefix: str) -> dict[str, float]:
    """
    Call the user's function on the main process, and let all have what it returned.

    So a slow verifier runs once, and one that depends on chance gives all processes the same figures. All processes
    call it together.

    Args:
        compute_metrics: the function.
        prediction: what it gets.
        prefix: of the keys, such as `"eval_"`.

    Returns:
        The metrics, each key with the prefix.

    Raises:
        TypeError, ValueError: see [`check_metrics`].
        RuntimeError: on the other processes, where the function failed on the main one.
    """
    state = PartialState()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = check_metrics(compute_metrics(prediction), prefix)
        except Exception as error:
            if state.num_processes == 1:
                raise
            failure, outcome[1] = error, f"{type(error).__name__}: {error}"
    broadcast_object_list(outcome)
    metrics, problem = outcome
    if problem is None:
        return metrics
    if state.is_main_process:
        raise failure
    raise RuntimeError(f"`compute_metrics` failed on the main process: {problem}")


def check_metrics(values: Any, prefix: str) -> dict[str, float]:
    """
    What the user's `compute_metrics` returned, as metrics to be logged.

    Args:
        values: a dict of numbers; scalar arrays and tensors count as such.
        prefix: put before each key that does not begin with it, such as `"eval_"`.

    Returns:
        The metrics as floats.

    Raises:
        TypeError: it is no dict, a key is no text, or a value no number.
        ValueError: two keys are the same with the prefix.
    """
    needed = "`compute_metrics` returns a dict with a number for each metric, such as {'accuracy': 0.75}"
    if not isinstance(values, Mapping):
        hint = " Does it end without `return`?" if values is None else ""
        raise TypeError(f"{needed}. Found {_described(values)}.{hint}")
    metrics: dict[str, float] = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise TypeError(f"{needed}. Found the key {_described(name)}.")
        number = value
        if isinstance(value, (Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
            number = value.item()
        if not isinstance(number, Real):
            raise TypeError(f"{needed}. Found {_described(value)} for {name!r}.")
        key = name if name.startswith(prefix) else f"{prefix}{name}"
        if key in metrics:
            raise ValueError(f"`compute_metrics` returned {key!r} twice, with and without the prefix {prefix!r}.")
        metrics[key] = float(number)
    return metrics


def _described(value: Any) -> str:
    shown = repr(value)
    return f"a {type(value).__name__} ({shown[:60]}{'…' if len(shown) > 60 else ''})"


# ---- Pass@k ----


def pass_at_k(is_correct: Sequence[float | bool | None], num_generations: int, k: int) -> float:
    """
    The share of prompts that k samples solve: at least one of them is correct.

    Of n samples of a prompt, of which c are correct, the unbiased estimate is 1 - C(n-c, k) / C(n, k): the share of all
    choices of k that hold a correct one (https://huggingface.co/papers/2107.03374). It is averaged over the prompts.

    Args:
        is_correct: of each completion, whether it is correct: 1 or True, 0 or False; those of one prompt stand side by
            side. None or NaN where that is not known: such a completion has not passed; a prompt of which nothing is
            known is left out.
        num_generations: completions per prompt, n.
        k: samples that one of has to be correct, from 1 to n.

    Returns:
        Between 0 and 1; NaN where nothing is known of any prompt.

    Raises:
        ValueError: k is not from 1 to n, the number of completions is no multiple of n, or a value is neither 0 nor 1.
    """
    if not 1 <= k <= num_generations:
        raise ValueError(
            f"pass@{k} takes {k} completions per prompt, and there are {num_generations}. Use a `k` from 1 to that, or "
            "raise `num_generations_eval`."
        )
    verdicts = [_verdict(value) for value in is_correct]
    if len(verdicts) % num_generations:
        raise ValueError(
            f"{len(verdicts)} completions are no multiple of `num_generations={num_generations}`: those of one prompt "
            "have to stand side by side, and all be there."
        )
    groups = [verdicts[start : start + num_generations] for start in range(0, len(verdicts), num_generations)]
    numbers_correct = [group.count(True) for group in groups if any(verdict is not None for verdict in group)]
    if not numbers_correct:
        return math.nan
    choices = math.comb(num_generations, k)
    solved = [1 - math.comb(num_generations - correct, k) / choices for correct in numbers_correct]
    return math.fsum(solved) / len(solved)


def _verdict(value: Any) -> bool | None:
    if value is None or value != value:
        return None
    if value not in (0, 1):
        raise ValueError(
            f"A completion is correct (1) or not (0). Found {value!r}; compare it with a threshold first."
        )
    return bool(value)


def pass_at_k_metric(
    reward_function: RewardFunc, ks: Sequence[int] = (1,), threshold: float = 0.5, name: str | None = None
) -> Callable[[TextEvalPrediction], dict[str, float]]:
    """
    A `compute_metrics` that measures with a reward function how many prompts are solved by one sample, or by k.

    With `num_generations_eval=1` and `temperature` 0, pass@1 is the accuracy of greedy decoding.

    Example:

        trainer = GRPOTrainer(..., compute_metrics=pass_at_k_metric(accuracy_reward, ks=(1, 4)))

    Args:
        reward_function: called as in training: with `prompts`, `completions`, `completion_ids` and the other columns
            of the dataset. It may be asynchronous, or a reward model. It need not be one that is trained with.
        ks: the values of k, each up to the number of completions per prompt.
        threshold: a completion is correct from this value on. Where the function returns `None`, see [`pass_at_k`].
        name: put before the metrics, as in `name/pass@1`, to tell several apart; default nothing.

    Returns:
        The function, giving `pass@k` for each k, and the means of what the reward function reports with `log_metric`.

    Raises:
        ValueError: `ks` is empty or has a value below 1.
        TypeError: `reward_function` is none.
    """
    ks = sorted(set(ks))
    if not ks or ks[0] < 1:
        raise ValueError(f"`ks` are numbers of samples, from 1 on. Found {ks}.")
    if isinstance(reward_function, (list, tuple)):
        raise TypeError(f"pass@k is of one reward function. Found a list of {len(reward_function)}.")
    suite = RewardSuite(reward_function)

    def compute_metrics(prediction: TextEvalPrediction) -> dict[str, float]:
        table = suite.score(prediction.prompts, prediction.completions, prediction.completion_ids, prediction.columns)
        values_N = table.values_FN[0]  # compared as a tensor: in float32, a value of 0.7 is below Python's 0.7
        missing_N, passed_N = values_N.isnan().tolist(), (values_N >= threshold).tolist()
        is_correct = [None if missing else passed for missing, passed in zip(missing_N, passed_N, strict=True)]
        metrics = {key: math.fsum(values) / len(values) for key, values in table.metrics.items()}
        metrics.update({f"pass@{k}": pass_at_k(is_correct, prediction.num_generations, k) for k in ks})
        return {f"{name}/{key}": value for key, value in metrics.items()} if name else metrics

    return compute_metrics
