"""
Packing: many short sequences share one row of fixed length, so that no compute goes to padding.

Three strategies. `bfd` (best fit, decreasing) keeps documents whole and cuts the overlong; `bfd_split` keeps every
token by cutting the overlong into pieces; `wrapped` joins everything and cuts where the row is full, across documents.
The first two are described in https://huggingface.co/papers/2404.10830.

Work is done on Arrow arrays: Python touches each sequence once to choose its row, and no token at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from .formats import DatasetType

SEQ_LENGTHS = "seq_lengths"


def assign_bins(lengths: Sequence[int] | np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Place items into bins by best fit, longest first.

    Each item goes to the fullest bin that still has room for it; a new bin is opened when there is none. Items of one
    length keep their order, and of several bins equally full the one that reached that level first is taken.

    Args:
        lengths (`Sequence[int]`):
            Positive item sizes, none above `capacity`.
        capacity (`int`):
            Size of a bin.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the items' indices grouped by bin (within a bin: in order of placement; bins:
        in order of opening), and the number of items of each bin.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    bin_of_item = []
    n_bins = 0
    bins_by_room: dict[int, deque[int]] = {}
    # Bit r is set while some bin has r free places: the best fit is then found by two operations on one integer.
    rooms = 0
    for length in lengths[longest_first].tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            waiting = bins_by_room[room]
            chosen = waiting.popleft()
            if not waiting:
                rooms ^= 1 << room
        else:
            room = capacity
            chosen = n_bins
            n_bins += 1
        bin_of_item.append(chosen)
        room -= length
        if room:
            waiting = bins_by_room.get(room)
            if waiting is None:
                waiting = bins_by_room[room] = deque()
            if not waiting:
                rooms |= 1 << room
            waiting.append(chosen)
    bin_of_item = np.asarray(bin_of_item, dtype=np.int64)
    by_bin = np.argsort(bin_of_item, kind="stable")
    return longest_first[by_bin], np.bincount(bin_of_item, minlength=n_bins)


def cut_to_pieces(lengths: np.ndarray, capacity: int, keep_rest: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Cut sequences so that none is longer than a row.

    Args:
        lengths (`np.ndarray`):
            Lengths of the sequences, in tokens. Empty ones disappear.
        capacity (`int`):
            Longest piece, in tokens.
        keep_rest (`bool`):
            Whether what lies beyond the first `capacity` tokens becomes further pieces, or is dropped.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: of each piece the sequence it comes from, its first token's
        position therein, and its length.
    """
    if keep_rest:
        pieces_per_sequence = -(-lengths // capacity)
    else:
        pieces_per_sequence = (lengths > 0).astype(np.int64)
    sequence = np.repeat(np.arange(len(lengths)), pieces_per_sequence)
    first_piece = np.cumsum(pieces_per_sequence) - pieces_per_sequence
    start = (np.arange(len(sequence)) - first_piece[sequence]) * capacity
    return sequence, start, np.minimum(lengths[sequence] - start, capacity)


def pack_best_fit(table: pa.Table, *, seq_length: int, split_overlong: bool) -> pa.Table:
    """
    Pack the rows of a table by best fit, longest first; a document is never spread over rows unless it is overlong.

    Args:
        table (`pa.Table`):
            List columns, of equal lengths within a row.
        seq_length (`int`):
            Capacity of a packed row, in tokens.
        split_overlong (`bool`):
            Whether sequences above `seq_length` are cut into pieces (every token is kept) or cut off.

    Returns:
        `pa.Table`: the packed columns and `seq_lengths`, the lengths of the documents in each row.
    """
    columns, offsets, lengths = _read_lists(table)
    sequence, start, piece_lengths = cut_to_pieces(lengths, seq_length, keep_rest=split_overlong)
    order, pieces_per_row = assign_bins(piece_lengths, seq_length)
    sequence, start, piece_lengths = sequence[order], start[order], piece_lengths[order]
    first_piece_of_row = np.concatenate([[0], np.cumsum(pieces_per_row)])
    token_offsets = np.concatenate([[0], np.cumsum(piece_lengths)])[first_piece_of_row]

    packed = {}
    for name, column in columns.items():
        # A list view may start anywhere, so flattening one copies the pieces in their new order, whole runs at a time.
        views = pa.LargeListViewArray.from_arrays(offsets[name][sequence] + start, piece_lengths, column.values)
        packed[name] = _to_lists(token_offsets, views.flatten(), like=column.type)
    packed[SEQ_LENGTHS] = _to_lists(first_piece_of_row, pa.array(piece_lengths), like=pa.list_(pa.int64()))
    return pa.table(packed)


def pack_wrapped(table: pa.Table, *, seq_length: int) -> pa.Table:
    """
    Join all rows of a table into one stream and cut it every `seq_length` tokens, wherever that falls.

    Args:
        table (`pa.Table`):
            List columns, of equal lengths within a row.
        seq_length (`int`):
            Length of a packed row, in tokens; the last may be shorter.

    Returns:
        `pa.Table`: the packed columns.
    """
    columns, _, lengths = _read_lists(table)
    total = int(lengths.sum())
    token_offsets = np.minimum(np.arange(0, total + seq_length, seq_length), total)
    return pa.table(
        {name: _to_lists(token_offsets, column.flatten(), like=column.type) for name, column in columns.items()}
    )


def _read_lists(table: pa.Table) -> tuple[dict[str, pa.Array], dict[str, np.ndarray], np.ndarray]:
    """The table's columns as list arrays, where each row's tokens begin in each, and the rows' common lengths."""
    if not table.column_names:
        raise ValueError("There is nothing to pack: the dataset has no column.")
    columns, offsets, lengths = {}, {}, None
    for name in table.column_names:
        column = table[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # older pyarrow keeps a table's column chunked
            column = column.chunk(0) if column.num_chunks else pa.array([], type=column.type)
        if pa.types.is_fixed_size_list(column.type):
            column = column.cast(pa.list_(column.type.value_type))
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise TypeError(
                f"Packing needs columns of lists (one entry per token), but `{name}` holds {column.type}. Select the "
                f"token columns first, e.g. dataset.select_columns(['input_ids', 'labels'])."
            )
        columns[name] = column
        offsets[name] = np.asarray(column.offsets, dtype=np.int64)[:-1]
        column_lengths = np.asarray(pc.fill_null(column.value_lengths(), 0), dtype=np.int64)
        if lengths is None:
            lengths, first_name = column_lengths, name
        elif not np.array_equal(lengths, column_lengths):
            row = int(np.flatnonzero(lengths != column_lengths)[0])
            raise ValueError(
                f"Columns that are packed together must have one entry per token each, but in row {row} of the batch "
                f"`{first_name}` has {lengths[row]} and `{name}` has {column_lengths[row]}."
            )
    return columns, offsets, lengths


def _to_lists(offsets: np.ndarray, values: pa.Array, like: pa.DataType) -> pa.Array:
    """A list array over `values`, of the type of `like` where its offsets are wide enough."""
    if pa.types.is_large_list(like) or offsets[-1] > np.iinfo(np.int32).max:
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


STRATEGIES: dict[str, tuple[Callable[..., pa.Table], dict[str, Any]]] = {
    "bfd": (pack_best_fit, {"split_overlong": False}),
    "bfd_split": (pack_best_fit, {"split_overlong": True}),
    "wrapped": (pack_wrapped, {}),
}
"""Packing strategy -> the function that packs one map batch, and its options."""


def pack_dataset(
    dataset: DatasetType, seq_length: int, strategy: str = "bfd", map_kwargs: dict[str, Any] | None = None
) -> DatasetType:
    """
    Pack the sequences of a tokenized dataset into rows of at most `seq_length` tokens.

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.DatasetDict`] or their iterable kin):
            Dataset whose columns are all lists with one entry per token, e.g. `input_ids` and `labels`.
        seq_length (`int`):
            Capacity of a packed row, in tokens.
        strategy (`str`, *optional*, defaults to `"bfd"`):
            `"bfd"`: best fit, longest first; documents stay whole, what is beyond `seq_length` tokens is cut off.
            `"bfd_split"`: the same, but an overlong document is cut into pieces, so that every token is kept.
            `"wrapped"`: all documents in a row, cut every `seq_length` tokens, wherever that falls.
        map_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of [`~datasets.Dataset.map`]. Each batch of `batch_size` rows (1000 by default) is packed
            on its own.

    Returns:
        The dataset with packed columns, in the format it had. The best-fit strategies add `seq_lengths`, the lengths
        of the documents in each row, in order.

    Raises:
        `ValueError`: unknown strategy, `seq_length` below 1, or columns of different lengths within a row.
        `TypeError`: a column is not made of lists.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from trl import pack_dataset

    >>> dataset = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6, 7, 8], [9]]})
    >>> pack_dataset(dataset, seq_length=4)[:]
    {'input_ids': [[1, 2, 3, 9], [6, 7, 8], [4, 5]], 'seq_lengths': [[3, 1], [3], [2]]}
    ```

    Paper: [Fewer Truncations Improve Language Modeling](https://huggingface.co/papers/2404.10830).
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown packing strategy {strategy!r}: choose one of {', '.join(map(repr, STRATEGIES))}.")
    if seq_length < 1:
        raise ValueError(f"`seq_length` must be at least 1 token, got {seq_length}.")
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        packed = {name: pack_dataset(split, seq_length, strategy, map_kwargs) for name, split in dataset.items()}
        return type(dataset)(packed)

    pack, options = STRATEGIES[strategy]
    original_format = get_dataset_format(dataset)
    map_kwargs = {"batched": True, **(map_kwargs or {})}
    map_kwargs["fn_kwargs"] = {"seq_length": seq_length, **options, **map_kwargs.get("fn_kwargs", {})}
    packed = dataset.with_format("arrow").map(pack, **map_kwargs)
    if original_format.get("columns") and SEQ_LENGTHS in packed.column_names:
        original_format["columns"] = [*original_format["columns"], SEQ_LENGTHS]
    return packed.with_format(**original_format)


def get_dataset_format(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """
    The dataset's output format, as the arguments of `with_format` that bring it back.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Any dataset.

    Returns:
        `dict[str, Any]`: `type`, and for a [`~datasets.Dataset`] `columns` (`None`: all of them),
        `output_all_columns` and the formatter's own arguments.
    """
    if isinstance(dataset, IterableDataset):
        formatting = dataset._formatting
        return {"type": formatting.format_type if formatting else None}
    current = dataset.format
    every_column = set(current["columns"]) == set(dataset.column_names)
    return {
        "type": current["type"],
        "columns": None if every_column else current["columns"],
        "output_all_columns": current["output_all_columns"],
        **current["format_kwargs"],
    }


def packing_efficiency(rows: Dataset | Sequence[int] | np.ndarray, seq_length: int) -> float:
    """
    Share of the places in packed rows that hold a token.

    Args:
        rows ([`~datasets.Dataset`], sequence of `int` or `np.ndarray`):
            Packed dataset with an `input_ids` column, or the rows' lengths in tokens.
        seq_length (`int`):
            Capacity of a row, in tokens.

    Returns:
        `float`: between 0 and 1; 0 when there is no row.
    """
    if isinstance(rows, Dataset):
        column = rows.with_format("arrow")["input_ids"]
        rows = pc.list_value_length(column[:] if not isinstance(column, (pa.Array, pa.ChunkedArray)) else column)
    lengths = np.asarray(rows, dtype=np.int64)
    return float(lengths.sum() / (len(lengths) * seq_length)) if len(lengths) else 0.0
