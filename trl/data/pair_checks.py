"""
Rows of preference data, looked at one by one before they are tokenized: what is wrong is named by row and column.

A value is either as it must be, or a `DatasetFormatError` says what it is and how to mend it. Only an empty answer is
no error: such rows are dropped and counted, since real data holds a few of them.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .formats import MESSAGES, TEXT, DatasetFormatError, describe_rows, kind_of_value

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_NO_ANSWER_ROLES = frozenset(ROLES) - {"assistant"}
# What other formats call the roles; templates that do know such a name are left alone.
_ROLE_ALIASES = {
    "human": "user", "prompter": "user", "question": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "ai": "assistant", "chosen": "assistant", "rejected": "assistant", "answer": "assistant",
    "model": "assistant", "instruction": "system",
}  # fmt: skip


class PairChecker:
    """
    Checks rows of prompts and answers.

    Args:
        name (`str`):
            Name of the dataset, for messages.
        columns (`Sequence[str]`):
            The columns to check, e.g. `("prompt", "chosen", "rejected")`.
        conversational (`bool`):
            Whether they must hold messages, or text.
        chat_template (`str`):
            The template's text; a role that is quoted in it is one it knows.
    """

    def __init__(self, name: str, columns: Sequence[str], conversational: bool, chat_template: str = ""):
        self.name, self.columns, self.conversational = name, tuple(columns), conversational
        self.chat_template = chat_template

    def check(self, rows: Mapping[str, list], indices: Sequence[int]) -> None:
        """
        Raises:
            `DatasetFormatError`: a value is missing, of another kind than it must be, or no proper conversation.
        """
        find_problem = self._problem_of_messages if self.conversational else self._problem_of_text
        for column in self.columns:
            for index, value in zip(indices, rows.get(column) or [None] * len(indices), strict=True):
                problem = find_problem(value, column)
                if problem:
                    self.fail(index, column, problem)

    def fail(self, index: int, column: str, problem: str) -> None:
        """Raise the error of one row."""
        raise DatasetFormatError(f"Row {index} of the {self.name} dataset: `{column}` {problem}")

    def check_answers(self, index: int, prompt: Sequence | None, answers: Mapping[str, Sequence]) -> None:
        """
        Check one conversation that has answers.

        Args:
            index (`int`):
                Number of the row.
            prompt (`list[dict]` or `None`):
                What the answers follow; `None` where they are whole conversations.
            answers (`Mapping[str, list[dict]]`):
                By column.

        Raises:
            `DatasetFormatError`: there is no prompt, or an answer that the assistant has no part in.
        """
        if not self.conversational:
            return
        if prompt is not None and not prompt:
            if "prompt" in self.columns:
                self.fail(
                    index,
                    "prompt",
                    "is an empty list. Give it at least one message; where the answers are whole conversations, drop "
                    'the column, dataset.remove_columns("prompt"), and their common beginning becomes the prompt.',
                )
            self.fail(
                index,
                "chosen",
                "and `rejected` have no message in common at their beginning, so there is no prompt that both answer. "
                "Begin both with the same messages, or give them in a column `prompt`.",
            )
        for column, answer in answers.items():
            roles = [message["role"] for message in answer]
            if _NO_ANSWER_ROLES.issuperset(roles) or not any(map(self._may_answer, roles)):
                self.fail(
                    index,
                    column,
                    f"has no message of the assistant (roles: {', '.join(dict.fromkeys(roles))}), so it answers "
                    "nothing. Give the answer the role 'assistant', and check that prompt and answer are not swapped.",
                )

    def _may_answer(self, role: str) -> bool:
        return role == "assistant" or (role not in _NO_ANSWER_ROLES and self._is_in_template(role))

    def _is_in_template(self, role: str) -> bool:
        return f"'{role}'" in self.chat_template or f'"{role}"' in self.chat_template

    def _problem_of_text(self, value: Any, column: str) -> str | None:
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                return f"holds text that is not valid Unicode ({error.reason} at character {error.start})."
            return None
        if value is None:
            return _missing(column)
        if kind_of_value(value) == MESSAGES:
            return f"holds messages, but {self._others(column)} text. {_ONE_FORM}"
        return f"is {_describe(value)}, and must be a text (or, in all rows, a list of messages)."

    def _problem_of_messages(self, value: Any, column: str) -> str | None:
        if value is None:
            return _missing(column)
        if kind_of_value(value) == TEXT:
            if column == "prompt":
                return (
                    "is text, but the answers are messages. Where the answers are whole conversations that begin with "
                    'the prompt, drop it: dataset.remove_columns("prompt"). Otherwise make it a message: '
                    '[{"role": "user", "content": row["prompt"]}].'
                )
            return f"is text, but {self._others(column)} messages. {_ONE_FORM}"
        if isinstance(value, Mapping):
            return "is a single message or dictionary, not a list of messages. Put it into a list: [message]."
        if not isinstance(value, (list, tuple)):
            return f"is {_describe(value)}, and must be a list of messages with `role` and `content`."
        for number, message in enumerate(value):
            problem = self._problem_of_message(message)
            if problem:
                return f"has a message (number {number}) that {problem}"
        return None

    def _problem_of_message(self, message: Any) -> str | None:
        if not isinstance(message, Mapping):
            return f"is {_describe(message)}, and must be a dictionary with `role` and `content`."
        role = message.get("role")
        if role is None and message.get("from") is not None:
            return (
                "has `from` and `value` instead of `role` and `content`. Convert the dataset: "
                "dataset.map(trl.maybe_convert_to_chatml)."
            )
        if role is None:
            return f"has no `role`. Each needs one of {', '.join(map(repr, ROLES[:5]))}."
        if not isinstance(role, str) or not role.strip():
            return f"has the role {role!r}, which is no name. Use one of {', '.join(map(repr, ROLES[:5]))}."
        meant = self._meant_role(role)
        if meant:
            return f"has the role {role!r}, which the chat template does not know. Did you mean {meant!r}?"
        return _problem_of_content(message)

    def _meant_role(self, role: str) -> str | None:
        """The usual role that an unusual one stands for; `None` where it may be right."""
        if role in ROLES or self._is_in_template(role):
            return None
        plain = role.strip().lower()
        near = difflib.get_close_matches(plain, ROLES, n=1, cutoff=0.8)
        return _ROLE_ALIASES.get(plain) or (near[0] if near else None)

    def count_unknown_roles(self, table: pa.Table) -> Counter[str]:
        """How many messages of an Arrow table have a role that is neither usual nor quoted in the chat template."""
        counts: Counter[str] = Counter()
        for column in table.columns if self.conversational else ():
            messages = pc.list_flatten(column.combine_chunks()) if pa.types.is_list(column.type) else None
            if messages is None or not pa.types.is_struct(messages.type):
                continue
            place = messages.type.get_field_index("role")
            if place < 0 or not pa.types.is_string(messages.type.field(place).type):
                continue  # the rows themselves will be refused
            for item in pc.value_counts(pc.struct_field(messages, [place])).to_pylist():
                role = item["values"]
                if role is not None and role not in ROLES and not self._is_in_template(role):
                    counts[role] += item["counts"]
        return counts

    def _others(self, column: str) -> str:
        return "the answers hold" if column == "prompt" else "the first row holds"


_ONE_FORM = (
    'Bring all rows to one form; a text becomes a conversation as [{"role": "user", "content": text}], or with '
    '"assistant" where it is an answer.'
)


def _missing(column: str) -> str:
    return (
        f"is missing (None). Each row needs one; drop such rows, e.g. "
        f'dataset.filter(lambda row: row["{column}"] is not None).'
    )


def _problem_of_content(message: Mapping[str, Any]) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        try:
            content.encode()
        except UnicodeEncodeError as error:
            return f"holds text that is not valid Unicode ({error.reason} at character {error.start})."
        return None
    if content is None:
        # A message may hold tool calls or thoughts and nothing else.
        return None if _has_payload(message) else "has no `content` (None). Give it a text."
    if not isinstance(content, (list, tuple)):
        return f"has a `content` {_describe(content)}, and it must be a text (or a list of content blocks)."
    for block in content:
        if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
            return f"has a content block that is {_describe(block)}, and must be a dictionary with a `type`."
        if block["type"] == "text" and not isinstance(block.get("text"), str):
            return f"has a text block whose `text` is {_describe(block.get('text'))}."
    return None


def _has_payload(message: Mapping[str, Any]) -> bool:
    return any(value for key, value in message.items() if key not in ("role", "content", "name"))


def is_empty_answer(answer: str | Sequence[Mapping[str, Any]]) -> bool:
    """Whether an answer says nothing: white space only, no message, or messages without content."""
    if isinstance(answer, str):
        return not answer.strip()
    return all(_is_blank(message.get("content")) and not _has_payload(message) for message in answer)


def _is_blank(content: Any) -> bool:
    if isinstance(content, (list, tuple)):
        return all(block["type"] == "text" and not block["text"].strip() for block in content)
    return content is None or not content.strip()


def _describe(value: Any) -> str:
    if value is None:
        return "None"
    return f"of type {type(value).__name__} ({reprlib.repr(value)})"


# ---------------------------------------------------------------------------------------------------------------------
# Columns of numbers
# ---------------------------------------------------------------------------------------------------------------------


def check_labels(values: Sequence[Any], indices: Sequence[int], name: str) -> list[bool]:
    """
    Labels of unpaired preference data as booleans.

    Args:
        values (`Sequence`):
            `True` or 1 for an answer to prefer, `False` or 0 for one to avoid.
        indices (`Sequence[int]`):
            Numbers of the rows, for errors.
        name (`str`):
            Name of the dataset, for errors.

    Raises:
        `DatasetFormatError`: a value is something else.
    """
    for index, value in zip(indices, values, strict=True):
        if isinstance(value, (bool, np.bool_)) or (isinstance(value, (int, np.integer)) and value in (0, 1)):
            continue
        raise DatasetFormatError(
            f"Row {index} of the {name} dataset: `label` is {_describe(value)}, and must be True (an answer to prefer) "
            "or False (one to avoid); 1 and 0 will do. Map it, e.g. "
            'dataset.map(lambda row: {"label": row["label"] > 0}).'
        )
    return [bool(value) for value in values]


def check_margins(values: Sequence[Any], indices: Sequence[int], name: str) -> None:
    """
    Raises:
        `DatasetFormatError`: a margin is not a finite number.
    """
    for index, value in zip(indices, values, strict=True):
        is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise DatasetFormatError(
                f"Row {index} of the {name} dataset: `margin` is {_describe(value)}, and must be a finite number: by "
                "how much the chosen answer is better. Where it is not known, use 0.0, or drop the column."
            )


def check_token_lists(
    values: Sequence[Sequence[int]] | pa.ChunkedArray | None, column: str, indices: Sequence[int], name: str
) -> pa.Array:
    """
    A column of token ids as an Arrow list of integers.

    Args:
        values (`Sequence[list[int]]` or `pa.ChunkedArray`):
            One list of ids per row.
        column (`str`):
            Name of the column, for errors.
        indices (`Sequence[int]`):
            Numbers of the rows, for errors.
        name (`str`):
            Name of the dataset, for errors.

    Raises:
        `DatasetFormatError`: a row has no list, or a value in it is not a whole number from 0 on.
    """
    needed = "must be a list of token ids, whole numbers from 0 on"
    values = [None] * len(indices) if values is None else values
    try:
        array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
        raise DatasetFormatError(
            f"The {name} dataset: `{column}` {needed}, but some of {describe_rows(indices)} are something else ({error})."
        ) from error
    if pa.types.is_null(array.type):
        array = array.cast(pa.list_(pa.int32()))
    if array.null_count:
        missing = np.asarray(indices)[np.flatnonzero(array.is_null())]
        raise DatasetFormatError(
            f"There is no `{column}` (None) in {describe_rows(missing)} of the {name} dataset. Drop such rows, e.g. "
            f'dataset.filter(lambda row: row["{column}"] is not None).'
        )
    is_list = isinstance(array.type, (pa.ListType, pa.LargeListType, pa.FixedSizeListType))
    if not is_list or not (pa.types.is_integer(array.type.value_type) or pa.types.is_null(array.type.value_type)):
        raise DatasetFormatError(f"The {name} dataset: `{column}` {needed}, but it holds {array.type}.")
    array = array.cast(pa.list_(array.type.value_type)).cast(pa.list_(pa.int64()))
    flat = pc.list_flatten(array)
    wrong = pc.or_kleene(pc.is_null(flat), pc.less(flat, 0)).fill_null(True)
    if pc.any(wrong).as_py():
        row = pc.list_parent_indices(array)[int(np.flatnonzero(wrong)[0])].as_py()
        raise DatasetFormatError(f"Row {indices[row]} of the {name} dataset: `{column}` {needed}, but not all are.")
    return array
