"""
Objectives of language modeling: from the log-probability of each target token to its loss.

An objective returns each token's loss together with its derivative with respect to the log-probability. With the
derivative known in the forward pass, `trl.ops.scoring.score_tokens` makes the gradients of the hidden states and of
the LM head right there, and no logits are computed twice.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# logps_N -> (losses_N, d losses_N / d logps_N)
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


def nll(logps_N: Tensor) -> tuple[Tensor, Tensor]:
    """
    Negative log-likelihood: the loss of a token is minus its log-probability.

    Args:
        logps_N: log-probabilities of the target tokens, in nats, of any shape.

    Returns:
        The losses and their derivatives, each shaped like the input.
    """
    return -logps_N, logps_N.new_full((), -1.0).expand_as(logps_N)


def dft(logps_N: Tensor) -> tuple[Tensor, Tensor]:
    """
    Dynamic Fine-Tuning (https://huggingface.co/papers/2508.05629): the negative log-likelihood of a token weighted by
    its own probability, which is held constant, so that improbable targets do not dominate the update.

    Args:
        logps_N: log-probabilities of the target tokens, in nats, of any shape.

    Returns:
        The losses and their derivatives, each shaped like the input.
    """
    probs_N = logps_N.exp()
    return -probs_N * logps_N, -probs_N


LANGUAGE_MODELING_LOSSES: dict[str, Objective] = {"nll": nll, "dft": dft}
