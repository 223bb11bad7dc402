"""How a model writes its reasoning and its tool calls, found out by rendering probe messages with the chat template.

A template turns messages into text; parsing is the way back. The syntax of a family is not looked up by the name or the
text of its template: every syntax that is known here is tried on a rendered probe call, and the one that reads the call
back is taken. What is found is written down as a `response_template` of Transformers, so `tokenizer.parse_response`,
streaming and serving understand the tokenizer too, also after saving.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_parsing import parse_response as parse_with_template

from .template_rendering import TemplateRenderer, inner_tokenizer, resolve_chat_template, text_blocks

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

# Arguments written without quotes: JSON where the text is JSON, else the text itself.
JSON_OR_TEXT = {"name": "json", "args": {"allow_non_json": True}}


# ---------------------------------------------------------------------------------------------------------------------
# Syntaxes
# ---------------------------------------------------------------------------------------------------------------------


def _call(name: str = "{name}", arguments: str = "{content}") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _json_call_field(arguments_key: str) -> dict[str, Any]:
    # With the usual key the object is the call already, and one without arguments is still read.
    if arguments_key == "arguments":
        transform = {"type": "function", "function": "{content}"}
    else:
        transform = _call("{content.name}", f"{{content.{arguments_key}}}")
    return {"content": "json", "transform": transform, "repeats": True}


def _tagged_json(arguments_key: str) -> dict[str, Any]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`"""
    return {
        "open_pattern": r"\s*<tool_call>(?=\s*\{)",
        "close_pattern": r"</tool_call>\s*",
        **_json_call_field(arguments_key),
    }


def _bare_json(arguments_key: str) -> dict[str, Any]:
    """`{"name": ..., "parameters": {...}}` as the whole message."""
    return {"open_pattern": r'\A\s*(?:<\|python_tag\|>)?\s*(?=\{\s*"name"\s*:)', **_json_call_field(arguments_key)}


TAGGED_FUNCTION = {  # <tool_call><function=name><parameter=key>value</parameter></function></tool_call>
    "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\s]+)>",
    "close_pattern": r"</function>\s*</tool_call>\s*",
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r"<parameter=(?P<key>[^>]+)>\n?(?P<value>.*?)\n?</parameter>",
        "value_parser": JSON_OR_TEXT,
    },
    "transform": _call(),
    "repeats": True,
}

TAGGED_KEYS = {  # <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>
    "open_pattern": r"\s*<tool_call>\s*(?P<name>[^\s<{]+)",
    "close_pattern": r"</tool_call>\s*",
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
        "value_parser": JSON_OR_TEXT,
    },
    "transform": _call(),
    "repeats": True,
}

FENCED_JSON = {  # <｜tool▁call▁begin｜>function<｜tool▁sep｜>name ```json {...} ```<｜tool▁call▁end｜>
    "open_pattern": r"\s*(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>\w*<｜tool▁sep｜>(?P<name>[^\s<]+)\s*```json",
    "close_pattern": r"```\s*<｜tool▁call▁end｜>\s*(?:<｜tool▁calls▁end｜>\s*)?",
    "content": "json",
    "transform": _call(),
    "repeats": True,
}

SEPARATED_JSON = {  # <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>
    "open_pattern": r"\s*(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>(?P<name>[^\s<]+)<｜tool▁sep｜>(?=\s*\{)",
    "close_pattern": r"<｜tool▁call▁end｜>\s*(?:<｜tool▁calls▁end｜>\s*)?",
    "content": "json",
    "transform": _call(),
    "repeats": True,
}

BRACED = {  # <|tool_call>call:name{key:<|"|>text<|"|>,key:1}<tool_call|>
    "open_pattern": r"\s*<\|tool_call>call:(?P<name>[^\s{]+)(?=\{)",
    # The template opens the result right after a call, and a model may stop there.
    "close_pattern": r"<tool_call\|>\s*(?:<\|tool_response>\s*)?",
    "content": "json",
    "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
    "transform": _call(),
    "repeats": True,
}

