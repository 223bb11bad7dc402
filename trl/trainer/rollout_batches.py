"""
From rollouts to micro-batches: what the learn phase of a method that samples keeps of a generation.

Everything is tensors, so that a checkpoint can hold it. Completions stand left-aligned in [N, C]; whole rows, prompt
and completion, right-padded in [N, W]. Images, of which rows have different numbers, are a dict of tensors for each row.

Shapes: N rows of one process's generation batch, W tokens of a row, C tokens of a completion.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..ops.tensors import pad
from ..rollouts.image_prompts import collate_model_inputs
from ..rollouts.types import Rollout

# Tensors by name; `IMAGE_INPUTS`, where there are images, is a list of such dicts.
RolloutBatch: TypeAlias = "dict[str, Any]"
# Values of completion tokens, [N, C]; the others have W columns or none.
COMPLETION_KEYS = ("completion_mask", "train_mask", "rollout_logps", "old_logps", "ref_logps", "engine_ratios")
ROW_KEYS = ("input_ids", "attention_mask")
IMAGE_INPUTS = "image_inputs"


# ---- A generation as tensors ----


def rollouts_to_batch(
    rollouts: Sequence[Rollout],
    groups: Sequence[int],
    *,
    pad_token_id: int,
    device: torch.device,
    pad_to_multiple_of: int | None = None,
    mask_truncated: bool = False,
) -> RolloutBatch:
    """
    Rollouts as tensors.

    Args:
        rollouts: of one process.
        groups: number of each rollout's prompt.
        pad_token_id: fills up `input_ids`.
        device: where to.
        pad_to_multiple_of: rounds W up.
        mask_truncated: do not train on completions that were cut off.

    Returns:
        `input_ids`, `attention_mask` [N, W]; `prompt_lengths`, `groups` [N]; `completion_mask` (tokens that are there)
        and `train_mask` (tokens that the policy wrote and is trained on) [N, C]; `rollout_logps` [N, C], NaN where not
        known, if the engine told any; and `image_inputs` of each row, if there are images.
    """
    prompts = [rollout.prompt_ids or [pad_token_id] for rollout in rollouts]  # a broken sample may have none
    completions = [rollout.completion_ids for rollout in rollouts]
    rows = [torch.tensor(prompt + ids) for prompt, ids in zip(prompts, completions, strict=True)]
    trained = [
        [0] * len(rollout.completion_ids) if mask_truncated and rollout.is_truncated else rollout.policy_mask
        for rollout in rollouts
    ]

    def padded(values: Sequence[Sequence[float]], fill: float = 0, dtype: torch.dtype = torch.long) -> Tensor:
        return pad([torch.tensor(list(row), dtype=dtype) for row in values], padding_value=fill)

    batch = {
        "input_ids": pad(rows, padding_value=pad_token_id, pad_to_multiple_of=pad_to_multiple_of),
        "attention_mask": pad([torch.ones_like(row) for row in rows], pad_to_multiple_of=pad_to_multiple_of),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts]),
        "groups": torch.tensor(list(groups)),
        "completion_mask": padded([[1] * len(ids) for ids in completions]),
        "train_mask": padded(trained),
    }
    if any(rollout.sampled_logps is not None for rollout in rollouts):
        logps = [rollout.sampled_logps or [math.nan] * len(rollout.completion_ids) for rollout in rollouts]
        batch["rollout_logps"] = padded(logps, 0.0, torch.float32)
    if any(rollout.model_inputs for rollout in rollouts):
        batch[IMAGE_INPUTS] = [rollout.model_inputs for rollout in rollouts]
    return to_device(batch, device)


def to_device(batch: RolloutBatch, device: torch.device) -> RolloutBatch:
    """The batch with all its tensors there."""
    moved = {name: value.to(device) for name, value in batch.items() if name != IMAGE_INPUTS}
    if IMAGE_INPUTS in batch:
        moved[IMAGE_INPUTS] = [{key: value.to(device) for key, value in row.items()} for row in batch[IMAGE_INPUTS]]
    return moved


# ---- Cutting and joining ----


def select_rows(batch: RolloutBatch, rows: Tensor, pad_to_multiple_of: int | None = None) -> RolloutBatch:
    """Some rows of a batch, without the columns that none of them needs."""
    selected = {
        name: [value[row] for row in rows.tolist()] if name == IMAGE_INPUTS else value[rows]
        for name, value in batch.items()
    }
    width = int(selected["attention_mask"].sum(dim=1).max())
    if pad_to_multiple_of:
        width = min(-(-width // pad_to_multiple_of) * pad_to_multiple_of, selected["input_ids"].shape[1])
    longest = max(int(selected["completion_mask"].sum(dim=1).max()), 1)
    widths = {**dict.fromkeys(ROW_KEYS, width), **dict.fromkeys(COMPLETION_KEYS, longest)}
    return {name: value[:, : widths[name]] if name in widths else value for name, value in selected.items()}


def join_batches(batches: Sequence[RolloutBatch], pad_token_id: int) -> RolloutBatch:
    """The rows of several batches as one. They may be of different generations: only some with images, say."""
    joined: RolloutBatch = {}
    for name in dict.fromkeys(name for batch in batches for name in batch):
        values = [batch[name] if name in batch else _absent(name, batch) for batch in batches]
        if name == IMAGE_INPUTS:
            joined[name] = [row for rows in values for row in rows]
        elif values[0].dim() == 1:
            joined[name] = torch.cat(values)
        else:
            if name in COMPLETION_KEYS:  # one value for all tokens of a completion is [B, 1]
                masks = [batch["completion_mask"] for batch in batches]
                values = [value.expand_as(mask) for value, mask in zip(values, masks, strict=True)]
            fill = pad_token_id if name == "input_ids" else 0
            rows = [row for value in values for row in value]
            joined[name] = pad_sequence(rows, batch_first=True, padding_value=fill)
    return joined


def _absent(name: str, batch: RolloutBatch) -> Any:
    """What stands for a value that a batch does not have."""
    if name == IMAGE_INPUTS:
        return [{}] * len(batch["input_ids"])
    # Log-probs of the engine are unknown, and what is unknown is not corrected.
    neutral = {"rollout_logps": math.nan, "engine_ratios": 1.0}[name]
    return torch.full_like(batch["completion_mask"], neutral, dtype=torch.float32)


def shuffle_groups(groups_N: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """
    A random order of the rows in which those of a group stay together, so that a micro-batch computes their prompt once.

    Where a micro-batch of `size` rows holds parts of groups anyway, the pieces of that size are what is shuffled.

    Args:
        groups_N: number of each row's prompt; those of one stand side by side.
        size: rows of a micro-batch.
        generator: of the random numbers. Default: torch's own.

    Returns:
        Indices of the rows, [N].
    """
    _, counts = torch.unique_consecutive(groups_N, return_counts=True)
    piece = math.gcd(size, *counts.tolist())
    order = torch.randperm(len(groups_N) // piece, generator=generator)
    return (order[:, None] * piece + torch.arange(piece)).flatten()


def balance_rows(batch: RolloutBatch, count: int, prompts_shared: bool = True) -> list[Tensor]:
    """
    Cut a batch into pieces of about equally many tokens; the rows of a group stay together where that is possible.

    The longest piece first, each to where the fewest tokens are (https://en.wikipedia.org/wiki/LPT_scheduling).

    Args:
        batch: the rows.
        count: number of pieces; at most that of the rows.
        prompts_shared: whether the rows of a piece compute their group's prompt once.

    Returns:
        Indices of the rows of each piece; none is empty.
    """
    prompts = batch["prompt_lengths"].tolist()
    completions = batch["completion_mask"].sum(dim=1).tolist()

    def tokens(rows: list[int]) -> int:
        shared = prompts[rows[0]] if prompts_shared else sum(prompts[row] for row in rows)
        return shared + sum(completions[row] for row in rows)

    by_group: dict[int, list[int]] = {}
    for row, group in enumerate(batch["groups"].tolist()):
        by_group.setdefault(group, []).append(row)
    pieces = list(by_group.values())
    while len(pieces) < count:
        widest = max(pieces, key=lambda rows: (len(rows) > 1, tokens(rows)))
        pieces.remove(widest)
        pieces += [widest[: len(widest) // 2], widest[len(widest) // 2 :]]
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for rows in sorted(pieces, key=tokens, reverse=True):
        least = loads.index(min(loads))
        bins[least] += rows
        loads[least] += tokens(rows)
    return [torch.tensor(sorted(rows)) for rows in bins]


# ---- For the model and back ----


def labels_of(batch: RolloutBatch, mask_NC: Tensor) -> Tensor:
    """Labels [N, W] that score the completion tokens under a mask; -100 elsewhere."""
    input_ids = batch["input_ids"]
    places = batch["prompt_lengths"][:, None] + torch.arange(mask_NC.shape[1], device=input_ids.device)
    scored = torch.zeros_like(input_ids, dtype=torch.bool)
    here = mask_NC.bool() & (places < input_ids.shape[1])
    rows = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(places)
    scored[rows[here], places[here]] = True
    return input_ids.masked_fill(~scored, -100)


def inputs_of(batch: RolloutBatch, mask_NC: Tensor) -> dict[str, Tensor]:
    """Inputs of the model, images included, with labels that score the completion tokens under a mask."""
    inputs = {name: batch[name] for name in ROW_KEYS}
    if IMAGE_INPUTS in batch:
        lengths, width = batch["attention_mask"].sum(dim=1).tolist(), batch["input_ids"].shape[1]
        inputs.update(collate_model_inputs(batch[IMAGE_INPUTS], lengths, "right", width))
    return {**inputs, "labels": labels_of(batch, mask_NC)}


def completion_values(values: Tensor, batch: RolloutBatch) -> Tensor:
    """
    Per-token values of whole rows, as those of their completions.

    Args:
        values: [N, W - 1]; place t belongs to token t + 1.
        batch: the rows.

    Returns:
        [N, C], 0 where there is no token.
    """
    mask_NC = batch["completion_mask"].bool()
    places = batch["prompt_lengths"][:, None] - 1 + torch.arange(mask_NC.shape[1], device=values.device)
    return values.gather(1, places.clamp(max=values.shape[1] - 1)).masked_fill(~mask_NC, 0)


# ---- In a checkpoint ----


class RolloutBuffer:
    """
    The micro-batches of the newest generation, of one process. Training goes through them `num_iterations` times.

    A checkpoint between two generations holds them, so that a resumed run trains on what was sampled, and does not
    sample anew with other weights.
    """

    def __init__(self) -> None:
        self.micro_batches: list[RolloutBatch] = []

    def __len__(self) -> int:
        return len(self.micro_batches)

    @staticmethod
    def _path(folder: str, process_index: int) -> str:
        return os.path.join(folder, f"rollouts_{process_index}.safetensors")

    def save(self, folder: str, process_index: int) -> None:
        """Write the micro-batches into a checkpoint's folder."""
        tensors, written = {}, set()
        for index, batch in enumerate(self.micro_batches):
            for name, value in batch.items():
                rows = {"": value} if name != IMAGE_INPUTS else _flat(value)
                for key, tensor in rows.items():
                    tensor = tensor.contiguous()
                    # Rows of a group may have one image between them, which the format does not allow.
                    is_shared = tensor.untyped_storage().data_ptr() in written
                    written.add(tensor.untyped_storage().data_ptr())
                    tensors[f"{index}/{name}{key}"] = tensor.clone() if is_shared else tensor
        if tensors:
            os.makedirs(folder, exist_ok=True)
            save_file(tensors, self._path(folder, process_index))

    def load(self, folder: str, process_index: int, device: torch.device) -> None:
        """Read what `save` wrote; nothing where it wrote nothing."""
        path = self._path(folder, process_index)
        self.micro_batches = []
        if not os.path.isfile(path):
            return
        batches: dict[int, RolloutBatch] = {}
        for key, tensor in sorted(load_file(path).items()):
            index, name, *inside = key.split("/")
            batch = batches.setdefault(int(index), {})
            if not inside:
                batch[name] = tensor.to(device)
                continue
            row, image_key = inside
            batch.setdefault(name, {}).setdefault(int(row), {})[image_key] = tensor.to(device)
        for batch in batches.values():
            if IMAGE_INPUTS in batch:
                rows = batch[IMAGE_INPUTS]
                batch[IMAGE_INPUTS] = [rows.get(row, {}) for row in range(len(batch["input_ids"]))]
        self.micro_batches = [batches[index] for index in sorted(batches)]


def _flat(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"/{index}/{name}": tensor for index, row in enumerate(rows) for name, tensor in row.items()}
