"""
A dataset on its way to a language-modeling trainer: formatted, converted, tokenized, labelled, cut or packed, shuffled.

Each step is one `datasets.map` over batches, cached on disk under a fingerprint of the dataset, the content of the
tokenizer, and the settings (`trl.data.fingerprints`), so that a second run reads what the first one wrote.

Tokenizing does not depend on `max_length`: trying another limit, or packing, reuses the tokens. Rows are cut and
packed in Arrow, without a Python object per token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from .counting import count_examples, count_merged_prompts, count_packed_rows, iter_tables
from .dataset_steps import check_dataset, check_not_empty, map_arrow, map_description, read_options, resolve_eos_token
from .fingerprints import fingerprint_processing_class, fingerprint_step
from .formats import (
    CONVERSATION,
    PROMPT_COMPLETION,
    SHAREGPT,
    TOKENIZED,
    DatasetFormatError,
    Shape,
    check_columns,
    check_rows,
    describe_rows,
    language_modeling,
)
from .packing import pack_dataset
from .preflight import PreparationReport
from .templating import maybe_convert_to_chatml
from .token_lists import (
    TOKEN_COLUMNS,
    TokenLists,
    build_labels,
    check_truncation,
    count_trained,
    truncate_table,
)
from .tokenization import RowTokenizer, get_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

PACKING_STRATEGIES = ("bfd", "bfd_split", "wrapped")


@dataclass(frozen=True)
class LanguageModelingOptions:
    """
    How rows become training examples.

    Args:
        dataset_text_field (`str`, defaults to `"text"`):
            Column of plain text.
        eos_token (`str`, *optional*):
            Appended to plain text and plain completions. `None`: the tokenizer's own, if it has one.
        completion_only_loss (`bool`, *optional*):
            Train the completion only. `None`: if the first row has `prompt` and `completion`.
        assistant_only_loss (`bool`, defaults to `False`):
            Train the assistant's turns only.
        max_length (`int` or `None`, defaults to `1024`):
            Longest example, or length of a packed row, in tokens. `None` cuts nothing.
        truncation_mode (`str`, defaults to `"keep_start"`):
            `"keep_start"` or `"keep_end"`. Packing keeps the start.
        packing (`bool`, defaults to `False`):
            Put several examples into one row.
        packing_strategy (`str`, defaults to `"bfd"`):
            `"bfd"`, `"bfd_split"` or `"wrapped"`.
        shuffle (`bool`, defaults to `False`):
            Shuffle the examples, before packing and at the end.
        seed (`int`, defaults to `42`):
            For shuffling.
        num_proc (`int`, *optional*):
            Processes that work on a map-style dataset.

    Raises:
        `ValueError`: an unknown mode or strategy, a `max_length` below 1, or packing without one.
    """

    dataset_text_field: str = "text"
    eos_token: str | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    packing: bool = False
    packing_strategy: str = "bfd"
    shuffle: bool = False
    seed: int = 42
    num_proc: int | None = None

    @classmethod
    def of(cls, config: Any, **overrides: Any) -> LanguageModelingOptions:
        """The options among a training config's fields; `overrides` win."""
        return read_options(cls, config, **overrides)

    def __post_init__(self):
        check_truncation(self.max_length, self.truncation_mode)
        if not self.packing:
            return
        if self.max_length is None:
            raise ValueError(
                "packing=True needs max_length, the length of a packed row in tokens, but max_length is None. Set it, "
                "e.g. max_length=1024, or packing=False."
            )
        if self.packing_strategy not in PACKING_STRATEGIES:
            raise ValueError(
                f"packing_strategy={self.packing_strategy!r} is unknown; use one of "
                f"{', '.join(map(repr, PACKING_STRATEGIES))}."
            )


