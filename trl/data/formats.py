"""
Which kind of example is this: the shapes a dataset may have, and what to say when it has none of those needed.

A dataset's shape is told by its column names (`prompt` and `completion`; `chosen` and `rejected`; ...). Each column
is *standard* (text) or *conversational* (a list of messages with `role` and `content`). Checks happen before any work
is done, and an error names what was found, what is needed and the nearest way from one to the other.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

DatasetType = TypeVar("DatasetType", Dataset, DatasetDict)
IterableDatasetType = TypeVar("IterableDatasetType", IterableDataset, IterableDatasetDict)


class DatasetFormatError(ValueError):
    """A dataset or an example does not have the form that was asked for; the message says how to mend it."""


class DatasetColumnError(DatasetFormatError, KeyError):
    """A [`DatasetFormatError`] that callers may also catch as `KeyError`: an example has not the keys it needs."""

    __str__ = ValueError.__str__  # KeyError would show the message quoted, on one line


@dataclass(frozen=True)
class Shape:
    """
    A kind of dataset, told by its columns.

    Args:
        name (`str`):
            What it is called, e.g. `"prompt-completion"`.
        columns (`tuple[str, ...]`):
            Columns that must be there.
        note (`str`, *optional*):
            What an error message adds after the columns.
        optional (`tuple[str, ...]`, *optional*):
            Columns that are used where they are there.
    """

    name: str
    columns: tuple[str, ...]
    note: str = ""
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        columns = _join([f"`{column}`" for column in self.columns], "and")
        plural = "s" if len(self.columns) > 1 else ""
        return f"a {self.name} dataset: column{plural} {columns}" + (f" ({self.note})" if self.note else "")


LANGUAGE_MODELING = Shape("language modeling", ("text",))
CONVERSATION = Shape("conversational language modeling", ("messages",))
SHAREGPT = Shape("ShareGPT", ("conversations",), "lists of `from` and `value`")
PROMPT_ONLY = Shape("prompt-only", ("prompt",))
PROMPT_COMPLETION = Shape("prompt-completion", ("prompt", "completion"))
PREFERENCE = Shape("preference", ("prompt", "chosen", "rejected"))
IMPLICIT_PREFERENCE = Shape("preference", ("chosen", "rejected"), "and `prompt`, or a common beginning", ("prompt",))
UNPAIRED_PREFERENCE = Shape("unpaired preference", ("prompt", "completion", "label"))
TRIPLE_PREFERENCE = Shape(
    "triple preference", ("chosen", "rejected", "reference"), "and `prompt`, optionally", ("prompt",)
)
STEPWISE = Shape("stepwise supervision", ("prompt", "completions", "labels"))
TOKENIZED = Shape("tokenized", ("input_ids",))
TOKENIZED_PREFERENCE = Shape("tokenized preference", ("chosen_ids", "rejected_ids"))

# Most telling first: a shape is recognised before any other whose columns are among its own.
SHAPES: tuple[Shape, ...] = (
    TOKENIZED_PREFERENCE,
    TOKENIZED,
    TRIPLE_PREFERENCE,
    PREFERENCE,
    IMPLICIT_PREFERENCE,
    STEPWISE,
    UNPAIRED_PREFERENCE,
    PROMPT_COMPLETION,
    CONVERSATION,
    SHAREGPT,
    PROMPT_ONLY,
    LANGUAGE_MODELING,
)

# Names under which people keep what we call otherwise, likeliest first. Compared without case, spaces and underscores.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "query", "problem", "input", "user", "prompts", "request", "source", "context"),
    "completion": (
        "answer", "response", "output", "solution", "target", "reply", "assistant", "completions", "generation",
    ),
    "messages": ("conversation", "conversations", "dialogue", "dialog", "chat", "turns", "message", "history"),
    "conversations": ("conversation", "messages", "dialogue", "dialog", "chat", "turns"),
    "text": ("content", "document", "texts", "body", "passage", "sentence", "article", "raw_text", "raw_content"),
    "chosen": (
        "preferred", "accepted", "winner", "better", "positive", "good", "chosen_response", "answer_a", "response_a",
        "output_a", "response_1", "answer_1", "output_1", "response_0", "answer_0", "completion_a", "completion_1",
    ),
    "rejected": (
        "dispreferred", "declined", "loser", "worse", "negative", "bad", "rejected_response", "answer_b", "response_b",
        "output_b", "response_2", "answer_2", "output_2", "response_1", "answer_1", "completion_b", "completion_2",
    ),
    "label": ("labels", "preference", "is_good", "thumbs_up", "desirable", "rating", "score", "correct"),
    "labels": ("step_labels", "label", "ratings"),
    "completions": ("steps", "completion", "solution_steps"),
    "input_ids": ("tokens", "token_ids", "ids"),
    "reference": ("gold", "reference_answer", "ground_truth"),
}  # fmt: skip

CONVERSATIONAL_COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages")


def is_conversational(example: Mapping[str, Any]) -> bool:
    """
    Whether an example is made of messages rather than text.

    Args:
        example (`dict[str, Any]`):
            One example. The first present of `prompt`, `chosen`, `rejected`, `completion` and `messages` decides, by
            its first element.

    Returns:
        `bool`: whether it is a list of messages with a `role`.

    Example:

    ```python
    >>> is_conversational({"prompt": [{"role": "user", "content": "What color is the sky?"}]})
    True
    >>> is_conversational({"prompt": "The sky is"})
    False
    ```
    """
    for column in CONVERSATIONAL_COLUMNS:
        if column in example:
            return _first_message_has(example[column], "role")
    return False


def is_conversational_from_value(example: Mapping[str, Any]) -> bool:
    """
    Whether an example is a conversation in ShareGPT's form, with `from` and `value` in place of `role` and `content`.

    Args:
        example (`dict[str, Any]`):
            One example, with its conversation under `conversations` or `messages`.

    Returns:
        `bool`: whether [`maybe_convert_to_chatml`] would have something to convert.

    Example:

    ```python
    >>> is_conversational_from_value({"conversations": [{"from": "human", "value": "What color is the sky?"}]})
    True
    ```
    """
    return any(
        _first_message_has(example.get(column), "from") and _first_message_has(example.get(column), "value")
        for column in ("conversations", "messages")
    )


def _first_message_has(value: Any, key: str) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and key in value[0]


def recognize_shape(columns: Iterable[str], text_field: str = "text") -> Shape | None:
    """
    The kind of dataset that has these columns.

    Args:
        columns (`Iterable[str]`):
            Column names; further ones do not matter.
        text_field (`str`, *optional*, defaults to `"text"`):
            Column that holds plain text.

    Returns:
        `Shape` or `None`: the most specific shape whose columns are all there.
    """
    present = set(columns)
    shapes = (language_modeling(text_field) if shape is LANGUAGE_MODELING else shape for shape in SHAPES)
    return next((shape for shape in shapes if present.issuperset(shape.columns)), None)


def language_modeling(text_field: str) -> Shape:
    """Plain text in a column of the user's choice."""
    return LANGUAGE_MODELING if text_field == "text" else Shape(LANGUAGE_MODELING.name, (text_field,))


