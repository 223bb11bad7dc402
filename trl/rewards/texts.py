"""
The text of a completion, whichever way it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Completion: TypeAlias = "str | Sequence[Mapping[str, Any]]"

# Where a response parser puts what stood between the thinking tags.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def completion_text(completion: Completion, with_reasoning: bool = False) -> str:
    """
    What the model said last.

    Args:
        completion: text, or messages. Of several messages (turns with tools between them) the last one of the
            assistant counts; the text blocks of a list content are joined.
        with_reasoning: where the answer was parsed and its reasoning stands in a field of its own, put it back in
            front, between `<think>` and `</think>`.

    Returns:
        The text; empty where no message is the assistant's.
    """
    if isinstance(completion, str):
        return completion
    messages = [message for message in completion if message.get("role", "assistant") == "assistant"]
    if not messages:
        return ""
    content = messages[-1].get("content") or ""
    if not isinstance(content, str):
        content = "".join(block.get("text") or "" for block in content)
    if with_reasoning and "<think>" not in content:
        reasoning = next((messages[-1][field] for field in _REASONING_FIELDS if messages[-1].get(field)), None)
        if reasoning is not None:
            return f"<think>{reasoning}</think>{content}"
    return content
