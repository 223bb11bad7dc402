"""
Losses on single completions, each judged desirable or not: from log-ratios to a value per row.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..choices import check_choice


def kto(logratios_B: Tensor, labels_B: Tensor, kl: Tensor | None, beta: float) -> Tensor:
    """
    KTO (https://huggingface.co/papers/2402.01306): 1 − σ(β·(r − kl)) for a desirable completion and 1 − σ(β·(kl − r))
    for an undesirable one, where r = log π − log π_ref and kl estimates how far the policy has moved from the
    reference. No gradient flows through `kl`, and it is at least 0.
    """
    if kl is None:
        raise ValueError("`loss_type='kto'` needs `kl`, the mean log-ratio of mismatched completions.")
    gains_B = beta * (logratios_B - kl.detach().clamp(min=0))
    return torch.where(labels_B, -gains_B, gains_B).sigmoid()


def apo_zero_unpaired(logratios_B: Tensor, labels_B: Tensor, kl: Tensor | None, beta: float) -> Tensor:
    """
    APO-zero without pairs (https://huggingface.co/papers/2408.06266): 1 − σ(β·r) for a desirable completion and σ(β·r)
    for an undesirable one: KTO around a fixed reference point, which needs no KL estimate.
    """
    return (beta * torch.where(labels_B, -logratios_B, logratios_B)).sigmoid()


UNPAIRED_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
}


def unpaired_loss(
    logratios_B: Tensor,
    labels_B: Tensor,
    kl: Tensor | None = None,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """
    Weighted losses of single completions. The loss of a step is their mean over all its rows.

    Args:
        logratios_B: log π − log π_ref of the completions, [B], in nats.
        labels_B: whether a completion is desirable, [B], bool.
        kl: mean of log π − log π_ref over mismatched completions, scalar, in nats; values below 0 count as 0. Not read
            by `apo_zero_unpaired`.
        loss_type: `kto` or `apo_zero_unpaired`.
        beta: how strongly the policy is held to the reference, > 0.
        desirable_weight: weight of the desirable completions.
        undesirable_weight: weight of the undesirable completions.

    Returns:
        The values, [B], with the order of the rows kept.

    Raises:
        ValueError: for an unknown loss type, or `kto` without `kl`.
    """
    check_choice("loss_type", loss_type, UNPAIRED_LOSSES)
    labels_B = labels_B.bool()
    losses_B = UNPAIRED_LOSSES[loss_type](logratios_B, labels_B, kl, beta)
    return torch.where(labels_B, desirable_weight, undesirable_weight).to(losses_B.dtype) * losses_B