PYTHONIC = {  # <|tool_call_start|>[name(key='text', key=1), name()]<|tool_call_end|>
    "open_pattern": (
        r"(?:\s*<\|tool_call_start\|>\s*\[|(?<=<\|tool_call_start\|>(?:(?!<\|tool_call_end\|>).)*)\s*,\s*)"
        r"(?P<name>[\w.\-]+)\("
    ),
    "close_pattern": r"\)(?=\s*,\s*[\w.\-]+\(|\s*\]\s*<\|tool_call_end\|>|\s*\]?\s*\Z)(?:\s*\]\s*<\|tool_call_end\|>\s*)?",
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r"(?P<key>\w+)\s*=\s*(?P<value>'.*?'|\".*?\"|[^'\"\s].*?)(?=\s*(?:,\s*\w+\s*=|\Z))",
        "value_parser": {"name": "json", "args": {"allow_non_json": True, "string_delims": [["'", "'"]]}},
    },
    "transform": _call(),
    "repeats": True,
}

LISTED_JSON = {  # [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
    "open_pattern": r"\s*\[TOOL_CALLS\](?=\s*\[)",
    "content": "json",
    "transform": _call("{name}", "{arguments}"),
    "transform_each": True,
}

NAMED_JSON = {  # [TOOL_CALLS]name[ARGS]{...}
    "open_pattern": r"\s*\[TOOL_CALLS\]\s*(?P<name>[^\[\s]+?)\s*(?:\[CALL_ID\][^\[]*)?\[ARGS\]",
    "content": "json",
    "transform": _call(),
    "repeats": True,
}

CHANNEL_CALL = {  # <|start|>assistant to=functions.name<|channel|>commentary json<|message|>{...}<|call|>
    "open_pattern": (
        r"(?:<\|start\|>assistant)?(?:\s*to=functions\.(?P<name>[\w.\-]+)\s*<\|channel\|>\s*(?:commentary|analysis)"
        r"|<\|channel\|>\s*(?:commentary|analysis)\s+to=functions\.(?P<name>[\w.\-]+))"
        r"[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
    ),
    "close": ["<|call|>", "<|end|>"],
    "content": "json",
    "transform": _call(),
    "repeats": True,
}

# JSON that is cut off cannot be read; in these syntaxes half a call looks like a call with fewer arguments.
CALL_MARKS = {
    TAGGED_FUNCTION["open_pattern"]: ("<tool_call>", "</tool_call>"),
    TAGGED_KEYS["open_pattern"]: ("<tool_call>", "</tool_call>"),
    PYTHONIC["open_pattern"]: ("<|tool_call_start|>", "<|tool_call_end|>"),
}

# Where a syntax has no closing mark of its own, a call ends with the turn.
TOOL_CALL_SYNTAXES: dict[str, dict[str, Any]] = {
    "tagged_json": _tagged_json("arguments"),
    "tagged_json_parameters": _tagged_json("parameters"),
    "tagged_function": TAGGED_FUNCTION,
    "tagged_keys": TAGGED_KEYS,
    "fenced_json": FENCED_JSON,
    "separated_json": SEPARATED_JSON,
    "braced": BRACED,
    "pythonic": PYTHONIC,
    "listed_json": LISTED_JSON,
    "named_json": NAMED_JSON,
    "channels": CHANNEL_CALL,
    "bare_json_parameters": _bare_json("parameters"),
    "bare_json": _bare_json("arguments"),
}


@dataclass(frozen=True)
class TurnFormat:
    """The text around what an assistant says in one turn."""

    start_anchors: tuple[str, ...]
    """The marks after which the assistant writes; the last one in a prompt starts its turn."""

    end: str = ""
    """The mark that ends a turn, or `""`."""

    reasoning_field: str | None = None
    """The message key that holds the reasoning, where the template writes any."""

    reasoning_open: str = "<think>"
    reasoning_close: str = "</think>"


