"""Refusing values of settings: a name that nobody knows, with the nearest one that is known; a number out of range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from numbers import Real

# Ways to lay a batch out; see `trl.ops.layouts`.
LAYOUTS = ("auto", "padded", "packed", "shared_prefix")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """
    Refuse a value outside `choices`.

    Args:
        name: of the setting, for the message.
        value: what was given.
        choices: what may be given.

    Raises:
        ValueError: if `value` is none of them; names the nearest one.
    """
    choices = list(choices)
    if value in choices:
        return
    near = get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"`{name}` is one of {', '.join(map(repr, choices))}. Found {value!r}.{hint}")


def check_number(name: str, value: object, allowed: str, holds: Callable[[float], bool] = lambda value: True) -> None:
    """
    Refuse what is no finite number, or not within its range.

    Args:
        name: of the setting, for the message.
        value: what was given.
        allowed: the range in words, e.g. "a number above 0".
        holds: whether a finite number is within it. Default: any is.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(value, Real) or not math.isfinite(value) or not holds(value):
        raise ValueError(f"`{name}` is {allowed}. Found {value!r}.")
