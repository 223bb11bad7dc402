"""
A dataset on its way to a language-modeling trainer: formatted, converted, tokenized, labelled, cut or packed, shuffled.

Each step is one `datasets.map` over batches, cached on disk under a fingerprint computed here from the content of
dataset, tokenizer and settings. A tokenizer object changes its state when it is used, so that pickling it, as
`datasets` would, gives another fingerprint after every use; its content stays.

Tokenizing does not depend on `max_length`: trying another limit, or packing, reuses the tokens. Rows are cut and
packed in Arrow, without a Python object per token.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import transformers
from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin

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
from .packing import pack_dataset, packing_efficiency
from .preflight import CUT_OFF, NO_TRAINED_TOKEN, PACKED_CONTEXT, PreparationReport
from .templating import maybe_convert_to_chatml
from .tokenization import (
    IGNORE_INDEX,
    TOKEN_COLUMNS,
    TRUNCATION_MODES,
    RowTokenizer,
    TokenLists,
    build_labels,
    count_trained,
    get_tokenizer,
    truncate_table,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PACKING_STRATEGIES = ("bfd", "bfd_split", "wrapped")

# Part of every fingerprint: raise it when the same input is to give other tokens, so that old caches are not used.
_ROUTINE_VERSION = 1

_ROWS_AT_ONCE = 10_000


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

    def __post_init__(self):
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r} is unknown; use one of "
                f"{', '.join(map(repr, TRUNCATION_MODES))}."
            )
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} leaves no token; give at least 1, or None to cut nothing.")
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
    dataset = _check_dataset(dataset, name)
    first = _first_row(dataset, name)
    tokenized = "input_ids" in first
    if tokenized and formatting_func is not None:
        warnings.warn(
            f"The {name} dataset is tokenized already (it has `input_ids`), so formatting_func is ignored.",
            UserWarning,
            stacklevel=2,
        )
    if not tokenized:
        dataset, options = _apply_formatting(dataset, options, formatting_func)
        _check_columns(list(next(iter(dataset))), options, name, _num_rows(dataset))
        dataset = _convert_to_chatml(dataset)
        first = next(iter(dataset))
        shape = _check_columns(list(first), options, name)
        if isinstance(dataset, Dataset):
            check_rows(dataset, shape, "Language modeling", f"the {name} dataset")
    masks = _masks_for(first, options)
    if tokenized:
        _check_assistant_masks(first, options, name)
    row_tokenizer = None if tokenized else _row_tokenizer(processing_class, options)
    report = PreparationReport(name=name, max_length=options.max_length)
    report.notes += _notes_on_masks(first, masks)
    if isinstance(dataset, IterableDataset):
        report.streaming = True
        return _prepare_stream(dataset, row_tokenizer, options, masks, report), report
    tokenizer = get_tokenizer(processing_class)
    return _prepare_table(dataset, row_tokenizer, tokenizer, options, masks, report), report


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


def _check_dataset(dataset: Any, name: str) -> Dataset | IterableDataset:
    if not isinstance(dataset, (Dataset, IterableDataset)):
        hint = ""
        if isinstance(dataset, Mapping):
            hint = f" It holds several ({', '.join(map(repr, dataset))}); pass one of them, e.g. dataset[{next(iter(dataset), 'train')!r}]."
        elif isinstance(dataset, (list, tuple)):
            hint = " Make one of a list of rows with datasets.Dataset.from_list(rows)."
        raise TypeError(
            f"The {name} dataset must be a datasets.Dataset or IterableDataset, found {type(dataset).__name__}.{hint}"
        )
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None) if dataset._formatting is not None else dataset
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset has a transform (set_transform or with_transform) that runs when a row is read, so "
            "it cannot be prepared ahead. Apply it with dataset.map(...) and reset the format with "
            'dataset.with_format(None), or skip preparation with dataset_kwargs={"skip_prepare_dataset": True}.'
        )
    return dataset.with_format(None)


def _first_row(dataset: Dataset | IterableDataset, name: str) -> dict[str, Any]:
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"The {name} dataset is empty: it has 0 rows, and at least 1 is needed.")
    return row


def _num_rows(dataset: Dataset | IterableDataset) -> int | None:
    return None if isinstance(dataset, IterableDataset) else len(dataset)


def _format_row(row: dict[str, Any], formatting_func: Callable[[dict], str]) -> dict[str, str]:
    text = formatting_func(row)
    if not isinstance(text, str):
        raise TypeError(
            f"formatting_func must return one string per row, but returned {type(text).__name__}. It is called with "
            "one row (a dict), not with a batch."
        )
    return {"text": text}


def _apply_formatting(
    dataset: Dataset | IterableDataset,
    options: LanguageModelingOptions,
    formatting_func: Callable[[dict], str] | None,
) -> tuple[Dataset | IterableDataset, LanguageModelingOptions]:
    """Put the text that `formatting_func` makes into column `text`, which is then the only thing to tokenize."""
    if formatting_func is None:
        return dataset, options
    if options.completion_only_loss:
        raise ValueError(
            "formatting_func makes one text of a row, so that prompt and completion cannot be told apart any more, but "
            "completion_only_loss=True needs them apart. Drop formatting_func and map the dataset to `prompt` and "
            "`completion`, or set completion_only_loss=False."
        )
    first = next(iter(dataset))
    dataset = dataset.map(
        _format_row,
        fn_kwargs={"formatting_func": formatting_func},
        remove_columns=[column for column in ("messages", "conversations", "prompt", "completion") if column in first],
        **_description(dataset, "Formatting", options.num_proc),
    )
    return dataset, replace(options, dataset_text_field="text", completion_only_loss=False)


def _convert_to_chatml(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Rename `from`/`value` to `role`/`content` and `conversations` to `messages`, where the rows use these names."""
    row = next(iter(dataset))
    converted = maybe_convert_to_chatml(dict(row))
    if converted == row:
        return dataset
    replaced = [column for column in row if column not in converted]
    return dataset.map(maybe_convert_to_chatml, remove_columns=replaced, **_description(dataset, "Converting"))