def build_response_template(syntax: str, turn: TurnFormat) -> dict[str, Any]:
    """
    The `response_template` of a model that writes its calls in one syntax.

    Args:
        syntax: a key of `TOOL_CALL_SYNTAXES`.
        turn: the marks of the assistant's turn.
    """
    calls = deepcopy(TOOL_CALL_SYNTAXES[syntax])
    template = {"version": 1, "start_anchor": list(turn.start_anchors), "defaults": {"role": "assistant"}}
    if syntax == "channels":
        template["fields"] = {
            turn.reasoning_field or "thinking": _channel("analysis"),
            "content": _channel("final|commentary"),
            "tool_calls": calls,
        }
        return template
    # Whatever follows the end of the turn is no part of it.
    marks = [turn.end, "<|tool_response>"] if syntax == "braced" else [turn.end]
    ends = rf"\s*(?:{'|'.join(map(re.escape, marks))}).*" if turn.end else ""
    if "close_pattern" not in calls:
        next_call = r"(?=\s*\[TOOL_CALLS\])" if syntax == "named_json" else ""
        if closings := [closing for closing in (next_call, ends) if closing]:
            calls["close_pattern"] = "|".join(closings)
    # A message may be in pieces around its calls. Marks take the white space around them, so no piece is empty.
    content = {"content": "text", "repeats": True, "join": "\n"}
    if ends:
        content["close_pattern"] = ends
    fields = {"content": content, "tool_calls": calls}
    if turn.reasoning_field is not None:
        fields[turn.reasoning_field] = {
            "open_pattern": rf"\s*{re.escape(turn.reasoning_open)}\s*",
            "close_pattern": rf"\s*{re.escape(turn.reasoning_close)}\s*",
            "content": "text",
        }
    template["fields"] = fields
    return template


def _channel(names: str) -> dict[str, Any]:
    return {
        "open_pattern": rf"(?:<\|start\|>assistant)?<\|channel\|>(?:{names})<\|message\|>",
        "close": ["<|end|>", "<|return|>", "<|call|>"],
        "content": "text",
        "repeats": True,
        "join": "\n",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Probes
# ---------------------------------------------------------------------------------------------------------------------


def _renderer(processing_class: Any) -> TemplateRenderer:
    # Among several templates the one for tools; the tools themselves are not rendered, their schema would show the
    # probe's names in the prompt.
    return TemplateRenderer.of(processing_class, resolve_chat_template(processing_class, tools=[PROBE_TOOL]))


def _probe_call(arguments: dict[str, Any] | str, **fields: Any) -> dict[str, Any]:
    function = {"name": PROBE_NAME, "arguments": arguments}
    call = {"id": PROBE_CALL_ID, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call], **fields}


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


def parse_pythonic_calls(text: str) -> list[dict[str, Any]] | None:
    """
    The calls of `<|tool_call_start|>[name(key='text', key=1), ...]<|tool_call_end|>`, read as Python.

    Values may be Python literals or JSON (`true`, `null`). Nothing is evaluated but literals.

    Returns:
        The calls as messages hold them, or `None` where the text is not Python or an argument is not a literal.
    """
    calls = []
    for block in re.findall(r"<\|tool_call_start\|>(.*?)(?:<\|tool_call_end\|>|\Z)", text, re.DOTALL):
        try:
            tree = ast.parse(block.strip(), mode="eval").body
            for node in tree.elts if isinstance(tree, ast.List) else [tree]:
                if not isinstance(node, ast.Call) or node.args:
                    return None
                arguments = {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
                calls.append(_call(ast.unparse(node.func), arguments))
        except (SyntaxError, ValueError, RecursionError):
            return None
    return calls or None


class _JsonNames(ast.NodeTransformer):
    """JSON's names for Python's constants."""

    NAMES = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(self.NAMES[node.id]) if node.id in self.NAMES else node


def _literal(node: ast.AST) -> Any:
    return ast.literal_eval(_JsonNames().visit(node))
