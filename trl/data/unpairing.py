"""
Tokenized pairs as labelled rows, in an order for training, and the answers that KTO exchanges between prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from .fingerprints import fingerprint_step
from .templating import unpair_columns

_ROWS_AT_ONCE = 1000


def balanced_order(n_pairs: int) -> np.ndarray:
    """
    An order of `n_pairs` chosen and as many rejected answers in which neighbours differ in label and in prompt.

    Chosen answers are numbered from 0, rejected ones from `n_pairs` on. A chosen answer is followed by the rejected
    one of the pair half the dataset away. Only of one or two pairs must neighbours share a prompt somewhere.

    Args:
        n_pairs (`int`):
            Number of pairs.

    Returns:
        `np.ndarray`: int64 `[2 * n_pairs]`, each number once.
    """
    chosen = np.arange(n_pairs)
    rejected = n_pairs + (chosen + (n_pairs + 1) // 2) % max(n_pairs, 1)
    return np.stack([chosen, rejected], axis=1).reshape(-1)


def _side_by_side(n_pairs: int) -> np.ndarray:
    return np.arange(2 * n_pairs).reshape(2, n_pairs).T.reshape(-1)


def unpair_tokenized(
    dataset: Dataset | IterableDataset, has_text: bool, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """
    Two labelled rows of each tokenized pair, in the order of [`balanced_order`]; of a stream, batch by batch.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Has `chosen_ids` and `rejected_ids`, which become `completion_ids`.
        has_text (`bool`):
            Whether it has `chosen` and `rejected` too, which become `completion`.
        num_proc (`int`, *optional*):
            Processes that work on a map-style dataset.
    """
    columns = {"completion_ids": ("chosen_ids", "rejected_ids")}
    if has_text:
        columns["completion"] = ("chosen", "rejected")
    if isinstance(dataset, IterableDataset):
        return unpair_columns(dataset, columns, balanced_order)
    # First side by side, which does not depend on how the rows are cut into batches, then all at once into order.
    n_pairs = len(dataset)
    dataset = unpair_columns(dataset, columns, _side_by_side, num_proc=num_proc, desc="Unpairing dataset")
    chosen, pair = np.divmod(balanced_order(n_pairs), n_pairs)
    return dataset.select(2 * pair + chosen, new_fingerprint=fingerprint_step(dataset, "balance", n_pairs))


def add_kl_completions(dataset: Dataset | IterableDataset, block_size: int) -> Dataset | IterableDataset:
    """
    Add `KL_completion_ids`: within each run of `block_size` rows, every prompt gets the answer of the row before.

    The first row of a run gets the answer of its last; a single row at the end keeps its own.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Has `completion_ids`.
        block_size (`int`):
            Rows of a run.
    """
    options = {
        "batched": True,
        "batch_size": block_size * max(1, _ROWS_AT_ONCE // block_size),
        "fn_kwargs": {"block_size": block_size},
    }
    if isinstance(dataset, Dataset):
        options |= {
            "new_fingerprint": fingerprint_step(dataset, "rotate completions", block_size),
            "desc": "Exchanging answers for the KL estimate",
        }
    return dataset.with_format("arrow").map(_rotate_table, **options).with_format(None)


def _rotate_table(table: pa.Table, block_size: int) -> pa.Table:
    rotated = table["completion_ids"].take(pa.array(rotation(len(table), block_size)))
    return table.append_column("KL_completion_ids", rotated)


def rotation(n_rows: int, block_size: int) -> Sequence[int]:
    """For each row the row before it in its block of `block_size` rows, and for the first of a block its last."""
    rows = np.arange(n_rows)
    first = rows - rows % block_size
    last = np.minimum(first + block_size, n_rows) - 1
    return np.where(rows == first, last, rows - 1)
