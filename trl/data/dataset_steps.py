"""What every preparation of a dataset does alike: check what it was given, read its options, map over Arrow tables."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
from datasets import Dataset, IterableDataset

from .fingerprints import fingerprint_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Options = TypeVar("Options")

# How training configs call what preparation calls otherwise.
_CONFIG_NAMES = {"shuffle": "shuffle_dataset", "num_proc": "dataset_num_proc"}


def read_options(options_class: type[Options], config: Any, **overrides: Any) -> Options:
    """
    A dataclass of options, filled from the fields of a training config.

    Args:
        options_class (`type`):
            The dataclass.
        config (`Any`):
            A training config; what it has no field for keeps the options' default.
        **overrides (`Any`):
            Options that win over the config's.
    """
    names = {field.name: _CONFIG_NAMES.get(field.name, field.name) for field in fields(options_class)}
    values = {name: getattr(config, source) for name, source in names.items() if hasattr(config, source)}
    return options_class(**{**values, **overrides})


def check_dataset(dataset: Any, name: str) -> Dataset | IterableDataset:
    """
    The dataset without an output format.

    Raises:
        `TypeError`: it is no dataset.
        `ValueError`: a transform runs when its rows are read.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        hint = ""
        if isinstance(dataset, Mapping):
            hint = f" It holds several ({', '.join(map(repr, dataset))}); pass one of them, e.g. dataset[{next(iter(dataset), 'train')!r}]."
        elif isinstance(dataset, (list, tuple)):
            hint = " Make one of a list of rows with datasets.Dataset.from_list(rows)."
        raise TypeError(
            f"The {name} dataset must be a datasets.Dataset or IterableDataset, found {type(dataset).__name__}.{hint}"
        )
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset has a transform (set_transform or with_transform) that runs when a row is read, so "
            "it cannot be prepared ahead. Apply it with dataset.map(...) and reset the format with "
            'dataset.with_format(None), or skip preparation with dataset_kwargs={"skip_prepare_dataset": True}.'
        )
    return dataset.with_format(None)


def check_not_empty(dataset: Dataset | IterableDataset, name: str) -> dict[str, Any]:
    """
    The first row of a dataset.

    Raises:
        `ValueError`: it has none.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty: it has 0 rows, and at least 1 is needed.")
    return first


def resolve_eos_token(tokenizer: PreTrainedTokenizerBase, eos_token: str | None) -> str | None:
    """
    The end-of-sequence token that was asked for, or the tokenizer's own.

    Raises:
        `ValueError`: the tokenizer does not know it.
    """
    if eos_token is None:
        return tokenizer.eos_token
    if eos_token not in tokenizer.get_vocab():
        near = difflib.get_close_matches(eos_token, tokenizer.all_special_tokens, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"eos_token={eos_token!r} is not in the vocabulary of the tokenizer, so the model could never "
            f"produce it.{hint} Special tokens: {', '.join(map(repr, tokenizer.all_special_tokens))}."
        )
    return eos_token


def map_description(dataset: Dataset | IterableDataset, verb: str, num_proc: int | None = None) -> dict[str, Any]:
    """Arguments of `map` that only a map-style dataset takes."""
    return {} if isinstance(dataset, IterableDataset) else {"desc": f"{verb} dataset", "num_proc": num_proc}


def map_arrow(
    dataset: Dataset, verb: str, function: Callable[..., pa.Table], num_proc: int | None = None, **kwargs: Any
) -> Dataset:
    """
    A dataset after a function of its Arrow tables, cached under its name and arguments.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset before.
        verb (`str`):
            What is done to it, for the progress bar and the cache.
        function (`Callable[..., pa.Table]`):
            Called with a table and `kwargs`.
        num_proc (`int`, *optional*):
            Number of processes.
        **kwargs (`Any`):
            Arguments of the function; they must have a JSON form.
    """
    return (
        dataset.with_format("arrow")
        .map(
            function,
            batched=True,
            fn_kwargs=kwargs,
            new_fingerprint=fingerprint_step(dataset, verb, kwargs),
            **map_description(dataset, verb, num_proc),
        )
        .with_format(None)
    )
