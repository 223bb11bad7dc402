"""What every script shares: its arguments, its dataset, its messages."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config_file import did_you_mean
from .parser import TrlParser

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

__all__ = [
    "DatasetConfig",
    "DatasetMixtureConfig",
    "ScriptArguments",
    "TrlParser",
    "get_dataset",
    "get_git_commit_hash",
    "init_zero_verbose",
]

logger = logging.getLogger(__name__)


# ---- Arguments ----


@dataclass
class DatasetConfig:
    """
    One dataset of a mixture.

    Args:
        path: name on the Hub, a folder, a file, or a loader such as `"json"` together with `data_files`.
        name: configuration of the dataset.
        data_dir: folder within it.
        data_files: files within it.
        split: split to take.
        columns: columns to keep. By default all; datasets of a mixture need the same ones.
        fraction: share of the mixture, relative to the others' fractions. By default all rows.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None


@dataclass
class DatasetMixtureConfig:
    """
    Several datasets put together into one.

    Raises:
        ValueError: an entry of `datasets` that is no dataset, or has an unknown key.
    """

    datasets: list[DatasetConfig] = field(
        default_factory=list,
        metadata={
            "help": "Datasets to mix. In a config file, a list of mappings with the keys `path`, `name`, `data_dir`, "
            "`data_files`, `split`, `columns`, `fraction`; as a flag, their paths."
        },
    )
    streaming: bool = field(default=False, metadata={"help": "Read the mixture while training, without a local copy."})
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Share of the mixture, between 0 and 1, that is split off as a test set."},
    )

    def __post_init__(self):
        self.datasets = [_dataset_config(entry, number) for number, entry in enumerate(self.datasets)]


def _dataset_config(entry: Any, number: int) -> DatasetConfig:
    if isinstance(entry, DatasetConfig):
        return entry
    if isinstance(entry, str):
        return DatasetConfig(entry)
    if not isinstance(entry, dict):
        raise ValueError(f"`datasets` is a list of mappings with at least a `path`; entry {number} is {entry!r}.")
    known = [f.name for f in fields(DatasetConfig)]
    for key in entry:
        if key not in known:
            raise ValueError(f"Unknown key `{key}` in entry {number} of `datasets`.{did_you_mean(str(key), known)}")
    if "path" not in entry:
        raise ValueError(f"Entry {number} of `datasets` has no `path`: {entry!r}.")
    return DatasetConfig(**entry)


