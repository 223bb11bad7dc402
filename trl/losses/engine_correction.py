"""
Correcting for the engine that sampled: its probabilities are not quite those of the trained model.

An inference engine computes with other kernels, another precision, or older weights. What it sampled is then off policy
from the start, and the ratio of the trainer's to its probabilities puts that right
(https://fengyao.notion.site/off-policy-rl).

Shapes: B completions, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .policy import LARGEST_EXPONENT, clean_logps
from .policy_options import PolicyLossOptions


@dataclass(frozen=True)
class EngineCorrection:
    """
    How the trainer's probabilities compare with the engine's.

    Args:
        ratios_BT: what the loss is multiplied by, [B, T] or [B, 1], truncated or masked; 1 where nothing is known.
        differences_BT: log π_old − log π_engine, [B, T], in nats; 0 where nothing is known.
        known_BT: tokens under the mask whose log-prob the engine told, bool, [B, T].
        mask_BT: tokens that count, bool, [B, T].
    """

    ratios_BT: Tensor
    differences_BT: Tensor
    known_BT: Tensor
    mask_BT: Tensor


@torch.no_grad()
def engine_correction(
    old_logps_BT: Tensor, rollout_logps_BT: Tensor, mask_BT: Tensor, options: PolicyLossOptions
) -> EngineCorrection:
    """
    Importance ratios exp(log π_old − log π_engine), in one of four modes (`vllm_importance_sampling_mode`).

    `token_*` has a ratio for each token; `sequence_*` the product over a completion. `*_truncate` moves ratios into
    the bounds, so that nothing is lost and the variance is bounded; `*_mask` sets those outside to 0, so that what the
    trainer and the engine disagree about is not learnt from.

    Args:
        old_logps_BT: of the sampled tokens under the trained model as it was when they were sampled, [B, T], in nats.
        rollout_logps_BT: the same as the engine reported them; NaN or infinite where it did not, which counts as
            ratio 1 and not as a difference.
        mask_BT: which tokens count, [B, T], bool or 0 and 1.
        options: mode and bounds.

    Returns:
        Ratios and differences, without a gradient.
    """
    mask_BT = mask_BT.bool()
    differences_BT, known_BT = engine_differences(old_logps_BT, rollout_logps_BT, mask_BT)
    logratios_BT = differences_BT
    if options.vllm_importance_sampling_mode.startswith("sequence_"):
        logratios_BT = differences_BT.sum(-1, keepdim=True)
    ratios_BT = logratios_BT.clamp(max=LARGEST_EXPONENT).exp()
    low, high = options.vllm_importance_sampling_clip_min, options.vllm_importance_sampling_clip_max
    if options.vllm_importance_sampling_mode.endswith("_truncate"):
        ratios_BT = ratios_BT.clamp(min=low, max=high)
    else:
        if low is not None:
            ratios_BT = ratios_BT.masked_fill(ratios_BT < low, 0)
        if high is not None:
            ratios_BT = ratios_BT.masked_fill(ratios_BT > high, 0)
    if ratios_BT.shape == mask_BT.shape:
        ratios_BT = ratios_BT.masked_fill(~known_BT, 1)
    return EngineCorrection(ratios_BT, differences_BT, known_BT, mask_BT)


@torch.no_grad()
def engine_differences(logps_BT: Tensor, rollout_logps_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """
    Log π_trainer − log π_engine of the sampled tokens, in nats, [B, T], 0 where the engine did not tell; and where it
    did, under the mask, bool, [B, T].
    """
    known_BT = mask_BT.bool() & rollout_logps_BT.isfinite()
    logps_BT = clean_logps(logps_BT, known_BT)
    return logps_BT - rollout_logps_BT.to(logps_BT.dtype).masked_fill(~known_BT, 0), known_BT
