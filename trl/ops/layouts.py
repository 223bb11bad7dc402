"""
Layouts of a batch: padded rows, documents packed end to end in one row, or rows that share a beginning computed once
(`trl.ops.shared_prefix`). The same numbers, less work.

What makes a packed row right is that no document sees another. How a model is told so depends on its attention:
sdpa and eager get the explicit mask, in the form that the installed Transformers takes (one mask, or one for each type
of layer), flash attention gets the cumulative lengths, and flex attention builds its block mask from `position_ids`
that restart at 0. None of it depends on training or evaluation mode. Models that carry a state along the row
(recurrent, convolutional) cannot be told, and are refused.

Shapes: B rows, T tokens, S tokens of a packed row, N scored tokens.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..choices import LAYOUTS
from .shared_prefix import Arrangement, SharedRows, Sight, arrange, block_mask, dense_mask, find_shared

IGNORE_INDEX = -100
# What a collator adds for flash attention; made anew here, so that padding at the end is one document.
_VARLEN_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# Attention that computes what a mask leaves out, and throws it away.
_DENSE_ATTENTION = ("sdpa", "eager")
# Types of layers (`config.layer_types`) whose attention is a mask and nothing else.
_MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_TEXT_KEYS = {"input_ids", "attention_mask", "labels", "shift_labels"}


class PackingNotSupportedError(ValueError):
    """A model or a batch that cannot be laid out anew without changing its numbers; the message says why."""


@dataclass(frozen=True)
class LayoutChoice:
    """
    How a batch is laid out, and why so.

    Args:
        name: `"padded"`, `"packed"` or `"shared_prefix"`.
        reason: a sentence without its full stop.
        sharing: for `"shared_prefix"`, what the rows share and where they go.
    """

    name: str
    reason: str
    sharing: tuple[SharedRows, Arrangement] | None = field(default=None, repr=False, compare=False)


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is one row of documents: `position_ids` and no attention mask."""
    position_ids = batch.get("position_ids")
    return (
        position_ids is not None
        and batch.get("attention_mask") is None
        and position_ids.dim() == 2
        and position_ids.shape[0] == 1
    )


# ---------------------------------------------------------------------------------------------------------------------
# Can this model do it


def why_not_packed(model: PreTrainedModel) -> str | None:
    """The reason why a model cannot keep packed documents apart, or `None` if it can."""
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(model, "_has_virtual_tokens", False):
        return (
            "The adapter puts learned tokens before a row, and in a packed row only the first document would see them"
        )
    layer_types = set(getattr(config, "layer_types", None) or ())
    others = sorted(layer_types - _MASKED_LAYERS)
    if getattr(model, "_is_stateful", False) or others:
        what = f" (layers of type {', '.join(others)})" if others else ""
        return f"{name} carries a state along the row{what}, through which one packed document would reach the next"
    backbone = find_backbone(model)
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return f"{name} takes no position_ids, so that a packed document cannot start at position 0"
    if hasattr(getattr(backbone, "embeddings", None), "create_position_ids_from_input_ids"):
        return f"{name} counts its positions from the padding token, so that a packed document cannot start at 0"
    if "create_causal_mask" not in _source(backbone) and "create_masks_for_generate" not in _source(backbone):
        return f"{name} builds its attention mask in a way of its own, which cannot be told to keep documents apart"
    if getattr(config, "alibi", False):
        return f"{name} weighs positions along the whole row (ALiBi), so that a packed document cannot start at 0"
    implementation = config._attn_implementation
    if "chunked_attention" in layer_types and implementation not in _DENSE_ATTENTION:
        return f"{name} attends in chunks of the row, which {implementation} cannot start anew with every document"
    return None


def why_not_shared_prefix(model: PreTrainedModel) -> str | None:
    """The reason why a model cannot let rows share a beginning, or `None` if it can."""
    reason = why_not_packed(model)
    if reason is not None:
        return reason
    implementation = model.config.get_text_config()._attn_implementation
    if implementation not in (*_DENSE_ATTENTION, "flex_attention"):
        return f"{implementation} takes no mask in which two answers see one prompt but not each other"
    if _mask_form(model) is None:
        return f"{type(model).__name__} makes its attention masks by itself and takes none of ours"
    return None


