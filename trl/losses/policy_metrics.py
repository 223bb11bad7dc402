"""
What a policy loss tells about a run: entropy, KL divergence, shares of clipped tokens, the engine's ratios.

Means are sums with counts, so that they can be reduced over micro-batches and processes; extremes are the least or
greatest value, and so can they.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .engine_correction import EngineCorrection
from .policy import PolicyLoss, PolicyStep, capped_ratios, vespo_weights
from .policy_options import CLIPPED_LOSSES, PolicyLossOptions


@dataclass(frozen=True)
class PolicyMetrics:
    """
    Metrics of a micro-batch.

    Args:
        means: name -> (sum, count).
        minima: name -> least value; +inf where there was none.
        maxima: name -> greatest value; −inf where there was none.
    """

    means: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    minima: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)


# Masked, not indexed: the number of tokens is on the device, and nobody waits for it here.
def _least(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, torch.inf).amin()


def _greatest(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, -torch.inf).amax()


def _sum_and_count(values_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    return values_BT.masked_fill(~mask_BT, 0).sum(), mask_BT.sum()


def _mask_like(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Where values count: at every token under the mask, or once for each sequence that has any."""
    return mask_BT if values_BT.shape == mask_BT.shape else mask_BT.any(-1, keepdim=True)


@torch.no_grad()
def policy_metrics(loss: PolicyLoss, options: PolicyLossOptions) -> PolicyMetrics:
    """
    The metrics of a micro-batch.

    Args:
        loss: of `policy_loss`.
        options: the same as there.

    Returns:
        `entropy` and `kl`, means over tokens, where the inputs had them; then by loss type: `clip_ratio/*`,
        `cispo_clip_ratio` or `vespo/phi_seq_mean`. A ratio of sequences is counted once for each sequence.
    """
    step, metrics = loss.step, PolicyMetrics()
    if loss.entropies_BT is not None:
        metrics.means["entropy"] = _sum_and_count(loss.entropies_BT, step.mask_BT)
    if loss.kl_BT is not None:
        metrics.means["kl"] = _sum_and_count(loss.kl_BT, step.mask_BT)
    if options.loss_type in CLIPPED_LOSSES:
        _add_clip_shares(metrics, step, options)
    elif options.loss_type == "cispo":
        is_cut_BT = (step.ratios_BT > options.upper_epsilon) & (step.advantages_BT > 0)
        metrics.means["cispo_clip_ratio"] = _share(is_cut_BT, step)
    elif options.loss_type == "vespo":
        phi_BT = vespo_weights(step, options)
        metrics.means["vespo/phi_seq_mean"] = _sum_and_count(phi_BT, _mask_like(phi_BT, step.mask_BT))
    return metrics


def _share(indicators_BT: Tensor, step: PolicyStep) -> tuple[Tensor, Tensor]:
    """
    The share of ratios of which something holds. Where a sequence's one ratio meets advantages of tokens, a token
    stands for its part of the sequence.
    """
    counts_B = _mask_like(step.ratios_BT, step.mask_BT).sum(-1)
    return (_row_shares(indicators_BT, step) * counts_B).sum(), counts_B.sum()


def _row_shares(indicators_BT: Tensor, step: PolicyStep) -> Tensor:
    """The share within each row, [B]; 0 for a row without tokens."""
    mask_BT = _mask_like(indicators_BT, step.mask_BT)
    return (indicators_BT & mask_BT).sum(-1).to(step.ratios_BT.dtype) / mask_BT.sum(-1).clamp(min=1)


def _add_clip_shares(metrics: PolicyMetrics, step: PolicyStep, options: PolicyLossOptions) -> None:
    """Shares of ratios at which clipping takes the gradient away: below for negative advantages, above for positive."""
    ratios_BT = capped_ratios(step, options)
    is_low_BT = (ratios_BT < 1 - options.epsilon) & (step.advantages_BT < 0)
    is_high_BT = (ratios_BT > 1 + options.upper_epsilon) & (step.advantages_BT > 0)
    metrics.means["clip_ratio/low_mean"] = _share(is_low_BT, step)
    metrics.means["clip_ratio/high_mean"] = _share(is_high_BT, step)
    metrics.means["clip_ratio/region_mean"] = _share(is_low_BT | is_high_BT, step)
    has_tokens_B = step.mask_BT.any(-1)
    metrics.minima["clip_ratio/low_min"] = _least(_row_shares(is_low_BT, step), has_tokens_B)
    metrics.maxima["clip_ratio/high_max"] = _greatest(_row_shares(is_high_BT, step), has_tokens_B)


@torch.no_grad()
def engine_metrics(correction: EngineCorrection) -> PolicyMetrics:
    """
    How far the engine is from the trained model.

    Args:
        correction: of `engine_correction`.

    Returns:
        Those of `engine_agreement`, and `sampling/importance_sampling_ratio/*`, over all tokens under the mask, or all
        sequences.
    """
    metrics, ratios_BT = engine_agreement(correction.differences_BT, correction.known_BT), correction.ratios_BT
    counted_BT, ratio = _mask_like(ratios_BT, correction.mask_BT), "sampling/importance_sampling_ratio"
    metrics.means[f"{ratio}/mean"] = _sum_and_count(ratios_BT, counted_BT)
    metrics.minima[f"{ratio}/min"] = _least(ratios_BT, counted_BT)
    metrics.maxima[f"{ratio}/max"] = _greatest(ratios_BT, counted_BT)
    return metrics


@torch.no_grad()
def engine_agreement(differences_BT: Tensor, known_BT: Tensor) -> PolicyMetrics:
    """
    How far the engine is from the trained model, without any correction.

    Args:
        differences_BT: log π_trainer − log π_engine, in nats.
        known_BT: where both are known, bool.

    Returns:
        `sampling/sampling_logp_difference/mean` and `/max`, of the absolute differences, and `sampling/sampling_kl`,
        their mean with the sign turned: KL(engine ‖ trainer), estimated from the sampled tokens.
    """
    difference, sizes_BT = "sampling/sampling_logp_difference", differences_BT.abs()
    return PolicyMetrics(
        means={
            f"{difference}/mean": _sum_and_count(sizes_BT, known_BT),
            "sampling/sampling_kl": _sum_and_count(-differences_BT, known_BT),
        },
        maxima={f"{difference}/max": _greatest(sizes_BT, known_BT)},
    )
