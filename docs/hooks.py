"""A MkDocs hook: `::fields package.Config` becomes a table of the config's fields, from their own help texts."""

from __future__ import annotations

import dataclasses
import importlib
import re
from typing import Any

FIELDS = re.compile(r"^::fields (?P<path>[\w.]+)$", re.MULTILINE)
CODE = re.compile(r"(`[^`]*`)")


def _own_fields(config_class: type) -> list[dataclasses.Field]:
    """Fields that this package declares; those of `transformers.TrainingArguments` are documented there."""
    declared = {
        name
        for base in config_class.__mro__
        if base.__module__.split(".")[0] == "trl"
        for name in vars(base).get("__annotations__", {})
    }
    return [field for field in dataclasses.fields(config_class) if field.name in declared and field.init]


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"


def _escape(cell: str) -> str:
    """Bars outside code would end the cell; angle brackets would be tags."""
    parts = CODE.split(cell)
    parts[::2] = [part.replace("|", "\\|").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def field_table(path: str) -> str:
    """A Markdown table of a dataclass's fields: name, type, default, what it is for."""
    module, _, name = path.rpartition(".")
    config_class: Any = getattr(importlib.import_module(module), name)
    lines = ["| Field | Type | Default | |", "|---|---|---|---|"]
    for field in _own_fields(config_class):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        text = " ".join(str(field.metadata.get("help", "")).split())
        cells = [f"`{field.name}`", f"`{kind}`", f"`{_default(field)}`", text]
        lines.append("| " + " | ".join(map(_escape, cells)) + " |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    return FIELDS.sub(lambda match: field_table(match["path"]), markdown)
