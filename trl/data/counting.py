"""
Counts of a prepared dataset for its pre-flight report, read from the Arrow columns of the dataset itself.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from datasets import Dataset

from .dataset_report import DatasetReport
from .formats import describe_rows
from .packing import packing_efficiency
from .preflight import CUT_OFF, NO_TRAINED_TOKEN, PACKED_CONTEXT, PreparationReport
from .token_lists import IGNORE_INDEX, TokenLists, count_trained, truncate_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 10_000


def iter_tables(dataset: Dataset, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Some columns of a dataset as Arrow tables, ten thousand rows at a time, each with the number of its first row."""
    tables = dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
    return ((number * _ROWS_AT_ONCE, table) for number, table in enumerate(tables))


def count_examples(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    eos_token: str | None,
    max_length: int | None,
    mode: str,
    report: PreparationReport,
) -> bool:
    """
    Count into the report what truncation will leave of each example.

    Args:
        dataset ([`~datasets.Dataset`]):
            Uncut `input_ids` and `labels`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Knows the ids of special tokens.
        eos_token (`str`, *optional*):
            The token that ends a generation.
        max_length (`int`, *optional*):
            Limit, in tokens.
        mode (`str`):
            Which end is kept.
        report ([`~trl.data.preflight.PreparationReport`]):
            Counted into.

    Returns:
        `bool`: whether there is something to cut or to drop.
    """
    stop_ids = np.array([] if eos_token is None else [tokenizer.convert_tokens_to_ids(eos_token)], np.int64)
    batches = []
    for _, table in iter_tables(dataset, ["input_ids", "labels"]):
        cut = truncate_table(table, max_length, mode)
        labels = TokenLists.from_arrow(cut["labels"])
        stops = labels.count(np.isin(labels.values, stop_ids)) > 0
        lengths = TokenLists.from_arrow(table["input_ids"]).lengths
        batches.append((lengths, labels.lengths, count_trained(table), count_trained(cut), stops))
    lengths, cut_lengths, trained_uncut, trained, stops = map(np.concatenate, zip(*batches, strict=True))

    kept, truncated = trained > 0, cut_lengths < lengths
    report.rows_kept = int(kept.sum())
    report.drop(NO_TRAINED_TOKEN, np.flatnonzero(trained_uncut == 0))
    report.drop(CUT_OFF, np.flatnonzero((trained_uncut > 0) & ~kept))
    report.tokens_trained = int(trained.sum())
    report.tokens_context = int(cut_lengths[kept].sum()) - report.tokens_trained
    report.rows_truncated = int((truncated & kept).sum())
    report.tokens_cut = int((lengths - cut_lengths)[kept].sum())
    report.longest, report.median = int(lengths.max()), float(np.median(lengths))
    if kept.any():
        report.stop_tokens = [] if eos_token is None else [eos_token]
        report.stop_token_share = None if eos_token is None else float(stops[kept].mean())
        whole = kept & ~truncated
        if whole.any() and stops[whole].mean() < 0.5:
            labels = dataset.select(np.flatnonzero(whole)[:1000])["labels"]
            answers = ([label for label in row if label != IGNORE_INDEX] for row in labels)
            report.notes.append(note_on_stop_token(answers, tokenizer, eos_token))
    return bool(truncated.any() or not kept.all())


def note_on_stop_token(
    answers: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, eos_token: str | None
) -> str:
    """
    A remark for where most examples do not train the end-of-sequence token; says which token they end with instead.

    Args:
        answers (`Iterable[Sequence[int]]`):
            The trained tokens of some examples.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Knows the names of special tokens.
        eos_token (`str`, *optional*):
            The token that ends a generation.
    """
    added = np.array(sorted(tokenizer.get_added_vocab().values()), np.int64)
    endings, n_answers = Counter(), 0
    for trained in answers:
        # A line break may follow the end of a turn, so the last two are looked at.
        last = np.asarray(trained)[-2:]
        endings.update(last[np.isin(last, added)][-1:].tolist())
        n_answers += 1
    note = (
        f"{eos_token} is trained in few examples, so the model may not learn to stop with it"
        if eos_token
        else "the tokenizer has no eos_token, so the model may not learn to stop"
    )
    if endings and endings.most_common(1)[0][1] > n_answers / 2:
        ending = tokenizer.convert_ids_to_tokens(endings.most_common(1)[0][0])
        return f"{note}; most examples end with {ending}: consider eos_token={ending!r}."
    return f"{note}."


def count_packed_rows(dataset: Dataset, strategy: str, max_length: int, report: PreparationReport) -> np.ndarray:
    """
    Count the rows of a packed dataset into the report.

    Args:
        dataset ([`~datasets.Dataset`]):
            Packed `input_ids` and `labels`, and `seq_lengths` where the strategy keeps documents apart.
        strategy (`str`):
            How they were packed.
        max_length (`int`):
            Capacity of a row, in tokens.
        report ([`~trl.data.preflight.PreparationReport`]):
            Counted into.

    Returns:
        `np.ndarray`: boolean, which rows have a trained token.
    """
    columns = [column for column in ("input_ids", "labels", "seq_lengths") if column in dataset.column_names]
    batches = [
        (count_trained(table), TokenLists.from_arrow(table["input_ids"]).lengths)
        for _, table in iter_tables(dataset, columns)
    ]
    trained, lengths = map(np.concatenate, zip(*batches, strict=True))
    kept = trained > 0
    report.drop(PACKED_CONTEXT, np.flatnonzero(~kept))
    report.packing_strategy, report.rows_packed = strategy, int(kept.sum())
    report.tokens_trained = int(trained.sum())
    report.tokens_context = int(lengths[kept].sum()) - report.tokens_trained
    report.packing_efficiency = packing_efficiency(lengths[kept], max_length)
    return kept


def count_merged_prompts(rows: np.ndarray, report: DatasetReport) -> None:
    """
    Count prompts that are not the beginning of prompt and completion together, token for token; warn of the first.

    Args:
        rows (`np.ndarray`):
            Numbers of such rows.
        report ([`~trl.data.dataset_report.DatasetReport`]):
            Counted into.
    """
    if not len(rows):
        return
    if not report.prompts_merged.count:
        logger.warning(
            "%s dataset: the prompt tokenized alone is not the beginning of prompt and completion together (%s). The "
            "tokens from where they part are counted as completion. Prompts that end in a space, and chat templates "
            "whose generation prompt is not how an assistant turn begins, cause this.",
            report.name,
            describe_rows(rows),
        )
    report.prompts_merged.add(rows.tolist())
