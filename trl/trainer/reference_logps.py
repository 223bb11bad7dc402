"""
The reference's log-probs of a whole dataset, computed before training and kept on disk.

Training then holds no reference and runs no reference forward. A file is named after the dataset, the reference's
weights and the settings that decide the numbers, so that a second run finds it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import torch
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.fingerprints import fingerprint_step
from ..models.reference import ReferencePolicy

if TYPE_CHECKING:
    from .preference_trainer import ReferencePolicyTrainer

logger = logging.get_logger(__name__)

# Fields of a config that decide the numbers, where a method has them.
_SETTINGS = ("max_length", "truncation_mode", "ld_alpha", "bf16", "fp16")


def add_reference_logps(trainer: ReferencePolicyTrainer, dataset: Dataset, name: str) -> Dataset:
    """
    A dataset with the reference's log-probs as columns.

    Args:
        trainer: has the reference, the policy, the collator and the columns' names.
        dataset: prepared.
        name: for the progress bar.

    Returns:
        The dataset with `trainer.reference_columns`, float32, nats.
    """
    settings = [getattr(trainer.args, field, None) for field in _SETTINGS]
    # One process may hold the weights for all of them, so its hash counts.
    weights = broadcast_object_list([trainer.reference.fingerprint(trainer.model)])[0]
    fingerprint = fingerprint_step(dataset, "reference log-probs", weights, settings, trainer.reference_columns)
    file = _cache_file(dataset, fingerprint)
    columns = _read(file, len(dataset), trainer.reference_columns)
    # Computing is for all processes together, so where one has not found the file (its machine's disk), all compute.
    if not all(gather_object([columns is not None])):
        columns = _compute(trainer, dataset, name)
        if trainer.accelerator.is_local_main_process:
            _write(file, columns)
        trainer.accelerator.wait_for_everyone()
    for column in trainer.reference_columns:
        dataset = dataset.add_column(column, columns[column].numpy(), new_fingerprint=f"{fingerprint}-{column}")
    return dataset


def _cache_file(dataset: Dataset, fingerprint: str) -> Path:
    """Beside the dataset's own cache; a dataset made in memory has none, so its place is that of all caches."""
    files = dataset.cache_files
    folder = Path(files[0]["filename"]).parent if files else Path(datasets.config.HF_DATASETS_CACHE) / "trl"
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "trl"
    return folder / f"reference-logps-{fingerprint}.safetensors"


def _read(file: Path, rows: int, names: tuple[str, ...]) -> dict[str, Tensor] | None:
    if not datasets.is_caching_enabled() or not file.is_file():
        return None
    try:
        columns = load_file(file)
    except Exception as error:  # whatever is wrong with the file, it can be made again
        logger.warning(f"{file} cannot be read ({error}): its log-probs are computed again.")
        return None
    fits = all(name in columns and len(columns[name]) == rows for name in names)
    return columns if fits else None


def _write(file: Path, columns: dict[str, Tensor]) -> None:
    if not datasets.is_caching_enabled():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    save_file(columns, unfinished)
    os.replace(unfinished, file)


def _compute(trainer: ReferencePolicyTrainer, dataset: Dataset, name: str) -> dict[str, Tensor]:
    accelerator, args = trainer.accelerator, trainer.args
    ranks, rank = accelerator.num_processes, accelerator.process_index
    per_rank = -(-len(dataset) // ranks)
    # Every process takes as many rows, since under sharding they run each forward together; the last ones may repeat.
    mine = [min(rank * per_rank + offset, len(dataset) - 1) for offset in range(per_rank)]
    kept = trainer.signature_columns
    dataset = dataset.select_columns([column for column in dataset.column_names if column in kept])
    loader = DataLoader(
        Subset(dataset, mine),
        batch_size=args.precompute_ref_batch_size or args.per_device_train_batch_size,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
    )
    pieces: dict[str, list[Tensor]] = {column: [] for column in trainer.reference_columns}
    progress = tqdm(
        loader, f"Reference log-probs ({name})", disable=args.disable_tqdm or not accelerator.is_main_process
    )
    with _reference_model(trainer) as model, torch.no_grad(), accelerator.autocast():
        for batch in progress:
            values = trainer.compute_ref_log_probs(model, trainer._prepare_inputs(batch))
            for column, value in zip(pieces, values, strict=True):
                pieces[column].append(value.float().cpu())
    mine_by_column = {column: torch.cat(values) for column, values in pieces.items()}
    gathered = gather_object([mine_by_column])
    return {column: torch.cat([part[column] for part in gathered])[: len(dataset)] for column in pieces}


@contextmanager
def _reference_model(trainer: ReferencePolicyTrainer) -> Iterator[nn.Module]:
    """The policy to ask the reference through, in evaluation mode. A copy made for it is gone afterwards."""
    policy, reference = trainer.model, trainer.reference
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if reference.model is None and sharded:
        # The policy is not cut over the processes yet; a frozen copy is, for as long as it takes.
        trainer.reference = ReferencePolicy.copy_of(policy, trainer.load_reference)
    trainer.reference.prepare(trainer.accelerator)
    on_host_between = reference.model is not None and not sharded
    if on_host_between:
        reference.model.to(trainer.args.device)
    was_training = policy.training
    policy.eval()
    try:
        yield policy
    finally:
        policy.train(was_training)
        trainer.reference = reference
        if on_host_between:  # the user's own model, kept for datasets given to `evaluate`
            reference.model.to("cpu")
        clear_device_cache()
