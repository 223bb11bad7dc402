"""How a model writes its reasoning and its tool calls, found out by rendering probe messages with the chat template.

A template turns messages into text; parsing is the way back. The syntax of a family is not looked up by the name or the
text of its template: every syntax that is known here is tried on a rendered probe call, and the one that reads the call
back is taken. What is found is written down as a `response_template` of Transformers, so `tokenizer.parse_response`,
streaming and serving understand the tokenizer too, also after saving.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_parsing import parse_response as parse_with_template

from .template_rendering import TemplateRenderer, inner_tokenizer, resolve_chat_template, text_blocks
from .tool_syntaxes import (
    CALL_MARKS,
    JSON_OR_TEXT,
    PYTHONIC,
    TOOL_CALL_SYNTAXES,
    TurnFormat,
    build_response_template,
    parse_pythonic_calls,
)

ProcessingClassT = TypeVar("ProcessingClassT", PreTrainedTokenizerBase, ProcessorMixin)

# Transformers reads `response_template` since 5.13; the oldest version supported here is younger.
_SUPPORTS_RESPONSE_TEMPLATE = hasattr(PreTrainedTokenizerBase, "get_response_parser")

PROBE_NAME = "probe_function"
PROBE_ARGUMENTS = {"probe_text": "probe value", "probe_count": 37}
PROBE_CALL_ID = "probe0001"
PROBE_QUESTION = "probe question"
PROBE_RESULT = "probe result"
PROBE_REASONING = "probe reasoning"
PROBE_ANSWER = "probe answer"

# A special token as templates write them: <|end|>, </think>, [INST].
MARK = r"<[^<>\s]+>|\[/?[A-Z_]+\]"

PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "Probe.",
        "parameters": {
            "type": "object",
            "properties": {"probe_text": {"type": "string"}, "probe_count": {"type": "integer"}},
        },
    },
}

# In the order in which they are tried; the first that the template renders is the one messages get.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# ---------------------------------------------------------------------------------------------------------------------
# Probes
# ---------------------------------------------------------------------------------------------------------------------


def _renderer(processing_class: Any) -> TemplateRenderer:
    # Among several templates the one for tools; the tools themselves are not rendered, their schema would show the
    # probe's names in the prompt.
    return TemplateRenderer.of(processing_class, resolve_chat_template(processing_class, tools=[PROBE_TOOL]))


def _probe_call(arguments: dict[str, Any] | str) -> dict[str, Any]:
    function = {"name": PROBE_NAME, "arguments": arguments}
    call = {"id": PROBE_CALL_ID, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _user() -> dict[str, Any]:
    return {"role": "user", "content": PROBE_QUESTION}


def _tool() -> dict[str, Any]:
    return {"role": "tool", "name": PROBE_NAME, "tool_call_id": PROBE_CALL_ID, "content": PROBE_RESULT}


def _render(renderer: TemplateRenderer, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
    """The rendering of a probe; templates that want arguments as JSON text or content in blocks get them so."""
    text_arguments = [
        {**message, "tool_calls": _probe_call(json.dumps(PROBE_ARGUMENTS))["tool_calls"]}
        if "tool_calls" in message
        else message
        for message in messages
    ]
    failure: Exception | None = None
    for variant in (messages, text_arguments, text_blocks(messages)):
        try:
            text = renderer.render(variant, add_generation_prompt)
        except (TemplateError, TypeError) as error:
            failure = failure or error
            continue
        if PROBE_QUESTION in text:
            return text
    raise failure or TemplateError(f"the template leaves out the user's message {PROBE_QUESTION!r}")


def supports_tool_calling(processing_class: Any) -> bool:
    """
    Whether the chat template writes tool calls and their results into the text.

    A conversation with one call and its result is rendered; the name, the arguments and the result must all appear.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): whose template is asked. Without a template
            the answer is `False`.
    """
    try:
        text = _render(_renderer(processing_class), [_user(), _probe_call(PROBE_ARGUMENTS), _tool()])
    except (TemplateError, TypeError, ValueError):
        return False
    needed = [PROBE_NAME, PROBE_RESULT, *PROBE_ARGUMENTS, *map(str, PROBE_ARGUMENTS.values())]
    return all(word in text for word in needed)


def _last_mark(text: str) -> str:
    marks = re.findall(MARK, text)
    return marks[-1] if marks else ""


def _start_anchors(renderer: TemplateRenderer) -> tuple[str, ...]:
    """The mark of the assistant's turn; and, where a result is followed by no such mark, the mark that ends results."""
    asked = _render(renderer, [_user()])
    prompt = _render(renderer, [_user()], add_generation_prompt=True)
    answered = _render(renderer, [_user(), {"role": "assistant", "content": PROBE_ANSWER}])
    if prompt.startswith(asked) and len(prompt) > len(asked):
        header = prompt[len(asked) :]
    else:  # no generation prompt: what stands between the question and the answer
        header = answered[answered.rindex(PROBE_QUESTION) + len(PROBE_QUESTION) : answered.rindex(PROBE_ANSWER)]
    # A header may go on with the start of the reasoning, which belongs to the message.
    for opening in ("<think>", "<|channel>"):
        header = header.split(opening)[0]
    header = header.strip() or _last_mark(prompt)
    after_result = _render(renderer, [_user(), _probe_call(PROBE_ARGUMENTS), _tool()], add_generation_prompt=True)
    tail = after_result[after_result.rindex(PROBE_RESULT) + len(PROBE_RESULT) :]
    anchors = [header] if header in tail else [header, _last_mark(tail)]
    return tuple(anchor for anchor in anchors if anchor)


