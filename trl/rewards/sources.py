"""
A source of reward before and after it is called: its name, the arguments it wants, and the values it gave.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from ..extras.plain import get_callable_name, is_async_callable
from .calls import RewardCall
from .reward_models import RewardModel

# What every function is given besides the columns.
TEXTS = ("prompts", "completions", "completion_ids")
REPORTING = ("trainer_state", "log_extra", "log_metric")


class RewardError(RuntimeError):
    """A reward function failed; the message names it."""


class RewardValueError(RewardError, ValueError):
    """A reward function returned something that is not a value per completion; the message names it."""


class RewardSource:
    """
    A reward function or model, with what is known about it before it is called.

    Args:
        function: the function, or a [`RewardModel`].
        name: in logs.
        limit_s: how long it is waited for, in seconds; `None` for as long as it takes.
        on_error: `"raise"` or `"count"`.
    """

    def __init__(self, function: Callable[..., Any], name: str, limit_s: float | None, on_error: str):
        self.function, self.name, self.limit_s, self.on_error = function, name, limit_s, on_error
        self.is_model = isinstance(function, RewardModel)
        self.is_async = not self.is_model and is_async_callable(function)
        self.abandoned: list[RewardCall] = []
        self._needed, self._accepted = _parameters(function)

    def check_columns(self, names: Collection[str], dataset: str = "dataset") -> None:
        """Refuse a function that needs an argument which is not among these names."""
        missing = [name for name in self._needed if name not in names]
        if missing:
            raise RewardError(
                f"The reward function {self.name!r} needs {', '.join(f'`{name}`' for name in missing)}, and the "
                f"{dataset} has no such column. There are: "
                f"{', '.join(f'`{name}`' for name in names if name not in REPORTING)}. Rename or add the column, or "
                "give the argument a default."
            )

    def arguments(self, everything: dict[str, Any]) -> dict[str, Any]:
        """What the function is called with: all of it, or what it asks for by name if it takes no `**kwargs`."""
        self.check_columns(everything)
        names = everything if self._accepted is None else [name for name in everything if name in self._accepted]
        # Of lists a copy, so that a function that changes them changes nothing for the others or for training.
        return {name: _copy_lists(everything[name]) for name in names}


def _copy_lists(value: Any) -> Any:
    """Lists and dicts copied at every depth (tokens, messages); what they hold, such as images, stays the same."""
    if type(value) is list:
        return [_copy_lists(item) for item in value]
    if type(value) is dict:
        return {key: _copy_lists(item) for key, item in value.items()}
    return value


def _parameters(function: Callable[..., Any]) -> tuple[list[str], set[str] | None]:
    """Names of the arguments that a function must get, and of all it takes (`None` with `**kwargs`)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return [], None
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return [p.name for p in named if p.default is p.empty], None if takes_all else {p.name for p in named}


def reward_name(function: Callable[..., Any]) -> str:
    """What a function is called in logs: a model by its name, others by theirs, through any `functools.partial`."""
    return function.name if isinstance(function, RewardModel) else get_callable_name(function)


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, a number added to those that are there already, so that each keeps a curve of its own."""
    unique: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in unique:
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return unique


def read_values(name: str, returned: Any, expected: int) -> list[float]:
    """
    What a reward function returned, as floats; NaN for `None`.

    Args:
        name: of the function, for messages.
        returned: a list, tuple, array or tensor of numbers or `None`.
        expected: number of completions.

    Raises:
        RewardValueError: it is something else, or of another length.
    """
    if isinstance(returned, Tensor):
        returned = returned.detach().cpu()
    if hasattr(returned, "tolist"):
        returned = returned.tolist()
    needed = f"A reward function returns a list with a number or `None` for each of the {expected} completions"
    if not isinstance(returned, Sequence) or isinstance(returned, (str, bytes)):
        raise RewardValueError(
            f"The reward function {name!r} returned {_described(returned)}. {needed}."
            + (" Does it end without `return`?" if returned is None else "")
        )
    if len(returned) != expected:
        raise RewardValueError(f"The reward function {name!r} returned {len(returned)} values. {needed}.")
    values = []
    for index, value in enumerate(returned):
        number = _number(value)
        if number is None:
            raise RewardValueError(
                f"The reward function {name!r} returned {_described(value)} for completion {index}. {needed}."
            )
        values.append(number)
    return values


def _number(value: Any) -> float | None:
    """The value as a float, NaN for `None`; `None` for what is no number."""
    if value is None:
        return math.nan
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        if math.prod(value.shape) != 1:
            return None
        value = value.item()
    if not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf if value > 0 else -math.inf


def _described(value: Any) -> str:
    shown = repr(value)
    return f"a {type(value).__name__} ({shown[:60]}{'…' if len(shown) > 60 else ''})"