def _check_columns(
    columns: Sequence[str], options: LanguageModelingOptions, name: str, num_rows: int | None = None
) -> Shape:
    accepted = [PROMPT_COMPLETION, CONVERSATION, SHAREGPT, language_modeling(options.dataset_text_field), TOKENIZED]
    return check_columns(
        columns, accepted, "Language modeling", f"{name} dataset", num_rows, hint="give a formatting_func"
    )


def _check_assistant_masks(first: Mapping[str, Any], options: LanguageModelingOptions, name: str) -> None:
    if options.assistant_only_loss and "labels" not in first and "assistant_masks" not in first:
        raise DatasetFormatError(
            f"assistant_only_loss=True, but the {name} dataset is tokenized and has neither `assistant_masks` nor "
            "finished `labels`, so the assistant's tokens cannot be told from the others. Add one of the two, or give "
            "the dataset untokenized, as `messages`."
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


def _row_tokenizer(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, options: LanguageModelingOptions
) -> RowTokenizer:
    return RowTokenizer(
        processing_class,
        text_field=options.dataset_text_field,
        eos_token=_resolve_eos_token(get_tokenizer(processing_class), options),
        assistant_mask=options.assistant_only_loss,
    )


def _resolve_eos_token(tokenizer: PreTrainedTokenizerBase, options: LanguageModelingOptions) -> str | None:
    if options.eos_token is None:
        return tokenizer.eos_token
    if options.eos_token not in tokenizer.get_vocab():
        near = difflib.get_close_matches(options.eos_token, tokenizer.all_special_tokens, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"eos_token={options.eos_token!r} is not in the vocabulary of the tokenizer, so the model could never "
            f"produce it.{hint} Special tokens: {', '.join(map(repr, tokenizer.all_special_tokens))}."
        )
    return options.eos_token


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints
# ---------------------------------------------------------------------------------------------------------------------


def fingerprint_processing_class(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """
    A hash of what a tokenizer does, equal in every process and before and after its use.

    It covers the vocabulary, merges, normalization and special tokens, and the chat template; not the padding and
    truncation that the last call happened to ask for.
    """
    tokenizer = get_tokenizer(processing_class)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str()
        # The text begins with the version, then the truncation and padding of the last call.
        content = content[max(content.find('"added_tokens"'), 0) :]
    else:
        content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs], default=str)
    template = tokenizer.chat_template
    processor_template = processing_class.chat_template if isinstance(processing_class, ProcessorMixin) else None
    return _hash(
        type(processing_class).__qualname__,
        type(tokenizer).__qualname__,
        content,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        [template, processor_template],
    )


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _fingerprint(dataset: Dataset, step: str, *parts: Any) -> str:
    versions = [_ROUTINE_VERSION, transformers.__version__]
    return _hash(dataset._fingerprint, step, versions, parts)


