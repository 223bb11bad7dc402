"""
Counts of tokenized preference data for its pre-flight report, read from the Arrow columns of the dataset itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from .counting import iter_tables, note_on_stop_token
from .dataset_steps import resolve_eos_token
from .fingerprints import fingerprint_step
from .pair_checks import check_token_lists
from .pair_report import CutAnswers, PairReport
from .token_lists import TokenLists

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .preference_preparation import PreferenceOptions

PAIR, UNPAIRED = ("chosen", "rejected"), ("completion",)


@dataclass(frozen=True)
class PairTask:
    """What is prepared: the columns of answers, and whether each holds its prompt (`whole`)."""

    name: str
    answers: tuple[str, ...]
    options: PreferenceOptions
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    whole: bool = False

    @property
    def token_columns(self) -> list[str]:
        columns = [f"{answer}_ids" for answer in self.answers]
        return columns if self.whole else ["prompt_ids", *columns]

    @property
    def eos_token(self) -> str | None:
        return resolve_eos_token(self.tokenizer, self.options.eos_token)

    def cut(self, columns: Mapping[str, Any], indices: Sequence[int]) -> CutAnswers:
        """The token columns of some rows, checked, as the collator will cut them."""
        lists = {
            column: TokenLists.from_arrow(check_token_lists(columns.get(column), column, indices, self.name))
            for column in self.token_columns
        }
        answers = {answer: lists[f"{answer}_ids"] for answer in self.answers}
        return CutAnswers(lists.get("prompt_ids"), answers, self.options.max_length, self.options.truncation_mode)


def count_and_drop(dataset: Dataset, task: PairTask, report: PairReport) -> Dataset:
    """
    Count what each row is worth, and leave out those that are worth nothing.

    Args:
        dataset ([`~datasets.Dataset`]):
            Has the task's token columns.
        task ([`PairTask`]):
            What is prepared.
        report ([`~trl.data.pair_report.PairReport`]):
            Counted into.

    Returns:
        [`~datasets.Dataset`]: the rows that are kept.
    """
    stop_id = task.tokenizer.convert_tokens_to_ids(task.eos_token) if task.eos_token else None
    counts: list[dict[str, np.ndarray]] = []
    lost: list[dict[str, np.ndarray]] = []
    for first_row, table in iter_tables(dataset, task.token_columns):
        columns = {column: table[column] for column in task.token_columns}
        cut = task.cut(columns, range(first_row, first_row + len(table)))
        lost.append(cut.lost())
        counts.append(_measure(cut, stop_id))
    masks = {reason: np.concatenate([batch[reason] for batch in lost]) for reason in lost[0]}
    measured = {key: np.concatenate([batch[key] for batch in counts]) for key in counts[0]}
    kept = ~np.any(list(masks.values()), axis=0)
    report.rows_in, report.rows_kept = len(dataset), int(kept.sum())
    for reason, mask in masks.items():
        report.drop(reason, np.flatnonzero(mask))
    if not kept.all():
        rows = np.flatnonzero(kept)
        dataset = dataset.select(rows, new_fingerprint=fingerprint_step(dataset, "drop", _digest(kept)))
    if kept.any():
        _summarize({key: values[kept] for key, values in measured.items()}, dataset, task, report)
    return dataset


def _digest(kept: np.ndarray) -> str:
    """Which rows are kept, in a short text."""
    return np.packbits(kept).tobytes().hex()


def _measure(cut: CutAnswers, stop_id: int | None) -> dict[str, np.ndarray]:
    """Numbers of each row, by what they count."""
    cut_lengths = cut.cut_lengths()
    measured = {answer: lists.lengths for answer, lists in cut.answers.items()}
    measured |= {f"cut {answer}": lengths for answer, lengths in zip(cut.answers, cut_lengths, strict=True)}
    if cut.prompts is not None:
        measured["prompt"] = cut.prompts.lengths
        room = [np.inf if cut.max_length is None else cut.max_length - lengths for lengths in cut_lengths]
        measured["prompt tokens"] = sum(np.minimum(cut.prompts.lengths, tokens) for tokens in room)
        preferred = (answers[0] for answers in cut.cut_answers(cut_lengths))
        n_rows = len(cut.prompts.lengths)
        measured["stops"] = np.fromiter((stop_id is not None and stop_id in ids for ids in preferred), bool, n_rows)
    else:
        chosen, rejected = (lists.to_arrays() for lists in cut.answers.values())
        shared = (_shared_tokens(*pair) for pair in zip(chosen, rejected, strict=True))
        measured["prompt tokens"] = 2 * np.fromiter(shared, np.int64, len(chosen))
    return measured


def _shared_tokens(ids: np.ndarray, other_ids: np.ndarray) -> int:
    shorter = min(len(ids), len(other_ids))
    different = np.flatnonzero(ids[:shorter] != other_ids[:shorter])
    return int(different[0]) if len(different) else shorter


def _summarize(measured: Mapping[str, np.ndarray], dataset: Dataset, task: PairTask, report: PairReport) -> None:
    """What the rows that are kept have in common, into the report."""
    for column in ("prompt", *task.answers):
        if column in measured:
            report.lengths[column] = (float(np.median(measured[column])), int(measured[column].max()))
    cut = sum(measured[f"cut {answer}"].sum() for answer in task.answers)
    truncated = np.any([measured[answer] > measured[f"cut {answer}"] for answer in task.answers], axis=0)
    report.rows_truncated = int(truncated.sum())
    prompts = int(measured["prompt tokens"].sum())
    total = int(cut) if task.whole else int(cut) + prompts
    report.prompt_share = prompts / total if total else None
    if len(task.answers) == 2:
        report.chosen_longer_share = float((measured["chosen"] > measured["rejected"]).mean())
        report.rejected_longer_share = float((measured["rejected"] > measured["chosen"]).mean())
        report.note_length_bias()
    labels = None
    if task.answers == UNPAIRED:
        labels = np.concatenate([table["label"].to_numpy() for _, table in iter_tables(dataset, ["label"])])
        report.note_classes(labels)
    if not task.whole:
        _note_on_prompts_and_stops(measured, truncated, labels, dataset, task, report)


def _note_on_prompts_and_stops(
    measured: Mapping[str, np.ndarray],
    truncated: np.ndarray,
    labels: np.ndarray | None,
    dataset: Dataset,
    task: PairTask,
    report: PairReport,
) -> None:
    empty = int((measured["prompt"] == 0).sum())
    if empty:
        report.notes.append(
            f"{empty:,} rows have no prompt token, so the first token of their answers has nothing to be predicted "
            "from and does not count."
        )
    preferred = np.ones(len(truncated), bool) if labels is None else labels
    if not preferred.any():
        return
    report.stop_tokens = [task.eos_token] if task.eos_token else []
    report.stop_token_share = float(measured["stops"][preferred].mean()) if task.eos_token else None
    whole = preferred & ~truncated
    if whole.any() and measured["stops"][whole].mean() < 0.5:
        rows = dataset.select(np.flatnonzero(whole)[:1000])
        report.notes.append(note_on_stop_token(rows[f"{task.answers[0]}_ids"], task.tokenizer, task.eos_token))
