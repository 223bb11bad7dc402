"""
Rewards that look at the tokens of a completion only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..choices import check_number

__all__ = ["get_repetition_penalty_reward", "get_soft_overlong_punishment"]


@dataclass(frozen=True)
class _SoftOverlongPunishment:
    max_completion_len: int
    soft_punish_cache: int
    __name__ = "soft_overlong_punishment_reward"

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [self._value(len(ids)) for ids in completion_ids]

    def _value(self, length: int) -> float:
        free = self.max_completion_len - self.soft_punish_cache
        if length <= free:
            return 0.0
        if length > self.max_completion_len:
            return -1.0
        return (free - length) / self.soft_punish_cache


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> Callable:
    """
    A penalty for completions near the length limit (DAPO, section 3.4, https://huggingface.co/papers/2503.14476).

    Args:
        max_completion_len: the limit, in tokens; longer completions get -1.
        soft_punish_cache: how many tokens before the limit the penalty begins; it goes linearly from 0 to -1.

    Returns:
        A reward function named `soft_overlong_punishment_reward`, with values from -1 to 0.

    Example:

    ```python
    >>> from trl.rewards import get_soft_overlong_punishment
    >>> get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)(completion_ids=[[1] * 90])
    [-0.5]
    ```
    """
    return _SoftOverlongPunishment(max_completion_len, soft_punish_cache)


@dataclass(frozen=True)
class _RepetitionPenalty:
    ngram_size: int
    max_penalty: float
    __name__ = "repetition_penalty_reward"

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [self._value(ids) for ids in completion_ids]

    def _value(self, ids: list[int]) -> float:
        total = len(ids) - self.ngram_size + 1
        if total <= 0:
            return 0.0
        distinct = {tuple(ids[start : start + self.ngram_size]) for start in range(total)}
        return (1 - len(distinct) / total) * self.max_penalty


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> Callable:
    """
    A penalty for repeated n-grams (https://huggingface.co/papers/2502.03373): the share of a completion's n-grams that
    it had before, times `max_penalty`.

    Args:
        ngram_size: tokens of an n-gram.
        max_penalty: value that a completion of nothing but repetition comes near to; not positive.

    Returns:
        A reward function named `repetition_penalty_reward`. Completions shorter than an n-gram get 0.

    Raises:
        ValueError: `max_penalty` is positive, or `ngram_size` not.

    Example:

    ```python
    >>> from trl.rewards import get_repetition_penalty_reward
    >>> get_repetition_penalty_reward(ngram_size=2)(completion_ids=[[7, 8, 7, 8, 7]])
    [-0.5]
    ```
    """
    check_number("max_penalty", max_penalty, "a penalty, 0 or negative", lambda penalty: penalty <= 0)
    check_number("ngram_size", ngram_size, "a number of tokens, at least 1", lambda size: size >= 1)
    return _RepetitionPenalty(ngram_size, max_penalty)
