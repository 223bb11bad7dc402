"""
Rewards for a correct mathematical answer.

What counts as the answer of a completion is the LaTeX that it marks as one, a `\\boxed{}` before anything else; it is
compared as mathematics, not as text (`\\frac{1}{2}` is `0.5`), by math-verify.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..choices import check_number
from ..import_utils import is_math_verify_available
from .math_verification import MathVerdict, default_verifier
from .texts import completion_text

__all__ = ["accuracy_reward", "get_cosine_scaled_reward", "reasoning_accuracy_reward"]

LogExtra = Callable[[str, list], None]


def _compare(texts: Sequence[str], solutions: Sequence[str], log_extra: LogExtra | None) -> list[MathVerdict]:
    """Verdicts on texts; what was understood goes into the table of completions."""
    if not is_math_verify_available():
        raise ImportError(
            "Comparing mathematical answers needs math-verify, which is not installed. Install it: "
            "`pip install math-verify`, or `pip install trl[math-verify]`."
        )
    if len(texts) != len(solutions):
        raise ValueError(
            f"Each completion needs a solution. Found {len(texts)} completions, {len(solutions)} solutions."
        )
    verdicts = [
        MathVerdict("", "", None) if solution is None else default_verifier.verify(answer=text, gold=str(solution))
        for text, solution in zip(texts, solutions, strict=True)
    ]
    if log_extra is not None:
        log_extra("solution", list(solutions))
        log_extra("gold_parsed", [verdict.gold for verdict in verdicts])
        log_extra("answer_parsed", [verdict.answer for verdict in verdicts])
    return verdicts


def _value(verdict: MathVerdict) -> float | None:
    return None if verdict.equal is None else float(verdict.equal)


def accuracy_reward(
    completions: list[list[dict[str, str]]],
    solution: list[str],
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """
    1.0 for a completion whose answer is mathematically equal to the solution, else 0.0.

    Parsing a text may take 10 s, comparing two answers 5 s, in whatever thread this is called; what takes longer could
    not be parsed, or is not equal.

    Args:
        completions: answers, as messages or text; of several messages the assistant's last one counts.
        solution: the expected answers, LaTeX or plain, one for each completion.
        log_extra: given by the trainer; receives the columns `solution`, `gold_parsed` and `answer_parsed`.
        **kwargs: the trainer's other arguments; not used.

    Returns:
        A value for each completion; `None` where there is no solution, or none that could be parsed.

    Raises:
        ImportError: math-verify is not installed.

    Example:

    ```python
    >>> from trl.rewards import accuracy_reward
    >>> accuracy_reward([[{"role": "assistant", "content": r"It is \\boxed{\\frac{1}{3}}."}]], [r"\\frac{2}{6}"])
    [1.0]
    ```
    """
    verdicts = _compare([completion_text(completion) for completion in completions], solution, log_extra)
    return [_value(verdict) for verdict in verdicts]


def _after_reasoning(text: str, delimiters: Sequence[str]) -> str | None:
    """What follows the last of the delimiters; `None` where there is none."""
    ends = [text.rfind(delimiter) + len(delimiter) for delimiter in delimiters if delimiter in text]
    return text[max(ends) :] if ends else None


def reasoning_accuracy_reward(
    completions: list[list[dict[str, str]]],
    solution: list[str],
    reasoning_delimiters: list[str] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """
    Like [`accuracy_reward`], but only what follows the reasoning is read: an answer inside it does not count.

    Args:
        completions: answers, as messages or text; of several messages the assistant's last one counts.
        solution: the expected answers, LaTeX or plain, one for each completion.
        reasoning_delimiters: what ends the reasoning, by default `["</think>"]`; the last one in the text counts.
        log_extra: given by the trainer; receives the columns `solution`, `gold_parsed` and `answer_parsed`.
        **kwargs: the trainer's other arguments; not used.

    Returns:
        A value for each completion: 0.0 where the reasoning did not end, `None` where the solution could not be parsed.

    Raises:
        ImportError: math-verify is not installed.

    Example:

    ```python
    >>> from trl.rewards import reasoning_accuracy_reward
    >>> reasoning_accuracy_reward([[{"role": "assistant", "content": r"<think>3, no, 4</think> \\boxed{4}"}]], ["4"])
    [1.0]
    ```
    """
    delimiters = ["</think>"] if reasoning_delimiters is None else reasoning_delimiters
    texts = [completion_text(completion, with_reasoning=True) for completion in completions]
    answers = [_after_reasoning(text, delimiters) for text in texts]
    # An empty text has no answer in it; a solution that cannot be parsed gives `None` all the same.
    verdicts = _compare([answer or "" for answer in answers], solution, log_extra)
    return [_value(verdict) for verdict in verdicts]


@dataclass(frozen=True)
class _CosineScaledReward:
    max_len: int
    wrong: tuple[float, float]  # at length 0 and at `max_len`
    correct: tuple[float, float]
    __name__ = "cosine_scaled_reward"

    def __call__(
        self,
        completions: list[list[dict[str, str]]],
        solution: list[str],
        completion_ids: list[list[int]],
        **kwargs: Any,
    ) -> list[float | None]:
        values = accuracy_reward(completions, solution)
        return [
            None if value is None else self._scale(len(ids), self.correct if value else self.wrong)
            for value, ids in zip(values, completion_ids, strict=True)
        ]

    def _scale(self, length: int, ends: tuple[float, float]) -> float:
        at_zero, at_full = ends
        progress = min(length / self.max_len, 1.0)
        return at_full + 0.5 * (at_zero - at_full) * (1 + math.cos(math.pi * progress))


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable:
    """
    A reward for correct answers that depends on their length (https://huggingface.co/papers/2502.03373): a correct
    answer is worth more the shorter it is, a wrong one costs less the longer it is, both along half a cosine.

    Args:
        max_len: length, in tokens, at which the value no longer changes.
        min_value_wrong: value of a wrong answer of length 0.
        max_value_wrong: value of a wrong answer of `max_len` tokens or more.
        min_value_correct: value of a correct answer of `max_len` tokens or more.
        max_value_correct: value of a correct answer of length 0.

    Returns:
        A reward function named `cosine_scaled_reward`. It needs the column `solution`; its value is `None` where the
        solution could not be parsed.

    Raises:
        ValueError: `max_len` is not positive.

    Example:

    ```python
    >>> from trl.rewards import get_cosine_scaled_reward
    >>> reward = get_cosine_scaled_reward(max_len=100)
    >>> reward(completions=[r"\\boxed{4}"], solution=["4"], completion_ids=[[1] * 50])
    [0.75]
    ```
    """
    check_number("max_len", max_len, "a number of tokens, at least 1", lambda tokens: tokens >= 1)
    return _CosineScaledReward(
        max_len, wrong=(min_value_wrong, max_value_wrong), correct=(max_value_correct, min_value_correct)
    )
