"""
Loading datasets: one, by its name on the Hub or a place on this machine, or several mixed into one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
"""File ending -> the loader of the datasets library that reads such files."""

COMPRESSION_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zip")


def load_any_dataset(
    path: str,
    name: str | None = None,
    data_dir: str | None = None,
    data_files: str | list[str] | dict[str, str] | None = None,
    split: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset | DatasetDict | IterableDatasetDict:
    """
    Load a dataset from the Hub, from a folder, from what `save_to_disk` wrote, or from a single local file.

    Args:
        path (`str`):
            Name on the Hub, a loader (`"json"`, ... with `data_files`), a folder, or a file (.json, .jsonl, .csv,
            .tsv, .parquet, .arrow, .txt, also compressed).
        name (`str`, *optional*):
            Configuration of the dataset.
        data_dir (`str`, *optional*):
            Folder within it.
        data_files (`str`, `list[str]` or `dict[str, str]`, *optional*):
            Files within it.
        split (`str`, *optional*):
            Split to load; all of them when `None`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read while training instead of loading first.

    Returns:
        The split, or a dict of all splits.

    Raises:
        `FileNotFoundError`: `path` looks like a local path and nothing is there.
        `ValueError`: the split is unknown, or the file is of a kind that cannot be read.
    """
    local = Path(path).expanduser()
    if local.is_file():
        builder = _builder_of(local)
        if builder is None:
            raise ValueError(
                f"{path} is a file of a kind that cannot be read as a dataset; these can: {', '.join(BUILDERS)}."
            )
        options = {"sep": "\t"} if ".tsv" in local.suffixes else {}
        return load_dataset(builder, data_files=str(local), split=split, streaming=streaming, **options)
    if local.is_dir() and ((local / "state.json").is_file() or (local / "dataset_dict.json").is_file()):
        return _load_saved(local, split, streaming)
    if not local.exists() and (path.startswith(("/", "./", "../", "~")) or _builder_of(local)):
        raise FileNotFoundError(f"There is no dataset at {path}: no such file or folder.")
    return load_dataset(path, name=name, data_dir=data_dir, data_files=data_files, split=split, streaming=streaming)


def _builder_of(path: Path) -> str | None:
    """The loader for a file, by its ending."""
    stem = path.with_suffix("") if path.suffix in COMPRESSION_ENDINGS else path
    return BUILDERS.get(stem.suffix)


def _load_saved(folder: Path, split: str | None, streaming: bool) -> Any:
    """What `save_to_disk` wrote. A single dataset has no named splits: it answers to any name."""
    dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        if split is not None:
            if split not in dataset:
                raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(map(repr, dataset))}.")
            dataset = dataset[split]
        elif streaming:
            return IterableDatasetDict({key: value.to_iterable_dataset() for key, value in dataset.items()})
    return dataset.to_iterable_dataset() if streaming else dataset


def load_mixture(mixture_config: Any) -> DatasetDict | IterableDatasetDict:
    """
    Load several datasets and put them one after another into one.

    With fractions, each dataset gives its share of the mixture: fractions are scaled to sum to 1, and the mixture is
    as large as it can be with no row taken twice. Each dataset gives its first rows.

    Args:
        mixture_config ([`DatasetMixtureConfig`]):
            What to load: `datasets` (each with `path`, `name`, `data_dir`, `data_files`, `split`, `columns` and
            `fraction`), `streaming` and `test_split_size`.

    Returns:
        [`~datasets.DatasetDict`] (iterable when streaming): `train`, and `test` where `test_split_size` is set.

    Raises:
        `ValueError`: no dataset; a fraction on some datasets only, not above 0, or with streaming; columns that are
            not there; `test_split_size` with streaming.
    """
    configs = list(mixture_config.datasets)
    streaming = mixture_config.streaming
    fractions = [config.fraction for config in configs]
    _check_mixture(configs, fractions, streaming, mixture_config.test_split_size)

    parts = []
    for config in configs:
        part = load_any_dataset(
            config.path,
            name=config.name,
            data_dir=config.data_dir,
            data_files=config.data_files,
            split=config.split,
            streaming=streaming,
        )
        if config.columns is not None:
            part = _select_columns(part, config)
        parts.append(part)
    if fractions[0] is not None:
        counts = share_rows([len(part) for part in parts], fractions)
        parts = [part.select(range(count)) for part, count in zip(parts, counts, strict=True)]

    mixture = concatenate_datasets(parts)
    if streaming:
        return IterableDatasetDict({"train": mixture})
    if mixture_config.test_split_size is not None:
        return mixture.train_test_split(test_size=mixture_config.test_split_size)
    return DatasetDict({"train": mixture})


def share_rows(num_rows: list[int], fractions: list[float]) -> list[int]:
    """
    Rows that each dataset gives to a mixture.

    Args:
        num_rows (`list[int]`):
            Rows that each has.
        fractions (`list[float]`):
            Its share, in any unit.

    Returns:
        `list[int]`: in the proportions asked for, with as many rows as the scarcest dataset allows.
    """
    scale = min(rows / fraction for rows, fraction in zip(num_rows, fractions, strict=True))
    return [min(round(fraction * scale), rows) for rows, fraction in zip(num_rows, fractions, strict=True)]


def _check_mixture(configs: list, fractions: list[float | None], streaming: bool, test_split_size: Any) -> None:
    """Refuse what cannot be mixed, before anything is loaded."""
    if not configs:
        raise ValueError("The dataset mixture is empty: name at least one dataset under `datasets`.")
    given = [fraction is not None for fraction in fractions]
    if any(given) and not all(given):
        without = ", ".join(config.path for config, has in zip(configs, given, strict=True) if not has)
        raise ValueError(
            f"`fraction` must be set for every dataset of a mixture or for none; it is missing for {without}."
        )
    if any(given) and streaming:
        raise ValueError(
            "`fraction` does not go with streaming: shares need the number of rows, which a stream does not tell. "
            "Remove `fraction`, or set `streaming` to false."
        )
    if any(fraction <= 0 for fraction in fractions if fraction is not None):
        raise ValueError(f"Every `fraction` must be above 0, got {', '.join(map(str, fractions))}.")
    if streaming and test_split_size is not None:
        raise ValueError(
            "`test_split_size` does not go with streaming: a stream cannot be split. Remove it, or set `streaming` to "
            "false."
        )


def _select_columns(part: Dataset | IterableDataset, config: Any) -> Dataset | IterableDataset:
    missing = [
        column for column in config.columns if part.column_names is not None and column not in part.column_names
    ]
    if missing:
        raise ValueError(
            f"Dataset {config.path} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, part.column_names))}."
        )
    return part.select_columns(config.columns)
