"""Rows of token ids become rectangular tensors. The collators share these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def as_tensor(values: Any) -> Tensor:
    """Ids or masks of one row, as a list, an array or a tensor, in int64."""
    return values.long() if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)


def pad_right(sequences: list[Tensor], value: int, multiple_of: int | None = None) -> Tensor:
    """
    Stack rows of different lengths, filled at their end.

    Args:
        sequences: one tensor per row.
        value: fills the rest.
        multiple_of: rounds the length up to a multiple of this; default: the longest row.

    Returns:
        [rows, T].
    """
    padded = pad_sequence(sequences, batch_first=True, padding_value=value)
    missing = -padded.shape[1] % multiple_of if multiple_of else 0
    return torch.nn.functional.pad(padded, (0, missing), value=value) if missing else padded


def completion_span(prompt_length: int, completion_length: int) -> Tensor:
    """Completion mask of one row: 0 on its prompt, 1 on its completion, whatever the tokens are. int64."""
    return (torch.arange(prompt_length + completion_length) >= prompt_length).long()


def float_column(examples: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    """
    One number of each row, e.g. a margin or a log-prob of the reference.

    Args:
        examples: rows of the batch.
        name: the column.

    Returns:
        float32 [rows].

    Raises:
        ValueError: a row has no number there.
    """
    values = [example.get(name) for example in examples]
    rows = [row for row, value in enumerate(values) if value is None]
    if rows:
        raise ValueError(
            f"`{name}` is missing in row(s) {rows} of a batch of {len(values)}: give every row a number, or drop the "
            "column."
        )
    return torch.tensor([float(value) for value in values], dtype=torch.float32)
