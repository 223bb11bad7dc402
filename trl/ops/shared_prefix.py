"""
Rows that begin alike, laid out so that their common beginning is computed once.

A DPO pair is one prompt and two answers; a group of online methods one prompt and many. Here such a group becomes one
sequence: the beginning, then each row's own rest. A rest sees the beginning and itself, and its positions continue
those of the beginning, so that every token has the hidden state that it has in a row of its own:

    rows    p p p p a a a        sequence   p p p p a a a b b
            p p p p b b          position   0 1 2 3 4 5 6 4 5

The beginning is found from the token ids, whatever a row's length or truncation; it may reach into the answers. This
module knows tensors only; which models can take such a sequence is in `trl.ops.layouts`.

Shapes: B padded rows of T tokens, G groups, P parts of groups, R laid-out rows of W tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Widths of laid-out rows are rounded up: CUDA's masked kernels want a multiple of 8, flex attention counts in blocks.
_DENSE_MULTIPLE, _BLOCK_MULTIPLE = 8, 128


@dataclass(frozen=True)
class SharedRows:
    """
    What the rows of a padded batch have in common, on the host.

    Args:
        starts_B: where a row's tokens begin.
        lengths_B: how many there are.
        shared_B: how many of them, from the first, all rows of the group have alike.
        groups_B: the row's group, 0 to G - 1.
    """

    starts_B: np.ndarray
    lengths_B: np.ndarray
    shared_B: np.ndarray
    groups_B: np.ndarray


@dataclass(frozen=True)
class Arrangement:
    """
    Where every row goes: `shape` is (R, W), and the rest are places in the R * W tokens laid end to end.

    Args:
        shape: laid-out rows and their width.
        parts_B: the part that a row belongs to. Rows of one part have their beginning in common; a large group is cut
            into several, each with the beginning of its own.
        shared_B: tokens of the beginning.
        beginnings_B: place of the first token of the beginning.
        rests_B: place of the first token of the row's own rest.
        tokens: tokens laid out, without padding.
        pairs: pairs of tokens that attention computes.
    """

    shape: tuple[int, int]
    parts_B: np.ndarray
    shared_B: np.ndarray
    beginnings_B: np.ndarray
    rests_B: np.ndarray
    tokens: int
    pairs: int


@dataclass(frozen=True)
class Sight:
    """
    Which tokens of the laid-out rows see which, [R, W] each.

    Args:
        parts_RW: number of the part; -1 for padding.
        branches_RW: number of the batch's row that the token belongs to alone; -1 where rows share it.
        positions_RW: position in the batch's row.
    """

    parts_RW: Tensor
    branches_RW: Tensor
    positions_RW: Tensor


@dataclass(frozen=True)
class LaidOutBatch:
    """
    A batch laid out anew.

    Args:
        inputs: `input_ids` and `position_ids`, [R, W].
        sight: what its attention masks are made from.
        weight_RW: how many rows of the batch have the token; 0 for padding.
        index_BT: place of each token of the padded batch, meaningful where `mask_BT` is True.
        mask_BT: the tokens of the padded batch.
    """

    inputs: dict[str, Tensor]
    sight: Sight
    weight_RW: Tensor
    index_BT: Tensor
    mask_BT: Tensor


# ---------------------------------------------------------------------------------------------------------------------
# What is shared, and where it goes


def find_shared(batch: Mapping[str, Any], groups_B: Tensor) -> SharedRows:
    """
    The common beginning of each group of rows, from their token ids.

    Args:
        batch: `input_ids` and `attention_mask`, [B, T]; the tokens of a row stand together, padded on any side.
        groups_B: int64; rows with the same number are a group.
    """
    mask_BT = batch["attention_mask"].bool()
    starts_B, lengths_B = mask_BT.int().argmax(dim=1), mask_BT.sum(dim=1)
    groups_B = torch.unique(groups_B.to(mask_BT.device), return_inverse=True)[1]
    offsets_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) + starts_B[:, None]
    ids_BT = batch["input_ids"].gather(1, offsets_BT.clamp(max=mask_BT.shape[1] - 1))

    rows_B = torch.arange(len(groups_B), device=groups_B.device)
    leaders_B = _minimum_of_group(rows_B, groups_B)
    alike_BT = ids_BT == ids_BT[leaders_B]
    common_B = torch.minimum(alike_BT.int().cumprod(dim=1).sum(dim=1), torch.minimum(lengths_B, lengths_B[leaders_B]))
    shared_B = _minimum_of_group(common_B, groups_B)
    return SharedRows(*torch.stack([starts_B, lengths_B, shared_B, groups_B]).cpu().numpy())


def _minimum_of_group(values_B: Tensor, groups_B: Tensor) -> Tensor:
    """For each row the least value in its group."""
    least_G = values_B.new_full((len(values_B),), torch.iinfo(values_B.dtype).max)
    return least_G.scatter_reduce(0, groups_B, values_B, "amin")[groups_B]


def arrange(rows: SharedRows, token_cost: float, *, dense: bool) -> Arrangement:
    """
    Give every row its place.

    A dense mask computes every pair of tokens in a row, seen or not. So large groups are cut into parts of the size
    that costs least, and the parts placed first-fit by decreasing length into rows no wider than the longest. Where
    attention skips what a mask leaves out, everything goes into one row.

    Args:
        rows: from `find_shared`.
        token_cost: what a token costs outside attention, in pairs of tokens inside it.
        dense: whether attention computes masked pairs.
    """
    parts_B = _cut_groups(rows, token_cost) if dense else rows.groups_B
    shared_P, rests_B = _first_of(parts_B, rows.shared_B), rows.lengths_B - rows.shared_B
    lengths_P = shared_P + np.bincount(parts_B, weights=rests_B).astype(np.int64)
    if dense:
        width = _round_up(int(lengths_P.max()), _DENSE_MULTIPLE)
        n_rows, beginnings_P = _first_fit(lengths_P, width)
        pairs = n_rows * width**2
    else:
        width, n_rows = _round_up(int(lengths_P.sum()), _BLOCK_MULTIPLE), 1
        beginnings_P = np.cumsum(lengths_P) - lengths_P
        pairs = int((shared_P**2).sum() + (rows.lengths_B**2 - rows.shared_B**2).sum())

    # Within a part the rests follow one another in the order of the batch.
    order = np.argsort(parts_B, kind="stable")
    before = np.cumsum(rests_B[order]) - rests_B[order]
    before -= _first_of(parts_B[order], before)[parts_B[order]]
    before_B = np.empty_like(before)
    before_B[order] = before
    beginnings_B = beginnings_P[parts_B]
    return Arrangement(
        shape=(n_rows, width),
        parts_B=parts_B,
        shared_B=rows.shared_B,
        beginnings_B=beginnings_B,
        rests_B=beginnings_B + rows.shared_B + before_B,
        tokens=int(lengths_P.sum()),
        pairs=pairs,
    )


def _cut_groups(rows: SharedRows, token_cost: float) -> np.ndarray:
    """
    Number the parts into which groups are cut so that a dense mask costs least.

    A part of k rows, each with s shared and r own tokens, costs c (s + kr) + (s + kr)² for c the cost of a token. Per
    row this is least at k = sqrt(s (c + s)) / r.
    """
    parts_B, n_parts = np.empty_like(rows.groups_B), 0
    for group in range(rows.groups_B.max() + 1):
        (members,) = np.nonzero(rows.groups_B == group)
        shared = rows.shared_B[members[0]]
        own = (rows.lengths_B[members] - shared).mean()
        best = math.sqrt(shared * (token_cost + shared)) / max(own, 1e-9)
        cuts = math.ceil(len(members) / min(max(round(best), 1), len(members)))
        parts_B[members] = n_parts + np.arange(len(members)) * cuts // len(members)
        n_parts += cuts
    return parts_B


def _first_fit(lengths_P: np.ndarray, width: int) -> tuple[int, np.ndarray]:
    """The number of rows that hold all parts, and where each begins, counted through all rows."""
    free: list[int] = []
    beginnings_P = np.empty_like(lengths_P)
    for part in np.argsort(-lengths_P, kind="stable"):
        length = int(lengths_P[part])
        row = next((row for row, space in enumerate(free) if space >= length), len(free))
        if row == len(free):
            free.append(width)
        beginnings_P[part] = row * width + width - free[row]
        free[row] -= length
    return len(free), beginnings_P


def _first_of(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each key 0, 1, … the value at its first place."""
    return values[np.unique(keys, return_index=True)[1]]


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def lay_out(batch: Mapping[str, Any], rows: SharedRows, arrangement: Arrangement) -> LaidOutBatch:
    """
    Put the tokens of a padded batch in their places.

    Args:
        batch: `input_ids` and `attention_mask`, [B, T].
        rows: from `find_shared`, for the same batch.
        arrangement: from `arrange`.
    """
    input_ids, mask_BT = batch["input_ids"], batch["attention_mask"].bool()
    device = input_ids.device
    sizes_B = np.bincount(arrangement.parts_B)[arrangement.parts_B]
    columns = (rows.starts_B, arrangement.shared_B, arrangement.beginnings_B, arrangement.rests_B)
    table = torch.from_numpy(np.stack([*columns, arrangement.parts_B, sizes_B])).to(device)
    starts, shared, beginnings, rests, parts, sizes = table.unsqueeze(2)

    positions_BT = torch.arange(mask_BT.shape[1], device=device) - starts
    is_shared_BT = positions_BT < shared
    index_BT = torch.where(is_shared_BT, beginnings + positions_BT, rests + positions_BT - shared)
    branches_BT = torch.arange(len(mask_BT), device=device)[:, None].masked_fill(is_shared_BT, -1)
    weight_BT = torch.where(is_shared_BT, sizes, 1)
    places = index_BT[mask_BT]

    def place(values_BT: Tensor, padding: int) -> Tensor:
        laid_out = values_BT.new_full(arrangement.shape, padding)
        # Rows that share a token write the same value to the same place.
        laid_out.view(-1)[places] = values_BT[mask_BT]
        return laid_out

    positions_RW = place(positions_BT, 0)
    sight = Sight(place(parts.expand_as(mask_BT), -1), place(branches_BT, -1), positions_RW)
    inputs = {"input_ids": place(input_ids, 0), "position_ids": positions_RW}
    return LaidOutBatch(inputs, sight, place(weight_BT, 0), index_BT, mask_BT)


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def _sees(query: list[Tensor], key: list[Tensor], window: int | None, chunk: int | None) -> Tensor:
    """Whether a query sees a key, each given by part, branch and position."""
    (query_part, query_branch, query_position), (key_part, key_branch, key_position) = query, key
    seen = (query_part == key_part) & (key_position <= query_position)
    seen = seen & ((key_branch < 0) | (key_branch == query_branch))
    if window is not None:
        seen = seen & (key_position > query_position - window)
    if chunk is not None:
        seen = seen & (key_position // chunk == query_position // chunk)
    return seen


def dense_mask(sight: Sight, dtype: torch.dtype, window: int | None = None, chunk: int | None = None) -> Tensor:
    """
    The mask that is added to the attention scores: 0 where a query sees a key, minus infinity elsewhere.

    All layers share an added mask as it is; of a boolean one, sdpa would make and keep such a mask in each layer.

    Args:
        sight: from `lay_out`.
        dtype: of the mask.
        window: tokens that a query sees, itself included; `None` for all before it.
        chunk: length of the chunks of a row that do not see each other; `None` for none.

    Returns:
        [R, 1, W, W].
    """
    fields = (sight.parts_RW, sight.branches_RW, sight.positions_RW)
    seen_RWW = _sees([field[:, :, None] for field in fields], [field[:, None, :] for field in fields], window, chunk)
    mask_RWW = torch.zeros(seen_RWW.shape, dtype=dtype, device=seen_RWW.device)
    return mask_RWW.masked_fill_(seen_RWW.logical_not_(), -math.inf).unsqueeze(1)


def block_mask(sight: Sight, window: int | None = None, chunk: int | None = None):
    """
    The same mask for flex attention, which skips blocks where nothing is seen.

    Args:
        sight: from `lay_out`.
        window: tokens that a query sees, itself included; `None` for all before it.
        chunk: length of the chunks of a row that do not see each other; `None` for none.

    Returns:
        A `torch.nn.attention.flex_attention.BlockMask`.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    fields = (sight.parts_RW, sight.branches_RW, sight.positions_RW)

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _sees([field[row, query] for field in fields], [field[row, key] for field in fields], window, chunk)

    (n_rows, width), device = sight.parts_RW.shape, sight.parts_RW.device
    # Compiled, no tensor of [W, W] is made; on the CPU that would need a compiler.
    return create_block_mask(mask_mod, n_rows, None, width, width, device=device, _compile=device.type == "cuda")
