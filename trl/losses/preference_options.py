"""
The settings of the losses on preference pairs, and what is wrong with a combination of them.

They are checked where they are made, before any model is loaded. Nothing here needs torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..choices import check_choice, check_number

PREFERENCE_LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
F_DIVERGENCE_TYPES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

# The others are derived for the log-ratio itself, which is the score of the reverse KL divergence.
LOSSES_OF_ANY_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
LOSSES_WITH_LABEL_SMOOTHING = ("robust", "exo_pair", "aot", "aot_unpaired")
# A value of these belongs to a rank in the sorted batch, not to a pair.
LOSSES_OF_SORTED_BATCHES = ("aot", "aot_unpaired")


def _is_share(value: float) -> bool:
    return 0 <= value <= 1


@dataclass(frozen=True)
class PreferenceLossOptions:
    """
    Which loss a trainer on preference pairs minimises.

    Args:
        beta: how strongly the policy is held to the reference, > 0; for `ipo` the regularisation τ of its paper.
        loss_type: one name of `PREFERENCE_LOSS_TYPES`, or several, whose losses are added.
        loss_weights: weight of each loss type; default 1 each.
        label_smoothing: assumed probability that a preference is the wrong way round, from 0 to 1. Read by `robust`
            (not 0.5; warns above), `exo_pair` (above 0, below 1), `aot` and `aot_unpaired`; the other losses ignore it.
        f_divergence_type: divergence between policy and reference: `reverse_kl`, `forward_kl`, `js_divergence` or
            `alpha_divergence` (https://huggingface.co/papers/2309.16240).
        f_alpha_divergence_coef: α of `alpha_divergence`; 1 is `reverse_kl`, 0 is `forward_kl`.
        discopop_tau: temperature of the blend in `discopop`, > 0.
        use_weighting: weigh each pair by how probable the policy finds its completions
            (WPO, https://huggingface.co/papers/2406.11827).
        ld_alpha: weight, from 0 to 1, of the tokens by which a completion is longer than the other of its pair
            (LD-DPO, https://huggingface.co/papers/2409.06411); `None` or 1 counts them in full.

    Raises:
        ValueError: if a value is out of its range or two settings contradict each other.
        NotImplementedError: for `use_weighting` with a loss that sorts the batch.
    """

    beta: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    use_weighting: bool = False
    ld_alpha: float | None = None

    @classmethod
    def of(cls, config: Any, **overrides: Any) -> PreferenceLossOptions:
        """The options among a training config's fields; `overrides` win."""
        values = {field.name: getattr(config, field.name) for field in fields(cls)}
        return cls(**{**values, **overrides})

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each loss type."""
        return self.loss_weights if self.loss_weights is not None else (1.0,) * len(self.loss_type)

    def __post_init__(self):
        self._normalize("loss_type", (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type)
        if self.loss_weights is not None:
            self._normalize("loss_weights", self.loss_weights)
        if not self.loss_type:
            raise ValueError("`loss_type` is empty; give at least one, for instance 'sigmoid'.")
        for name in self.loss_type:
            check_choice("loss_type", name, PREFERENCE_LOSS_TYPES)
        check_choice("f_divergence_type", self.f_divergence_type, F_DIVERGENCE_TYPES)
        self._check_numbers()
        self._check_label_smoothing()
        self._check_combinations()

    def _normalize(self, name: str, value: Sequence) -> None:
        if not isinstance(value, Sequence):
            raise ValueError(f"`{name}` is a list, one entry for each loss. Found {value!r}.")
        object.__setattr__(self, name, tuple(value))  # the dataclass is frozen

    def _chosen(self, names: Sequence[str]) -> list[str]:
        return [name for name in self.loss_type if name in names]

    def _check_numbers(self) -> None:
        check_number("beta", self.beta, "a number above 0", lambda value: value > 0)
        check_number("discopop_tau", self.discopop_tau, "a number above 0", lambda value: value > 0)
        check_number("f_alpha_divergence_coef", self.f_alpha_divergence_coef, "a finite number")
        if self.ld_alpha is not None:
            check_number("ld_alpha", self.ld_alpha, "a number from 0 to 1, or None", _is_share)
        if self.loss_weights is None:
            return
        if len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"`loss_weights` has {len(self.loss_weights)} entries {list(self.loss_weights)} for "
                f"{len(self.loss_type)} loss types {list(self.loss_type)}; give one weight for each."
            )
        for weight in self.loss_weights:
            check_number("loss_weights", weight, "a list of finite numbers")

    def _check_label_smoothing(self) -> None:
        smoothing = self.label_smoothing
        check_number("label_smoothing", smoothing, "a probability, from 0 to 1", _is_share)
        if "exo_pair" in self.loss_type and not 0 < smoothing < 1:
            raise ValueError(
                f"`loss_type='exo_pair'` takes the logarithm of `label_smoothing`, which has to be above 0 and below 1. "
                f"Found {smoothing}; 1e-3 is a common choice."
            )
        if "robust" in self.loss_type and smoothing == 0.5:
            raise ValueError(
                "`loss_type='robust'` with `label_smoothing=0.5` divides by zero: if half of the preferences are wrong, "
                "there is nothing to learn from them. Choose a value below 0.5."
            )
        if "robust" in self.loss_type and smoothing > 0.5:
            warnings.warn(
                f"`label_smoothing={smoothing}` tells `loss_type='robust'` that most preferences are the wrong way "
                "round: the rejected completions will be preferred. Choose a value from 0 to below 0.5, unless you "
                "mean that.",
                stacklevel=4,
            )
        if smoothing > 0 and not self._chosen(LOSSES_WITH_LABEL_SMOOTHING):
            warnings.warn(
                f"`label_smoothing={smoothing}` changes nothing: of the losses, only "
                f"{', '.join(LOSSES_WITH_LABEL_SMOOTHING)} read it. For noisy preferences, `loss_type='robust'` is the "
                "sigmoid loss with smoothing.",
                stacklevel=4,
            )

    def _check_combinations(self) -> None:
        if self.f_divergence_type != "reverse_kl":
            without = [name for name in self.loss_type if name not in LOSSES_OF_ANY_DIVERGENCE]
            if without:
                raise ValueError(
                    f"`f_divergence_type={self.f_divergence_type!r}` is not defined for {', '.join(without)}. Use "
                    f"'reverse_kl', or only losses among {', '.join(LOSSES_OF_ANY_DIVERGENCE)}."
                )
        if self.use_weighting and self._chosen(LOSSES_OF_SORTED_BATCHES):
            raise NotImplementedError(
                f"`use_weighting` weighs pairs, but {', '.join(self._chosen(LOSSES_OF_SORTED_BATCHES))} sorts the batch "
                "and compares ranks, not pairs. Choose another loss, or leave `use_weighting` off."
            )
