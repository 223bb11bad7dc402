"""
Rewards for the form of an answer.
"""

from __future__ import annotations

from typing import Any

from .texts import completion_text

__all__ = ["think_format_reward"]


def think_format_reward(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """
    1.0 for a completion that begins with its reasoning between `<think>` and `</think>`, else 0.0.

    The text has to start with `<think>`, hold that tag once, and close it.

    Args:
        completions: answers, as messages or text; of several messages the assistant's last one counts.
        **kwargs: the trainer's other arguments; not used.

    Returns:
        A value for each completion.

    Example:

    ```python
    >>> from trl.rewards import think_format_reward
    >>> think_format_reward([[{"role": "assistant", "content": "<think>Easy.</think>4"}], "4"])
    [1.0, 0.0]
    ```
    """
    texts = [completion_text(completion, with_reasoning=True) for completion in completions]
    return [float(text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text) for text in texts]
