"""
Rows that online trainers sample for: what a dataset must have, and what stands in where there is none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from ..data.formats import DatasetFormatError
from ..rewards.suite import RewardSuite
from ..rollouts.types import Rollout
from .base_trainer import AnyDataset, EvalDatasets
from .online_config import _OnlineConfig


def rows_of_batch(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The collator: rows stay rows until completions have been sampled for them."""
    return rows


def placeholder_rows(args: _OnlineConfig) -> Dataset:
    """
    Rows with empty prompts, for environments that say everything themselves: those of one generation.

    Raises:
        ValueError: nothing says how long to train.
    """
    if args.max_steps <= 0:
        raise ValueError(
            "Without a `train_dataset` nothing says how long to train. Set `max_steps`, or pass a `train_dataset` with "
            "a column `prompt`."
        )
    count = args.generation_batch_size // args.num_generations
    return Dataset.from_list([{"prompt": [{"role": "user", "content": ""}]}] * count)


def check_prompts(dataset: AnyDataset, name: str, args: _OnlineConfig, needs_prompt: bool = True) -> None:
    """
    Refuse, before a model is loaded, rows that completions cannot be sampled for.

    Args:
        dataset: rows.
        name: "train", "eval", ...
        args: the config.
        needs_prompt: False with environments, which may say everything themselves.

    Raises:
        DatasetFormatError: no rows, or no column `prompt`.
        ValueError: fewer prompts than a generation batch has.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise DatasetFormatError(f"The {name} dataset is empty: there are no prompts to sample completions for.")
    if needs_prompt and first.get("prompt") is None:
        raise DatasetFormatError(
            "Completions are sampled for the column `prompt`: text, or messages such as "
            f'[{{"role": "user", "content": ...}}]. Found: {", ".join(f"`{column}`" for column in first)} ({name} dataset). '
            'Rename it, e.g. dataset.rename_column("question", "prompt").'
        )
    prompts = args.generation_batch_size // args.num_generations
    if name.startswith("train") and isinstance(dataset, Dataset) and len(dataset) < prompts:
        raise ValueError(
            f"A generation batch has {args.generation_batch_size} completions of {prompts} prompts, but the {name} "
            f"dataset has only {len(dataset)} rows. Lower `generation_batch_size` (or `per_device_train_batch_size`, "
            "`gradient_accumulation_steps`), or raise `num_generations`."
        )
    workers = args.dataloader_num_workers
    if isinstance(dataset, IterableDataset) and workers > 1:
        raise ValueError(
            f"`dataloader_num_workers={workers}` would cut a stream into {workers}, and groups with it. Use 0 or 1."
        )


def check_reward_columns(
    rewards: RewardSuite,
    train_dataset: AnyDataset,
    eval_dataset: EvalDatasets | None,
    with_environments: bool,
    remaining: Collection[str] | None = None,
) -> None:
    """
    Refuse, before a model is loaded, reward functions that need a column which a dataset does not have.

    Args:
        rewards: the functions.
        train_dataset: rows; a stream that does not tell its columns is let pass.
        eval_dataset: the same, or several by name.
        with_environments: whether completions run in environments.
        remaining: columns that are not removed. Default: none is.

    Raises:
        RewardError: a column is not there.
    """
    evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    named = {"train dataset": train_dataset}
    named.update({f"eval dataset {name!r}" if name else "eval dataset": split for name, split in evaluated.items()})
    for name, dataset in named.items():
        columns = getattr(dataset, "column_names", None)
        if columns is not None:
            if remaining is not None:
                name += " (with `remove_unused_columns=True`)"
                columns = [column for column in columns if column in remaining]
            rewards.check_columns(columns, name, with_environments=with_environments)


def columns_of(rows: Sequence[Mapping[str, Any]], rollouts: Sequence[Rollout]) -> dict[str, list]:
    """What reward functions and metrics get beside the texts: the rows' columns, and what rollouts brought along."""
    merged = [{**row, **rollout.extra} for row, rollout in zip(rows, rollouts, strict=True)]
    names = dict.fromkeys(name for row in merged for name in row if name != "prompt")
    return {name: [row.get(name) for row in merged] for name in names}
