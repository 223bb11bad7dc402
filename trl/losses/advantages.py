"""
Advantages: how much better a sampled completion is than was to be expected, from the rewards of its group.

Rewards come as a table, a row for each reward function and a column for each completion; NaN says that a function does
not apply to a completion. Completions of one prompt stand next to each other, G in a row. A completion to which no
function applies is unscorable: its advantage is 0, and it is left out of means and standard deviations. Standard
deviations are those of samples (divided by n − 1).

Everything here wants the rewards of all processes: a group, and a batch more so, may span several. Computed in float64
where the device has it.

Shapes: F reward functions, N completions, M = N / G groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..choices import check_choice
from .numerics import at_least_fp32
from .policy import clean_logps
from .policy_options import MULTI_OBJECTIVE_AGGREGATIONS, normalize_scale_rewards

# Keeps the advantages of a group whose rewards barely differ from exploding.
_STD_FLOOR = 1e-4
# Below this, a standard deviation is rounding.
_ZERO_STD = 1e-8


@dataclass(frozen=True)
class Advantages:
    """
    What a batch of rewards says about its completions.

    Args:
        advantages_N: [N], 0 for unscorable completions.
        rewards_N: weighted sums of the functions' rewards, [N], NaN for unscorable completions.
        zero_std_N: completions that teach nothing because all rewards they are compared with are the same, bool, [N].
            Its mean is `frac_reward_zero_std`.
    """

    advantages_N: Tensor
    rewards_N: Tensor
    zero_std_N: Tensor


# ---- Statistics that leave out NaN ----


def _precise(values: Tensor) -> Tensor:
    return at_least_fp32(values) if values.device.type == "mps" else values.double()


def nan_std(values: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """
    Sample standard deviation of the values that are not NaN.

    Args:
        values: of any shape.
        dim: along which; default over all.
        keepdim: keep that dimension, of size 1.

    Returns:
        The deviations; NaN where fewer than two values are left.
    """
    if dim is None:
        values, dim = values.flatten(), 0
    count = values.isfinite().sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)) ** 2
    variance = squares.nansum(dim, keepdim=True) / (count - 1).clamp(min=1)
    std = variance.sqrt().masked_fill(count < 2, torch.nan)
    return std if keepdim else std.squeeze(dim)


def _in_groups(values_N: Tensor, num_generations: int) -> Tensor:
    if num_generations < 1 or len(values_N) % num_generations:
        raise ValueError(
            f"Rewards come in groups of `num_generations={num_generations}`, one group for each prompt. Found "
            f"{len(values_N)} completions, which is no multiple of it."
        )
    return values_N.view(-1, num_generations)


# ---- From the functions' rewards to one ----


def _weighted(rewards_FN: Tensor, weights: Sequence[float] | Tensor | None) -> Tensor:
    if rewards_FN.dim() != 2:
        raise ValueError(f"Rewards are a table [functions, completions]. Found the shape {tuple(rewards_FN.shape)}.")
    if rewards_FN.isinf().any():
        function, completion = rewards_FN.isinf().nonzero()[0].tolist()
        raise ValueError(
            f"Reward function {function} gave {rewards_FN[function, completion].item()} for completion {completion}: "
            "no mean can be taken of it. Return a finite number, or None where the function does not apply."
        )
    rewards_FN = _precise(rewards_FN)
    if weights is None:
        return rewards_FN
    weights_F = torch.as_tensor(weights, dtype=rewards_FN.dtype, device=rewards_FN.device)
    if weights_F.shape != rewards_FN.shape[:1]:
        raise ValueError(
            f"There are {len(rewards_FN)} reward functions, but {weights_F.numel()} weights; give one weight for each."
        )
    return rewards_FN * weights_F.unsqueeze(-1)


def _sum(weighted_FN: Tensor) -> Tensor:
    return weighted_FN.nansum(0).masked_fill(weighted_FN.isnan().all(0), torch.nan)


def total_rewards(rewards_FN: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """
    The weighted sum over the functions that apply.

    Args:
        rewards_FN: [F, N], NaN where a function does not apply.
        weights: of each function, [F]; default 1.

    Returns:
        [N], NaN where no function applies.

    Raises:
        ValueError: for an infinite reward, or a number of weights that is not that of the functions.
    """
    return _sum(_weighted(rewards_FN, weights)).to(at_least_fp32(rewards_FN).dtype)


def warn_of_unscorable(rewards_N: Tensor) -> None:
    """Warn if no reward function applies to some completions: they are sampled in vain."""
    unscorable = rewards_N.isnan().nonzero().flatten().tolist()
    if unscorable:
        shown = ", ".join(map(str, unscorable[:8])) + (", …" if len(unscorable) > 8 else "")
        warnings.warn(
            f"No reward function applies to {len(unscorable)} of {len(rewards_N)} completions (rows {shown}): all "
            "returned None. Their advantage is 0, so nothing is learnt from them. See that each row has at least one "
            "function that scores it.",
            stacklevel=2,
        )


# ---- GRPO ----


def _standardize(values_MG: Tensor, stds: Tensor) -> Tensor:
    """Over the deviations and the floor; 0 where there is no deviation because there is but one value."""
    return (values_MG / (stds + _STD_FLOOR)).masked_fill(stds.isnan(), 0)


def _centred(values_MG: Tensor) -> Tensor:
    return values_MG - values_MG.nanmean(-1, keepdim=True)


def group_advantages(
    rewards_FN: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    num_generations: int = 8,
    scale_rewards: str | bool = "group",
    multi_objective_aggregation: str = "sum_then_normalize",
) -> Advantages:
    """
    Advantages relative to the group, of GRPO (https://huggingface.co/papers/2402.03300).

    `sum_then_normalize`: A = (r − mean of the group) / (std + 1e-4) with r the weighted sum. The standard deviation is
    that of the group; of the batch, which is steadier (https://huggingface.co/papers/2508.08221); or none is divided
    by, so that easy and hard prompts are not favoured (Dr. GRPO, https://huggingface.co/papers/2503.20783).

    `normalize_then_sum` (GDPO, https://huggingface.co/papers/2601.05242): each function's rewards are standardized in
    the group, then added with their weights, then standardized over the batch, so that no function drowns another.
    `scale_rewards` is not read.

    Args:
        rewards_FN: [F, N] of all processes, groups next to each other, NaN where a function does not apply.
        weights: of each function, [F]; default 1.
        num_generations: G, completions of a group.
        scale_rewards: `"group"` or `True`, `"batch"`, `"none"` or `False`.
        multi_objective_aggregation: one name of `MULTI_OBJECTIVE_AGGREGATIONS`.

    Returns:
        Advantages, in the type of the rewards (float32 at least). The lone scorable completion of a group has 0 unless
        the batch moves it.

    Raises:
        ValueError: for an unknown name, an infinite reward, or numbers that do not fit each other.
    """
    scale_rewards = normalize_scale_rewards(scale_rewards)
    check_choice("multi_objective_aggregation", multi_objective_aggregation, MULTI_OBJECTIVE_AGGREGATIONS)
    weighted_FN = _weighted(rewards_FN, weights)
    rewards_N = _sum(weighted_FN)
    rewards_MG = _in_groups(rewards_N, num_generations)
    if multi_objective_aggregation == "normalize_then_sum":
        scores_FN = _standardize_functions(_precise(rewards_FN), num_generations)
        scores_N = _sum(_weighted(scores_FN, weights))
        std = nan_std(scores_N)
        advantages_N = _standardize(scores_N - scores_N.nanmean(), std)
        stds_MG = std.expand_as(rewards_MG)
    else:
        std = nan_std(rewards_N) if scale_rewards == "batch" else nan_std(rewards_MG, dim=-1, keepdim=True)
        stds_MG = std.expand_as(rewards_MG)
        advantages_MG = _centred(rewards_MG)
        if scale_rewards != "none":
            advantages_MG = _standardize(advantages_MG, stds_MG)
        advantages_N = advantages_MG.flatten()
    return _result(advantages_N, rewards_N, stds_MG, rewards_FN)


def _standardize_functions(rewards_FN: Tensor, num_generations: int) -> Tensor:
    rewards_FMG = torch.stack([_in_groups(rewards_N, num_generations) for rewards_N in rewards_FN])
    stds_FM1 = nan_std(rewards_FMG, dim=-1, keepdim=True)
    scores_FMG = _standardize(_centred(rewards_FMG), stds_FM1.expand_as(rewards_FMG))
    return scores_FMG.masked_fill(rewards_FMG.isnan(), torch.nan).flatten(1)


def _result(advantages_N: Tensor, rewards_N: Tensor, stds_MG: Tensor, like: Tensor) -> Advantages:
    dtype = at_least_fp32(like).dtype
    return Advantages(
        advantages_N=advantages_N.nan_to_num(nan=0.0).to(dtype),
        rewards_N=rewards_N.to(dtype),
        zero_std_N=stds_MG.flatten() < _ZERO_STD,
    )


# ---- RLOO ----


def trajectory_kl(logps_BT: Tensor, ref_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """
    Log-ratio of whole completions, Σ log π − log π_ref: an unbiased estimate of KL(π ‖ π_ref) from what π sampled,
    which may be negative.

    Args:
        logps_BT: under the policy that sampled, [B, T], in nats.
        ref_logps_BT: under the reference, [B, T].
        mask_BT: which tokens count, [B, T], bool or 0 and 1.

    Returns:
        [B], in float32 or better. Over the number of tokens, its sum is the metric `kl`.
    """
    mask_BT = mask_BT.bool()
    return (clean_logps(logps_BT, mask_BT) - clean_logps(ref_logps_BT, mask_BT)).sum(-1)


def leave_one_out_advantages(
    rewards_FN: Tensor,
    weights: Sequence[float] | Tensor | None = None,
    num_generations: int = 2,
    reward_clip_range: tuple[float, float] | None = None,
    kl_N: Tensor | None = None,
    beta: float = 0.0,
    normalize_advantages: bool = False,
) -> Advantages:
    """
    Advantages of RLOO (https://huggingface.co/papers/2402.14740): the reward less the mean reward of the others in the
    group, a baseline that is unbiased because the completion itself is not in it.

    The reward is the weighted sum, cut to `reward_clip_range`, less β times the KL estimate of the completion.

    Args:
        rewards_FN: [F, N] of all processes, groups next to each other, NaN where a function does not apply.
        weights: of each function, [F]; default 1.
        num_generations: G, completions of a group.
        reward_clip_range: lowest and highest reward; `None` for no bounds.
        kl_N: of `trajectory_kl`, [N], of all processes; needed with `beta`.
        beta: coefficient of the KL penalty.
        normalize_advantages: standardize the advantages over the batch.

    Returns:
        Advantages, in the type of the rewards (float32 at least); those of a group sum to 0 unless they are
        normalized. The lone scorable completion of a group has 0. `rewards_N` is before clipping and KL; `zero_std_N`
        is of groups, after both.

    Raises:
        ValueError: for an infinite reward, a missing `kl_N`, or numbers that do not fit each other.
    """
    if beta and kl_N is None:
        raise ValueError(f"`beta={beta}` needs `kl_N`; `trajectory_kl` makes it from the log-probs.")
    rewards_N = _sum(_weighted(rewards_FN, weights))
    returns_N = rewards_N if reward_clip_range is None else rewards_N.clamp(*reward_clip_range)
    if beta:
        returns_N = returns_N - beta * kl_N.to(returns_N)
    returns_MG = _in_groups(returns_N, num_generations)
    others_M1 = returns_MG.isfinite().sum(-1, keepdim=True) - 1
    # r − (Σ − r)/(n − 1) = n/(n − 1) · (r − Σ/n), without the difference of two sums.
    advantages_MG = _centred(returns_MG) * (others_M1 + 1) / others_M1.clamp(min=1)
    # Without others there is no baseline, so no advantage that could count in the batch's mean either.
    advantages_N = advantages_MG.masked_fill(others_M1 < 1, torch.nan).flatten()
    if normalize_advantages:
        advantages_N = _standardize(advantages_N - advantages_N.nanmean(), nan_std(advantages_N))
    stds_MG = nan_std(returns_MG, dim=-1, keepdim=True).expand_as(returns_MG)
    return _result(advantages_N, rewards_N, stds_MG, rewards_FN)


# ---- Metrics ----


def reward_metrics(rewards_FN: Tensor, names: Sequence[str], result: Advantages) -> dict[str, Any]:
    """
    What is logged of a batch of rewards of all processes.

    Args:
        rewards_FN: [F, N], NaN where a function does not apply.
        names: of the functions.
        result: of the advantages.

    Returns:
        `rewards/{name}/mean` and `/std` over the completions a function applies to, `reward` and `reward_std` of the
        weighted sums, `frac_reward_zero_std`; floats, NaN where there is nothing to take a mean of.
    """
    rewards_FN, totals_N = _precise(rewards_FN), _precise(result.rewards_N)
    metrics = {}
    for name, rewards_N in zip(names, rewards_FN, strict=True):
        metrics[f"rewards/{name}/mean"] = rewards_N.nanmean().item()
        metrics[f"rewards/{name}/std"] = nan_std(rewards_N).item()
    metrics["reward"] = totals_N.nanmean().item()
    metrics["reward_std"] = nan_std(totals_N).item()
    metrics["frac_reward_zero_std"] = result.zero_std_N.float().mean().item()
    return metrics