@dataclass
class ScriptArguments:
    """Arguments that every training script takes: the dataset, and what concerns the process."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset: a name on the Hub, a folder, or a file (.jsonl, .json, .csv, .parquet, .txt)."},
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, where it has several."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, where `eval_strategy` asks for evaluation."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the dataset while training, without a local copy."}
    )
    ignore_bias_buffers: bool = field(
        default=False,
        metadata={
            "help": "Leave boolean buffers of the model out of the synchronisation between processes; some models "
            "with causal-mask buffers fail in distributed training without it."
        },
    )


def read_script_arguments(parser: TrlParser, args: Iterable[str] | None = None) -> tuple[Any, ...]:
    """
    Parse the arguments of a script that runs by itself or under `trl` or `accelerate launch`.

    Args:
        parser: the script's parser.
        args: the arguments. By default those of the process.

    Returns:
        The dataclass instances in order. Keys of the config file that belong to `accelerate launch` are passed over:
        they were the launcher's.

    On an error prints it, without a traceback, and exits with status 2.
    """
    from .launch_options import is_launch_option, launch_option_names

    try:
        *outputs, from_config, from_flags = parser.parse_args_and_config(args, separate_remaining_strings=True)
        unknown = [key for key in from_config[::2] if not is_launch_option(key)]
        parser.refuse_unknown(unknown, from_flags, also_known=launch_option_names())
    except ValueError as error:
        parser.error(str(error))
    return tuple(outputs)


# ---- Dataset ----


def get_dataset(mixture_config: DatasetMixtureConfig) -> DatasetDict:
    """
    Load the datasets of a mixture and put them together.

    Args:
        mixture_config: what to load.

    Returns:
        `train`, and `test` where `test_split_size` is set.

    Raises:
        ValueError: an empty mixture; a fraction on some datasets only, or with streaming.

    Example:
        ```python
        mixture = DatasetMixtureConfig(datasets=[DatasetConfig(path="json", data_files="rows.jsonl")])
        dataset = get_dataset(mixture)
        ```
    """
    from ..data.mixture import load_mixture

    return load_mixture(mixture_config)


def load_script_dataset(
    script_args: ScriptArguments, dataset_args: DatasetMixtureConfig
) -> DatasetDict | IterableDatasetDict | Dataset | IterableDataset:
    """
    The dataset that a script was asked to use: the mixture, or the one named.

    Args:
        script_args: with `dataset_name`.
        dataset_args: the mixture; it goes before `dataset_name`.

    Returns:
        The dataset, mostly with its splits.

    Raises:
        ValueError: there is neither.
    """
    from ..data.mixture import load_any_dataset

    if dataset_args.datasets:
        if script_args.dataset_name:
            logger.warning(
                "Both `datasets` and `dataset_name` are given: the mixture is used, and `dataset_name` "
                f"({script_args.dataset_name}) is not."
            )
        return get_dataset(dataset_args)
    if script_args.dataset_name:
        return load_any_dataset(
            script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
        )
    raise ValueError(
        "No dataset. Name one with `--dataset_name` (on the Hub, a folder or a file), or list several under "
        "`datasets:` in the config file."
    )


def select_split(dataset: Any, split: str, flag: str) -> Any:
    """
    One split of what was loaded.

    Args:
        dataset: a dataset with splits, or one without, which answers to any name but serves for training only.
        split: its name.
        flag: the flag that chose it, for the message.

    Returns:
        The split.

    Raises:
        ValueError: there is no such split.
    """
    if not isinstance(dataset, dict):
        if flag == "dataset_train_split":
            return dataset
        available = []
    elif split in dataset:
        return dataset[split]
    else:
        available = list(dataset)
    found = f"It has: {', '.join(available)}." if available else "It has no splits."
    advice = f"Choose one with `--{flag}`"
    if flag == "dataset_test_split":
        advice += ", or turn evaluation off (`--eval_strategy no`), or split some rows off (`test_split_size`, with `datasets`)"
    raise ValueError(f"The dataset has no split '{split}'. {found}{did_you_mean(split, available)} {advice}.")


# ---- Messages ----


def init_zero_verbose() -> None:
    """
    Log errors only, in Rich's format where Rich is installed, and send Python's warnings the same way.

    For scripts whose output is a live table or progress display.
    """
    handler: logging.Handler
    if importlib.util.find_spec("rich") is not None:
        from rich.logging import RichHandler

        handler, message_format = RichHandler(), "%(message)s"
    else:
        handler, message_format = logging.StreamHandler(), "%(levelname)s %(message)s"
    logging.basicConfig(format=message_format, datefmt="[%X]", handlers=[handler], level=logging.ERROR)

    def log_warning(message, category, filename, lineno, file=None, line=None):
        logging.warning(f"{filename}:{lineno}: {category.__name__}: {message}")

    warnings.showwarning = log_warning


def get_git_commit_hash(package_name: str) -> str | None:
    """
    Commit of the git checkout that a package is imported from.

    Args:
        package_name: name of an importable package.

    Returns:
        The full hash; None when the package is not there or not a file of the checkout it lies in (an environment
        inside somebody's repository is not the package's own).
    """
    spec = importlib.util.find_spec(package_name) if package_name not in sys.modules else None
    origin = spec.origin if spec else getattr(sys.modules.get(package_name), "__file__", None)
    if origin is None:
        return None
    file = Path(origin).resolve()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=file.parent, env=environment, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