def get_dataset_column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """
    Column names of a dataset, read from its first row where a stream does not know them.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Any dataset.

    Returns:
        `list[str]`: the names; empty for an empty stream of unknown features.
    """
    if dataset.column_names is not None:
        return list(dataset.column_names)
    return list(next(iter(dataset), {}))


# ---------------------------------------------------------------------------------------------------------------------
# What a trainer needs and what it was given


def check_columns(
    dataset_columns: Iterable[str],
    accepted: Sequence[Shape],
    trainer_name: str,
    dataset_name: str = "train_dataset",
    num_rows: int | None = None,
    hint: str = "",
) -> Shape:
    """
    Find the accepted shape that a dataset has, or say what is missing.

    Args:
        dataset_columns (`Iterable[str]`):
            The dataset's column names.
        accepted (`Sequence[Shape]`):
            Shapes that the trainer can use, best first.
        trainer_name (`str`):
            Who needs the data, for the message.
        dataset_name (`str`, *optional*, defaults to `"train_dataset"`):
            Which dataset is looked at, for the message.
        num_rows (`int`, *optional*):
            Its number of rows, for the message.
        hint (`str`, *optional*):
            Another way out, told where no renaming fits.

    Returns:
        `Shape`: the first accepted shape whose columns are all there.

    Raises:
        `DatasetFormatError`: no accepted shape fits.
    """
    found = list(dataset_columns)
    for shape in accepted:
        if set(shape.columns) <= set(found):
            return shape

    if len(accepted) == 1:
        needed = f"{trainer_name} needs {accepted[0]}."
    else:
        needed = f"{trainer_name} needs one of:\n" + "\n".join(f"- {shape}" for shape in accepted)
    rows = f", {num_rows:,} row{'s' if num_rows != 1 else ''}" if num_rows is not None else ""
    listed = ", ".join(f"`{column}`" for column in found) or "no column"
    message = f"{needed}\nFound: {listed} ({dataset_name}{rows})."
    renaming = suggest_renaming(found, accepted)
    if renaming:
        pairs = ", ".join(f'"{old}": "{new}"' for old, new in renaming.items())
        message += f"\nRename them, e.g. dataset.rename_columns({{{pairs}}})."
    else:
        missing = _join([f"`{column}`" for column in accepted[0].columns if column not in found], "and")
        message += (
            f"\nNo column resembles {missing}: make {'it' if missing.count('`') == 2 else 'them'} with dataset.map"
        )
        message += f", or {hint}." if hint else "."
    raise DatasetFormatError(message)