def find_backbone(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that gives hidden states; the model itself if there is no such part."""
    if model.base_model is not model:
        return model.base_model
    return getattr(model, "model", model)


def check_packable(model: PreTrainedModel) -> None:
    """
    Raises:
        PackingNotSupportedError: with the reason, if the model cannot keep packed documents apart.
    """
    reason = why_not_packed(model)
    if reason is not None:
        raise PackingNotSupportedError(f"{reason}. Use padded batches: packing=False and padding_free=False.")


def choose_layout(
    model: PreTrainedModel, batch: Mapping[str, Any], layout: str, groups: Tensor | None = None
) -> LayoutChoice:
    """
    The layout of a padded batch.

    `"auto"` leaves the padded rows where another layout saves at least a tenth of the estimated work, and shares
    beginnings where that saves another tenth: a token costs 24 D² operations in the linear maps of a layer, and each
    pair of tokens that attention computes, masked or not, 4 D.

    Args:
        model: the bare causal language model.
        batch: a padded batch.
        layout: `"auto"`, `"padded"`, `"packed"` or `"shared_prefix"`; the last becomes `"auto"` where no rows of a
            group begin alike.
        groups: int64, [B]; rows with the same number may begin alike. Default: none do.

    Raises:
        ValueError: if the layout is unknown, or asked for and not possible for this model or batch.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be "auto", "padded", "packed" or "shared_prefix", got {layout!r}.')
    if layout == "padded":
        return LayoutChoice("padded", "It was asked for")
    reason = why_not_packed(model) or _why_not_repacked(batch)
    if layout == "shared_prefix":
        reason = reason or why_not_shared_prefix(model)
    if reason is not None:
        if layout == "auto":
            return LayoutChoice("padded", reason)
        raise PackingNotSupportedError(f"{reason}. Use layout='padded'.")
    if layout == "packed":
        return LayoutChoice("packed", "It was asked for")

    sharing = _plan_sharing(model, batch, groups)
    if layout == "shared_prefix" and sharing is not None:
        return LayoutChoice("shared_prefix", "It was asked for", sharing)
    if not _is_right_padded(batch["attention_mask"]):
        return LayoutChoice("padded", "Rows padded on the left start at another position, so they stay as they are")
    choice = _cheapest_layout(model, batch, sharing)
    if layout == "shared_prefix":
        return replace(choice, reason=f"No two rows of a group begin alike. {choice.reason}")
    if groups is not None and (reason := why_not_shared_prefix(model)) is not None:
        return replace(choice, reason=f"{choice.reason}. {reason}")
    return choice


def _plan_sharing(
    model: PreTrainedModel, batch: Mapping[str, Any], groups: Tensor | None
) -> tuple[SharedRows, Arrangement] | None:
    """What the rows of a batch share and where they go, or `None` where they share nothing."""
    if groups is None or why_not_shared_prefix(model) is not None:
        return None
    if groups.shape != batch["input_ids"].shape[:1]:
        raise ValueError(
            f"groups must have one number for each of the {len(batch['input_ids'])} rows, got a tensor of shape "
            f"{tuple(groups.shape)}."
        )
    rows = find_shared(batch, groups)
    config = model.config.get_text_config()
    arrangement = arrange(rows, _token_cost(model), dense=config._attn_implementation in _DENSE_ATTENTION)
    return (rows, arrangement) if arrangement.tokens < rows.lengths_B.sum() else None


def _token_cost(model: PreTrainedModel) -> int:
    """What a token costs in the linear maps, in pairs of tokens in attention."""
    return 6 * model.config.get_text_config().hidden_size


def _cheapest_layout(
    model: PreTrainedModel, batch: Mapping[str, Any], sharing: tuple[SharedRows, Arrangement] | None
) -> LayoutChoice:
    rows, width = batch["attention_mask"].shape
    lengths = batch["attention_mask"].sum(dim=1).double()
    packed_tokens = int(lengths.sum())
    dense = model.config.get_text_config()._attn_implementation in _DENSE_ATTENTION
    packed_pairs = packed_tokens**2 if dense else lengths.square().sum().item()
    cost = _token_cost(model)
    padded_work = work = rows * width * cost + rows * width**2
    best, tokens = LayoutChoice("padded", "No other layout saves a tenth of the estimated work"), rows * width
    packed_work = packed_tokens * cost + packed_pairs
    if packed_work < 0.9 * work:
        best, tokens, work = LayoutChoice("packed", "Padding is left out"), packed_tokens, packed_work
    if sharing is not None:
        arrangement = sharing[1]
        laid_out_tokens = math.prod(arrangement.shape)
        shared_work = laid_out_tokens * cost + arrangement.pairs
        if shared_work < 0.9 * work:
            best = LayoutChoice("shared_prefix", "What rows have in common is computed once", sharing)
            tokens, work = laid_out_tokens, shared_work
    if best.name == "padded":
        return best
    saved = f"{tokens:,} tokens instead of {rows * width:,}, about {1 - work / padded_work:.0%} less work"
    return replace(best, reason=f"{best.reason}: {saved}")


def _why_not_repacked(batch: Mapping[str, Any]) -> str | None:
    """Why a padded batch cannot be laid out anew without changing its numbers."""
    others = sorted(name for name in batch if name not in _TEXT_KEYS)
    if others:
        return f"The batch has inputs whose place in a packed row is unknown ({', '.join(others)})"
    attention_mask = batch.get("attention_mask")
    if attention_mask is None or attention_mask.dim() != 2 or "input_ids" not in batch:
        return "The batch has no attention mask of [batch, length] that says where the tokens are"
    runs = torch.diff(
        attention_mask.bool().int(), dim=1, prepend=attention_mask.new_zeros(len(attention_mask), 1).int()
    )
    if ((runs == 1).sum(dim=1) != 1).any():
        return "A row has padding between its tokens, or no token at all"
    if "labels" in batch and ((batch["labels"] != IGNORE_INDEX) & ~attention_mask.bool()).any():
        return "A padding token has a label"
    if "shift_labels" in batch and ((batch["shift_labels"] != IGNORE_INDEX) & ~attention_mask.bool()).any():
        return "A padding token has a label"
    return None


def _is_right_padded(attention_mask: Tensor) -> bool:
    return bool(attention_mask[:, 0].bool().all())


# ---------------------------------------------------------------------------------------------------------------------
# Padded rows to one packed row, and back


@dataclass(frozen=True)
class ScoredPositions:
    """
    Where to find, in a batch laid out anew, what the tokens of the padded batch are scored from.

    Args:
        mask: the scored tokens, in the shape of the scores: [B, T - 1], or [B, T] for shifted labels.
        index_N: place of the hidden state that predicts each of them, counted through all laid-out rows. Rows that
            share a beginning have places in common.
        targets_N: the tokens to be predicted.
    """

    mask: Tensor
    index_N: Tensor
    targets_N: Tensor


def find_scored_positions(batch: Mapping[str, Any], mask_BT: Tensor, index_BT: Tensor) -> ScoredPositions:
    """
    Args:
        batch: the padded batch, with `labels` or `shift_labels`.
        mask_BT: its tokens.
        index_BT: their places in the new layout.
    """
    if "shift_labels" in batch:
        labels, known, index = batch["shift_labels"], mask_BT, index_BT
    else:
        # A token is predicted at the position before it; a row's first token at none.
        labels, known, index = batch["labels"][:, 1:], mask_BT[:, 1:] & mask_BT[:, :-1], index_BT[:, :-1]
    mask = (labels != IGNORE_INDEX) & known
    return ScoredPositions(mask, index[mask], labels[mask])


def pack_padded(batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], ScoredPositions]:
    """
    Lay the rows of a padded batch end to end, without the padding.

    Args:
        batch: `input_ids`, `attention_mask`, and `labels` or `shift_labels`, [B, T].

    Returns:
        The packed batch, [1, S], with `position_ids` that restart at 0, and where its tokens are scored.
    """
    mask_BT = batch["attention_mask"].bool()
    packed = {
        "input_ids": batch["input_ids"][mask_BT].unsqueeze(0),
        "position_ids": (mask_BT.cumsum(dim=1) - 1)[mask_BT].unsqueeze(0),
    }
    index_BT = (mask_BT.flatten().cumsum(dim=0) - 1).view_as(mask_BT)
    return packed, find_scored_positions(batch, mask_BT, index_BT)


