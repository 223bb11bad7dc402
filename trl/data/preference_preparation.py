"""
A dataset of preferences on its way to a trainer: checked, tokenized, rid of rows that teach nothing, and counted.

Pairs keep their prompt apart from their answers (DPO), are tokenized whole (reward models), or become labelled rows
(KTO). Nothing is cut here: the collators cut at `max_length`, so that another limit reuses the tokens. What the cut
will do is known all the same; rows that it leaves nothing of are dropped.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value

from .answer_tokenization import MERGED, AnswerTokenizer
from .counting import count_merged_prompts, iter_tables
from .dataset_steps import check_dataset, check_not_empty, map_description, read_options
from .fingerprints import fingerprint_processing_class, fingerprint_step
from .formats import (
    IMPLICIT_PREFERENCE,
    PREFERENCE,
    UNPAIRED_PREFERENCE,
    Shape,
    check_columns,
    check_rows,
)
from .pair_checks import PairChecker, check_labels, check_margins
from .pair_counting import PAIR, UNPAIRED, PairTask, count_and_drop
from .pair_report import PairReport
from .template_rendering import resolve_chat_template
from .token_lists import check_truncation
from .tokenization import RowTokenizer, get_tokenizer
from .unpairing import add_kl_completions, unpair_tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

AnyDataset = Dataset | IterableDataset

_TOKENIZED_PAIR = Shape("tokenized preference", ("prompt_ids", "chosen_ids", "rejected_ids"))
_TOKENIZED_WHOLE_PAIR = Shape("tokenized preference", ("chosen_ids", "rejected_ids"))
_TOKENIZED_UNPAIRED = Shape("tokenized unpaired preference", ("prompt_ids", "completion_ids", "label"))


@dataclass(frozen=True)
class PreferenceOptions:
    """
    How rows of preference data become training examples.

    Args:
        max_length (`int` or `None`, defaults to `1024`):
            Longest prompt with answer, in tokens. `None` cuts nothing.
        truncation_mode (`str`, defaults to `"keep_start"`):
            `"keep_start"` or `"keep_end"`: what the collator keeps.
        eos_token (`str`, *optional*):
            Appended to plain answers. `None`: the tokenizer's own, if it has one.
        num_proc (`int`, *optional*):
            Processes that work on a map-style dataset.
        kl_block_size (`int`, *optional*):
            For unpaired data: each run of so many rows exchanges its answers, for KTO's estimate of the KL
            divergence. `None`: no such answers.

    Raises:
        `ValueError`: an unknown mode, a `max_length` below 1, or a block of less than 2 rows.
    """

    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    eos_token: str | None = None
    num_proc: int | None = None
    kl_block_size: int | None = None

    @classmethod
    def of(cls, config: Any, **overrides: Any) -> PreferenceOptions:
        """The options among a training config's fields; `overrides` win."""
        return read_options(cls, config, **overrides)

    def __post_init__(self):
        check_truncation(self.max_length, self.truncation_mode)
        if self.kl_block_size is not None and self.kl_block_size < 2:
            raise ValueError(
                f"kl_block_size={self.kl_block_size}: within fewer than 2 rows no answer can be given to another "
                "prompt, so the KL divergence cannot be estimated. Use a batch size of at least 2 per device."
            )


