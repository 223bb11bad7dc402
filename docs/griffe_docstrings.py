"""A Griffe extension: types in docstrings as plain text (`` (`int`, *optional*) `` reads `int` on the page)."""

from __future__ import annotations

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^(\s+\*{0,2}[\w, *]+) \(([^\n]*)\):[ \t]*$", re.MULTILINE)
REFERENCE = re.compile(r"\[`~?(?:[\w.]+\.)?(\w+)`\](?!\()")
LEADING_TYPE = re.compile(r"^(\s+)`([\w.\[\], |]+)`:(?=\s)", re.MULTILINE)


def _plain_type(match: re.Match) -> str:
    kind = re.sub(r",?\s*\*optional\*|,\s*defaults to .*$", "", match[2])
    return f"{match[1]} ({kind.replace('`', '').strip() or 'Any'}):"


def plain_types(text: str) -> str:
    """Strip Markdown from the types of `Args`, `Returns` and `Raises`, and the brackets from references."""
    text = REFERENCE.sub(r"`\1`", text)
    text = ARGUMENT.sub(_plain_type, text)
    return LEADING_TYPE.sub(r"\1\2:", text)


class PlainTypes(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain_types(obj.docstring.value)
