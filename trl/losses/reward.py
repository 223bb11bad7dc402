"""
Losses of reward models: from the rewards of a chosen and a rejected completion to a value per pair.

Shapes: B pairs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .numerics import at_least_fp32


def bradley_terry_loss(
    chosen_rewards_B: Tensor, rejected_rewards_B: Tensor, margins_B: Tensor | None = None
) -> Tensor:
    """
    −log σ(r_c − r_r − margin): the negative log-likelihood of the preference in the model of Bradley and Terry, as in
    InstructGPT (https://huggingface.co/papers/2203.02155); the margin, by which a clear preference asks for more, is
    that of Llama 2 (https://huggingface.co/papers/2307.09288).

    Args:
        chosen_rewards_B: rewards of the chosen completions, [B].
        rejected_rewards_B: rewards of the rejected completions, [B].
        margins_B: by how much the chosen reward is to be higher at least, [B]; default 0.

    Returns:
        The loss of each pair, [B], in float32 or better.
    """
    differences_B = at_least_fp32(chosen_rewards_B) - at_least_fp32(rejected_rewards_B)
    if margins_B is not None:
        differences_B = differences_B - margins_B.to(differences_B.dtype)
    return -F.logsigmoid(differences_B)


def centering_penalty(chosen_rewards_B: Tensor, rejected_rewards_B: Tensor) -> Tensor:
    """
    (r_c + r_r)² (https://huggingface.co/papers/2312.09244): preferences say nothing about the level of rewards; this
    pulls it to 0.

    Args:
        chosen_rewards_B: rewards of the chosen completions, [B].
        rejected_rewards_B: rewards of the rejected completions, [B].

    Returns:
        The penalty of each pair, [B], in float32 or better, to be multiplied by the coefficient.
    """
    return (at_least_fp32(chosen_rewards_B) + at_least_fp32(rejected_rewards_B)) ** 2
