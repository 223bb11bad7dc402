"""The ways in which models write tool calls and reasoning, each as fields of a `response_template` of Transformers.

Nothing here knows a model: which of the syntaxes a tokenizer's template uses is found out in `tool_formats`.
"""

from __future__ import annotations

import ast
import re
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

# Arguments written without quotes: JSON where the text is JSON, else the text itself.
JSON_OR_TEXT = {"name": "json", "args": {"allow_non_json": True}}


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