def _description(dataset: Dataset | IterableDataset, verb: str, num_proc: int | None = None) -> dict[str, Any]:
    """Arguments of `map` that only a map-style dataset takes."""
    return {} if isinstance(dataset, IterableDataset) else {"desc": f"{verb} dataset", "num_proc": num_proc}


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
    if row_tokenizer is None:
        _check_no_missing_tokens(rows, indices)
        encoded = rows
    else:
        encoded = row_tokenizer(rows, indices)
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
        _check_columns(list(rows[0]), options, "previewed")
        rows = [maybe_convert_to_chatml(row) for row in rows]
        row_tokenizer = _row_tokenizer(processing_class, options)
    masks = _masks_for(rows[0], options)
    batch = {column: [row.get(column) for row in rows] for column in rows[0]}
    lists, _ = _token_lists(batch, range(len(rows)), row_tokenizer, masks)
    arrays = zip(lists["input_ids"].to_arrays(), lists["labels"].to_arrays(), strict=True)
    return [(input_ids.tolist(), labels.tolist()) for input_ids, labels in arrays]


# ---------------------------------------------------------------------------------------------------------------------
# Map-style datasets
# ---------------------------------------------------------------------------------------------------------------------


def _prepare_table(
    dataset: Dataset,
    row_tokenizer: RowTokenizer | None,
    tokenizer: PreTrainedTokenizerBase,
    options: LanguageModelingOptions,
    masks: Sequence[str],
    report: PreparationReport,
) -> Dataset:
    report.rows_in = len(dataset)
    if row_tokenizer is not None:
        dataset = _tokenize_table(dataset, row_tokenizer, options, masks, report)
    else:
        for number, table in enumerate(_tables(dataset, [c for c in TOKEN_COLUMNS if c in dataset.column_names])):
            columns = dict(zip(table.column_names, table.columns, strict=True))
            first_row = number * _ROWS_AT_ONCE
            _check_no_missing_tokens(columns, range(first_row, first_row + len(table)))
        if "labels" not in dataset.column_names:
            dataset = _map_arrow(dataset, "Labelling", _label_batch, options, masks=list(masks))

    limit, mode = _limit_before_packing(options)
    needs_cut = _measure(dataset, tokenizer, limit, mode, report)
    report.raise_if_unusable()
    if needs_cut:
        dataset = _map_arrow(dataset, "Truncating", _cut_batch, options, max_length=limit, mode=mode)
    if options.packing:
        dataset = _pack(dataset, options, report)
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
        new_fingerprint=_fingerprint(dataset, "tokenize", content, settings),
        **_description(dataset, "Tokenizing", options.num_proc),
    )
    if "prompt_tokens_merged" in dataset.column_names:
        merged = np.concatenate(
            [np.asarray(batch["prompt_tokens_merged"]) for batch in _tables(dataset, ["prompt_tokens_merged"])]
        )
        _warn_about_merged_prompts(np.flatnonzero(merged), report)
        dataset = dataset.remove_columns("prompt_tokens_merged")
    return dataset