def _turn_end(renderer: TemplateRenderer) -> str:
    text = _render(renderer, [_user(), {"role": "assistant", "content": PROBE_ANSWER}])
    end = text[text.rindex(PROBE_ANSWER) + len(PROBE_ANSWER) :].strip()
    # A conversation's end may follow the turn's; the model stops at the first mark.
    first = re.match(MARK, end)
    return first[0] if first else end


def _reasoning(renderer: TemplateRenderer, anchor: str) -> dict[str, str]:
    """The message key of the reasoning and the marks around it; empty where the template knows none."""
    answer = {"role": "assistant", "content": PROBE_ANSWER}
    for field in REASONING_FIELDS:
        for message in (answer, _probe_call(PROBE_ARGUMENTS)):
            try:
                text = _render(renderer, [_user(), {**message, field: PROBE_REASONING}])
            except (TemplateError, TypeError):
                continue
            if PROBE_REASONING not in text:
                continue
            turn = text[text.rindex(PROBE_QUESTION) + len(PROBE_QUESTION) :]
            before, after = turn.split(PROBE_REASONING, 1)
            opening = before.split(anchor, 1)[1].strip() if anchor in before else _last_mark(before)
            closing = re.match(MARK, after.lstrip())
            if opening and closing:
                return {"reasoning_field": field, "reasoning_open": opening, "reasoning_close": closing[0]}
    # Some templates only open the reasoning for the model, or drop it from earlier answers.
    prompt = _render(renderer, [_user()], add_generation_prompt=True)
    thought = {"role": "assistant", "content": f"<think>\n{PROBE_REASONING}\n</think>\n\n{PROBE_ANSWER}"}
    history = _render(renderer, [_user(), thought, _user()])
    if "<think>" in prompt or (PROBE_ANSWER in history and PROBE_REASONING not in history):
        return {"reasoning_field": "reasoning_content"}
    return {}


def _reads_back(template: dict[str, Any], prefix: str, response: str) -> bool:
    try:
        message = parse_with_template(response, template, prefix=prefix, tools=[PROBE_TOOL])
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    except (ValueError, TypeError, KeyError):
        return False
    return calls == [(PROBE_NAME, PROBE_ARGUMENTS)] and not message.get("content")


def derive_response_template(processing_class: Any) -> dict[str, Any]:
    """
    The `response_template` that reads back what the chat template of a tokenizer or processor writes.

    Raises:
        ValueError: the template writes no tool calls, or in a syntax that is not known.
    """
    if not supports_tool_calling(processing_class):
        raise ValueError(
            "The chat template does not write tool calls and their results, so there is nothing to parse: rendering a "
            "conversation with a call loses its name, its arguments or its result. Use a model whose template knows "
            "tools, or copy such a template with `trl.clone_chat_template`."
        )
    renderer = _renderer(processing_class)
    anchors = _start_anchors(renderer)
    turn = TurnFormat(anchors, _turn_end(renderer), **_reasoning(renderer, anchors[0]))
    text = _render(renderer, [_user(), _probe_call(PROBE_ARGUMENTS)])
    start = text.find(anchors[0], text.rindex(PROBE_QUESTION)) + len(anchors[0])
    prefix, response = text[:start], text[start:]
    for syntax in TOOL_CALL_SYNTAXES:
        template = build_response_template(syntax, turn)
        if _reads_back(template, prefix, response):
            return template
    raise ValueError(
        f"The chat template writes a tool call as {response!r}, which is none of the known syntaxes "
        f"({', '.join(TOOL_CALL_SYNTAXES)}). Set `tokenizer.response_template` to a response template of Transformers "
        "that reads it."
    )