# ---------------------------------------------------------------------------------------------------------------------
# Keeping documents apart


def prepare_packed(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """
    Make a packed row safe for the model's attention.

    Padding at the end of the row (a run of zeros in `position_ids`, as `pad_to_multiple_of` leaves it) becomes one
    document, and the first token of a document loses its label, which another document would predict.

    Args:
        model: the bare causal language model.
        batch: `input_ids`, `position_ids` that restart at 0, and `labels` or `shift_labels`, [1, S].

    Returns:
        The model's inputs, and the mask of the tokens that are not padding, [1, S].

    Raises:
        PackingNotSupportedError: if the model cannot keep documents apart.
    """
    check_packable(model)
    inputs = {name: value for name, value in batch.items() if name not in _VARLEN_KEYS}
    position_ids, token_mask = _merge_trailing_padding(inputs["position_ids"])
    inputs["position_ids"] = position_ids
    starts = position_ids == 0
    if "labels" in inputs:
        inputs["labels"] = inputs["labels"].masked_fill(starts, IGNORE_INDEX)
    if "shift_labels" in inputs:
        ends = starts.roll(-1, dims=1)
        inputs["shift_labels"] = inputs["shift_labels"].masked_fill(ends, IGNORE_INDEX)

    implementation = model.config.get_text_config()._attn_implementation
    if "flash" in implementation:
        inputs.update(_varlen_arguments(position_ids))
    elif implementation in _DENSE_ATTENTION:
        mask = _explicit_mask(model, position_ids)
        if mask is not None:
            inputs["attention_mask"] = mask
    return inputs, token_mask


def _merge_trailing_padding(position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Number a trailing run of zeros 0, 1, 2, …; also the mask of the tokens before it."""
    nonzero = position_ids[0].nonzero()
    length = position_ids.shape[1]
    # The run begins after the last token at a position above 0; a single 0 there is a document of its own.
    start = int(nonzero[-1]) + 1 if len(nonzero) else 0
    token_mask = torch.ones_like(position_ids)
    if length - start > 1 and start > 0:
        position_ids = position_ids.clone()
        position_ids[0, start:] = torch.arange(length - start, device=position_ids.device)
        token_mask[0, start:] = 0
    return position_ids, token_mask


def _varlen_arguments(position_ids: Tensor) -> dict[str, Any]:
    starts = (position_ids[0] == 0).nonzero().squeeze(1)
    bounds = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _explicit_mask(model: PreTrainedModel, position_ids: Tensor) -> Tensor | dict[str, Tensor] | None:
    """
    The mask that keeps documents apart, or one for each type of layer, as the installed Transformers makes it; `None`
    for a model that makes its own from `position_ids`.
    """
    if not (position_ids[0, 1:] == 0).any():
        return None  # a single document: plain causal attention
    return _make_masks(model, lambda layer_type: _mask_of_layer_type(model, layer_type, position_ids))


def make_shared_prefix_masks(model: PreTrainedModel, sight: Sight) -> Any:
    """
    The mask for rows that share a beginning, or one for each type of layer, in the form that the model's attention
    takes. Called inside the model's forward, where autocast, if any, is on.

    Args:
        model: the bare causal language model.
        sight: which tokens see which.
    """
    config, device = model.config, sight.parts_RW.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype

    def make(layer_type: str) -> Any:
        window = config.sliding_window if layer_type == "sliding_attention" else None
        chunk = config.attention_chunk_size if layer_type == "chunked_attention" else None
        if config._attn_implementation == "flex_attention":
            return block_mask(sight, window, chunk)
        return dense_mask(sight, dtype, window, chunk)

    return _make_masks(model, make)


def _make_masks(model: PreTrainedModel, make: Callable[[str], Any]) -> Any:
    form = _mask_form(model)
    if form is None:
        return None
    return make(form) if isinstance(form, str) else {layer_type: make(layer_type) for layer_type in form}


def _mask_form(model: PreTrainedModel) -> str | tuple[str, ...] | None:
    """
    The type of layer that the one mask of a model is for; the types, where it takes a mapping with a mask for each.

    `None` for a model that cannot be given its masks: one with several types of layers that takes no mapping of masks,
    or one whose text model is inside a larger one.
    """
    config = model.config
    if config.get_text_config() is not config:
        return None
    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types:
        return tuple(sorted(layer_types)) if _takes_mask_mapping(find_backbone(model)) else None
    # A config may name a window that its model never looks at.
    makes_windows = "create_sliding_window_causal_mask" in _source(find_backbone(model))
    if makes_windows and getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "chunked_attention"
    return "full_attention"


def _mask_of_layer_type(model: PreTrainedModel, layer_type: str, position_ids: Tensor) -> Tensor:
    make = create_sliding_window_causal_mask if layer_type == "sliding_attention" else create_causal_mask
    mask = make(
        config=model.config,
        inputs_embeds=torch.empty((*position_ids.shape, 1), dtype=model.dtype, device=position_ids.device),
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids,
    )
    if layer_type == "chunked_attention":
        # Transformers counts the chunks along the row; a document has to find the chunks it has alone.
        chunk = position_ids[0] // model.config.attention_chunk_size
        same_chunk = chunk[:, None] == chunk[None, :]
        mask = (
            mask & same_chunk
            if mask.dtype == torch.bool
            else mask.masked_fill(~same_chunk, torch.finfo(mask.dtype).min)
        )
    return mask


def _takes_mask_mapping(backbone: nn.Module) -> bool:
    """Whether the backbone's forward accepts a mapping of masks; Transformers has no flag for it."""
    return "attention_mask, dict)" in _source(backbone)


@functools.cache
def _source_of_module(name: str) -> str:
    return inspect.getsource(sys.modules[name])


def _source(module: nn.Module) -> str:
    # FSDP and others derive classes at run time; the first class with a file is the one that was written.
    for cls in type(module).__mro__:
        if cls.__module__ in sys.modules and getattr(sys.modules[cls.__module__], "__file__", None):
            return _source_of_module(cls.__module__)
    return ""
