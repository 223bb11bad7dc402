"""Refusing what nobody knows by that name, with the nearest name that is known."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


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