def prepare_language_modeling_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    options: LanguageModelingOptions,
    *,
    formatting_func: Callable[[dict], str] | None = None,
    name: str = "train",
) -> tuple[Dataset | IterableDataset, PreparationReport]:
    """
    Make a dataset ready for [`~trl.data.collators.DataCollatorForLanguageModeling`].

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows of `messages`, `conversations`, `prompt` and `completion`, plain text, or `input_ids`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor for text-only rows.
        options ([`LanguageModelingOptions`]):
            How rows become examples.
        formatting_func (`Callable[[dict], str]`, *optional*):
            Makes the text of a row; ignored, with a warning, where the rows are tokenized already.
        name (`str`, defaults to `"train"`):
            Name of the dataset in messages and in the report.

    Returns:
        `tuple`: the dataset with `input_ids` and `labels` (and `seq_lengths` where documents are packed apart), and
        its [`~trl.data.preflight.PreparationReport`].

    Raises:
        `TypeError`: not a dataset.
        `DatasetFormatError`: columns are missing, or rows differ in kind.
        `ValueError`: the settings do not fit the rows, or nothing is left to train on.
    """
    dataset = check_dataset(dataset, name)
    first = check_not_empty(dataset, name)
    tokenizer = get_tokenizer(processing_class)
    eos_token = resolve_eos_token(tokenizer, options.eos_token)
    if "input_ids" in first:
        if formatting_func is not None:
            warnings.warn(
                f"The {name} dataset is tokenized already (it has `input_ids`), so formatting_func is ignored.",
                UserWarning,
                stacklevel=2,
            )
        _check_tokenized(first, options, name)
        row_tokenizer = None
    else:
        dataset, first, options = _to_messages_or_text(dataset, first, options, formatting_func, name)
        row_tokenizer = RowTokenizer(
            processing_class, options.dataset_text_field, eos_token, options.assistant_only_loss
        )
    masks = _masks_for(first, options)
    report = PreparationReport(name=name, max_length=options.max_length, notes=_notes_on_masks(first, masks))
    if isinstance(dataset, IterableDataset):
        report.streaming = True
        return _prepare_stream(dataset, list(first), row_tokenizer, options, masks, report), report
    dataset = _tokenize_and_label(dataset, row_tokenizer, options, masks, report)
    return _cut_or_pack(dataset, tokenizer, eos_token, options, report), report


