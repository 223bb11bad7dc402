"""
Conversations to token ids, and which of them the assistant wrote.

Everything is worked out by rendering the tokenizer's own chat template, never by its text, so a vendor's next revision
works too. A template with generation markers (`{% generation %}`) says itself what the assistant writes. For any other,
the conversation is rendered again and again, one message longer each time: what an assistant message adds after the
generation prompt is what the assistant wrote, its end-of-turn token included.

A template may render a turn differently once it has become history (Qwen3 drops the thinking, GPT-OSS changes the stop
token). The masks follow the text that is trained on, which is always the plain rendering of the whole conversation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .templating import common_prefix_length

ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin
Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]  # character positions: first, one past the last

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplateError(ValueError):
    """A chat template that cannot do what is asked of it, and for which message."""


def _tokenizer(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def get_template_text(
    processing_class: ProcessingClass, chat_template: str | None = None, tools: list | None = None
) -> str:
    """The text of the template that a call with `chat_template` and `tools` renders."""
    if isinstance(processing_class, ProcessorMixin):
        template = chat_template if chat_template is not None else processing_class.chat_template
        if isinstance(template, dict):
            template = template["tool_use" if tools and "tool_use" in template else "default"]
        if template:
            return template
    return _tokenizer(processing_class).get_chat_template(chat_template, tools)


def has_generation_markers(chat_template: str | dict[str, str]) -> bool:
    """
    Whether a template marks what the assistant writes.

    Args:
        chat_template: its text, or several by name (then `"default"` counts).
    """
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default", "")
    return _GENERATION_BLOCK.search(chat_template) is not None


def render(
    processing_class: ProcessingClass,
    messages: Messages,
    *,
    tools: list | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    chat_template: str | None = None,
    **template_kwargs: Any,
) -> str:
    """The conversation as text, exactly as `apply_chat_template(..., tokenize=False)` gives it."""
    return processing_class.apply_chat_template(
        list(messages),
        tools=tools or None,
        chat_template=chat_template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tokenize=False,
        **template_kwargs,
    )


def _marked_spans(
    processing_class: ProcessingClass, messages: Messages, template: str, tools: list | None, **kwargs: Any
) -> tuple[str, list[Span]]:
    """Text and spans of a template with generation markers."""
    special = {**_tokenizer(processing_class).special_tokens_map}
    texts, spans = render_jinja_template(
        conversations=[list(messages)],
        tools=tools or None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **{**special, **kwargs},
    )
    return texts[0], [(start, end) for start, end in spans[0]]


class _PrefixRenderer:
    """Finds the spans of assistant messages in a full rendering, by rendering its beginnings."""

    def __init__(self, processing_class: ProcessingClass, messages: Messages, full: str, **kwargs: Any):
        self.processing_class = processing_class
        self.messages = list(messages)
        self.full = full
        self.kwargs = kwargs
        added = _tokenizer(processing_class).get_added_vocab()
        self.special = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")

    def _render(self, count: int, add_generation_prompt: bool = False) -> str | None:
        """The first `count` messages; None where the template refuses such a beginning."""
        if count == 0 and not add_generation_prompt:
            return ""
        try:
            return render(
                self.processing_class,
                self.messages[:count],
                add_generation_prompt=add_generation_prompt,
                **self.kwargs,
            )
        except (jinja2.TemplateError, TypeError, KeyError, IndexError, ValueError):
            return None

    def span(self, index: int) -> Span:
        start = self._start(index)
        end = self._end(index, start)
        written = self.full[start:end].rstrip()
        # White space after the stop token belongs to the template: the model has stopped already.
        if any(token.end() == len(written) for token in self.special.finditer(written)):
            end = start + len(written)
        return start, end

    def _start(self, index: int) -> int:
        prompt = self._render(index, add_generation_prompt=True)
        if prompt is not None and self.full.startswith(prompt):
            return len(prompt)
        history = self._render(index)
        if history is not None and self.full.startswith(history):
            # The generation prompt opens what a finished turn no longer shows, e.g. a thinking block.
            shared = common_prefix_length(self.full, prompt or "")
            if shared > len(history):
                return shared
        content = self._content(index)
        if index == 0 and content and content in self.full:  # no conversation to generate from
            return self.full.index(content)
        raise ChatTemplateError(self._why(index, "where it begins"))

    def _end(self, index: int, start: int) -> int:
        if index == len(self.messages) - 1:
            return len(self.full)
        turn = self._render(index + 1)
        if turn is not None and self.full.startswith(turn) and len(turn) > start:
            return len(turn)
        # As history the turn looks different. It ends with the first stop token after its words.
        content = self._content(index)
        at = self.full.find(content, start) if content else start
        stop = self.special.search(self.full, at + len(content)) if at >= 0 else None
        if stop is None:
            raise ChatTemplateError(self._why(index, "where it ends"))
        return stop.end()

    def _content(self, index: int) -> str:
        """The words of a message as any template shows them: trimmed, without thinking."""
        content = self.messages[index].get("content")
        if isinstance(content, list):
            texts = [block.get("text", "") for block in content if isinstance(block, dict)]
            content = texts[-1] if texts else ""
        return (content or "").split("</think>")[-1].strip()

    def _why(self, index: int, what: str) -> str:
        return (
            f"The chat template has no generation markers, and message {index} (role 'assistant') of {len(self.messages)} "
            f"cannot be located in the rendered conversation: rendering the messages before it does not show {what}. "
            "The template changes earlier text when the conversation goes on. Use a template with generation markers, "
            "e.g. tokenizer.chat_template = trl.get_training_chat_template(tokenizer), or turn `assistant_only_loss` off."
        )


def assistant_spans(
    processing_class: ProcessingClass,
    messages: Messages,
    *,
    tools: list | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    chat_template: str | None = None,
    **template_kwargs: Any,
) -> tuple[str, list[Span]]:
    """
    Render a conversation and find what the assistant wrote.

    Returns:
        The text, and the character spans of the assistant's words in it, end-of-turn tokens included.

    Raises:
        ChatTemplateError: the template has no generation markers and a message cannot be located.
    """
    prompt = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    template = get_template_text(processing_class, chat_template, tools)
    if has_generation_markers(template):
        return _marked_spans(processing_class, messages, template, tools, **prompt, **template_kwargs)
    same = {"tools": tools, "chat_template": chat_template, **template_kwargs}
    text = render(processing_class, messages, **prompt, **same)
    whole = render(processing_class, messages, **same) if add_generation_prompt else text
    finder = _PrefixRenderer(processing_class, messages, whole, **same)
    return text, [finder.span(i) for i, message in enumerate(messages) if message.get("role") == "assistant"]


def _mask_by_offsets(offsets: list[Span], spans: list[Span]) -> list[int]:
    """1 for each token that shares a character with a span. Both are in order."""
    mask = [0] * len(offsets)
    i = 0
    for start, end in spans:
        while i < len(offsets) and offsets[i][1] <= start:
            i += 1
        j = i
        while j < len(offsets) and offsets[j][0] < end:
            mask[j] = int(offsets[j][1] > offsets[j][0])
            j += 1
    return mask


def _mask_by_prefixes(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], spans: list[Span]) -> list[int]:
    """The same without offsets (a tokenizer in Python): from the tokens that each beginning of the text shares."""

    def tokens_before(position: int) -> int:
        begun = tokenizer(text[:position], add_special_tokens=False, verbose=False)["input_ids"]
        return common_prefix_length(begun, ids)

    mask = [0] * len(ids)
    for start, end in spans:
        first, last = tokens_before(start), tokens_before(end)
        mask[first:last] = [1] * (last - first)
    return mask


def tokenize_conversation(
    processing_class: ProcessingClass,
    messages: Messages,
    *,
    tools: list | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    assistant_mask: bool = False,
    chat_template: str | None = None,
    **template_kwargs: Any,
) -> dict[str, list[int]]:
    """
    Token ids of a conversation, as its chat template renders it.

    Args:
        processing_class: tokenizer or processor that holds the template.
        messages: the conversation: dictionaries with `role` and `content`, and what else the template knows.
        tools: functions or JSON schemas that the template announces.
        add_generation_prompt: end with the header of an assistant turn.
        continue_final_message: leave the last message open.
        assistant_mask: also tell what the assistant wrote.
        chat_template: use this template instead.
        template_kwargs: variables of the template.

    Returns:
        `input_ids`, and with `assistant_mask` the list `assistant_masks`: 1 where the assistant wrote the token.

    Raises:
        ChatTemplateError: the assistant's words cannot be located.
    """
    settings = {
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "chat_template": chat_template,
        **template_kwargs,
    }
    tokenizer = _tokenizer(processing_class)
    if not assistant_mask:
        text = render(processing_class, messages, **settings)
        return {"input_ids": tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]}
    text, spans = assistant_spans(processing_class, messages, **settings)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = encoded["input_ids"]
    if tokenizer.is_fast:
        mask = _mask_by_offsets(encoded["offset_mapping"], spans)
    else:
        mask = _mask_by_prefixes(tokenizer, text, ids, spans)
    return {"input_ids": ids, "assistant_masks": mask}


_QUESTION = {"role": "user", "content": "What is the weather?"}
_ANSWER = {"role": "assistant", "content": "It is sunny."}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
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

    for call, follow_up in ((_CALL, _RESULT), (_ANSWER, _QUESTION)):
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
    tokenizer = _tokenizer(processing_class)
    row = tokenize_conversation(
        processing_class, [_QUESTION, _ANSWER], assistant_mask=True, chat_template=chat_template
    )
    written = [token for token, mask in zip(row["input_ids"], row["assistant_masks"], strict=True) if mask]
    while written and not tokenizer.decode(written[-1:]).strip():
        written.pop()
    return bool(written) and written[-1] in set(tokenizer.get_added_vocab().values())
