"""
Conversations to tokens, by the tokenizer's own chat template.

What training needs beyond the text (which tokens the assistant wrote, whether a tool result continues a conversation
token for token) is worked out by rendering, so that it holds for a template nobody has seen before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from .assistant_masks import assistant_spans as spans_by_rendering
from .assistant_masks import learn_turn_format
from .template_rendering import (
    Messages,
    ProcessingClass,
    Span,
    TemplateRenderer,
    has_generation_markers,
    inner_tokenizer,
    text_blocks,
)
from .templating import common_prefix_length

__all__ = ["assistant_spans", "has_generation_markers", "tokenize_conversation"]


def tokenize_conversation(
    processing_class: ProcessingClass,
    messages: Messages,
    *,
    tools: list[dict | Callable] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    assistant_mask: bool = False,
    chat_template: str | None = None,
    **template_kwargs: Any,
) -> dict[str, list[int]]:
    """
    Token ids of a conversation, and which of them the assistant wrote.

    The ids are those of the rendered conversation as a whole, never of pieces. The mask comes from the template's
    generation markers where it has them, else from rendering growing prefixes of the conversation (see
    `trl.data.assistant_masks`): per assistant turn everything after the generation prompt, end-of-turn token included.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or the processor that holds it.
        messages (`list[dict]`):
            The conversation.
        tools (`list[dict | Callable]`, *optional*):
            Functions, or their JSON schemas, that the template describes to the model.
        add_generation_prompt (`bool`, *optional*, defaults to `False`):
            Open an assistant turn at the end.
        continue_final_message (`bool`, *optional*, defaults to `False`):
            Leave the last message open, to be continued.
        assistant_mask (`bool`, *optional*, defaults to `False`):
            Also return `assistant_masks`.
        chat_template (`str`, *optional*):
            Template to use instead of the tokenizer's own.
        **template_kwargs (`Any`):
            Further variables of the template, e.g. `enable_thinking`.

    Returns:
        `dict`: `input_ids` (`list[int]`), and if asked for `assistant_masks` (`list[int]`, as long, 1 on the
        assistant's tokens).

    Raises:
        `ValueError`: no template, or a message whose tokens cannot be told apart.
    """
    tokenizer = inner_tokenizer(processing_class)
    if assistant_mask:
        if continue_final_message:
            raise ValueError(
                "assistant_mask=True needs finished messages; continue_final_message=True leaves one open."
            )
        text, spans = assistant_spans(
            processing_class,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            **template_kwargs,
        )
        return _encode_with_mask(tokenizer, text, spans)
    renderer = TemplateRenderer.of(processing_class, chat_template, tools, **template_kwargs)
    messages = _with_blocks_if_needed(renderer, messages)
    text = renderer.render(messages, add_generation_prompt, continue_final_message=continue_final_message)
    return {"input_ids": _encode(tokenizer, text)["input_ids"]}


def assistant_spans(
    processing_class: ProcessingClass,
    messages: Messages,
    *,
    tools: list[dict | Callable] | None = None,
    add_generation_prompt: bool = False,
    chat_template: str | None = None,
    **template_kwargs: Any,
) -> tuple[str, list[Span]]:
    """
    A conversation as text, and the character ranges in it that the assistant wrote.

    The arguments are those of [`tokenize_conversation`].

    Returns:
        `tuple`: the text, and a list of `(first, one past the last)`.

    Raises:
        `ValueError`: no template, or a message that cannot be found in the text.
    """
    renderer = TemplateRenderer.of(processing_class, chat_template, tools, **template_kwargs)
    messages = _with_blocks_if_needed(renderer, messages)
    if has_generation_markers(renderer.template):
        return renderer.render_with_spans(messages, add_generation_prompt)
    text = renderer.render(messages, add_generation_prompt)
    return text, spans_by_rendering(renderer, messages, text, add_generation_prompt)


def _with_blocks_if_needed(renderer: TemplateRenderer, messages: Messages) -> Messages:
    """Templates of some image models silently drop a content that is not a list of blocks."""
    # The words of such a template are looked for once; a template that can do without blocks costs nothing here.
    if not any(isinstance(message.get("content"), str) for message in messages):
        return messages
    if "'type'" not in renderer.template and '"type"' not in renderer.template and ".type" not in renderer.template:
        return messages
    try:
        form = learn_turn_format(renderer)
    except ValueError:
        return messages
    return text_blocks(messages) if form.wants_blocks else messages


def _encode(tokenizer: Any, text: str, **options: Any) -> dict[str, Any]:
    # verbose=False: a conversation beyond the model's length is cut later, and the report counts it.
    return tokenizer(text, add_special_tokens=False, padding=False, truncation=False, verbose=False, **options)


def _encode_with_mask(tokenizer: Any, text: str, spans: list[Span]) -> dict[str, list[int]]:
    if tokenizer.is_fast:
        encoded = _encode(tokenizer, text, return_offsets_mapping=True)
        return {
            "input_ids": encoded["input_ids"],
            "assistant_masks": _mask_by_offsets(encoded["offset_mapping"], spans),
        }
    ids = _encode(tokenizer, text)["input_ids"]
    return {"input_ids": ids, "assistant_masks": _mask_by_prefixes(tokenizer, text, ids, spans)}


def _mask_by_offsets(offsets: list[Span], spans: list[Span]) -> list[int]:
    """1 on every token that holds a character of a span: a token that began before it was completed by it."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    mask = [0] * len(offsets)
    for span_start, span_end in spans:
        first = bisect_left(ends, span_start + 1)
        last = bisect_left(starts, span_end)
        for index in range(first, last):
            if ends[index] > starts[index]:
                mask[index] = 1
    return mask


def _mask_by_prefixes(tokenizer: Any, text: str, ids: list[int], spans: list[Span]) -> list[int]:
    """For a tokenizer without offsets: a boundary lies where the tokens of the text before it part from the whole's."""
    mask = [0] * len(ids)
    for span in spans:
        start, end = (common_prefix_length(_encode(tokenizer, text[:cut])["input_ids"], ids) for cut in span)
        mask[start:end] = [1] * (end - start)
    return mask
