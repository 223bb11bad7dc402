"""What a chat template keeps of a conversation, and whether a model can learn from it to stop; found by rendering."""

from __future__ import annotations

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .chat_templates import tokenize_conversation

ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin
Messages = list[dict[str, Any]]

_QUESTION = {"role": "user", "content": "What is the weather?"}
_ANSWER = {"role": "assistant", "content": "It is sunny."}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    ],
}
# Some templates want the arguments as JSON text.
_TEXT_CALL = {
    **_CALL,
    "tool_calls": [
        {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    ],
}
_RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "sunny"}


def is_chat_template_prefix_preserving(processing_class: ProcessingClass) -> bool:
    """
    Whether a conversation that goes on leaves its earlier tokens as they were.

    Tool loops and multi-turn rollouts append to what was generated, so the tokens of `[user, assistant]` must begin
    those of the longer conversation. Tried with a tool call and its result; where the template has no tools, with a
    second question.
    """

    def begins(first: Messages, longer: Messages) -> bool:
        before = tokenize_conversation(processing_class, first)["input_ids"]
        after = tokenize_conversation(processing_class, longer, add_generation_prompt=True)["input_ids"]
        return after[: len(before)] == before

    for call, follow_up in ((_CALL, _RESULT), (_TEXT_CALL, _RESULT), (_ANSWER, _QUESTION)):
        try:
            return begins([_QUESTION, call], [_QUESTION, call, follow_up])
        except (jinja2.TemplateError, TypeError, KeyError, ValueError):
            continue
    return False


def is_chat_template_stop_token_trained(processing_class: ProcessingClass, chat_template: str | None = None) -> bool:
    """
    Whether the token that ends an assistant turn is inside the assistant mask, so that the model learns to stop.

    Args:
        processing_class: tokenizer or processor.
        chat_template: a template to look at instead of its own.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    row = tokenize_conversation(
        processing_class, [_QUESTION, _ANSWER], assistant_mask=True, chat_template=chat_template
    )
    written = [token for token, mask in zip(row["input_ids"], row["assistant_masks"], strict=True) if mask]
    while written and not tokenizer.decode(written[-1:]).strip():
        written.pop()
    return bool(written) and written[-1] in set(tokenizer.get_added_vocab().values())