def _warn_about_merged_prompts(rows: np.ndarray, report: PreparationReport) -> None:
    if not len(rows):
        return
    if not report.prompts_merged.count:
        logger.warning(
            "%s dataset: the prompt tokenized alone is not the beginning of prompt and completion together (%s). The "
            "tokens from where they part are counted as completion. Prompts that end in a space, and chat templates "
            "whose generation prompt is not how an assistant turn begins, cause this.",
            report.name,
            describe_rows(rows.tolist()),
        )
    report.prompts_merged.add(rows.tolist())


def _check_no_missing_tokens(rows: Mapping[str, Any], indices: Sequence[int]) -> None:
    """Refuse None where tokens are expected, in a batch of lists or in an Arrow table's columns."""
    for column in TOKEN_COLUMNS:
        if column in rows:
            values = rows[column]
            missing = (
                values.is_null().to_numpy() if isinstance(values, pa.ChunkedArray) else [v is None for v in values]
            )
            lost = np.asarray(indices)[np.flatnonzero(missing)]
            if len(lost):
                raise DatasetFormatError(
                    f"There is no `{column}` (None) in {describe_rows(lost)} of the dataset. Drop such rows, e.g. "
                    f'dataset.filter(lambda row: row["{column}"] is not None).'
                )


def _map_arrow(
    dataset: Dataset, verb: str, function: Callable[..., pa.Table], options: LanguageModelingOptions, **kwargs: Any
) -> Dataset:
    return (
        dataset.with_format("arrow")
        .map(
            function,
            batched=True,
            fn_kwargs=kwargs,
            new_fingerprint=_fingerprint(dataset, verb, kwargs),
            **_description(dataset, verb, options.num_proc),
        )
        .with_format(None)
    )


