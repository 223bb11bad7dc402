"""
From rollouts to micro-batches: what the learn phase of a method that samples keeps of a generation.

Everything is a tensor, so that a checkpoint can hold it. Completions stand left-aligned in [N, C]; whole rows, prompt
and completion, right-padded in [N, W].

Shapes: N rows of one process's generation batch, W tokens of a row, C tokens of a completion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.tensors import pad
from ..rollouts.types import Rollout

RolloutBatch = dict[str, Tensor]
# Values of completion tokens, [N, C]; the others have W columns or none.
COMPLETION_KEYS = ("completion_mask", "train_mask", "rollout_logps", "old_logps", "ref_logps")
ROW_KEYS = ("input_ids", "attention_mask")


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
        and `train_mask` (tokens that the policy wrote and is trained on) [N, C]; and `rollout_logps` [N, C], NaN where
        not known, if the engine told any.
    """
    rows = [torch.tensor(rollout.prompt_ids + rollout.completion_ids) for rollout in rollouts]
    completions = [rollout.completion_ids for rollout in rollouts]
    trained = [
        [0] * len(rollout.completion_ids) if mask_truncated and rollout.is_truncated else rollout.policy_mask
        for rollout in rollouts
    ]

    def padded(values: Sequence[Sequence[float]], fill: float = 0, dtype: torch.dtype = torch.long) -> Tensor:
        return pad([torch.tensor(list(row), dtype=dtype) for row in values], padding_value=fill)

    batch = {
        "input_ids": pad(rows, padding_value=pad_token_id, pad_to_multiple_of=pad_to_multiple_of),
        "attention_mask": pad([torch.ones_like(row) for row in rows], pad_to_multiple_of=pad_to_multiple_of),
        "prompt_lengths": torch.tensor([len(rollout.prompt_ids) for rollout in rollouts]),
        "groups": torch.tensor(list(groups)),
        "completion_mask": padded([[1] * len(ids) for ids in completions]),
        "train_mask": padded(trained),
    }
    if any(rollout.sampled_logps is not None for rollout in rollouts):
        logps = [rollout.sampled_logps or [math.nan] * len(rollout.completion_ids) for rollout in rollouts]
        batch["rollout_logps"] = padded(logps, 0.0, torch.float32)
    return {name: value.to(device) for name, value in batch.items()}


def select_rows(batch: RolloutBatch, rows: Tensor, pad_to_multiple_of: int | None = None) -> RolloutBatch:
    """Some rows of a batch, without the columns that none of them needs."""
    selected = {name: value[rows] for name, value in batch.items()}
    width = int(selected["attention_mask"].sum(dim=1).max())
    if pad_to_multiple_of:
        width = min(-(-width // pad_to_multiple_of) * pad_to_multiple_of, selected["input_ids"].shape[1])
    longest = max(int(selected["completion_mask"].sum(dim=1).max()), 1)
    widths = {**dict.fromkeys(ROW_KEYS, width), **dict.fromkeys(COMPLETION_KEYS, longest)}
    return {name: value[:, : widths[name]] if name in widths else value for name, value in selected.items()}


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


def labels_of(batch: RolloutBatch, mask_NC: Tensor) -> Tensor:
    """Labels [N, W] that score the completion tokens under a mask; -100 elsewhere."""
    input_ids = batch["input_ids"]
    places = batch["prompt_lengths"][:, None] + torch.arange(mask_NC.shape[1], device=input_ids.device)
    scored = torch.zeros_like(input_ids, dtype=torch.bool)
    here = mask_NC.bool() & (places < input_ids.shape[1])
    rows = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(places)
    scored[rows[here], places[here]] = True
    return input_ids.masked_fill(~scored, -100)


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