def prepare_preference_dataset(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    options: PreferenceOptions,
    *,
    name: str = "train",
) -> tuple[AnyDataset, PairReport]:
    """
    Make pairs ready for `DataCollatorForPreference`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows of `chosen` and `rejected`, and `prompt` or a common beginning; or of `prompt_ids`, `chosen_ids` and
            `rejected_ids`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor for text-only rows.
        options ([`PreferenceOptions`]):
            How rows become examples.
        name (`str`, defaults to `"train"`):
            Name of the dataset in messages and in the report.

    Returns:
        `tuple`: the dataset with `prompt_ids`, `chosen_ids` and `rejected_ids`, uncut, and its
        [`~trl.data.pair_report.PairReport`]. Rows with an empty answer, without a difference between the answers, and
        with a prompt that fills `max_length` are left out.

    Raises:
        `TypeError`: not a dataset.
        `DatasetFormatError`: columns are missing, or a row is not as it must be.
        `ValueError`: the dataset is empty, or the settings do not fit.
    """
    dataset = check_dataset(dataset, name)
    first = check_not_empty(dataset, name)
    check_columns(
        first,
        [PREFERENCE, IMPLICIT_PREFERENCE, _TOKENIZED_PAIR],
        "Preference training",
        f"{name} dataset",
        _number_of_rows(dataset),
    )
    task = PairTask(name, PAIR, options, tokenizer=get_tokenizer(processing_class))
    return _prepare(dataset, first, processing_class, task)


def prepare_reward_dataset(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    options: PreferenceOptions,
    *,
    name: str = "train",
) -> tuple[AnyDataset, PairReport]:
    """
    Make pairs ready for a reward model: each answer with its prompt as one sequence.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows of `chosen` and `rejected`, with `prompt` or without, or of `chosen_ids` and `rejected_ids`;
            optionally `margin`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer.
        options ([`PreferenceOptions`]):
            How rows become examples.
        name (`str`, defaults to `"train"`):
            Name of the dataset in messages and in the report.

    Returns:
        `tuple`: the dataset with `chosen_ids` and `rejected_ids`, and its [`~trl.data.pair_report.PairReport`]. Rows
        of which a side has more than `max_length` tokens are left out, and those that [`prepare_preference_dataset`]
        leaves out.

    Raises:
        As [`prepare_preference_dataset`]; also for a `margin` that is not a finite number.
    """
    dataset = _rename_legacy_columns(check_dataset(dataset, name), name)
    first = check_not_empty(dataset, name)
    check_columns(
        first,
        [IMPLICIT_PREFERENCE, _TOKENIZED_WHOLE_PAIR],
        "Reward modeling",
        f"{name} dataset",
        _number_of_rows(dataset),
    )
    task = PairTask(name, PAIR, options, tokenizer=get_tokenizer(processing_class), whole=True)
    return _prepare(dataset, first, processing_class, task)


def prepare_unpaired_dataset(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    options: PreferenceOptions,
    *,
    name: str = "train",
) -> tuple[AnyDataset, PairReport]:
    """
    Make labelled answers ready for `DataCollatorForUnpairedPreference`.

    Pairs are taken apart: a chosen answer, then the rejected one of a distant row, and so on, so that a few
    consecutive rows have both labels and different prompts. A stream is taken apart batch by batch.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows of `prompt`, `completion` and `label`, or pairs as for [`prepare_preference_dataset`]; or of
            `prompt_ids`, `completion_ids` and `label`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor for text-only rows.
        options ([`PreferenceOptions`]):
            How rows become examples.
        name (`str`, defaults to `"train"`):
            Name of the dataset in messages and in the report.

    Returns:
        `tuple`: the dataset with `prompt_ids`, `completion_ids`, `label` and, with a `kl_block_size`,
        `KL_completion_ids`; and its [`~trl.data.pair_report.PairReport`], which counts pairs as pairs.

    Raises:
        As [`prepare_preference_dataset`]; also for a `label` that is neither true nor false.
    """
    dataset = check_dataset(dataset, name)
    first = check_not_empty(dataset, name)
    shape = check_columns(
        first,
        [_TOKENIZED_UNPAIRED, _TOKENIZED_PAIR, UNPAIRED_PREFERENCE, PREFERENCE, IMPLICIT_PREFERENCE],
        "Unpaired preference training",
        f"{name} dataset",
        _number_of_rows(dataset),
    )
    paired = shape not in (_TOKENIZED_UNPAIRED, UNPAIRED_PREFERENCE)
    task = PairTask(name, PAIR if paired else UNPAIRED, options, tokenizer=get_tokenizer(processing_class))
    dataset, report = _prepare(dataset, first, processing_class, task)
    if isinstance(dataset, Dataset) and not len(dataset):
        return dataset, report
    if paired:
        dataset = unpair_tokenized(dataset, "chosen" in first, options.num_proc)
        if not report.streaming:
            report.desirable = report.undesirable = report.rows_kept
    if options.kl_block_size is not None and "KL_completion_ids" not in first:
        dataset = add_kl_completions(dataset, options.kl_block_size)
        _note_on_last_block(dataset, options.kl_block_size, report)
    return dataset, report


