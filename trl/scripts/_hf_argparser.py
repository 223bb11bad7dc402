"""
Flags from dataclass fields: `transformers.HfArgumentParser`, and what the command line of this package wants besides.

Added here: `none` for optional values, every union that contains `str`, optional lists, tuples of one type (given as
lists), a bare flag for optional booleans, and JSON fields that are checked when they are read, so that a typo is found before a model is loaded.
"""

from __future__ import annotations

import copy
import json
import types
from argparse import Action, ArgumentParser, ArgumentTypeError
from argparse import _StoreAction as StoreAction
from collections.abc import Callable
from dataclasses import MISSING, Field
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from transformers import HfArgumentParser as _HfArgumentParser
from transformers.hf_argparser import DataClass, DataClassType, HfArg, make_choice_type_function, string_to_bool

__all__ = [
    "DataClass",
    "DataClassType",
    "HfArg",
    "HfArgumentParser",
    "make_choice_type_function",
    "string_to_bool",
]

# Their text may also be the path of a JSON file, which TrainingArguments reads.
PATH_OR_JSON_FIELDS = {"accelerator_config", "deepspeed", "fsdp_config"}


class HfArgumentParser(_HfArgumentParser):
    """
    Argument parser whose flags come from dataclasses.

    Args:
        dataclass_types: a dataclass, or several; their fields become `--field_name` and `--field-name`.
        **kwargs: as for `argparse.ArgumentParser`.

    Raises:
        ValueError: a field is a union without `str`, other than `X | None`.
        RuntimeError: the annotations of a dataclass cannot be resolved.
    """

    @staticmethod
    def _parse_dataclass_field(parser: ArgumentParser, field: Field) -> None:
        annotation = field.type
        field = copy.copy(field)  # the dataclass keeps its own
        field.type = _plain_elements(_one_type(annotation))
        known = len(parser._actions)
        _HfArgumentParser._parse_dataclass_field(parser, field)
        action = parser._actions[known]
        action.annotation = annotation
        _adapt_action(action, field, annotation)


def split_optional(annotation: Any) -> tuple[tuple[Any, ...], bool]:
    """The members of a union other than None (a plain type is its own only member), and whether None is one."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,), False
    members = get_args(annotation)
    return tuple(m for m in members if m is not type(None)), type(None) in members


def is_list(annotation: Any) -> bool:
    """Whether the field takes several values."""
    return any((get_origin(member) or member) in (list, tuple) for member in split_optional(annotation)[0])


def _one_type(annotation: Any) -> Any:
    """Reduce a union that contains text to the one type a flag is read as; other annotations stay."""
    members, optional = split_optional(annotation)
    if len(members) == 1:
        return annotation
    if str not in members:
        return annotation  # refused by the parent, which names the field
    for member in members:
        if get_origin(member) is Literal and set(get_args(member)) <= {False, True, None}:
            continue
        if get_origin(member) is Literal or (isinstance(member, type) and issubclass(member, Enum)):
            return member | None if optional else member
    if not optional and any(get_origin(member) is list for member in members):
        return next(member for member in members if get_origin(member) is list)
    return str | None if optional else str


def _plain_elements(annotation: Any) -> Any:
    """`list[X | None]` and `tuple[X, X]` read as `list[X]`: argparse wants one type; `_adapt_action` lets None in again."""
    members, optional = split_optional(annotation)
    (main,) = members if len(members) == 1 else (None,)
    if get_origin(main) not in (list, tuple):
        return annotation
    element_members, _ = split_optional(get_args(main)[0])
    plain = list[str if str in element_members else element_members[0]]
    return plain | None if optional else plain


def _adapt_action(action: Action, field: Field, annotation: Any) -> None:
    """Set how the flag's text becomes a value."""
    members, optional = split_optional(annotation)
    (main,), _ = split_optional(field.type)
    if (get_origin(main) or main) is list:
        (convert,) = get_args(main) or (str,)
        element_optional = _has_optional_elements(annotation)
        if not (isinstance(convert, type) and issubclass(convert, Enum)) and get_origin(convert) is not Literal:
            action.type = _Text(bool_text if convert is bool else convert, none=element_optional or optional)
        if optional and not element_optional:
            action.__class__ = _StoreListOrNone
    elif _is_dict(main):
        action.type = _Text(lambda text: json.loads(json_object(text)), none=optional, name=f"{main}")
    elif any(_is_dict(member) for member in members):  # stays text: TrainingArguments decodes it
        paths = field.name in PATH_OR_JSON_FIELDS
        action.type = _Text(json_object_or_path if paths else json_object, none=optional)
    elif main is bool:
        action.type = _Text(bool_text, none=optional, name="bool")
        if field.default is None or field.default is MISSING:
            action.nargs, action.const = "?", True
    elif optional and main is not str:
        action.type = _Text(action.type, none=True)
    elif main is str and any(m is bool or get_origin(m) is Literal for m in members):
        action.type = _text_or_bool
        if bool in members:
            action.nargs, action.const = "?", True


def _has_optional_elements(annotation: Any) -> bool:
    lists = [member for member in split_optional(annotation)[0] if get_origin(member) is list]
    return any(split_optional(element)[1] for member in lists for element in get_args(member))


def _is_dict(annotation: Any) -> bool:
    return (get_origin(annotation) or annotation) is dict


class _StoreListOrNone(StoreAction):
    """`--field none` stores None, not a list that holds it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, None if values == [None] else values, option_string)


class _Text:
    """Reads a flag's text; where None is allowed, `none` and `null` mean it."""

    def __init__(self, convert: Callable[[str], Any], none: bool, name: str | None = None):
        self.convert, self.none = convert, none
        self.__name__ = name or getattr(convert, "__name__", str(convert))  # argparse puts it in its messages

    def __call__(self, text: str) -> Any:
        if self.none and text.lower() in ("none", "null"):
            return None
        return self.convert(text)


def _text_or_bool(text: str) -> str | bool:
    return {"true": True, "false": False}.get(text.lower(), text)


def bool_text(text: str) -> bool:
    """Yes or no, in any of the usual spellings."""
    return string_to_bool(text)


def json_object(text: str) -> str:
    """Check that a text is a JSON object, and return it."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentTypeError(
            f"""takes a JSON object, e.g. '{{"key": 1}}'; found {text!r}, which is not JSON ({error})"""
        ) from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"""takes a JSON object, e.g. '{{"key": 1}}'; found {text!r}""")
    return text


def json_object_or_path(text: str) -> str:
    """Check that a text which begins like a JSON object is one; another is a path, and returned as it is."""
    return json_object(text) if text.lstrip().startswith("{") else text
