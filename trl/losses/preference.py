"""
Losses on preference pairs: from the log-probabilities of a chosen and a rejected completion to a value per pair.

The way is: log-probs of tokens → `sum_pair_logps` → `PreferenceLossInputs` → `preference_loss`, which gives sums, not
means, so that a batch may be cut anywhere. Every published loss is one function below; they share these quantities,
for a prompt x and its completions y_c (chosen) and y_r (rejected):

- log-ratio r(y) = log π(y|x) − log π_ref(y|x), in nats;
- score s(y) = f′(π/π_ref) of the chosen f-divergence, which is r(y) for the reverse KL divergence;
- margin d = s(y_c) − s(y_r).

log σ is the logarithm of the logistic function, len the number of a completion's tokens, at least 1. Metrics such as
the implicit reward β·r are the trainer's business.

Shapes: B pairs, R = 2B rows (B chosen, then their B rejected), T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .numerics import at_least_fp32, bounded_exponents
from .preference_options import F_DIVERGENCE_TYPES, PREFERENCE_LOSS_TYPES, PreferenceLossOptions

__all__ = [
    "F_DIVERGENCES",
    "F_DIVERGENCE_TYPES",
    "PREFERENCE_LOSSES",
    "PREFERENCE_LOSS_TYPES",
    "LossTerm",
    "PairLogps",
    "PreferenceLossInputs",
    "PreferenceLossOptions",
    "preference_loss",
    "sum_pair_logps",
    "wpo_weights",
]


# ---- From tokens to pairs ----


@dataclass(frozen=True)
class PairLogps:
    """
    Log-probabilities of whole completions, in nats.

    Args:
        chosen_B: of the chosen completions, [B].
        rejected_B: of the rejected completions, [B].
    """

    chosen_B: Tensor
    rejected_B: Tensor


def _scored(values_RT: Tensor, mask_RT: Tensor) -> Tensor:
    """The values under the mask, 0 elsewhere whatever stood there, in float32 at least: long sums want the digits."""
    if len(values_RT) % 2:
        raise ValueError(f"Pairs are an even number of rows, the chosen ones first. Found {len(values_RT)} rows.")
    return at_least_fp32(values_RT).masked_fill(~mask_RT, 0)


def sum_pair_logps(logps_RT: Tensor, mask_RT: Tensor, ld_alpha: float | None = None) -> PairLogps:
    """
    Log-probabilities of the completions of a batch of pairs.

    With `ld_alpha` (LD-DPO, https://huggingface.co/papers/2409.06411) the tokens by which a completion is longer than
    the other of its pair count with that weight, so that length alone makes less of a difference. Use the same value
    for the policy and the reference.

    Args:
        logps_RT: log-probabilities of the tokens, [2B, T], in nats; the B chosen rows first.
        mask_RT: which positions belong to a completion, [2B, T], bool or 0 and 1.
        ld_alpha: weight of the tokens beyond the shorter completion's length, from 0 to 1; `None` is 1.

    Returns:
        The sums over each completion's tokens.

    Raises:
        ValueError: for an odd number of rows.
    """
    mask_RT = mask_RT.bool()
    logps_RT = _scored(logps_RT, mask_RT)
    if ld_alpha is not None:
        shorter_B = torch.minimum(*mask_RT.sum(-1).chunk(2))
        in_tail_RT = mask_RT.cumsum(-1) > shorter_B.repeat(2).unsqueeze(-1)
        logps_RT = torch.where(in_tail_RT, ld_alpha * logps_RT, logps_RT)
    return PairLogps(*logps_RT.sum(-1).chunk(2))


def wpo_weights(logps_RT: Tensor, log_sum_sq_probs_RT: Tensor, mask_RT: Tensor) -> Tensor:
    """
    Weights of the pairs in WPO (https://huggingface.co/papers/2406.11827): pairs that the policy could have written
    itself count more, which brings training on others' completions nearer to training on one's own.

    The weight of a completion is exp(mean over its tokens of log p(token) − log Σ_v p(v)²): its probability against
    what the policy gives on average to a token that it samples. The weight of a pair is the product of its two.

    Args:
        logps_RT: the policy's log-probabilities of the tokens, [2B, T], in nats; the B chosen rows first.
        log_sum_sq_probs_RT: logarithm of the sum of squared probabilities of the prediction at each position, [2B, T].
        mask_RT: which positions belong to a completion, [2B, T], bool or 0 and 1.

    Returns:
        Weights, [B], without a gradient.

    Raises:
        ValueError: for an odd number of rows.
    """
    mask_RT = mask_RT.bool()
    with torch.no_grad():
        excess_RT = _scored(logps_RT, mask_RT) - _scored(log_sum_sq_probs_RT, mask_RT)
        mean_R = excess_RT.sum(-1) / mask_RT.sum(-1).clamp(min=1)
        chosen_B, rejected_B = mean_R.chunk(2)
        return (chosen_B + rejected_B).exp()


@dataclass(frozen=True)
class PreferenceLossInputs:
    """
    What the losses look at.

    Args:
        policy: log-probabilities of the completions under the policy; gradients flow into these.
        reference: the same under the reference policy.
        chosen_lengths_B: tokens of the chosen completions, [B].
        rejected_lengths_B: tokens of the rejected completions, [B].
        chosen_nll_B: negative log-likelihood of the chosen completions, summed over their tokens, [B], in nats; for
            `sft`.
        weights_B: weights of the pairs, [B]; for `use_weighting`, see `wpo_weights`.
    """

    policy: PairLogps
    reference: PairLogps
    chosen_lengths_B: Tensor
    rejected_lengths_B: Tensor
    chosen_nll_B: Tensor | None = None
    weights_B: Tensor | None = None

    @property
    def logratios(self) -> PairLogps:
        """r = log π − log π_ref of each completion."""
        return PairLogps(
            self.policy.chosen_B - self.reference.chosen_B, self.policy.rejected_B - self.reference.rejected_B
        )


# ---- f-divergences: from the log-ratio to the score f′(π/π_ref) ----


def reverse_kl_score(logratios_B: Tensor, alpha: float) -> Tensor:
    """s = r: the divergence of DPO (https://huggingface.co/papers/2305.18290). It concentrates on the best modes."""
    return logratios_B


def forward_kl_score(logratios_B: Tensor, alpha: float) -> Tensor:
    """s = 1 − exp(−r) (https://huggingface.co/papers/2309.16240): covers what the reference covers. −r is cut at 80."""
    return -bounded_exponents(-logratios_B).expm1()


def js_divergence_score(logratios_B: Tensor, alpha: float) -> Tensor:
    """s = log 2 + log σ(r) (https://huggingface.co/papers/2309.16240): between the two KL divergences, at most log 2."""
    return math.log(2) + F.logsigmoid(logratios_B)


def alpha_divergence_score(logratios_B: Tensor, alpha: float) -> Tensor:
    """
    s = (exp((α − 1)·r) − 1) / (α − 1) (https://huggingface.co/papers/2309.16240): from the forward KL divergence at
    α = 0 to the reverse at α = 1. Computed in float32 or better; the exponent is cut at 80 (float16: 11).
    """
    if abs(alpha - 1) < 1e-6:  # the limit, where the formula is 0 / 0
        return reverse_kl_score(logratios_B, alpha)
    return bounded_exponents((alpha - 1) * logratios_B).expm1() / (alpha - 1)


F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": reverse_kl_score,
    "forward_kl": forward_kl_score,
    "js_divergence": js_divergence_score,
    "alpha_divergence": alpha_divergence_score,
}


def _scores(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> PairLogps:
    score, alpha = F_DIVERGENCES[options.f_divergence_type], options.f_alpha_divergence_coef
    logratios = inputs.logratios
    return PairLogps(score(logratios.chosen_B, alpha), score(logratios.rejected_B, alpha))


def _scaled_margins(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """β·d"""
    scores = _scores(inputs, options)
    return options.beta * (scores.chosen_B - scores.rejected_B)


def _margins_per_token(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """Difference of the scores, each over its completion's length."""
    scores = _scores(inputs, options)
    chosen_B = scores.chosen_B / inputs.chosen_lengths_B.clamp(min=1)
    return chosen_B - scores.rejected_B / inputs.rejected_lengths_B.clamp(min=1)


def _scaled_logratios(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> tuple[Tensor, Tensor]:
    """β·r of the chosen and of the rejected completions: the implicit rewards."""
    return options.beta * inputs.logratios.chosen_B, options.beta * inputs.logratios.rejected_B


def _smoothed(margins_B: Tensor, label_smoothing: float) -> Tensor:
    """Logistic loss where the preference is the wrong way round with the given probability."""
    return -(1 - label_smoothing) * F.logsigmoid(margins_B) - label_smoothing * F.logsigmoid(-margins_B)


# ---- The losses: [B] values, one per pair ----


def sigmoid(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    DPO (https://huggingface.co/papers/2305.18290): −log σ(β·d), the logistic loss of telling chosen from rejected.
    """
    return -F.logsigmoid(_scaled_margins(inputs, options))


def hinge(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    Hinge loss on the normalised likelihoods, of SLiC (https://huggingface.co/papers/2305.10425) and RSO
    (https://huggingface.co/papers/2309.06657): max(0, 1 − β·d). A pair that is far enough apart pulls no more.
    """
    return F.relu(1 - _scaled_margins(inputs, options))


def ipo(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    IPO (https://huggingface.co/papers/2310.12036): (s_c/len_c − s_r/len_r − 1/(2β))², on scores per token. The margin
    has a target, so it does not grow without end where all annotators agree.
    """
    return (_margins_per_token(inputs, options) - 1 / (2 * options.beta)) ** 2


def exo_pair(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    EXO (https://huggingface.co/papers/2402.00856) with two completions: KL(q ‖ p), where q = (σ(β·d), σ(−β·d)) and
    p = (1 − ε, ε), with ε the label smoothing, which has to be above 0.
    """
    margins_B, epsilon = _scaled_margins(inputs, options), options.label_smoothing
    chosen_B = margins_B.sigmoid() * (F.logsigmoid(margins_B) - math.log1p(-epsilon))
    return chosen_B + (-margins_B).sigmoid() * (F.logsigmoid(-margins_B) - math.log(epsilon))


def nca_pair(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    NCA (https://huggingface.co/papers/2402.05369) with two completions:
    −log σ(β·r_c) − ½·log σ(−β·r_c) − ½·log σ(−β·r_r). It looks at each likelihood by itself, so that the chosen one does
    not sink together with the rejected.
    """
    chosen_B, rejected_B = _scaled_logratios(inputs, options)
    return -F.logsigmoid(chosen_B) - 0.5 * F.logsigmoid(-chosen_B) - 0.5 * F.logsigmoid(-rejected_B)


def robust(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    Robust DPO (https://huggingface.co/papers/2403.00409): (−(1 − ε)·log σ(β·d) + ε·log σ(−β·d)) / (1 − 2ε), whose mean
    over preferences flipped with probability ε is the sigmoid loss of the preferences before they were flipped.
    """
    epsilon = options.label_smoothing
    margins_B = _scaled_margins(inputs, options)
    return (-(1 - epsilon) * F.logsigmoid(margins_B) + epsilon * F.logsigmoid(-margins_B)) / (1 - 2 * epsilon)


def bco_pair(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    BCO (https://huggingface.co/papers/2404.04656) on pairs: −log σ(β·r_c) − log σ(−β·r_r), a classifier of good and bad
    completions. The reward shift δ of the paper is 0 here.
    """
    chosen_B, rejected_B = _scaled_logratios(inputs, options)
    return -F.logsigmoid(chosen_B) - F.logsigmoid(-rejected_B)


def sppo_hard(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    SPPO (https://huggingface.co/papers/2405.00675) with certain preferences: (r_c − 1/(2β))² + (r_r + 1/(2β))². Each
    log-ratio has a target of its own.
    """
    logratios, target = inputs.logratios, 0.5 / options.beta
    return (logratios.chosen_B - target) ** 2 + (logratios.rejected_B + target) ** 2


def aot(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    AOT on pairs (https://huggingface.co/papers/2406.05882): the smoothed logistic loss of β·(u_i − v_i), where u is the
    sorted log π(y_c) − log π(y_r) of the batch and v the sorted log π_ref(y_c) − log π_ref(y_r): the distribution of
    margins is to lie above that of the reference.

    The values belong to ranks within what is given, one micro-batch of one process. Unlike all other losses this one
    depends on how a batch is cut; give it large micro-batches.
    """
    policy_B = (inputs.policy.chosen_B - inputs.policy.rejected_B).sort().values
    reference_B = (inputs.reference.chosen_B - inputs.reference.rejected_B).sort().values
    return _smoothed(options.beta * (policy_B - reference_B), options.label_smoothing)


def aot_unpaired(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    AOT without pairs (https://huggingface.co/papers/2406.05882): the smoothed logistic loss of β·(u_i − v_i), where u is
    the sorted r_c of the batch and v the sorted r_r: the rewards of chosen completions are to lie, as a distribution,
    above those of rejected ones.

    The values belong to ranks within what is given, one micro-batch of one process; see `aot`.
    """
    chosen_B, rejected_B = _scaled_logratios(inputs, options)
    return _smoothed(chosen_B.sort().values - rejected_B.sort().values, options.label_smoothing)


def apo_zero(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    APO-zero (https://huggingface.co/papers/2408.06266): 1 − σ(β·r_c) + σ(β·r_r). Chosen completions become more
    likely, rejected ones less; for data better than what the model writes.
    """
    chosen_B, rejected_B = _scaled_logratios(inputs, options)
    return (-chosen_B).sigmoid() + rejected_B.sigmoid()


def apo_down(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    APO-down (https://huggingface.co/papers/2408.06266): σ(β·r_c) + 1 − σ(β·(r_c − r_r)). Both become less likely,
    rejected ones more so; for data worse than what the model writes.
    """
    chosen_B, rejected_B = _scaled_logratios(inputs, options)
    return chosen_B.sigmoid() + (rejected_B - chosen_B).sigmoid()


def discopop(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    DiscoPOP, the log-ratio modulated loss (https://huggingface.co/papers/2406.08414), found by a language model:
    −(1 − m)·log σ(x) + m·exp(−x) with x = β·d and m = σ(x/τ).
    """
    margins_B = _scaled_margins(inputs, options)
    modulation_B = margins_B / options.discopop_tau
    logistic_B = -(-modulation_B).sigmoid() * F.logsigmoid(margins_B)
    # m·exp(−x) in one exponential: for a very negative x the factors are 0 and infinite.
    return logistic_B + bounded_exponents(F.logsigmoid(modulation_B) - margins_B).exp()


def sft(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    Negative log-likelihood of the chosen completion, summed over its tokens; the loss is the mean over all chosen
    tokens, as in supervised fine-tuning. Beside another loss it keeps the chosen completions likely
    (https://huggingface.co/papers/2404.19733, MPO: https://huggingface.co/papers/2411.10442).
    """
    if inputs.chosen_nll_B is None:
        raise ValueError("`loss_type='sft'` needs `chosen_nll_B` among its inputs.")
    return inputs.chosen_nll_B


def sigmoid_norm(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> Tensor:
    """
    Length-normalised DPO, of Tülu 3 (https://huggingface.co/papers/2411.15124): −log σ(β·(s_c/len_c − s_r/len_r)).
    Margins per token are small, so β is chosen larger, for instance 5.
    """
    return -F.logsigmoid(options.beta * _margins_per_token(inputs, options))


PREFERENCE_LOSSES: dict[str, Callable[[PreferenceLossInputs, PreferenceLossOptions], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "sigmoid_norm": sigmoid_norm,
}


# ---- A batch's loss ----


class LossTerm(NamedTuple):
    """
    One loss of a mixture, for a micro-batch.

    Args:
        total: sum of the loss over the micro-batch, scalar, not yet multiplied by `weight`.
        unit: what the sum is divided by, counted over the whole optimizer step: `"pairs"` or `"chosen_tokens"`.
        weight: of this loss in the mixture.
    """

    total: Tensor
    unit: str
    weight: float


def preference_loss(inputs: PreferenceLossInputs, options: PreferenceLossOptions) -> list[LossTerm]:
    """
    The losses of a micro-batch of pairs. The loss of a step is Σ weight · Σ total / Σ unit, the inner sums over its
    micro-batches and processes.

    Args:
        inputs: log-probabilities and lengths of the pairs.
        options: which losses, and their parameters.

    Returns:
        A term for each of `options.loss_type`, in that order. With `options.use_weighting` a pair's value is multiplied
        by its weight, that of `sft` too.

    Raises:
        ValueError: if `inputs` lacks what a loss needs.
    """
    if options.use_weighting and inputs.weights_B is None:
        raise ValueError("`use_weighting=True` needs `weights_B` among the inputs; `wpo_weights` makes them.")
    terms = []
    for name, weight in zip(options.loss_type, options.weights, strict=True):
        values_B = PREFERENCE_LOSSES[name](inputs, options)
        if options.use_weighting:
            values_B = values_B * inputs.weights_B
        terms.append(LossTerm(values_B.sum(), "chosen_tokens" if name == "sft" else "pairs", weight))
    return terms
