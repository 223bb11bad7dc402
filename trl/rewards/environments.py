"""
The reward that an environment gives itself.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any


def environment_reward(environment_class: type) -> Callable[..., Any]:
    """
    A reward function that asks environments for their reward.

    Args:
        environment_class: class with a method `get_reward()`, synchronous or not, that returns a number or `None`.

    Returns:
        A function named after the class. It applies to completions whose environment is of exactly that class; those of
        asynchronous environments are asked at the same time.
    """

    def is_one(environment: Any) -> bool:
        return type(environment) is environment_class

    if inspect.iscoroutinefunction(environment_class.get_reward):

        async def reward(environments: Sequence[Any], **kwargs: Any) -> list[float | None]:
            values = await asyncio.gather(*(one.get_reward() for one in environments if is_one(one)))
            remaining = iter(values)
            return [next(remaining) if is_one(one) else None for one in environments]

    else:

        def reward(environments: Sequence[Any], **kwargs: Any) -> list[float | None]:
            return [one.get_reward() if is_one(one) else None for one in environments]

    reward.__name__ = reward.__qualname__ = environment_class.__name__
    return reward