# ---------------------------------------------------------------------------------------------------------------------
# What the three have in common
# ---------------------------------------------------------------------------------------------------------------------


def _prepare(
    dataset: AnyDataset,
    first: Mapping[str, Any],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    task: PairTask,
) -> tuple[AnyDataset, PairReport]:
    report = PairReport(name=task.name, max_length=task.options.max_length)
    tokenized = set(task.token_columns) <= set(first)
    answers = None if tokenized else _tokenizer_for(first, processing_class, task)
    if isinstance(dataset, IterableDataset):
        report.streaming = True
        return _prepare_stream(dataset, answers, task, report), report
    dataset = _check_numbers(dataset, task)
    if answers is not None:
        _check_kinds(dataset, task, answers.checker, report)
        dataset = _tokenize(dataset, answers, task, report)
    return count_and_drop(dataset, task, report), report


def _number_of_rows(dataset: AnyDataset) -> int | None:
    return len(dataset) if isinstance(dataset, Dataset) else None


def _rename_legacy_columns(dataset: AnyDataset, name: str) -> AnyDataset:
    columns = dataset.column_names or list(next(iter(dataset), {}))
    legacy = {
        f"{side}_input_ids": f"{side}_ids"
        for side in ("chosen", "rejected")
        if f"{side}_input_ids" in columns and f"{side}_ids" not in columns
    }
    if legacy:
        warnings.warn(
            f"The {name} dataset has {' and '.join(f'`{column}`' for column in legacy)}; the names are "
            f"{' and '.join(f'`{column}`' for column in legacy.values())} now, and the old ones will be refused in a "
            f"later version. Rename them: dataset.rename_columns({legacy}).",
            FutureWarning,
            stacklevel=3,
        )
        dataset = dataset.rename_columns(legacy)
    return dataset


def _tokenizer_for(
    first: Mapping[str, Any], processing_class: PreTrainedTokenizerBase | ProcessorMixin, task: PairTask
) -> AnswerTokenizer:
    conversational = isinstance(first[task.answers[0]], (list, tuple, Mapping))
    template = resolve_chat_template(processing_class) if conversational else ""
    has_prompt = "prompt" in first
    columns = ("prompt", *task.answers) if has_prompt else task.answers
    return AnswerTokenizer(
        RowTokenizer(processing_class, eos_token=task.eos_token),
        PairChecker(task.name, columns, conversational, template),
        task.answers,
        has_prompt,
        task.whole,
    )


def _check_numbers(dataset: Dataset, task: PairTask) -> Dataset:
    """Labels and margins, which say nothing where they are no numbers; labels become booleans."""
    if task.answers == UNPAIRED:
        for values, indices in _iter_values(dataset, "label"):
            check_labels(values, indices, task.name)
        if dataset.features["label"] != Value("bool"):
            dataset = dataset.cast_column("label", Value("bool"))
    if task.whole and "margin" in dataset.column_names:
        for values, indices in _iter_values(dataset, "margin"):
            check_margins(values, indices, task.name)
    return dataset


def _iter_values(dataset: Dataset, column: str) -> Iterator[tuple[list, range]]:
    """The values of one column as Python objects, ten thousand rows at a time, and the numbers of the rows."""
    first_row = 0
    for batch in dataset.select_columns([column]).iter(batch_size=10_000):
        values = batch[column]
        yield values, range(first_row, first_row + len(values))
        first_row += len(values)


