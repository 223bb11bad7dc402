"""
Token columns as Arrow lists: labels, the cut at `max_length`, and counts, thousands of rows at a time and without a
Python object per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .formats import describe_rows

IGNORE_INDEX = -100
"""Label of a token that is not trained."""

TRUNCATION_MODES = ("keep_start", "keep_end")
TOKEN_COLUMNS = ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask", "token_type_ids")
"""Columns with one entry per token: they are cut together."""


@dataclass(frozen=True)
class TokenLists:
    """One column of lists: all values in one array, and the length of each row."""

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def from_arrow(cls, column: pa.Array | pa.ChunkedArray) -> TokenLists:
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(pc.list_flatten(column).to_numpy(zero_copy_only=False), lengths)

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], dtype: type = np.int32) -> TokenLists:
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return cls(np.fromiter(chain.from_iterable(rows), dtype, lengths.sum()), lengths)

    @property
    def offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def to_arrow(self) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), pa.array(self.values))

    def to_arrays(self) -> list[np.ndarray]:
        return np.split(self.values, self.offsets[1:-1]) if len(self.lengths) else []

    def truncate(self, max_length: int, mode: str) -> TokenLists:
        """At most `max_length` values per row, of the start or of the end."""
        lengths = np.minimum(self.lengths, max_length)
        first = self.offsets[:-1] + (self.lengths - lengths if mode == "keep_end" else 0)
        new_starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
        index = np.arange(lengths.sum()) + np.repeat(first - new_starts, lengths)
        return TokenLists(self.values[index], lengths)

    def count(self, hits: np.ndarray) -> np.ndarray:
        """Number of True among each row's entries of `hits` (one entry per value)."""
        cumulative = np.concatenate([[0], np.cumsum(hits)])
        offsets = self.offsets
        return cumulative[offsets[1:]] - cumulative[offsets[:-1]]


def build_labels(input_ids: TokenLists, masks: Mapping[str, TokenLists]) -> TokenLists:
    """
    Labels of rows of tokens: the token itself where all masks are 1, -100 elsewhere.

    Args:
        input_ids ([`TokenLists`]):
            The tokens.
        masks (`Mapping[str, TokenLists]`):
            By column name, 0 or 1 for each token. None: every token is trained.

    Raises:
        `ValueError`: a mask has another length than its `input_ids`.
    """
    labels = input_ids.values.copy()
    for name, mask in masks.items():
        unequal = np.flatnonzero(mask.lengths != input_ids.lengths)
        if len(unequal):
            raise ValueError(
                f"`{name}` and `input_ids` must have one entry per token, but their lengths differ in "
                f"{describe_rows(unequal.tolist())} of a batch."
            )
        labels[mask.values == 0] = IGNORE_INDEX
    return TokenLists(labels, input_ids.lengths)


def check_truncation(max_length: int | None, mode: str) -> None:
    """
    Check where rows are to be cut.

    Raises:
        `ValueError`: a limit below 1, or an unknown mode.
    """
    if mode not in TRUNCATION_MODES:
        raise ValueError(f"truncation_mode={mode!r} is unknown; use one of {', '.join(map(repr, TRUNCATION_MODES))}.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length={max_length} leaves no token; give at least 1, or None to cut nothing.")


def truncate_table(table: pa.Table, max_length: int | None, mode: str = "keep_start") -> pa.Table:
    """
    The table with its token columns cut to `max_length`.

    Args:
        table (`pa.Table`):
            Has `input_ids`; the other columns of [`TOKEN_COLUMNS`] are cut with it.
        max_length (`int` or `None`):
            Longest row kept, in tokens; `None` cuts nothing.
        mode (`str`, defaults to `"keep_start"`):
            `"keep_start"` or `"keep_end"`.

    Raises:
        `ValueError`: `mode` is neither.
    """
    check_truncation(max_length, mode)
    if max_length is None:
        return table
    lengths = TokenLists.from_arrow(table["input_ids"]).lengths
    if not len(lengths) or lengths.max() <= max_length:
        return table
    for index, name in enumerate(table.column_names):
        if name in TOKEN_COLUMNS:
            cut = TokenLists.from_arrow(table[name]).truncate(max_length, mode).to_arrow()
            table = table.set_column(index, name, cut)
    return table


def count_trained(table: pa.Table) -> np.ndarray:
    """
    Number of tokens of each row that are trained, int64 `[rows]`.

    The first token of a document has nothing before it that could predict it, so its label never counts. In a packed
    row (`seq_lengths`) each document has its own first token.
    """
    labels = TokenLists.from_arrow(table["labels"])
    trained = labels.values != IGNORE_INDEX
    if "seq_lengths" in table.column_names:
        documents = TokenLists.from_arrow(table["seq_lengths"]).values
        starts = np.concatenate([[0], np.cumsum(documents)])[:-1][documents > 0]
    else:
        starts = labels.offsets[:-1][labels.lengths > 0]
    trained[starts.astype(np.int64)] = False
    return labels.count(trained)