def check_unprepared_columns(column_names: Sequence[str], name: str = "train") -> None:
    """
    Check a text dataset whose preparation is skipped: masks alone do not reach the collator.

    Raises:
        `ValueError`: there is a mask column but no `labels`.
    """
    masks = [mask for mask in ("completion_mask", "assistant_masks") if mask in column_names]
    if masks and "labels" not in column_names:
        raise ValueError(
            f"The {name} dataset has {' and '.join(f'`{mask}`' for mask in masks)} but no `labels`, and preparation is "
            "skipped, so the masks would have no effect and every token would be trained. Add `labels` (the input_ids "
            "where a token is trained, -100 elsewhere), or leave skip_prepare_dataset out."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Before tokenizing
# ---------------------------------------------------------------------------------------------------------------------


def _format_row(row: dict[str, Any], formatting_func: Callable[[dict], str]) -> dict[str, str]:
    text = formatting_func(row)
    if not isinstance(text, str):
        raise TypeError(
            f"formatting_func must return one string per row, but returned {type(text).__name__}. It is called with "
            "one row (a dict), not with a batch."
        )
    return {"text": text}


def _to_messages_or_text(
    dataset: Dataset | IterableDataset,
    first: dict[str, Any],
    options: LanguageModelingOptions,
    formatting_func: Callable[[dict], str] | None,
    name: str,
) -> tuple[Dataset | IterableDataset, dict[str, Any], LanguageModelingOptions]:
    """Apply `formatting_func`, check the columns and rename ShareGPT's; also returns the first row as it is then."""
    if formatting_func is not None:
        if options.completion_only_loss:
            raise ValueError(
                "formatting_func makes one text of a row, so that prompt and completion cannot be told apart any "
                "more, but completion_only_loss=True needs them apart. Drop formatting_func and map the dataset to "
                "`prompt` and `completion`, or set completion_only_loss=False."
            )
        replaced = [column for column in _REPLACED_BY_TEXT if column in first]
        first = {**_without(first, replaced), **_format_row(first, formatting_func)}
        dataset = dataset.map(
            _format_row,
            fn_kwargs={"formatting_func": formatting_func},
            remove_columns=replaced,
            **map_description(dataset, "Formatting", options.num_proc),
        )
        options = replace(options, dataset_text_field="text", completion_only_loss=False)

    num_rows = len(dataset) if isinstance(dataset, Dataset) else None
    _check_columns(first, options, name, num_rows)
    converted = maybe_convert_to_chatml(first)
    if converted != first:
        dataset = dataset.map(
            maybe_convert_to_chatml,
            remove_columns=[column for column in first if column not in converted],
            **map_description(dataset, "Converting", options.num_proc),
        )
    shape = _check_columns(converted, options, name, num_rows)
    if isinstance(dataset, Dataset):
        for first_row, table in iter_tables(dataset, shape.columns):
            check_rows(table, shape, "Language modeling", f"the {name} dataset", first_row)
    return dataset, converted, options


# A text made of a row stands for these columns, which would otherwise be tokenized in its place.
_REPLACED_BY_TEXT = ("messages", "conversations", "prompt", "completion")


def _without(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    return {column: value for column, value in row.items() if column not in columns}


def _check_columns(
    columns: Iterable[str], options: LanguageModelingOptions, name: str, num_rows: int | None = None
) -> Shape:
    accepted = [PROMPT_COMPLETION, CONVERSATION, SHAREGPT, language_modeling(options.dataset_text_field), TOKENIZED]
    return check_columns(
        columns, accepted, "Language modeling", f"{name} dataset", num_rows, hint="give a formatting_func"
    )


def _check_tokenized(first: Mapping[str, Any], options: LanguageModelingOptions, name: str) -> None:
    if options.assistant_only_loss and "labels" not in first and "assistant_masks" not in first:
        raise DatasetFormatError(
            f"assistant_only_loss=True, but the {name} dataset is tokenized and has neither `assistant_masks` nor "
            "finished `labels`, so the assistant's tokens cannot be told from the others. Add one of the two, or give "
            "the dataset untokenized, as `messages`."
        )
    if "seq_lengths" in first and options.packing:
        raise DatasetFormatError(
            f"The {name} dataset is packed already (it has `seq_lengths`), and packing it again would join its "
            "documents. Set packing=False and padding_free=True, or drop the column to pack each row as one document."
        )


def _masks_for(first: Mapping[str, Any], options: LanguageModelingOptions) -> list[str]:
    """Names of the mask columns that decide the labels."""
    completion_only = options.completion_only_loss
    if completion_only is None:
        completion_only = "prompt" in first and "completion" in first
    masks = ["completion_mask"] if completion_only else []
    return [*masks, "assistant_masks"] if options.assistant_only_loss else masks


def _notes_on_masks(first: Mapping[str, Any], masks: Sequence[str]) -> list[str]:
    """Where the settings and the rows do not go together, and more is trained than one may think."""
    if "labels" in first:
        return []
    options = {"completion_mask": "completion_only_loss", "assistant_masks": "assistant_only_loss"}
    notes = [
        f"`{mask}` is there but not used, since {option} is off: the tokens it masks are trained."
        for mask, option in options.items()
        if mask in first and mask not in masks
    ]
    if "completion_mask" in masks and not ({"completion", "completion_mask"} & set(first)):
        notes.append("completion_only_loss is on, but there is no completion: every token is trained.")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and labels
# ---------------------------------------------------------------------------------------------------------------------


def _token_lists(
    rows: Mapping[str, list], indices: Sequence[int] | None, row_tokenizer: RowTokenizer | None, masks: Sequence[str]
) -> tuple[dict[str, TokenLists], list[int] | None]:
    """
    Tokens, labels, and the masks that the labels do not contain, of a batch of rows.

    Also the number of prompt tokens that merged with the completion, where there are prompts.
    """
    encoded = rows if row_tokenizer is None else row_tokenizer(rows, indices)
    lists = {
        column: TokenLists.from_lists(encoded[column], np.int8 if "mask" in column else np.int32)
        for column in TOKEN_COLUMNS
        if column in encoded
    }
    if "labels" not in lists:
        used = {mask: lists.pop(mask) for mask in masks if mask in lists}
        lists["labels"] = build_labels(lists["input_ids"], used)
    return lists, encoded.get("prompt_tokens_merged")


def _tokenize_batch(
    rows: Mapping[str, list], indices: Sequence[int], row_tokenizer: RowTokenizer, masks: Sequence[str]
) -> dict[str, Any]:
    lists, merged = _token_lists(rows, indices, row_tokenizer, masks)
    batch = {name: column.to_arrays() for name, column in lists.items()}
    return batch if merged is None else {**batch, "prompt_tokens_merged": np.array(merged, np.int32)}


def _label_batch(table: pa.Table, masks: Sequence[str]) -> pa.Table:
    used = {mask: TokenLists.from_arrow(table[mask]) for mask in masks if mask in table.column_names}
    labels = build_labels(TokenLists.from_arrow(table["input_ids"]), used)
    return table.drop_columns(list(used)).append_column("labels", labels.to_arrow())


def _cut_batch(table: pa.Table, max_length: int | None, mode: str) -> pa.Table:
    """Cut the rows, and drop those without a trained token."""
    table = truncate_table(table, max_length, mode)
    return table.filter(pa.array(count_trained(table) > 0))


def encode_rows(
    rows: Sequence[Mapping[str, Any]],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    options: LanguageModelingOptions,
    formatting_func: Callable[[dict], str] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """
    Tokens and labels of single rows, neither cut nor dropped: for looking at them.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            Unprepared rows.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor for text-only rows.
        options ([`LanguageModelingOptions`]):
            How rows become examples.
        formatting_func (`Callable[[dict], str]`, *optional*):
            Makes the text of a row.

    Returns:
        `list[tuple[list[int], list[int]]]`: `input_ids` and `labels` of each row.
    """
    rows = [dict(row) for row in rows]
    row_tokenizer = None
    if "input_ids" not in rows[0]:
        if formatting_func is not None:
            rows = [_format_row(row, formatting_func) for row in rows]
            options = replace(options, dataset_text_field="text", completion_only_loss=False)
        _check_columns(rows[0], options, "previewed")
        rows = [maybe_convert_to_chatml(row) for row in rows]
        eos_token = resolve_eos_token(get_tokenizer(processing_class), options.eos_token)
        row_tokenizer = RowTokenizer(
            processing_class, options.dataset_text_field, eos_token, options.assistant_only_loss
        )
    masks = _masks_for(rows[0], options)
    batch = {column: [row.get(column) for row in rows] for column in rows[0]}
    lists, _ = _token_lists(batch, range(len(rows)), row_tokenizer, masks)
    arrays = zip(lists["input_ids"].to_arrays(), lists["labels"].to_arrays(), strict=True)
    return [(input_ids.tolist(), labels.tolist()) for input_ids, labels in arrays]


# ---------------------------------------------------------------------------------------------------------------------
# Map-style datasets
# ---------------------------------------------------------------------------------------------------------------------


def _tokenize_and_label(
    dataset: Dataset,
    row_tokenizer: RowTokenizer | None,
    options: LanguageModelingOptions,
    masks: Sequence[str],
    report: PreparationReport,
) -> Dataset:
    report.rows_in = len(dataset)
    if row_tokenizer is not None:
        dataset = _tokenize_table(dataset, row_tokenizer, options, masks, report)
    else:
        columns = [column for column in (*TOKEN_COLUMNS, "seq_lengths") if column in dataset.column_names]
        for first_row, table in iter_tables(dataset, columns):
            rows = dict(zip(table.column_names, table.columns, strict=True))
            _check_tokens(rows, range(first_row, first_row + len(table)), options)
        if "labels" not in columns:
            dataset = map_arrow(dataset, "Labelling", _label_batch, options.num_proc, masks=list(masks))
    return dataset


def _cut_or_pack(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    eos_token: str | None,
    options: LanguageModelingOptions,
    report: PreparationReport,
) -> Dataset:
    limit, mode = _limit_before_packing(options)
    needs_cut = count_examples(dataset, tokenizer, eos_token, limit, mode, report)
    report.raise_if_unusable()
    if needs_cut:
        dataset = map_arrow(dataset, "Truncating", _cut_batch, options.num_proc, max_length=limit, mode=mode)
    if options.packing:
        if options.shuffle:
            dataset = dataset.shuffle(seed=options.seed)
        dataset = pack_dataset(
            dataset.select_columns(["input_ids", "labels"]),
            options.max_length,
            options.packing_strategy,
            map_description(dataset, "Packing", options.num_proc),
        )
        kept = count_packed_rows(dataset, options.packing_strategy, options.max_length, report)
        report.raise_if_unusable()
        if not kept.all():
            dataset = map_arrow(dataset, "Filtering", _cut_batch, options.num_proc, max_length=None, mode="keep_start")
    return dataset.shuffle(seed=options.seed) if options.shuffle else dataset


def _limit_before_packing(options: LanguageModelingOptions) -> tuple[int | None, str]:
    """Best-fit packing keeps the start of a longer example; cutting it first shows what is lost. The others split."""
    if not options.packing:
        return options.max_length, options.truncation_mode
    return (options.max_length if options.packing_strategy == "bfd" else None), "keep_start"


def _tokenize_table(
    dataset: Dataset,
    row_tokenizer: RowTokenizer,
    options: LanguageModelingOptions,
    masks: Sequence[str],
    report: PreparationReport,
) -> Dataset:
    settings = [row_tokenizer.text_field, row_tokenizer.eos_token, row_tokenizer.assistant_mask, list(masks)]
    content = fingerprint_processing_class(row_tokenizer.processing_class)
    dataset = dataset.map(
        _tokenize_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={"row_tokenizer": row_tokenizer, "masks": masks},
        new_fingerprint=fingerprint_step(dataset, "tokenize", content, settings),
        **map_description(dataset, "Tokenizing", options.num_proc),
    )
    if "prompt_tokens_merged" in dataset.column_names:
        tables = iter_tables(dataset, ["prompt_tokens_merged"])
        merged = np.concatenate([table["prompt_tokens_merged"].to_numpy() for _, table in tables])
        count_merged_prompts(np.flatnonzero(merged), report)
        dataset = dataset.remove_columns("prompt_tokens_merged")
    return dataset


def _check_tokens(rows: Mapping[str, Any], indices: Sequence[int], options: LanguageModelingOptions) -> None:
    """Refuse tokenized rows that lack tokens, or are packed and over the limit; lists or Arrow columns."""
    for column in TOKEN_COLUMNS:
        if column in rows:
            values = rows[column]
            missing = values.is_null() if isinstance(values, pa.ChunkedArray) else [value is None for value in values]
            lost = np.asarray(indices)[np.flatnonzero(missing)]
            if len(lost):
                raise DatasetFormatError(
                    f"There is no `{column}` (None) in {describe_rows(lost)} of the dataset. Drop such rows, e.g. "
                    f'dataset.filter(lambda row: row["{column}"] is not None).'
                )
    if "seq_lengths" in rows and options.max_length is not None:
        packed = rows["input_ids"]
        lists = TokenLists.from_arrow if isinstance(packed, pa.ChunkedArray) else TokenLists.from_lists
        over = np.asarray(indices)[np.flatnonzero(lists(packed).lengths > options.max_length)]
        if len(over):
            raise DatasetFormatError(
                f"The dataset is packed (it has `seq_lengths`), but {describe_rows(over)} have more than "
                f"max_length={options.max_length} tokens, and cutting them would contradict `seq_lengths`. Raise "
                "max_length, or set it to None."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Streamed datasets
# ---------------------------------------------------------------------------------------------------------------------


def _prepare_stream(
    dataset: IterableDataset,
    columns: list[str],
    row_tokenizer: RowTokenizer | None,
    options: LanguageModelingOptions,
    masks: Sequence[str],
    report: PreparationReport,
) -> IterableDataset:
    dataset = dataset.map(
        _encode_stream_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={
            "row_tokenizer": row_tokenizer,
            "masks": masks,
            "options": options,
            "report": report,
        },
        remove_columns=columns,
    )
    if options.packing:
        if options.shuffle:
            dataset = dataset.shuffle(seed=options.seed)
        dataset = pack_dataset(dataset, options.max_length, options.packing_strategy)
    return dataset.shuffle(seed=options.seed) if options.shuffle else dataset


def _encode_stream_batch(
    rows: Mapping[str, list],
    indices: Sequence[int],
    row_tokenizer: RowTokenizer | None,
    masks: Sequence[str],
    options: LanguageModelingOptions,
    report: PreparationReport,
) -> dict[str, list]:
    """All steps on one batch of a stream; rows without a trained token end here, and are counted."""
    if row_tokenizer is None:
        _check_tokens(rows, indices, options)
    lists, merged = _token_lists(rows, indices, row_tokenizer, masks)
    if merged is not None:
        count_merged_prompts(np.asarray(indices)[np.flatnonzero(merged)], report)
    table = pa.table({name: column.to_arrow() for name, column in lists.items()})
    trained_uncut = count_trained(table)
    table = truncate_table(table, *_limit_before_packing(options))
    trained = count_trained(table)
    report.count_stream(indices, trained_uncut, trained)
    kept = trained > 0
    table = table.filter(pa.array(kept))
    if options.packing:
        return {name: table[name].to_pylist() for name in ("input_ids", "labels")}
    others = {
        name: [value for value, keep in zip(column, kept, strict=True) if keep]
        for name, column in rows.items()
        if name not in TOKEN_COLUMNS
    }
    return {**others, **table.to_pydict()}
