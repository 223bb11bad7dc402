"""Rendering a conversation with a tokenizer's or processor's chat template: the one door to Jinja.

Everything the package knows about a chat template it learns by calling `TemplateRenderer.render` on conversations of
its own making, never by looking at the template's text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin
Messages = list[dict[str, Any]]
Span = tuple[int, int]

GENERATION_TAG = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def inner_tokenizer(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """The tokenizer of a processor; a tokenizer is returned as it is."""
    return getattr(processing_class, "tokenizer", processing_class)


def resolve_chat_template(
    processing_class: ProcessingClass, chat_template: str | None = None, tools: list | None = None
) -> str:
    """
    The text of the chat template that a call with these arguments uses.

    Args:
        processing_class: tokenizer or processor whose template is meant.
        chat_template: a template text, or the name of one of several templates of the processing class. Default: its
            own template; among several, `tool_use` where tools are given and there is one, else `default`.
        tools: the tools of the conversation; only whether there are any matters.

    Raises:
        ValueError: there is no template, or there are several and none is the default.
    """
    own = getattr(processing_class, "chat_template", None) or inner_tokenizer(processing_class).chat_template
    if isinstance(own, dict):
        if chat_template is not None:
            return own.get(chat_template, chat_template)
        if tools and "tool_use" in own:
            return own["tool_use"]
        if "default" in own:
            return own["default"]
        raise ValueError(
            f"The tokenizer has several chat templates ({', '.join(sorted(own))}) and none is called 'default'. "
            "Pass the name of one of them as `chat_template`."
        )
    template = chat_template if chat_template is not None else own
    if template is None:
        name = getattr(inner_tokenizer(processing_class), "name_or_path", "") or "This tokenizer"
        raise ValueError(
            f"{name} has no chat template, so conversations cannot be turned into text. Set "
            "`tokenizer.chat_template`, or copy one from another model with `trl.clone_chat_template` "
            "(`chat_template_path` of SFTConfig)."
        )
    return template


def has_generation_markers(chat_template: str | dict[str, str] | None) -> bool:
    """
    Whether a template says itself which text the assistant wrote, in `{% generation %}` blocks.

    Args:
        chat_template: template text, or several by name (then the one called `default` is looked at).
    """
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    return chat_template is not None and GENERATION_TAG.search(chat_template) is not None


@dataclass
class TemplateRenderer:
    """A template with everything that stays the same between two renderings: special tokens, tools, variables."""

    template: str
    variables: dict[str, Any] = field(default_factory=dict)
    tools: list[dict | Callable] | None = None

    @classmethod
    def of(
        cls,
        processing_class: ProcessingClass,
        chat_template: str | None = None,
        tools: list[dict | Callable] | None = None,
        **template_kwargs: Any,
    ) -> TemplateRenderer:
        """The renderer that `processing_class.apply_chat_template` with these arguments would use."""
        template = resolve_chat_template(processing_class, chat_template, tools)
        variables = {**inner_tokenizer(processing_class).special_tokens_map, **template_kwargs}
        return cls(template, variables, tools or None)

    def render(self, messages: Messages, add_generation_prompt: bool = False, **options: Any) -> str:
        """The conversation as one string."""
        return self._render(messages, add_generation_prompt, **options)[0][0]

    def render_with_spans(self, messages: Messages, add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The string, and the character ranges that came out of the template's generation blocks."""
        texts, spans = self._render(messages, add_generation_prompt, return_assistant_tokens_mask=True)
        return texts[0], [(start, end) for start, end in spans[0] if end > start]

    def _render(self, messages: Messages, add_generation_prompt: bool, **options: Any) -> tuple[list[str], list]:
        if not messages:
            raise ValueError("A conversation needs at least one message; this one is empty.")
        return render_jinja_template(
            conversations=[messages],
            tools=self.tools,
            chat_template=self.template,
            add_generation_prompt=add_generation_prompt,
            **{**self.variables, **options},
        )


def text_blocks(messages: Messages) -> Messages:
    """The same conversation with every string content as a list of one text block, as many image models want it."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]
