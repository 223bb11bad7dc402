"""
Entropy in policy losses: which tokens are uncertain enough to learn from, and how strongly to keep the policy uncertain.

Shapes: B completions, T tokens, N tokens under the mask, of one process or gathered from all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .policy_options import PolicyLossOptions


@torch.no_grad()
def entropy_threshold(entropies_N: Tensor, top_entropy_quantile: float) -> Tensor:
    """
    The entropy from which on a token belongs to the given share of the most uncertain ones
    (https://huggingface.co/papers/2506.01939): few tokens of a text are decisions, and learning from these alone is
    enough.

    Args:
        entropies_N: entropies of all tokens under the mask, gathered over processes, [N], in nats.
        top_entropy_quantile: the share, from 0 (the highest alone) to 1 (all).

    Returns:
        The (1 − share) quantile, interpolated linearly, a scalar in float32; +inf where there is no token.
    """
    entropies_N = entropies_N.float()
    if entropies_N.numel() == 0:
        return entropies_N.new_full((), math.inf)
    # torch.quantile refuses more than 2^24 elements.
    sorted_N = entropies_N.flatten().sort().values
    position = (1 - top_entropy_quantile) * (len(sorted_N) - 1)
    below = math.floor(position)
    above = min(below + 1, len(sorted_N) - 1)
    return torch.lerp(sorted_N[below], sorted_N[above], position - below)


class EntropyController:
    """
    Steers the coefficient of the entropy bonus so that the entropy stays above a target, as in Skywork-OR1
    (https://huggingface.co/papers/2505.22312).

    At each optimizer step: entropy at the target or below raises the coefficient, else it is lowered. The bonus is in
    force only while the last entropy was not above the target, so it is off until the first step has been taken.

    Args:
        coef: coefficient to begin with.
        target: the least entropy wanted, in nats per token.
        delta: how far one step moves the coefficient.
        minimum: lowest coefficient.
        maximum: highest coefficient.
    """

    def __init__(self, coef: float, target: float, delta: float, minimum: float, maximum: float):
        self.coef = coef
        self.target = target
        self.delta = delta
        self.minimum = minimum
        self.maximum = maximum
        self.last_entropy = math.inf

    @classmethod
    def of(cls, options: PolicyLossOptions) -> EntropyController:
        """The controller that a training's options describe."""
        return cls(
            coef=options.entropy_coef,
            target=options.entropy_target,
            delta=options.entropy_coef_delta,
            minimum=options.entropy_coef_min,
            maximum=options.entropy_coef_max,
        )

    @property
    def active_coef(self) -> float:
        """The coefficient in force: 0 while the entropy is above the target."""
        return self.coef if self.last_entropy <= self.target else 0.0

    def update(self, entropy: float) -> None:
        """
        Take an optimizer step into account.

        Args:
            entropy: mean over the step's tokens of all processes, in nats. NaN, of a step without tokens, changes
                nothing.
        """
        if math.isnan(entropy):
            return
        self.last_entropy = float(entropy)
        if entropy <= self.target:
            self.coef = min(self.coef + self.delta, self.maximum)
        else:
            self.coef = max(self.coef - self.delta, self.minimum)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, in JSON's types; an entropy of `None` is one not yet seen."""
        return {
            "entropy_coef": self.coef,
            "last_entropy": self.last_entropy if math.isfinite(self.last_entropy) else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint left off."""
        self.coef = float(state["entropy_coef"])
        self.last_entropy = math.inf if state["last_entropy"] is None else float(state["last_entropy"])
