"""
Policy losses: from the log-probabilities of sampled tokens and their advantages to a value per token.

The way is: `PolicyLossInputs` → `policy_loss`, a value for each token → `aggregate`, sums with what they are divided by,
so that a batch may be cut anywhere. Every published loss is one function below; they share these quantities, for a token
of a sampled completion:

- log-ratio x = log π(token) − log π_old(token), in nats: how far the policy went since it sampled;
- ratio ρ = exp(x) of each token, or one for the whole completion (`importance_sampling_level`);
- advantage A: how much better than expected the completion was; see `trl.losses.advantages`;
- KL estimate k = exp(d) − d − 1 with d = log π_ref − log π (http://joschu.net/blog/kl-approx.html), never negative.

No loss looks at what stands outside the mask, not even at NaN. Exponents above 20 go on linearly, so a ratio and its
gradient stay finite however far the policy went; NaN among the policy's log-probs stays NaN.

Shapes: B completions, T tokens; where a completion has one value for all tokens, [B, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .numerics import at_least_fp32
from .policy_options import POLICY_LOSS_TYPES, PolicyLossOptions

__all__ = [
    "POLICY_LOSSES",
    "POLICY_LOSS_TYPES",
    "PolicyLoss",
    "PolicyLossInputs",
    "PolicyLossOptions",
    "PolicyLossTerm",
    "PolicyStep",
    "aggregate",
    "bounded_exp",
    "clean_logps",
    "count_units",
    "importance_ratios",
    "kl_estimates",
    "make_step",
    "masked_mean",
    "on_policy_mask",
    "policy_loss",
    "policy_unit",
    "vespo_weights",
]

# exp(20) = 5e8 is beyond any ratio that means something, and its square is far within float32.
LARGEST_EXPONENT = 20.0
# Log-probabilities of −inf, of tokens that a policy rules out, are taken for this.
LOWEST_LOGP = -1e4


# ---- What the losses look at ----


@dataclass(frozen=True)
class PolicyLossInputs:
    """
    A micro-batch of B completions of up to T tokens, left-aligned. Log-probabilities are in nats.

    Args:
        logps_BT: of the sampled tokens under the policy, [B, T]; gradients flow into these.
        advantages_BT: of each completion, [B] or [B, 1], or of each token, [B, T].
        mask_BT: which tokens the policy wrote and is trained on, [B, T], bool or 0 and 1.
        old_logps_BT: under the policy that sampled, [B, T]; default those of `logps_BT`, which makes every ratio 1.
        ref_logps_BT: under the reference, [B, T]; needed with `beta`.
        rollout_logps_BT: as the engine that sampled reported them, [B, T], NaN where it did not; read by the
            off-policy mask, which else takes `old_logps_BT`.
        engine_ratios_BT: what `trl.losses.engine_correction.engine_correction` made of them, [B, T] or [B, 1]; default
            no correction.
        entropies_BT: entropies of the policy's predictions, [B, T], in nats; needed with `top_entropy_quantile` below 1
            and for the entropy bonus, whose gradient flows into these.
    """

    logps_BT: Tensor
    advantages_BT: Tensor
    mask_BT: Tensor
    old_logps_BT: Tensor | None = None
    ref_logps_BT: Tensor | None = None
    rollout_logps_BT: Tensor | None = None
    engine_ratios_BT: Tensor | None = None
    entropies_BT: Tensor | None = None


@dataclass(frozen=True)
class PolicyStep:
    """
    The shared quantities of a micro-batch, 0 outside the mask.

    Args:
        logps_BT: log-probabilities of the tokens, [B, T].
        mask_BT: which tokens count, bool, [B, T].
        advantages_BT: [B, 1] or [B, T].
        logratios_BT: x, [B, T].
        ratios_BT: ρ, [B, T] or [B, 1], not clipped.
        engine_ratios_BT: of the trainer's to the engine's probabilities, [B, T] or [B, 1], or `None`.
    """

    logps_BT: Tensor
    mask_BT: Tensor
    advantages_BT: Tensor
    logratios_BT: Tensor
    ratios_BT: Tensor
    engine_ratios_BT: Tensor | None = None


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the tokens of each row under the mask, [B, 1]; 0 for a row without any."""
    return values_BT.masked_fill(~mask_BT, 0).sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp(min=1)


