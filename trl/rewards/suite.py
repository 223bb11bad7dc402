"""
All rewards of a run, side by side: functions, asynchronous functions, reward models, and what environments say.

`RewardSuite.score` is called with the completions of a batch and gives a `RewardTable`. In what order things run:
asynchronous functions start first, in one event loop; functions with a time limit next, each in a thread; then all
others and the models, one after the other, in the calling thread, where signals and CUDA behave as a script expects.
At the end those under way are waited for, each until its limit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..choices import check_choice, check_number
from .calls import MAX_ABANDONED, Collected, RewardCall, RewardTimeoutError
from .environments import environment_reward
from .event_loop import EventLoopThread
from .reward_models import RewardModel
from .sources import (
    REPORTING,
    TEXTS,
    RewardError,
    RewardSource,
    RewardValueError,
    read_values,
    reward_name,
    unique_names,
)
from .table import RewardTable

__all__ = ["RewardError", "RewardSuite", "RewardTable", "RewardValueError"]

logger = logging.get_logger(__name__)

RewardFunc: TypeAlias = "str | nn.Module | Callable[..., Any]"

ON_ERROR = ("raise", "count")
# Values are kept in float32; beyond this they are infinite.
LARGEST = torch.finfo(torch.float32).max
# A function gets these under other names, or not at all.
NOT_FORWARDED = ("prompt", "completion", "completion_ids")


@dataclass
class _Outcome:
    """What a source gave: values (NaN for none), how many of them failed and why, and its seconds."""

    values: list[float]
    failed: int = 0
    error: str | None = None
    seconds: float = 0.0


class RewardSuite:
    """
    Runs reward functions and models on completions.

    A function is called with keyword arguments: `prompts`, `completions` and `completion_ids`; every other column of
    the dataset as a list; `trainer_state`, `log_extra(name, values)`, `log_metric(name, value)`, and `environments`
    where there are some. It returns a number for each completion, or `None` where it does not apply. It may be
    asynchronous, and it may leave out `**kwargs` if it names what it wants.

    Args:
        functions: a function, a model, the name or path of one, or a list of these; or `None` with `environments`.
        weights: of the functions in the sum; default 1 each.
        names: of the functions in logs; default the model's or function's own.
        processing_classes: the tokenizers of the reward models, `None` where there is none; default as published.
        time_limits: seconds that a function is waited for; one for all, or a list with `None` for no limit. Models
            have none. A synchronous function with a limit runs in a thread, and cannot use signals.
        on_error: what happens when a function raises, takes too long, or returns an infinite value: `"raise"` stops
            the run and names it, `"count"` counts it and goes on without its values. One for all, or a list.
        model_init_kwargs: options of `from_pretrained` for models given by name.
        chat_template_kwargs: variables for the chat templates of reward models.
        model_batch_size: completions in one forward of a reward model; default all.
        environment_classes: classes whose `get_reward` is a source of reward, with weight 1.

    Raises:
        ValueError: there is no source of reward; lists differ in length; a setting has no such value.
        TypeError: a reward function is not one.
    """

    def __init__(
        self,
        functions: RewardFunc | Sequence[RewardFunc] | None,
        weights: Sequence[float] | None = None,
        *,
        names: Sequence[str] | None = None,
        processing_classes: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
        time_limits: float | Sequence[float | None] | None = None,
        on_error: str | Sequence[str] = "raise",
        model_init_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        model_batch_size: int | None = None,
        environment_classes: Sequence[type] = (),
    ):
        functions = _as_list(functions)
        if not functions and not environment_classes:
            raise ValueError(
                "There is no source of reward. Pass `reward_funcs`, or environments that define `get_reward`."
            )
        count = len(functions)
        tokenizers = _one_each("reward_processing_classes", processing_classes, count)
        limits = _one_each("time_limits", time_limits, count)
        policies = _one_each("on_error", on_error, count)
        weights = _one_each("reward_weights", 1.0 if weights is None else list(weights), count)
        model_options = {
            "model_init_kwargs": model_init_kwargs,
            "chat_template_kwargs": chat_template_kwargs,
            "batch_size": model_batch_size,
        }
        calls = [
            _as_callable(function, tokenizer, model_options)
            for function, tokenizer in zip(functions, tokenizers, strict=True)
        ]
        names = list(map(reward_name, calls)) if names is None else _one_each("names", list(names), count)
        for environment_class in environment_classes:
            calls.append(environment_reward(environment_class))
            names.append(environment_class.__name__)
            weights.append(1.0)
            limits.append(time_limits if isinstance(time_limits, (int, float)) else None)
            policies.append(on_error if isinstance(on_error, str) else "raise")
        self.names: list[str] = unique_names(names)
        self.weights_F: Tensor = torch.tensor(weights, dtype=torch.float32)
        for policy, weight in zip(policies, weights, strict=True):
            check_choice("on_error", policy, ON_ERROR)
            check_number("reward_weights", weight, "a finite number for each function")
        limits = [
            _check_limit(name, call, limit, isinstance(time_limits, (list, tuple)))
            for name, call, limit in zip(self.names, calls, limits, strict=True)
        ]
        self.processing_classes: list[Any] = tokenizers
        self._sources = [RewardSource(*source) for source in zip(calls, self.names, limits, policies, strict=True)]
        self.event_loop = EventLoopThread()

    # ---- Reward models ----

    @property
    def functions(self) -> list[Any]:
        """The reward functions and models, in order."""
        return [source.function.model if source.is_model else source.function for source in self._sources]

    @property
    def models(self) -> list[nn.Module]:
        """The reward models, in order."""
        return [source.function.model for source in self._sources if source.is_model]

    def prepare_models(self, prepare: Callable[[nn.Module], nn.Module]) -> None:
        """Replace each reward model by what `prepare` makes of it, e.g. `accelerator.prepare_model`."""
        for source in self._sources:
            if source.is_model:
                source.function.model = prepare(source.function.model)

    # ---- Scoring ----

    def check_columns(
        self, columns: Collection[str], dataset: str = "dataset", *, with_environments: bool = False
    ) -> None:
        """
        Refuse, before anything is sampled, functions that need what they would not get.

        Args:
            columns: of the dataset.
            dataset: what to call it.
            with_environments: whether completions run in environments.

        Raises:
            RewardError: a function needs a column that is not there.
        """
        others = ["environments"] if with_environments else []
        names = [*TEXTS, *(name for name in columns if name not in NOT_FORWARDED), *others, *REPORTING]
        for source in self._sources:
            source.check_columns(names, dataset)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        trainer_state: Any = None,
        environments: Sequence[Any] | None = None,
    ) -> RewardTable:
        """
        The values of N completions.

        Args:
            prompts: the prompts, text or messages, one for each completion.
            completions: the completions, text or messages.
            completion_ids: their tokens.
            columns: the other columns of their rows; `prompt`, `completion` and `completion_ids` are left out.
            trainer_state: state of the trainer, for functions whose reward depends on progress.
            environments: of each completion, the environment that it ran in.

        Returns:
            The table of values, NaN where a source does not apply.

        Raises:
            RewardValueError: a function returned something else than a number or `None` for each completion.
            RewardError: a function failed and its policy is `"raise"`; or it needs a column that is not there.
        """
        everything = {
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": list(completion_ids),
            **{key: list(values) for key, values in (columns or {}).items() if key not in NOT_FORWARDED},
            "trainer_state": trainer_state,
        }
        if environments is not None:
            everything["environments"] = list(environments)
        collected = [Collected() for _ in self._sources]
        calls = self._make_calls(everything, collected)
        try:
            self._start(calls)
            outcomes = [self._collect(*item, len(completions)) for item in zip(self._sources, calls, strict=True)]
        finally:
            for call in calls:
                if call is not None:
                    call.cancel()
        return self._make_table(outcomes, collected, everything["prompts"])

    def _make_calls(self, everything: dict[str, Any], collected: list[Collected]) -> list[RewardCall | None]:
        """The calls to be made; `None` for a function that is busy with abandoned ones."""
        calls: list[RewardCall | None] = []
        for source, reports in zip(self._sources, collected, strict=True):
            source.abandoned = [call for call in source.abandoned if not call.done.is_set()]
            if len(source.abandoned) >= MAX_ABANDONED:
                calls.append(None)
                continue
            reporting = {"log_extra": reports.log_extra, "log_metric": reports.log_metric}
            arguments = source.arguments({**everything, **reporting})
            calls.append(RewardCall(source.name, source.function, arguments, source.limit_s, self.event_loop))
        return calls

    def _start(self, calls: list[RewardCall | None]) -> None:
        """Set everything going that can run by itself, then run the rest here."""
        jobs = [(source, call) for source, call in zip(self._sources, calls, strict=True) if call is not None]
        for source, call in jobs:
            if source.is_async:
                call.start_coroutine()
        for source, call in jobs:
            if not source.is_async and source.limit_s is not None:
                call.start_thread()
        for source, call in jobs:
            if not source.is_async and source.limit_s is None:
                call.run_here()

    def _collect(self, source: RewardSource, call: RewardCall | None, expected: int) -> _Outcome:
        """Wait for a call, and read its values or apply the error policy."""
        if call is None:
            return self._fail(source, f"{MAX_ABANDONED} earlier calls of it are still running", None, expected)
        result = call.wait()
        if isinstance(result.error, RewardTimeoutError):
            self.event_loop.replace_if_blocked()
            if not source.is_async and not call.done.is_set():
                source.abandoned.append(call)
        if result.error is not None:
            what = f"{type(result.error).__name__}: {result.error}".removesuffix(": ")
            return self._fail(source, what, result.error, expected, call.seconds)
        values = read_values(source.name, result.value, expected)
        infinite = [index for index, value in enumerate(values) if abs(value) > LARGEST]
        if not infinite:
            return _Outcome(values, seconds=call.seconds)
        what = f"infinite value for completion {infinite[0]}" + (
            f" and {len(infinite) - 1} more" if infinite[1:] else ""
        )
        outcome = self._fail(source, what, None, expected, call.seconds)
        outcome.values = [math.nan if abs(value) > LARGEST else value for value in values]
        outcome.failed = len(infinite)
        return outcome

    @staticmethod
    def _fail(
        source: RewardSource, what: str, error: BaseException | None, expected: int, seconds: float = 0.0
    ) -> _Outcome:
        """Stop with the function's name, or go on without its values."""
        # A model is called by all processes together: one that went on alone would wait for the others for ever.
        if source.on_error == "raise" or source.is_model:
            hint = "" if source.is_model else " To go on without its values, set its error policy to 'count'."
            raise RewardError(f"The reward function {source.name!r} failed: {what}.{hint}") from error
        logger.warning(f"The reward function {source.name!r} failed, and its values count as `None`: {what}.")
        return _Outcome([math.nan] * expected, failed=expected, error=what, seconds=seconds)

    def _make_table(self, outcomes: list[_Outcome], collected: list[Collected], prompts: list[Any]) -> RewardTable:
        extras: dict[str, list] = {}
        metrics: dict[str, list[float]] = {}
        for source, outcome, reports in zip(self._sources, outcomes, collected, strict=True):
            if outcome.error is not None:  # stopped half-way, or is still writing
                continue
            for key, column in reports.extras.items():
                if len(column) != len(prompts):
                    raise RewardValueError(
                        f"The reward function {source.name!r} logged {len(column)} values as {key!r} for "
                        f"{len(prompts)} completions. `log_extra` takes one for each."
                    )
                extras[key] = column
            for key, figures in reports.metrics.items():
                metrics.setdefault(key, []).extend(figures)
        values_FN = torch.tensor([outcome.values for outcome in outcomes], dtype=torch.float32)
        _warn_about_unscored(values_FN, prompts)
        return RewardTable(
            names=list(self.names),
            weights_F=self.weights_F,
            values_FN=values_FN,
            extras=extras,
            metrics=metrics,
            failed_counts=[outcome.failed for outcome in outcomes],
            latencies_s=[outcome.seconds for outcome in outcomes],
            errors={name: one.error for name, one in zip(self.names, outcomes, strict=True) if one.error is not None},
        )

    def close(self) -> None:
        """Stop the event loop; the next call of an asynchronous function starts a new one."""
        self.event_loop.close()


