"""
A causal language model whose forward returns per-token values instead of logits, on request.

Thin doors to `trl.ops.scoring` for those who call the model themselves; trainers call `score_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..ops.head import maybe_gather_lm_head_ctx
from ..ops.scoring import ScoreRequest, TokenScores, find_causal_lm, install_scoring, redirect_forward, run_scoring

__all__ = [
    "FusedCausalLMOutput",
    "add_fused_lm_head",
    "install_scoring",
    "maybe_gather_lm_head_ctx",
    "patch_chunked_lm_head",
]


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """
    What a model with a fused LM head returns when called with `fused_lm_head=True`.

    Every per-token field is [B, L - 1] for labels of [B, L] (or [B, L] for `shift_labels`), with 0 where the label is
    -100, and `None` where it was not asked for.

    Args:
        loss: minus the sum of the log-probabilities over the number of labels, plus the weighted router loss.
        log_probs: log-probabilities of the labels, in nats.
        entropy: entropy of the prediction, in nats.
        log_sum_sq_probs: log of the sum of squared probabilities.
        mean_logits: mean logit over the vocabulary.
        is_top1: whether the label is the most probable token.
        label_mask: whether the position has a label.
        aux_loss: load-balancing loss of a mixture of experts.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def add_fused_lm_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """
    Teach `model.forward` the argument `fused_lm_head=True`: per-token values in chunks, without full logits.

    Such a call needs `labels` ([B, L], -100 where there is none) or `shift_labels`, takes `num_items_in_batch` as the
    loss's denominator, and returns a `FusedCausalLMOutput`. Every other call is the model's own.

    Args:
        model: causal language model, bare or wrapped by PEFT.
        temperature: divides the logits, after logit scale and soft-capping.
        cast_lm_head_to_fp32: keep the head's weights in float32 and project in float32, outside autocast. Tied input
            embeddings, which become float32 with it, return their former dtype.
        outputs: which of `log_probs`, `entropy`, `log_sum_sq_probs`, `mean_logits`, `is_top1` to return.

    Raises:
        ValueError: if an output is unknown, or `cast_lm_head_to_fp32` meets an adapter on the head.
    """
    known = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    unknown = set(outputs) - set(known)
    if unknown:
        raise ValueError(f"Unknown outputs {sorted(unknown)}; choose from {', '.join(known)}.")
    causal_lm = install_scoring(model)
    if cast_lm_head_to_fp32:
        cast_head_to_fp32(causal_lm)
    causal_lm._fused_lm_head = (
        ScoreRequest(
            temperature, tuple(name for name in outputs if name != "log_probs"), head_in_fp32=cast_lm_head_to_fp32
        ),
        tuple(outputs),
    )
    if "_forward_without_fused_head" not in causal_lm.__dict__:
        redirect_forward(causal_lm, "_forward_without_fused_head", _fused_forward)


def _fused_forward(self: PreTrainedModel, *args, fused_lm_head: bool = False, **kwargs):
    if not fused_lm_head:
        return self._forward_without_fused_head(*args, **kwargs)
    request, outputs = self._fused_lm_head
    return _run_fused(self, request, outputs, *args, **kwargs)


def _run_fused(
    model: PreTrainedModel,
    request: ScoreRequest,
    outputs: tuple[str, ...],
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **inputs,
) -> FusedCausalLMOutput:
    if labels is None and shift_labels is None:
        raise ValueError("A call with fused_lm_head=True needs `labels` or `shift_labels`.")
    inputs.setdefault("use_cache", False)
    if input_ids is not None:
        inputs["input_ids"] = input_ids
    scores = run_scoring(model, request, labels=labels, shift_labels=shift_labels, **inputs)
    loss = _mean_loss(scores, num_items_in_batch)
    if scores.aux_loss is not None:
        coefficient = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) or 0.0
        loss = loss + coefficient * scores.aux_loss.to(loss.device)
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=scores.logps if "log_probs" in outputs else None,
        entropy=scores.entropies,
        log_sum_sq_probs=scores.log_sum_sq_probs,
        mean_logits=scores.mean_logits,
        is_top1=scores.is_top1,
        label_mask=scores.mask,
        aux_loss=scores.aux_loss,
    )


def _mean_loss(scores: TokenScores, num_items_in_batch: Tensor | int | None) -> Tensor:
    count = scores.mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        count = count.to(scores.logps.device)
    return -scores.logps.sum() / count


def cast_head_to_fp32(model: PreTrainedModel) -> None:
    """
    Keep the head's weights in float32; tied input embeddings, which become float32 with it, return their former dtype.

    Args:
        model: the causal language model.

    Raises:
        ValueError: the head is no plain linear layer, such as one with an adapter.
    """
    head = model.get_output_embeddings()
    if type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"cast_lm_head_to_fp32 needs a plain linear head, but the head is a {type(head).__name__}. "
            "Take `lm_head` out of the adapter's target_modules and modules_to_save, or leave the cast out."
        )
    embedding = model.get_input_embeddings()
    tied = embedding.weight is head.weight
    dtype = embedding.weight.dtype
    head.float()
    if tied and dtype != torch.float32:
        embedding._output_dtype = dtype
        redirect_forward(embedding, "_forward_in_fp32", _embedding_forward)


def _embedding_forward(self: nn.Module, *args, **kwargs) -> Tensor:
    return self._forward_in_fp32(*args, **kwargs).to(self._output_dtype)


def patch_chunked_lm_head(
    model: nn.Module, chunk_size: int, temperature: float, output_router_logits: bool = False
) -> None:
    """
    Make every call with `labels` return per-token `log_probs` and `entropy` instead of logits, computed in chunks.

    An earlier form of `add_fused_lm_head`, kept for scripts that use it.

    Args:
        model: causal language model, bare or wrapped by PEFT.
        chunk_size: tokens projected at a time.
        temperature: divides the logits.
        output_router_logits: also return the router loss of a mixture of experts as `aux_loss`.
    """
    causal_lm = find_causal_lm(model)
    request = ScoreRequest(temperature, ("entropy",), chunk_size=chunk_size)
    causal_lm._chunked_lm_head = (request, output_router_logits)
    if "_forward_with_logits" not in causal_lm.__dict__:
        install_scoring(causal_lm)
        redirect_forward(causal_lm, "_forward_with_logits", _chunked_forward)


def _chunked_forward(self: PreTrainedModel, *args, **kwargs):
    if (kwargs.get("labels") is None and kwargs.get("shift_labels") is None) or "scoring" in kwargs:
        return self._forward_with_logits(*args, **kwargs)
    request, output_router_logits = self._chunked_lm_head
    kwargs.setdefault("output_router_logits", output_router_logits or None)
    return _run_fused(self, request, ("log_probs", "entropy"), *args, **kwargs)