def suggest_renaming(found: Sequence[str], accepted: Sequence[Shape]) -> dict[str, str]:
    """
    Guess which columns hold what a shape needs, by usual other names and by spelling.

    Args:
        found (`Sequence[str]`):
            Columns that there are.
        accepted (`Sequence[Shape]`):
            Shapes to reach; the one with the best guess for every missing column wins, then the earlier.

    Returns:
        `dict[str, str]`: old name -> new name; empty when no shape can be reached by renaming.
    """
    best: dict[str, str] = {}
    best_score = 0.0
    for shape in accepted:
        missing = [column for column in shape.columns if column not in found]
        free = [column for column in found if column not in shape.columns]
        options = [[(_likeness(name, column), name) for name in free] for column in missing]
        options = [sorted((pair for pair in row if pair[0] > 0), reverse=True)[:4] for row in options]
        for choice in itertools.product(*options):
            names = [name for _, name in choice]
            # The more columns of a shape are told by name, the likelier it is the one that was meant.
            score = sum(likeness for likeness, _ in choice) / len(missing) + 0.1 * len(shape.columns)
            if len(set(names)) == len(names) and score > best_score:
                best, best_score = dict(zip(names, missing, strict=True)), score
                for column in shape.optional:
                    likeness, name = max(
                        [(_likeness(name, column), name) for name in free if name not in names] + [(0, "")]
                    )
                    if column not in found and likeness > 0.85:
                        best[name] = column
    return dict(sorted(best.items(), key=lambda pair: found.index(pair[0])))


def _likeness(name: str, wanted: str) -> float:
    """How likely a column called `name` holds what we call `wanted`: 0 (no reason to think so) to 1."""
    plain, target = _plain(name), _plain(wanted)
    if plain == target:
        return 1.0
    synonyms = [_plain(synonym) for synonym in SYNONYMS.get(wanted, ())]
    if plain in synonyms:
        return 0.95 - 0.01 * synonyms.index(plain)
    spelling = difflib.SequenceMatcher(None, plain, target).ratio()
    return 0.7 * spelling if spelling >= 0.8 else 0.0


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


# ---------------------------------------------------------------------------------------------------------------------
# Rows that differ from the others


def check_rows(
    dataset: Dataset | pa.Table,
    shape: Shape,
    trainer_name: str,
    dataset_name: str = "train_dataset",
    first_row: int = 0,
) -> None:
    """
    Refuse a dataset in which some rows lack what the others have, or mix text with conversations.

    Args:
        dataset ([`~datasets.Dataset`] or `pa.Table`):
            The rows; a stream is checked batch by batch.
        shape (`Shape`):
            The shape that its columns have.
        trainer_name (`str`):
            Who needs the data, for the message.
        dataset_name (`str`, *optional*, defaults to `"train_dataset"`):
            Which dataset is looked at, for the message.
        first_row (`int`, *optional*, defaults to `0`):
            Index of the first of these rows in the whole, for the message.

    Raises:
        `DatasetFormatError`: names the rows.
    """
    kind_of_column = {}
    for column in shape.columns:
        kinds = _kinds_of_rows(dataset, column)
        if len(kinds) == 0:
            continue
        kind_of_column[column] = kinds[0]
        names, counts = np.unique(kinds, return_counts=True)
        if list(names) == [MISSING]:
            raise DatasetFormatError(f"{trainer_name}: column `{column}` of {dataset_name} holds no value in any row.")
        if len(names) == 1:
            continue
        common = max((int(count), name) for name, count in zip(names, counts, strict=True) if name != MISSING)[1]
        odd = np.flatnonzero(kinds != common)
        odd_kinds = _join(sorted({_PHRASES[kind] for kind in kinds[odd]}), "or")
        raise DatasetFormatError(
            f"{trainer_name} needs every row of {dataset_name} in one format, but in column `{column}` "
            f"{len(kinds) - len(odd):,} rows hold {_PHRASES[common]} and {len(odd):,} hold {odd_kinds}: "
            f"{describe_rows(odd + first_row)}.\nConvert those rows to the format of the others, or drop them, e.g. "
            f"dataset.filter(lambda row: {_KEEP[common].format(column=column)})."
        )
    for column, other in (("prompt", "completion"), ("chosen", "rejected")):
        kinds = {kind_of_column.get(column), kind_of_column.get(other)}
        if len(kinds) == 2 and None not in kinds:
            raise DatasetFormatError(
                f"{trainer_name} needs `{column}` and `{other}` of {dataset_name} in one format, but `{column}` holds "
                f"{_PHRASES[kind_of_column[column]]} and `{other}` holds {_PHRASES[kind_of_column[other]]}. Make both "
                f'text, or both lists of messages, e.g. [{{"role": "assistant", "content": row["{other}"]}}].'
            )