# ---- Arguments ----


def _as_list(functions: Any) -> list[Any]:
    if functions is None:
        return []
    return list(functions) if isinstance(functions, (list, tuple)) else [functions]


def _one_each(name: str, given: Any, count: int) -> list[Any]:
    """A list with a value for each function; a single value is for all."""
    if not isinstance(given, (list, tuple)):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"`{name}` has {len(given)} values for {count} reward functions. Give one for each.")
    return list(given)


def _as_callable(function: RewardFunc, tokenizer: Any, model_options: dict[str, Any]) -> Callable[..., Any]:
    if isinstance(function, (str, nn.Module)):
        return RewardModel(function, tokenizer, **model_options)
    if not callable(function):
        raise TypeError(
            "A reward function is a callable, a model, or the name or path of one. Found a "
            f"{type(function).__name__}: {function!r}."
        )
    return function


def _check_limit(name: str, function: Callable[..., Any], limit_s: float | None, is_its_own: bool) -> float | None:
    """The time limit of a function. One meant for all leaves models out."""
    if limit_s is None:
        return None
    check_number(f"time_limits (of {name})", limit_s, "a number of seconds above 0", lambda seconds: seconds > 0)
    if not isinstance(function, RewardModel):
        return float(limit_s)
    if is_its_own:
        raise ValueError(
            f"{name!r} is a model, and a model has no time limit: all processes run it together. Give `None` for it."
        )
    return None


def _warn_about_unscored(values_FN: Tensor, prompts: list[Any]) -> None:
    rows = values_FN.isnan().all(0).nonzero().flatten().tolist()
    if rows:
        shown = repr(prompts[rows[0]])
        warnings.warn(
            f"No reward function gave a value for {len(rows)} of {len(prompts)} completions. They are not trained on, "
            f"and count in no statistic. The first is completion {rows[0]}, to the prompt "
            f"{shown[:200]}{'…' if len(shown) > 200 else ''}."
        )