def bounded_exp(exponents: Tensor) -> Tensor:
    """exp, going on along its tangent above 20."""
    within = exponents.clamp(max=LARGEST_EXPONENT)
    return within.exp() * (1 + exponents - within)


def clean_logps(logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """In float32 or better, 0 outside the mask, −inf bounded."""
    return at_least_fp32(logps_BT).masked_fill(~mask_BT, 0).clamp(min=LOWEST_LOGP)


def importance_ratios(logratios_BT: Tensor, mask_BT: Tensor, level: str) -> Tensor:
    """
    How much likelier the policy makes what was sampled: of each token, [B, T], or of each completion, [B, 1].

    Args:
        logratios_BT: x, [B, T], in nats.
        mask_BT: which tokens count, bool, [B, T].
        level: `"token"`, `"sequence"` (geometric mean over the tokens) or `"trajectory"` (product).
    """
    if level == "sequence":
        logratios_BT = masked_mean(logratios_BT, mask_BT)
    elif level == "trajectory":
        logratios_BT = logratios_BT.masked_fill(~mask_BT, 0).sum(-1, keepdim=True)
    return bounded_exp(logratios_BT)


def make_step(inputs: PolicyLossInputs, options: PolicyLossOptions) -> PolicyStep:
    """The shared quantities of a micro-batch."""
    mask_BT = inputs.mask_BT.bool()
    logps_BT = clean_logps(inputs.logps_BT, mask_BT)
    old_logps_BT = logps_BT if inputs.old_logps_BT is None else clean_logps(inputs.old_logps_BT, mask_BT)
    logratios_BT = logps_BT - old_logps_BT.detach()
    advantages_BT = inputs.advantages_BT.to(logps_BT.dtype)
    if advantages_BT.dim() == 1:
        advantages_BT = advantages_BT.unsqueeze(-1)
    if advantages_BT.shape[-1] > 1:
        advantages_BT = advantages_BT.masked_fill(~mask_BT, 0)
    engine_ratios_BT = inputs.engine_ratios_BT
    return PolicyStep(
        logps_BT=logps_BT,
        mask_BT=mask_BT,
        advantages_BT=advantages_BT,
        logratios_BT=logratios_BT,
        ratios_BT=importance_ratios(logratios_BT, mask_BT, options.importance_sampling_level),
        engine_ratios_BT=None if engine_ratios_BT is None else engine_ratios_BT.to(logps_BT.dtype),
    )


# ---- The losses: [B, T] values, or [B, 1] where all tokens of a completion share one ----


def clipped_surrogate(step: PolicyStep, options: PolicyLossOptions) -> Tensor:
    """
    The objective of PPO (https://huggingface.co/papers/1707.06347) with the advantages of GRPO
    (https://huggingface.co/papers/2402.03300): −min(ρ·A, clip(ρ, 1 − ε, 1 + ε_high)·A). A token whose ratio has already
    gone that far in the direction of its advantage pulls no more. With `delta`, ρ is cut there in the first term
    (https://huggingface.co/papers/2505.07291).
    """
    clipped_BT = step.ratios_BT.clamp(1 - options.epsilon, 1 + options.upper_epsilon)
    unclipped_BT = capped_ratios(step, options)
    return -torch.minimum(unclipped_BT * step.advantages_BT, clipped_BT * step.advantages_BT)


def capped_ratios(step: PolicyStep, options: PolicyLossOptions) -> Tensor:
    """ρ, at most `delta`."""
    return step.ratios_BT if options.delta is None else step.ratios_BT.clamp(max=options.delta)


def cispo(step: PolicyStep, options: PolicyLossOptions) -> Tensor:
    """
    CISPO, of MiniMax-M1 (https://huggingface.co/papers/2506.13585): −min(ρ, ε_high)·A·log π with the weight held
    constant. The weight is bounded, yet no token loses its gradient.
    """
    weights_BT = step.ratios_BT.detach().clamp(max=options.upper_epsilon)
    return -weights_BT * step.advantages_BT * step.logps_BT


def sapo(step: PolicyStep, options: PolicyLossOptions) -> Tensor:
    """
    SAPO (https://huggingface.co/papers/2511.20347): −4/τ·σ(τ·(ρ − 1))·A, a soft gate in the place of clipping: the
    gradient fades as ρ leaves 1. τ is `sapo_temperature_pos` where A > 0, else `sapo_temperature_neg`.
    """
    temperatures_BT = torch.where(
        step.advantages_BT > 0, options.sapo_temperature_pos, options.sapo_temperature_neg
    ).to(step.logps_BT.dtype)
    gates_BT = (temperatures_BT * (step.ratios_BT - 1)).sigmoid()
    return -4 / temperatures_BT * gates_BT * step.advantages_BT


@torch.no_grad()
def vespo_weights(step: PolicyStep, options: PolicyLossOptions) -> Tensor:
    """
    The weight of a sequence in VESPO, φ = exp(λ + k·w − λ·exp(w)): 1 at w = 0, fading on both sides.

    w is the log-ratio of the whole sequence, from log 1e-8 to 20, with what the engine's correction adds. A token that
    the correction masks (ratio 0) is left out of w: one of them would else switch off its whole sequence.

    Args:
        step: the shared quantities.
        options: `vespo_k_pos` and the others of that family; `_pos` where A >= 0.

    Returns:
        φ, [B, 1], or [B, T] where advantages are of tokens; 0 where it is not finite.
    """
    logratios_BT = step.logratios_BT.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    w_B1 = logratios_BT.masked_fill(~step.mask_BT, 0).sum(-1, keepdim=True)
    if step.engine_ratios_BT is not None:
        kept_BT = (step.engine_ratios_BT > 0) & (step.mask_BT if step.engine_ratios_BT.shape[-1] > 1 else True)
        w_B1 = w_B1 + step.engine_ratios_BT.log().masked_fill(~kept_BT, 0).sum(-1, keepdim=True)
    w_B1 = w_B1.clamp(math.log(1e-8), LARGEST_EXPONENT)
    is_good_BT = step.advantages_BT >= 0
    k_BT = torch.where(is_good_BT, options.vespo_k_pos, options.vespo_k_neg).to(w_B1.dtype)
    lambda_BT = torch.where(is_good_BT, options.vespo_lambda_pos, options.vespo_lambda_neg).to(w_B1.dtype)
    phi_BT = (lambda_BT + k_BT * w_B1 - lambda_BT * w_B1.exp()).exp()
    return phi_BT.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def vespo(step: PolicyStep, options: PolicyLossOptions) -> Tensor:
    """
    VESPO (https://huggingface.co/papers/2602.10693): −φ·A·log π, with one smooth weight φ for a sequence in the place
    of clipping; see `vespo_weights`.
    """
    return -vespo_weights(step, options) * step.advantages_BT * step.logps_BT


# The clipped ones differ in how they are averaged; see `aggregate`.
POLICY_LOSSES: dict[str, Callable[[PolicyStep, PolicyLossOptions], Tensor]] = {
    "grpo": clipped_surrogate,
    "bnpo": clipped_surrogate,
    "dr_grpo": clipped_surrogate,
    "dapo": clipped_surrogate,
    "cispo": cispo,
    "sapo": sapo,
    "luspo": clipped_surrogate,
    "vespo": vespo,
}


# ---- Which tokens count, and the divergence from the reference ----


@torch.no_grad()
def on_policy_mask(inputs: PolicyLossInputs, step: PolicyStep, threshold: float) -> Tensor:
    """
    Which sequences are near enough to the policy to learn from (https://huggingface.co/papers/2512.02556).

    A completion with a negative advantage that the policy has already given up says little: its gradient is large and
    points anywhere. It is left out if the mean of log π_sampled − log π over its tokens is above the threshold.

    Args:
        inputs: the engine's log-probs, else the old ones, are those of sampling; a missing one counts as no change.
        step: the shared quantities.
        threshold: in nats per token.

    Returns:
        bool, [B, 1], or [B, T] where advantages are of tokens.
    """
    sampled_BT = inputs.rollout_logps_BT if inputs.rollout_logps_BT is not None else inputs.old_logps_BT
    if sampled_BT is None:
        return torch.ones_like(step.advantages_BT, dtype=torch.bool)
    drops_BT = clean_logps(sampled_BT, step.mask_BT) - step.logps_BT
    mean_drops_B1 = masked_mean(drops_BT.masked_fill(~sampled_BT.isfinite(), 0), step.mask_BT)
    return (step.advantages_BT >= 0) | (mean_drops_B1 <= threshold)


def kl_estimates(logps_BT: Tensor, ref_logps_BT: Tensor) -> Tensor:
    """
    k = exp(d) − d − 1 with d = log π_ref − log π: an estimate of KL(π ‖ π_ref) from one token, at least 0
    (http://joschu.net/blog/kl-approx.html).

    Args:
        logps_BT: under the policy, [B, T], in nats.
        ref_logps_BT: under the reference, [B, T].
    """
    differences_BT = ref_logps_BT - logps_BT
    return bounded_exp(differences_BT) - differences_BT - 1


# ---- A micro-batch's loss ----


@dataclass(frozen=True)
class PolicyLoss:
    """
    The loss of each token of a micro-batch, and what metrics look at.

    Args:
        losses_BT: with the KL term, [B, T], 0 outside the mask.
        step: ratios, advantages and mask.
        kl_BT: KL estimates as they enter the loss, without `beta`, [B, T], 0 outside the mask; `None` without `beta`.
        entropies_BT: entropies, [B, T], 0 outside the mask, or `None`.
        trained_mask_BT: tokens of the mask whose entropy is high enough, bool, [B, T]; those of the entropy bonus.
    """

    losses_BT: Tensor
    step: PolicyStep
    kl_BT: Tensor | None
    entropies_BT: Tensor | None
    trained_mask_BT: Tensor


def policy_loss(
    inputs: PolicyLossInputs, options: PolicyLossOptions, entropy_threshold: Tensor | float | None = None
) -> PolicyLoss:
    """
    The loss of each token: the loss type's value, then the off-policy mask, the entropy mask and the engine's
    correction, then the KL term, which none of them touches.

    Args:
        inputs: log-probabilities, advantages and mask.
        options: which loss, and its parameters.
        entropy_threshold: entropy from which on a token is trained, in nats, the same on all processes; needed with
            `top_entropy_quantile` below 1. `trl.losses.entropy.entropy_threshold` makes it.

    Returns:
        Values per token; `aggregate` adds them up.

    Raises:
        ValueError: if something is missing that the options ask for.
    """
    _check_inputs(inputs, options, entropy_threshold)
    step = make_step(inputs, options)
    losses_BT = POLICY_LOSSES[options.loss_type](step, options).expand_as(step.mask_BT)
    trained_mask_BT, entropies_BT = step.mask_BT, None
    if inputs.entropies_BT is not None:
        entropies_BT = at_least_fp32(inputs.entropies_BT).masked_fill(~step.mask_BT, 0)

    if options.off_policy_mask_threshold is not None:
        kept_BT = on_policy_mask(inputs, step, options.off_policy_mask_threshold)
        losses_BT = losses_BT.masked_fill(~kept_BT, 0)
    if options.needs_entropy_threshold:
        trained_mask_BT = step.mask_BT & (entropies_BT.detach() >= entropy_threshold)
        losses_BT = losses_BT.masked_fill(~trained_mask_BT, 0)
    if step.engine_ratios_BT is not None:
        # VESPO has the ratios in its weight already; what they mask is masked there too.
        factors_BT = step.engine_ratios_BT if options.loss_type != "vespo" else step.engine_ratios_BT > 0
        losses_BT = losses_BT * factors_BT
    kl_BT = None
    if options.beta:
        kl_BT = kl_estimates(step.logps_BT, clean_logps(inputs.ref_logps_BT, step.mask_BT))
        if options.use_bias_correction_kl:
            kl_BT = kl_BT * step.ratios_BT
        kl_BT = kl_BT.masked_fill(~step.mask_BT, 0)
        losses_BT = losses_BT + options.beta * kl_BT
    return PolicyLoss(losses_BT.masked_fill(~step.mask_BT, 0), step, kl_BT, entropies_BT, trained_mask_BT)


def _check_inputs(inputs: PolicyLossInputs, options: PolicyLossOptions, entropy_threshold: object) -> None:
    if options.beta and inputs.ref_logps_BT is None:
        raise ValueError(f"`beta={options.beta}` needs `ref_logps_BT` among the inputs.")
    if not options.needs_entropy_threshold and not options.has_entropy_bonus:
        return
    if inputs.entropies_BT is None:
        name = "entropy_coef" if options.has_entropy_bonus else "top_entropy_quantile"
        raise ValueError(f"`{name}` needs `entropies_BT` among the inputs.")
    if options.needs_entropy_threshold and entropy_threshold is None:
        raise ValueError(
            f"`top_entropy_quantile={options.top_entropy_quantile}` needs `entropy_threshold`; "
            "`trl.losses.entropy.entropy_threshold` makes it from the entropies of all processes."
        )


# ---- Adding up ----


class PolicyLossTerm(NamedTuple):
    """
    One part of the loss, for a micro-batch.

    Args:
        name: `"policy"` or `"entropy"`.
        total: sum over the micro-batch, scalar, not yet multiplied by `weight`.
        unit: what the sum is divided by, counted over the whole optimizer step; see `count_units`.
        count: how much of it this micro-batch has.
        weight: of this part in the loss.
    """

    name: str
    total: Tensor
    unit: str
    count: Tensor
    weight: float


def policy_unit(options: PolicyLossOptions) -> str:
    """
    What the policy's part is divided by:

    - `"rows"` (`grpo`, `sapo`, `luspo`): completions;
    - `"tokens"` (`dapo`, `cispo`, `vespo`): tokens under the mask;
    - `"row_tokens"` (`dr_grpo`): completions times `max_completion_length`, a constant, so that nothing depends on
      the length (https://huggingface.co/papers/2503.20783);
    - `"batches"` (`bnpo`): micro-batches, each of which is divided by its own tokens. This is its definition, and the
      one case where a loss depends on how a batch is cut.
    """
    units = {"grpo": "rows", "sapo": "rows", "luspo": "rows", "dr_grpo": "row_tokens", "bnpo": "batches"}
    return units.get(options.loss_type, "tokens")


def count_units(mask_BT: Tensor, options: PolicyLossOptions) -> dict[str, Tensor]:
    """
    How much a batch has of each unit that a loss may be divided by. Counts add up over micro-batches and processes
    (`batches` too: one for each call), and need no forward pass.

    Args:
        mask_BT: which tokens are trained on, [B, T], bool or 0 and 1.
        options: for `max_completion_length`.

    Returns:
        unit -> count, scalars.
    """
    rows = len(mask_BT)
    counts = {"tokens": mask_BT.bool().sum(), "rows": rows, "batches": 1}
    if options.max_completion_length is not None:
        counts["row_tokens"] = rows * options.max_completion_length
    return {unit: torch.as_tensor(count, device=mask_BT.device) for unit, count in counts.items()}


def aggregate(loss: PolicyLoss, options: PolicyLossOptions, entropy_coef: float | None = None) -> list[PolicyLossTerm]:
    """
    Add up a micro-batch. The loss of a step is Σ weight · Σ total / Σ count, the inner sums over its micro-batches and
    processes.

    A row of `grpo` and `sapo` is the mean over its tokens; of `luspo` the sum over them
    (https://huggingface.co/papers/2602.05261); the token losses are plain sums. `bnpo`
    (https://huggingface.co/papers/2506.02864) divides by its own tokens at once. Tokens and rows that a mask has left
    out of the loss still count below the line; a row without any token counts as 0.

    Args:
        loss: of `policy_loss`.
        options: the same as there.
        entropy_coef: coefficient of the entropy bonus now; default that of the options. Needed with
            `use_adaptive_entropy`; see `trl.losses.entropy.EntropyController`.

    Returns:
        The policy's part, and the entropy bonus where its coefficient is not 0. The latter's unit is `"tokens"`, or
        `"trained_tokens"` where `top_entropy_quantile` leaves some out, which only the forward pass can count.

    Raises:
        ValueError: without `entropy_coef` where it is needed.
    """
    counts = count_units(loss.step.mask_BT, options)
    if options.loss_type in ("grpo", "sapo"):
        total = masked_mean(loss.losses_BT, loss.step.mask_BT).sum()
    else:
        total = loss.losses_BT.sum()
    if options.loss_type == "bnpo":
        total = total / counts["tokens"].clamp(min=1)
    unit = policy_unit(options)
    terms = [PolicyLossTerm("policy", total, unit, counts[unit], 1.0)]

    if entropy_coef is None:
        if options.use_adaptive_entropy:
            raise ValueError("`use_adaptive_entropy=True` needs `entropy_coef`; an `EntropyController` tells it.")
        entropy_coef = options.entropy_coef
    if entropy_coef:
        total = -loss.entropies_BT.masked_fill(~loss.trained_mask_BT, 0).sum()
        unit = "trained_tokens" if options.needs_entropy_threshold else "tokens"
        terms.append(PolicyLossTerm("entropy", total, unit, loss.trained_mask_BT.sum(), entropy_coef))
    return terms