def add_response_schema(processing_class: ProcessingClassT) -> ProcessingClassT:
    """
    Set `response_template` on the tokenizer, so that answers with reasoning and tool calls can be parsed.

    The syntax is found by rendering a probe call with the tokenizer's own chat template, so a revised or own template
    works as long as it writes calls in a known way.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): changed in place; of a processor, its inner
            tokenizer is.

    Returns:
        The same object.

    Raises:
        ValueError: no chat template, one without tool calls, or one whose syntax is not known.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from trl.chat_template_utils import add_response_schema, parse_response

    >>> tokenizer = add_response_schema(AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B"))
    >>> text = '<tool_call>\\n{"name": "multiply", "arguments": {"a": 3, "b": 4}}\\n</tool_call><|im_end|>'
    >>> parse_response(tokenizer, tokenizer(text)["input_ids"])["tool_calls"]
    [{'type': 'function', 'function': {'name': 'multiply', 'arguments': {'a': 3, 'b': 4}}}]
    ```
    """
    resolve_chat_template(processing_class, tools=[PROBE_TOOL])
    inner_tokenizer(processing_class).response_template = derive_response_template(processing_class)
    return processing_class


# ---------------------------------------------------------------------------------------------------------------------
# Parsing
# ---------------------------------------------------------------------------------------------------------------------


def parse_response(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    prefix: list[int] | None = None,
    tools: list[dict | Callable] | None = None,
) -> dict:
    """
    Turn the tokens of an answer into an assistant message.

    An answer that cannot be parsed, for example one cut off within a call, becomes a message with its plain text.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a `response_template`, see [`add_response_schema`].
        ids (`list[int]`): the answer's tokens, with or without the end-of-sequence token.
        prefix (`list[int]`, *optional*): the prompt's tokens. Needed where the prompt begins the answer, as with an
            opened `<think>`.
        tools (`list[dict | Callable]`, *optional*): the tools that the model had. Arguments that a syntax writes
            without quotes get the types of the tool's parameters; without tools, those that JSON gives them.

    Returns:
        `dict` with `role`, `content` (always a string) and, where the answer has them, `tool_calls` (each with `type`
        and `function`, which has `name` and `arguments`) and the reasoning under the template's key for it.

    Raises:
        AttributeError: the tokenizer has no `response_template`.
    """
    template = getattr(tokenizer, "response_template", None)
    if template is None:
        raise AttributeError(
            "The tokenizer has no `response_template`, which says how to parse an answer. Call "
            "`add_response_schema(tokenizer)` first."
        )
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    while tokenizer.eos_token and text.endswith(tokenizer.eos_token):
        text = text.removesuffix(tokenizer.eos_token)
    prefix_text = tokenizer.decode(prefix, clean_up_tokenization_spaces=False) if prefix else ""
    try:
        return _parse_text(text, template, prefix_text, tools)
    except (ValueError, TypeError, KeyError):
        return {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}


def _parse_text(text: str, template: dict[str, Any], prefix: str, tools: list[dict | Callable] | None) -> dict:
    message = parse_with_template(
        text, _with_plain_values(template) if tools else template, prefix=prefix, tools=tools
    )
    syntax = template["fields"].get("tool_calls", {}).get("open_pattern")
    if message.get("tool_calls") and syntax in CALL_MARKS:
        opening, closing = CALL_MARKS[syntax]
        if text.rfind(opening) > text.rfind(closing):
            raise ValueError("the last call was cut off")
    if message.get("tool_calls") and syntax == PYTHONIC["open_pattern"]:
        # Python literals are read as Python reads them where that works: True, None, escaped quotes.
        message["tool_calls"] = parse_pythonic_calls(text) or message["tool_calls"]
    for call in message.get("tool_calls") or []:
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool call needs a name: {call}")
        if function.get("arguments") is None:
            function["arguments"] = {}
    if not message.keys() - template.get("defaults", {}).keys() and text.strip():
        raise ValueError("no part of the answer was recognised")
    return {"role": "assistant", **message, "content": message.get("content") or ""}


def _with_plain_values(template: dict[str, Any]) -> dict[str, Any]:
    """The template with unquoted arguments left as text, to be given the types of the tool's parameters."""
    arguments = template["fields"].get("tool_calls", {}).get("content_args", {})
    if arguments.get("value_parser") != JSON_OR_TEXT:
        return template
    template = deepcopy(template)
    del template["fields"]["tool_calls"]["content_args"]["value_parser"]
    return template
