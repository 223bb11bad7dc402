"""
Small tensor functions: log-probs and entropies of given logits, statistics that skip NaN, padding, cutting batches.

Shapes in names: B rows, T tokens, V vocabulary. Whoever has hidden states instead of logits uses `ops.scoring`, which
never holds [B, T, V].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- Log-probs and entropies of logits ----


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(
            f"`temperature` must be above 0, found {temperature}. For greedy choices take the argmax of the logits."
        )


def _rows(logits: Tensor, chunk_size: int, row_mask: Tensor | None):
    """Cut [..., V] into pieces of at most `chunk_size` rows, with the slice (or indices) each covers."""
    flat = logits.reshape(-1, logits.shape[-1])
    if row_mask is None:
        yield from zip(
            flat.split(chunk_size),
            (slice(start, start + chunk_size) for start in range(0, len(flat), chunk_size)),
            strict=True,
        )
        return
    kept = row_mask.reshape(-1).nonzero().squeeze(-1)
    for indices in kept.split(chunk_size):
        yield flat[indices], indices


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """The logits at a temperature, in float32 at least: half types lose the small probabilities' digits."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits / temperature


def _scatter(pieces: list[Tensor], indices: list[Any], total: int, like: Tensor) -> Tensor:
    """Join the pieces; rows that none of them covers are 0."""
    if not pieces:
        return like.new_zeros((total, *like.shape[1:])) + 0 * like.sum()
    joined = torch.cat(pieces)
    if isinstance(indices[0], slice):
        return joined
    return joined.new_zeros((total, *joined.shape[1:])).index_copy(0, torch.cat(indices), joined)


def _entropy(logps: Tensor) -> Tensor:
    # A token of probability 0 has a log-prob of -inf; bounded, its product with 0 is 0 and so is its gradient.
    return -(logps.exp() * logps.clamp_min(torch.finfo(logps.dtype).min)).sum(-1)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """
    Log-probabilities of chosen tokens, without the log-softmax of the whole batch in memory.

    Args:
        logits: [..., V].
        index: token ids, [...] or [..., K] for K tokens per position.
        temperature: divides the logits; above 0.
        row_mask: [...], nonzero where a value is wanted; 0 is returned elsewhere, and nothing computed. Default: all.

    Returns:
        Log-probabilities in nats, shaped like `index`, of the logits' dtype (computed in float32 at least).

    Raises:
        ValueError: `temperature` is not above 0.
    """
    _check_temperature(temperature)
    several = index.ndim == logits.ndim
    index_NK = index.reshape(-1, index.shape[-1] if several else 1)
    pieces, covered = [], []
    for chunk_CV, rows in _rows(logits, logits.shape[-2] if logits.ndim > 1 else 1, row_mask):
        scaled_CV = _scaled(chunk_CV, temperature)
        chosen_CK = scaled_CV.gather(-1, index_NK[rows])
        pieces.append((chosen_CK - scaled_CV.logsumexp(-1, keepdim=True)).to(logits.dtype))
        covered.append(rows)
    like = logits.reshape(-1, logits.shape[-1])[:, :1].expand(-1, index_NK.shape[-1])
    return _scatter(pieces, covered, len(index_NK), like).reshape(index.shape)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    Log-probabilities of chosen tokens, and the entropy of each prediction, in one pass.

    Args:
        logits: [..., V].
        index: token ids, [...] or [..., K] for K tokens per position.
        entropy_requires_grad: whether gradients flow through the entropy.
        temperature: divides the logits, for both values; above 0.
        row_mask: [...], nonzero where values are wanted; 0 is returned elsewhere. Default: all.

    Returns:
        Log-probabilities shaped like `index`, and entropies [...], in nats.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    _check_temperature(temperature)
    several = index.ndim == logits.ndim
    index_NK = index.reshape(-1, index.shape[-1] if several else 1)
    chosen, entropies, covered = [], [], []
    for chunk_CV, rows in _rows(logits, logits.shape[-2] if logits.ndim > 1 else 1, row_mask):
        logps_CV = F.log_softmax(_scaled(chunk_CV, temperature), dim=-1)
        chosen.append(logps_CV.gather(-1, index_NK[rows]).to(logits.dtype))
        entropies.append(_entropy(logps_CV if entropy_requires_grad else logps_CV.detach()).to(logits.dtype))
        covered.append(rows)
    like = logits.reshape(-1, logits.shape[-1])[:, :1]
    logps = _scatter(chosen, covered, len(index_NK), like.expand(-1, index_NK.shape[-1]))
    entropy = _scatter(entropies, covered, len(index_NK), like[:, 0] if entropy_requires_grad else like[:, 0].detach())
    return logps.reshape(index.shape), entropy.reshape(logits.shape[:-1])


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """
    Entropy of each prediction.

    Args:
        logits: [..., V].
        chunk_size: predictions per step; bounds the extra memory to `chunk_size` × V.

    Returns:
        Entropies in nats, [...].
    """
    pieces = [
        _entropy(F.log_softmax(_scaled(chunk, 1.0), dim=-1)).to(logits.dtype)
        for chunk, _ in _rows(logits, chunk_size, None)
    ]
    return torch.cat(pieces).reshape(logits.shape[:-1]) if pieces else logits.new_zeros(logits.shape[:-1])