MISSING, TEXT, MESSAGES, MESSAGES_FROM_VALUE, OTHER = "missing", "text", "messages", "from_value", "other"
_PHRASES = {
    MISSING: "nothing",
    TEXT: "text",
    MESSAGES: "messages with `role` and `content`",
    MESSAGES_FROM_VALUE: "messages with `from` and `value`",
    OTHER: "something else",
}
_KEEP = {
    TEXT: 'isinstance(row["{column}"], str)',
    MESSAGES: 'isinstance(row["{column}"], list)',
    MESSAGES_FROM_VALUE: 'isinstance(row["{column}"], list)',
    OTHER: 'row["{column}"] is not None',
}


def describe_rows(rows: Sequence[int] | np.ndarray, show: int = 5) -> str:
    """
    Name rows in a message.

    Args:
        rows (`Sequence[int]`):
            Row indices.
        show (`int`, *optional*, defaults to `5`):
            How many of them to write out.

    Returns:
        `str`: e.g. `"row 7"` or `"rows 1, 4, 9, 12, 30 and 88 more"`.
    """
    shown = [str(int(row)) for row in rows[:show]]
    more = f" and {len(rows) - len(shown):,} more" if len(rows) > len(shown) else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(shown)}{more}"


def _kinds_of_rows(dataset: Dataset | pa.Table, column: str) -> np.ndarray:
    """What each row holds in a column; one entry where all are alike by type."""
    if isinstance(dataset, Dataset):
        dataset = dataset.select_columns(column).with_format("arrow")[:]
    values = dataset[column]
    kind = _kind_of_type(values.type)
    if kind is None:  # messages of several forms in one struct, or JSON: only the values tell
        return np.array([kind_of_value(_decode_json(value, values.type)) for value in values.to_pylist()])
    if values.null_count == 0:
        return np.full(min(len(values), 1), kind)  # one row speaks for all
    return np.where(np.asarray(pc.is_null(values)), MISSING, kind)


def _kind_of_type(arrow_type: pa.DataType) -> str | None:
    """The one kind that all values of a type are, or `None` where the values must be looked at."""
    if pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type):
        return TEXT
    if isinstance(arrow_type, pa.BaseExtensionType):
        return None
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type):
        item = arrow_type.value_type
        if isinstance(item, pa.BaseExtensionType):
            return None
        if pa.types.is_struct(item):
            names = {item.field(index).name for index in range(item.num_fields)}
            if "role" in names:
                return None if "from" in names else MESSAGES
            return MESSAGES_FROM_VALUE if {"from", "value"} <= names else OTHER
    return OTHER


def _decode_json(value: Any, arrow_type: pa.DataType) -> Any:
    """A value of a JSON column, which Arrow keeps as text; of a list of JSON, the first item."""
    if value is None or pa.types.is_struct(arrow_type):
        return value
    if isinstance(arrow_type, pa.BaseExtensionType):
        return json.loads(value)
    return [_decode_json(item, arrow_type.value_type) for item in value[:1]]


def kind_of_value(value: Any) -> str:
    """What one value of a column is: `"missing"`, `"text"`, `"messages"`, `"from_value"` or `"other"`."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return TEXT
    if isinstance(value, list) and value and isinstance(value[0], dict):
        if value[0].get("role") is not None:
            return MESSAGES
        if value[0].get("from") is not None:
            return MESSAGES_FROM_VALUE
    return OTHER


def _join(items: Sequence[str], word: str) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"
