"""Preferences as the trainer will see them: the prompt, and which tokens of each answer are trained or cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from .token_view import legend, paint_tokens
from .tokenization import get_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from .pair_report import PairReport
    from .preference_preparation import PreferenceOptions

_KINDS = ("context", "chosen", "rejected", "cut")
_ROW = "row_of_the_preview"


def preview_preferences(
    dataset_or_rows: Iterable[Mapping[str, Any]],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    options: PreferenceOptions,
    prepare: Callable[..., tuple[Dataset, PairReport]],
    n: int = 3,
    color: bool = True,
) -> str:
    """
    The first rows of a dataset of preferences, token by token.

    Args:
        dataset_or_rows ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or list of rows):
            Unprepared rows: pairs, or answers with a label.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor.
        options ([`~trl.data.preference_preparation.PreferenceOptions`]):
            The settings of the run.
        prepare (`Callable`):
            What prepares the rows for the trainer: a function of `trl.data.preference_preparation`.
        n (`int`, defaults to `3`):
            Number of rows.
        color (`bool`, defaults to `True`):
            Mark with terminal colours; otherwise with brackets.

    Returns:
        `str`: a legend and the rows; for a row that is dropped, the reason.

    Raises:
        `ValueError`: there are no rows, or one is not as it must be.
    """
    rows = [{**row, _ROW: number} for number, row in enumerate(itertools.islice(iter(dataset_or_rows), n))]
    if not rows:
        raise ValueError("There is nothing to preview: the dataset has no rows.")
    prepared, report = prepare(Dataset.from_list(rows), processing_class, options)
    reasons = {row: reason for reason, dropped in report.dropped.items() for row in dropped.rows}
    tokenizer = get_tokenizer(processing_class)
    blocks = {number: [f"── row {number}: dropped — {reason}"] for number, reason in reasons.items()}
    for row in prepared:
        block = blocks.setdefault(row[_ROW], [f"── row {row[_ROW]}"])
        block += _show_row(row, options, tokenizer, color)
    return "\n".join([legend(_KINDS, color), *(line for number in sorted(blocks) for line in blocks[number])])


def _show_row(row: Mapping[str, Any], options: PreferenceOptions, tokenizer: Any, color: bool) -> list[str]:
    """The prompt, and under it each answer with its counts."""
    if "completion_ids" in row:
        answers = [("chosen" if row["label"] else "rejected", row["completion_ids"], f"label {row['label']}")]
    else:
        answers = [(kind, row[f"{kind}_ids"], kind) for kind in ("chosen", "rejected")]
    if "prompt_ids" in row:
        prompt = row["prompt_ids"]
        kinds = [_kinds(len(prompt), len(ids), kind, options) for kind, ids, _ in answers]
    else:  # whole sequences, which are never cut; what they have in common is shown once
        prompt = _common_start(*(ids for _, ids, _ in answers))
        answers = [(kind, ids[len(prompt) :], label) for kind, ids, label in answers]
        kinds = [["context"] * len(prompt) + [kind] * len(ids) for kind, ids, _ in answers]
    # Where the end is kept, a long answer may cut the prompt and a short one not: shown as the longest leaves it.
    prompt_kinds = min((kinds_of[: len(prompt)] for kinds_of in kinds), key=lambda kinds_of: kinds_of.count("context"))
    lines = [f"prompt, {len(prompt):,} tokens:", paint_tokens(prompt, prompt_kinds, tokenizer, color)]
    for (_, ids, label), kinds_of in zip(answers, kinds, strict=True):
        of_answer = kinds_of[len(prompt) :]
        cut = f", {of_answer.count('cut'):,} of them cut" if "cut" in of_answer else ""
        lines += [f"{label}, {len(ids):,} tokens{cut}:", paint_tokens(ids, of_answer, tokenizer, color)]
    return lines


def _kinds(prompt_length: int, answer_length: int, kind: str, options: PreferenceOptions) -> list[str]:
    """What becomes of each token of a prompt with an answer."""
    kinds = ["context"] * prompt_length + [kind] * answer_length
    over = len(kinds) - options.max_length if options.max_length is not None else 0
    if over > 0 and options.truncation_mode == "keep_end":
        kinds[:over] = ["cut"] * over
    elif over > 0:
        kinds[-over:] = ["cut"] * over
    first = next((i for i, kind_of in enumerate(kinds) if kind_of != "cut"), None)
    if first is not None:
        kinds[first] = "context"  # nothing before it predicts it
    return kinds


def _common_start(first: Sequence[int], second: Sequence[int]) -> Sequence[int]:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return first[: sum(1 for _ in same)]