def _tables(dataset: Dataset, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of some columns as Arrow tables."""
    return dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)


def _measure(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    mode: str,
    report: PreparationReport,
) -> bool:
    """Count into the report what the cut will leave; True if there is something to cut or to drop."""
    lengths, trained_uncut, trained, stops, kept_lengths = [], [], [], [], []
    stop_ids = np.array([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [], np.int64)
    for table in _tables(dataset, ["input_ids", "labels"]):
        lengths.append(TokenLists.from_arrow(table["input_ids"]).lengths)
        trained_uncut.append(count_trained(table))
        table = truncate_table(table, limit, mode)
        trained.append(count_trained(table))
        labels = TokenLists.from_arrow(table["labels"])
        kept_lengths.append(labels.lengths)
        stops.append(labels.count(np.isin(labels.values, stop_ids)) > 0)
    lengths, trained_uncut, trained, stops, kept_lengths = map(
        np.concatenate, (lengths, trained_uncut, trained, stops, kept_lengths)
    )
    kept = trained > 0
    truncated = kept_lengths < lengths
    report.rows_kept = int(kept.sum())
    report.drop(NO_TRAINED_TOKEN, np.flatnonzero(trained_uncut == 0))
    report.drop(CUT_OFF, np.flatnonzero((trained_uncut > 0) & ~kept))
    report.tokens_trained = int(trained.sum())
    report.tokens_context = int(kept_lengths[kept].sum()) - report.tokens_trained
    report.rows_truncated = int((truncated & kept).sum())
    report.tokens_cut = int((lengths - kept_lengths)[kept].sum())
    report.longest, report.median = int(lengths.max()), float(np.median(lengths))
    if len(stop_ids) and kept.any():
        report.stop_tokens = [tokenizer.eos_token]
        report.stop_token_share = float(stops[kept].mean())
        whole = kept & ~truncated
        if whole.any() and stops[whole].mean() < 0.5:
            report.notes.append(_note_on_stop_token(dataset, tokenizer, np.flatnonzero(whole)[:1000]))
    return bool(truncated.any() or not kept.all())


def _note_on_stop_token(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, rows: np.ndarray) -> str:
    """Most examples do not train the end-of-sequence token: say so, and which token they end with instead."""
    added = np.array(sorted(tokenizer.get_added_vocab().values()), np.int64)
    endings = Counter()
    for labels in dataset.select(rows)["labels"]:
        trained = np.array([label for label in labels if label != IGNORE_INDEX])[-2:]
        endings.update(trained[np.isin(trained, added)][-1:].tolist())
    note = (
        f"{tokenizer.eos_token} is trained in few examples, so the model may not learn to stop there"
        if tokenizer.eos_token
        else "the tokenizer has no eos_token"
    )
    if endings and endings.most_common(1)[0][1] > len(rows) / 2:
        ending = tokenizer.convert_ids_to_tokens(endings.most_common(1)[0][0])
        return f"{note}; most examples end with {ending}: consider eos_token={ending!r}."
    return f"{note}."


def _pack(dataset: Dataset, options: LanguageModelingOptions, report: PreparationReport) -> Dataset:
    if options.shuffle:
        dataset = dataset.shuffle(seed=options.seed)
    dataset = pack_dataset(
        dataset.select_columns(["input_ids", "labels"]),
        options.max_length,
        options.packing_strategy,
        _description(dataset, "Packing", options.num_proc),
    )
    columns = [column for column in ("input_ids", "labels", "seq_lengths") if column in dataset.column_names]
    counts = [
        (count_trained(table), TokenLists.from_arrow(table["input_ids"]).lengths)
        for table in _tables(dataset, columns)
    ]
    trained, lengths = (np.concatenate(column) for column in zip(*counts, strict=True))
    kept = trained > 0
    if not kept.all():
        report.drop(PACKED_CONTEXT, np.flatnonzero(~kept))
        dataset = _map_arrow(dataset, "Filtering", _cut_batch, options, max_length=None, mode="keep_start")
    report.packing_strategy, report.rows_packed = options.packing_strategy, int(kept.sum())
    report.tokens_trained = int(trained.sum())
    report.tokens_context = int(lengths[kept].sum()) - report.tokens_trained
    report.packing_efficiency = packing_efficiency(lengths[kept], options.max_length)
    return dataset


# ---------------------------------------------------------------------------------------------------------------------
# Streamed datasets
# ---------------------------------------------------------------------------------------------------------------------


def _prepare_stream(
    dataset: IterableDataset,
    row_tokenizer: RowTokenizer | None,
    options: LanguageModelingOptions,
    masks: Sequence[str],
    report: PreparationReport,
) -> IterableDataset:
    limit, mode = _limit_before_packing(options)
    dataset = dataset.map(
        _encode_stream_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={
            "row_tokenizer": row_tokenizer,
            "masks": masks,
            "max_length": limit,
            "mode": mode,
            "tokens_only": options.packing,
            "report": report,
        },
        remove_columns=list(next(iter(dataset))),
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
    max_length: int | None,
    mode: str,
    tokens_only: bool,
    report: PreparationReport,
) -> dict[str, list]:
    """All steps on one batch of a stream; rows without a trained token end here, and are counted."""
    lists, merged = _token_lists(rows, indices, row_tokenizer, masks)
    if merged is not None:
        _warn_about_merged_prompts(np.asarray(indices)[np.flatnonzero(merged)], report)
    table = pa.table({name: column.to_arrow() for name, column in lists.items()})
    uncut = count_trained(table)
    table = truncate_table(table, max_length, mode)
    trained = count_trained(table)
    kept = trained > 0
    report.count_stream(indices, uncut, trained)
    table = table.filter(pa.array(kept))
    if tokens_only:
        return {name: table[name].to_pylist() for name in ("input_ids", "labels")}
    others = {
        name: [value for value, keep in zip(column, kept, strict=True) if keep]
        for name, column in rows.items()
        if name not in TOKEN_COLUMNS
    }
    return {**others, **table.to_pydict()}