def _check_kinds(dataset: Dataset, task: PairTask, checker: PairChecker, report: PairReport) -> None:
    """Missing and mixed values of whole columns, found in Arrow before anything is tokenized; and unknown roles."""
    columns = [column for column in ("prompt", *task.answers) if column in dataset.column_names]
    shape = Shape("preference", tuple(columns))
    unknown: Counter[str] = Counter()
    for first_row, table in iter_tables(dataset, columns):
        check_rows(table, shape, "Preference training", f"the {task.name} dataset", first_row)
        unknown.update(checker.count_unknown_roles(table))
    if unknown:
        roles = ", ".join(f"{role!r} ({count:,} messages)" for role, count in unknown.most_common(5))
        report.notes.append(
            f"Roles that the chat template does not name: {roles}. See what it makes of them, with "
            "tokenizer.apply_chat_template(messages, tokenize=False)."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Map-style datasets
# ---------------------------------------------------------------------------------------------------------------------


def _tokenize(dataset: Dataset, answers: AnswerTokenizer, task: PairTask, report: PairReport) -> Dataset:
    content = fingerprint_processing_class(answers.row_tokenizer.processing_class)
    settings = [task.eos_token, list(task.answers), answers.has_prompt, task.whole]
    features = {**dataset.features, **{column: List(Value("int32")) for column in task.token_columns}}
    if not task.whole:
        features[MERGED] = Value("int32")
    if answers.finds_prompt:
        features["prompt"] = dataset.features["chosen"]
    dataset = dataset.map(
        answers,
        batched=True,
        with_indices=True,
        features=Features(features),
        new_fingerprint=fingerprint_step(dataset, "tokenize preferences", content, settings),
        **map_description(dataset, "Tokenizing", task.options.num_proc),
    )
    if not task.whole:
        tables = iter_tables(dataset, [MERGED])
        merged = np.concatenate([table[MERGED].to_numpy() for _, table in tables])
        count_merged_prompts(np.flatnonzero(merged), report)
        dataset = dataset.remove_columns(MERGED)
    return dataset


def _note_on_last_block(dataset: AnyDataset, block_size: int, report: PairReport) -> None:
    if isinstance(dataset, Dataset) and len(dataset) % block_size == 1:
        report.notes.append(
            f"The last block of {block_size} rows has one row only, so its answer stands in for that of another "
            "prompt in the estimate of the KL divergence."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Streamed datasets
# ---------------------------------------------------------------------------------------------------------------------


def _prepare_stream(
    dataset: IterableDataset, answers: AnswerTokenizer | None, task: PairTask, report: PairReport
) -> IterableDataset:
    steps = {"task": task, "report": report}
    dataset = dataset.map(
        _prepare_stream_batch, batched=True, with_indices=True, fn_kwargs={"answers": answers, **steps}
    )
    return dataset.filter(_keep_in_stream, batched=True, with_indices=True, fn_kwargs=steps)


def _prepare_stream_batch(
    rows: Mapping[str, list],
    indices: Sequence[int],
    answers: AnswerTokenizer | None,
    task: PairTask,
    report: PairReport,
) -> dict[str, list]:
    output: dict[str, list] = {}
    if task.answers == UNPAIRED:
        output["label"] = check_labels(rows.get("label") or [None] * len(indices), indices, task.name)
    if task.whole and "margin" in rows:
        check_margins(rows["margin"], indices, task.name)
    if answers is not None:
        output |= answers(rows, indices)
        if MERGED in output:
            count_merged_prompts(np.asarray(indices)[np.flatnonzero(output.pop(MERGED))], report)
    return output


def _keep_in_stream(
    rows: Mapping[str, list], indices: Sequence[int], task: PairTask, report: PairReport
) -> list[bool]:
    lost = task.cut(rows, indices).lost()
    report.count_batch(indices, lost)
    return (~np.any(list(lost.values()), axis=0)).tolist()
