"""
Tool results as tokens that go on from what was sampled.

A policy's tokens are never decoded and tokenized again. So what follows a call (the end of its turn, the results, the
head of the next turn) is worked out apart: a short conversation with the same call is rendered without and with the
results, and what the second has more is appended.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import jinja2
from torch import Tensor

from ..data.chat_templates import tokenize_conversation
from ..data.template_checks import is_chat_template_prefix_preserving
from ..data.template_rendering import Messages, ProcessingClass, inner_tokenizer
from ..data.templating import common_prefix_length
from ..data.tool_formats import add_response_schema, supports_tool_calling
from ..data.training_templates import get_training_chat_template
from .image_prompts import encode_with_images, images_in, is_per_token

QUESTION = {"role": "user", "content": "Question?"}


def prepare_for_tools(processing_class: ProcessingClass, chat_template: str | None = None) -> str | None:
    """
    Make a tokenizer or processor ready for rollouts with tools.

    It gets a response template, with which calls are read, if it has none.

    Args:
        processing_class: changed in place.
        chat_template: a template to use instead of its own.

    Returns:
        The template to tokenize with: a derived one where the tokenizer's own rewrites a finished turn once tool
        results follow, else `chat_template`.

    Raises:
        ValueError: the template does not render calls and their results, or in a syntax that is not known.
    """
    tokenizer = inner_tokenizer(processing_class)
    if not supports_tool_calling(processing_class):
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path or 'this tokenizer'} cannot be used with tools: rendering a "
            "conversation with a tool call loses the tool's name, its arguments or its result. Use a model that was "
            "trained to call tools, or copy such a template with `trl.clone_chat_template`."
        )
    if getattr(tokenizer, "response_template", None) is None:
        if getattr(tokenizer, "response_schema", None) is not None:
            warnings.warn(
                "The tokenizer's `response_schema` is deprecated: Transformers reads `response_template` instead. One "
                "is derived from the chat template; save the tokenizer to keep it.",
                FutureWarning,
                stacklevel=2,
            )
        add_response_schema(processing_class)
    if chat_template is None and not is_chat_template_prefix_preserving(processing_class):
        return get_training_chat_template(processing_class)
    return chat_template


@dataclass(frozen=True)
class ToolSuffix:
    """What follows a sampled call: tokens, and for images among the results the model's tensors of these tokens."""

    ids: list[int]
    model_inputs: dict[str, Tensor] = field(default_factory=dict)


def tool_suffix(
    processing_class: ProcessingClass,
    call: dict[str, Any],
    results: Messages,
    eos_token_ids: Collection[int],
    last_id: int | None = None,
    chat_template: str | None = None,
    **template_kwargs: Any,
) -> ToolSuffix:
    """
    What stands between a sampled call and the policy's next turn.

    Args:
        processing_class: tokenizer or processor.
        call: the assistant message with `tool_calls`.
        results: the tool messages that answer it.
        eos_token_ids: tokens that end a turn.
        last_id: the last token that was sampled. Where turns have no end but hand over by the head of the next one,
            that head's first token is sampled already and not repeated.
        chat_template: a template to use instead of the tokenizer's own.
        **template_kwargs: further variables of the template.

    Returns:
        What follows the end-of-turn token, the generation prompt included.

    Raises:
        ValueError: the template rewrites the call once results follow, so no tokens can be appended.
    """

    def encode(messages: Messages, add_generation_prompt: bool) -> ToolSuffix:
        options = {"add_generation_prompt": add_generation_prompt, "chat_template": chat_template, **template_kwargs}
        if images_in(messages):
            return ToolSuffix(*encode_with_images(processing_class, messages, **options))
        return ToolSuffix(tokenize_conversation(processing_class, messages, **options)["input_ids"])

    call, results = _with_ids(call, results)
    for form in (call, _text_arguments(call)):
        try:
            asked = encode([QUESTION, form], False).ids
            answered = encode([QUESTION, form, *results], True)
            break
        except (jinja2.TemplateError, TypeError) as error:
            failure = error
    else:
        raise ValueError(f"The chat template refuses a conversation with tool results: {failure}") from failure
    begin = common_prefix_length(encode([QUESTION], True).ids, asked)
    ends = [index for index in range(begin, len(asked)) if asked[index] in eos_token_ids]
    cut = ends[-1] + 1 if ends else len(asked)
    if answered.ids[:cut] != asked[:cut]:
        raise ValueError(
            "The chat template renders a tool call in another way once its result follows, so the result cannot be "
            "appended to the tokens that were sampled. Pass a prefix-preserving template: "
            "`tokenizer.chat_template = get_training_chat_template(tokenizer)`."
        )
    handed_over = not ends and last_id in eos_token_ids and answered.ids[cut : cut + 1] == [last_id]
    cut += handed_over
    inputs = {
        name: tensor.reshape(-1)[cut:] if is_per_token(name) else tensor
        for name, tensor in answered.model_inputs.items()
    }
    return ToolSuffix(answered.ids[cut:], inputs)


def _with_ids(call: dict[str, Any], results: Messages) -> tuple[dict[str, Any], Messages]:
    """Calls and results that name each other, as some templates demand; models that write no ids need none."""
    calls = [{"id": f"call{index:05d}", **one} for index, one in enumerate(call.get("tool_calls") or [])]
    by_name: dict[str, list[str]] = {}
    for one in calls:
        by_name.setdefault(one.get("function", {}).get("name"), []).append(one["id"])
    linked = []
    for result in results:
        ids = by_name.get(result.get("name")) or [calls[0]["id"] if calls else "call00000"]
        linked.append({"tool_call_id": ids.pop(0) if len(ids) > 1 else ids[0], **result})
    return {**call, "tool_calls": calls}, linked


def _text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The same with arguments as JSON text, for templates that put strings together."""
    calls = []
    for one in call["tool_calls"]:
        function = one["function"]
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append({**one, "function": {**function, "arguments": text}})
    return {**call, "tool_calls": calls}