# ---- Statistics that skip NaN ----


def nanmin(tensor: Tensor) -> Tensor:
    """The smallest value that is not NaN (a scalar tensor); NaN where there is none."""
    kept = tensor[~torch.isnan(tensor)]
    return kept.min() if kept.numel() else tensor.new_tensor(math.nan)


def nanmax(tensor: Tensor) -> Tensor:
    """The largest value that is not NaN (a scalar tensor); NaN where there is none."""
    kept = tensor[~torch.isnan(tensor)]
    return kept.max() if kept.numel() else tensor.new_tensor(math.nan)


def nanstd(tensor: Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    """
    Standard deviation of the values that are not NaN, with Bessel's correction.

    Args:
        tensor: any shape.
        dim: dimension(s) to reduce; default all.
        keepdim: keep reduced dimensions with size 1.

    Returns:
        The standard deviations; NaN where fewer than two values are left.
    """
    dims = tuple(range(tensor.ndim)) if dim is None else dim
    count = (~torch.isnan(tensor)).sum(dims, keepdim=keepdim)
    squares = (tensor - torch.nanmean(tensor, dims, keepdim=True)).square()
    variance = torch.nansum(squares, dims, keepdim=keepdim) / (count - 1).clamp_min(1)
    return torch.where(count > 1, variance, math.nan).sqrt()


# ---- Padding ----


def pad(
    tensors: list[Tensor],
    padding_value: int = 0,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> Tensor:
    """
    Stack tensors of different lengths.

    Args:
        tensors: equal in rank and dtype; every dimension may differ.
        padding_value: fills the rest.
        padding_side: `"left"` or `"right"`: where the first dimension is filled. Other dimensions are filled at their
            end.
        pad_to_multiple_of: rounds the first dimension up to a multiple of this.

    Returns:
        [len(tensors), longest, ...].

    Raises:
        ValueError: `padding_side` is neither of the two, or there is nothing to stack.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"`padding_side` is 'left' or 'right', found {padding_side!r}.")
    if not tensors:
        raise ValueError("There is nothing to pad: the list of tensors is empty.")
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    if pad_to_multiple_of is not None:
        shape[0] = math.ceil(shape[0] / pad_to_multiple_of) * pad_to_multiple_of
    padded = tensors[0].new_full((len(tensors), *shape), padding_value)
    for row, tensor in zip(padded, tensors, strict=True):
        start = shape[0] - len(tensor) if padding_side == "left" else 0
        row[(slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))] = tensor
    return padded


def flush_left(mask: Tensor, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    """
    Move each row's first kept position to column 0, and cut the columns at the end that no row keeps.

    Args:
        mask: [B, T], nonzero where a position is kept. Positions between two kept ones stay.
        *tensors: [B, T, ...], moved along.

    Returns:
        The mask, or a tuple of the mask and the tensors, with the new width. What wraps around lands where the mask
        is 0.
    """
    rows, width = mask.shape
    kept = mask != 0
    first = kept.int().argmax(dim=1)  # 0 for a row that keeps nothing
    columns = (torch.arange(width, device=mask.device) + first[:, None]) % max(width, 1)
    row_index = torch.arange(rows, device=mask.device)[:, None]
    used = kept[row_index, columns].any(dim=0).nonzero()
    columns = columns[:, : int(used.max()) + 1 if used.numel() else 0]
    moved = tuple(tensor[row_index, columns] for tensor in (mask, *tensors))
    return moved if tensors else moved[0]


# ---- Batches as dictionaries ----


def _is_sequence(value: Any) -> bool:
    return value.ndim > 0 if isinstance(value, Tensor) else isinstance(value, (list, tuple))


def _length(batch: dict[str, Any]) -> int:
    for value in batch.values():
        if _is_sequence(value):
            return len(value)
    raise ValueError(f"No value of the batch has rows to cut or shuffle: keys {', '.join(batch) or '(none)'}.")


def split_tensor_dict(tensor_dict: dict[str, Tensor | None], num_chunks: int) -> list[dict[str, Tensor | None]]:
    """
    Cut a batch into equal parts.

    Args:
        tensor_dict: tensors (or lists) with one length; `None` and scalars go to every part.
        num_chunks: number of parts. Rows that do not fill a part are left out.

    Returns:
        `num_chunks` batches of `length // num_chunks` rows.
    """
    size = _length(tensor_dict) // num_chunks
    return [
        {
            key: value[part * size : (part + 1) * size] if _is_sequence(value) else value
            for key, value in tensor_dict.items()
        }
        for part in range(num_chunks)
    ]


def shuffle_sequence_dict(seq_dict: dict[str, Sequence | None]) -> dict[str, Sequence | None]:
    """
    Shuffle the rows of a batch, all values alike, with torch's random generator.

    Args:
        seq_dict: tensors or lists with one length; `None` and scalars are kept.

    Returns:
        A new dictionary.
    """
    order = torch.randperm(_length(seq_dict))

    def shuffled(value: Any) -> Any:
        if not _is_sequence(value):
            return value
        if isinstance(value, Tensor):
            return value[order.to(value.device)]
        return type(value)([value[index] for index in order.tolist()])

    return {key: shuffled(value) for key, value in seq_dict.items()}


def split_pixel_values_by_grid(batch: dict[str, Tensor]) -> dict[str, Tensor | list[Tensor]]:
    """
    Give each sample its own image patches, so that a batch can be shuffled and cut.

    Args:
        batch: `pixel_values` [patches, ...] of all images in a row, `image_grid_thw` [images, 3] with the patches per
            side of each image, and `num_images`, how many each sample has. Returned as it is where one is missing.

    Returns:
        The batch, with `pixel_values` and `image_grid_thw` as lists, one tensor per sample.

    Raises:
        ValueError: the grids count other patches than there are.
    """
    if any(batch.get(key) is None for key in ("pixel_values", "image_grid_thw", "num_images")):
        return batch
    patches, grids = batch["pixel_values"], batch["image_grid_thw"]
    images = [int(count) for count in batch["num_images"]]
    patches_per_image = grids.prod(-1).tolist()
    if sum(patches_per_image) != len(patches) or sum(images) != len(grids):
        raise ValueError(
            f"The image grids do not fit the batch: `image_grid_thw` counts {sum(patches_per_image)} patches in "
            f"{len(grids)} images, `pixel_values` has {len(patches)} rows, `num_images` counts {sum(images)} images."
        )
    ends = list(accumulate(images))
    patches_per_sample = [sum(patches_per_image[end - count : end]) for count, end in zip(images, ends, strict=True)]
    return {
        **batch,
        "pixel_values": list(patches.split(patches_per_sample)),
        "image_grid_thw": list(grids.split(images)),
    }


def unsplit_pixel_values_by_grid(batch: dict[str, Tensor | list[Tensor]]) -> dict[str, Tensor]:
    """
    Undo `split_pixel_values_by_grid`.

    Args:
        batch: with `pixel_values` and `image_grid_thw` as lists of tensors; other values are kept.

    Returns:
        The batch with those two as one tensor each.
    """
    return {
        key: torch.cat(value) if key in ("pixel_values", "image_grid_thw") and isinstance(value, list) else value
        for key, value in batch.items()
    }
