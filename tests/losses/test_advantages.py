"""Advantages: the recorded figures, what the formulas promise for any rewards, and what is refused."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import load_reference
from trl.losses.advantages import (
    Advantages,
    group_advantages,
    leave_one_out_advantages,
    nan_std,
    reward_metrics,
    total_rewards,
    trajectory_kl,
    warn_of_unscorable,
)
from trl.losses.policy_options import check_reward_clip_range, normalize_scale_rewards

REFERENCE = {
    name: case
    for name, case in load_reference("policy").items()
    if "rewards_per_func" in case["inputs"] and case["trainer"] in ("GRPOTrainer", "RLOOTrainer")
}
NAN = math.nan


def table(columns) -> torch.Tensor:
    """[F, N] from rows of samples, None as NaN."""
    return torch.tensor([[NAN if value is None else value for value in row] for row in columns]).T


def advantages_of(case) -> Advantages:
    config, inputs = case["config"], case["inputs"]
    rewards, weights = table(inputs["rewards_per_func"]), config["reward_weights"]
    if case["trainer"] == "GRPOTrainer":
        names = ("scale_rewards", "multi_objective_aggregation")
        return group_advantages(rewards, weights, config["num_generations"], *(config[name] for name in names))
    kl = None
    if "old_per_token_logps" in inputs:
        logps = [torch.tensor(inputs[f"{name}_per_token_logps"]) for name in ("old", "ref")]
        kl = trajectory_kl(*logps, torch.tensor(inputs["completion_mask"]))
    return leave_one_out_advantages(
        rewards,
        weights,
        config["num_generations"],
        config["reward_clip_range"],
        kl,
        config["beta"],
        config["normalize_advantages"],
    )


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_figures(name):
    case = REFERENCE[name]
    result = advantages_of(case)
    assert result.advantages_N.dtype == torch.float32
    expected = torch.tensor(case["outputs"]["advantages"])
    torch.testing.assert_close(result.advantages_N, expected, rtol=1e-5, atol=1e-5)
    metrics = dict(case["outputs"]["metrics"])
    kl = metrics.pop("kl", None)
    rewards = table(case["inputs"]["rewards_per_func"])
    actual = reward_metrics(rewards, [f"f{index}" for index in range(len(rewards))], result)
    assert actual == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    if kl is not None:
        logps = [torch.tensor(case["inputs"][f"{name}_per_token_logps"]) for name in ("old", "ref")]
        mask = torch.tensor(case["inputs"]["completion_mask"])
        assert trajectory_kl(*logps, mask).sum() / mask.sum() == pytest.approx(kl, abs=1e-6)


def test_the_figures_cover_both_methods():
    trainers = [case["trainer"] for case in REFERENCE.values()]
    assert trainers.count("GRPOTrainer") > 20
    assert trainers.count("RLOOTrainer") > 15


# ---- What the formulas promise ----

sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 6))  # functions, groups, completions of a group
values = st.one_of(st.just(NAN), st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.25]), st.floats(-100, 100))


@st.composite
def rewards_and_group_size(draw):
    functions, groups, generations = draw(sizes)
    count = groups * generations
    rows = draw(st.lists(st.lists(values, min_size=count, max_size=count), min_size=functions, max_size=functions))
    return torch.tensor(rows, dtype=torch.float64), generations


def group_sums(values_N: torch.Tensor, generations: int) -> torch.Tensor:
    return values_N.view(-1, generations).sum(-1)


def assert_same(actual: Advantages, expected: Advantages, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.advantages_N, expected.advantages_N, rtol=1e-6, atol=atol)


GRPO_SETTINGS = [
    ("group", "sum_then_normalize"),
    ("batch", "sum_then_normalize"),
    ("none", "sum_then_normalize"),
    ("group", "normalize_then_sum"),
]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@given(data=rewards_and_group_size())
@settings(max_examples=40, deadline=None)
def test_advantages_of_a_group_sum_to_zero(scale, data):
    rewards, generations = data
    advantages = group_advantages(rewards, None, generations, scale).advantages_N
    assert group_sums(advantages, generations).abs().max() < 1e-8


@given(data=rewards_and_group_size())
@settings(max_examples=60, deadline=None)
def test_rloo_advantages_of_a_group_sum_to_zero(data):
    rewards, generations = data
    advantages = leave_one_out_advantages(rewards, None, generations).advantages_N
    assert group_sums(advantages, generations).abs().max() < 1e-8


@pytest.mark.parametrize(("scale", "aggregation"), GRPO_SETTINGS)
@given(data=rewards_and_group_size())
@settings(max_examples=40, deadline=None)
def test_unscorable_completions_have_no_advantage_and_no_influence(scale, aggregation, data):
    rewards, generations = data
    result = group_advantages(rewards, None, generations, scale, aggregation)
    unscorable = rewards.isnan().all(0)
    assert result.advantages_N.isfinite().all()
    assert (result.advantages_N[unscorable] == 0).all()
    assert torch.equal(result.rewards_N.isnan(), unscorable)
    # One group more, to which nothing applies, changes nothing.
    wider = torch.cat([rewards, torch.full((len(rewards), generations), NAN)], dim=1)
    again = group_advantages(wider, None, generations, scale, aggregation).advantages_N
    torch.testing.assert_close(again[:-generations], result.advantages_N)


@pytest.mark.parametrize(("scale", "aggregation"), GRPO_SETTINGS)
@given(data=rewards_and_group_size(), shift=st.floats(-50, 50))
@settings(max_examples=40, deadline=None)
def test_a_shift_of_a_function_that_always_applies_changes_nothing(scale, aggregation, data, shift):
    rewards, generations = data
    rewards[0] = rewards[0].nan_to_num(nan=0.5)
    shifted = rewards.clone()
    shifted[0] += shift
    arguments = (None, generations, scale, aggregation)
    # Differences of 1e-14 between equal rewards may be raised by the floor's 1e4, twice.
    assert_same(group_advantages(shifted, *arguments), group_advantages(rewards, *arguments), atol=1e-4)
    assert_same(
        leave_one_out_advantages(shifted, None, generations), leave_one_out_advantages(rewards, None, generations)
    )


@given(data=rewards_and_group_size(), scale=st.floats(0.1, 100))
@settings(max_examples=40, deadline=None)
def test_how_a_scale_passes_through(data, scale):
    rewards, generations = data
    plain = group_advantages(rewards, None, generations, "none")
    scaled = group_advantages(rewards * scale, None, generations, "none").advantages_N
    torch.testing.assert_close(scaled, plain.advantages_N * scale)
    weighted = group_advantages(rewards, [scale] * len(rewards), generations, "none").advantages_N
    torch.testing.assert_close(weighted, scaled)
    rloo = leave_one_out_advantages(rewards * scale, None, generations).advantages_N
    torch.testing.assert_close(rloo, leave_one_out_advantages(rewards, None, generations).advantages_N * scale)
    stds = nan_std(plain.rewards_N.view(-1, generations), dim=-1, keepdim=True).expand(-1, generations).flatten()
    wide = stds > 1
    # Divided by the deviation, a scale is gone but for the floor of 1e-4.
    normal = [group_advantages(rewards * s, None, generations, "group").advantages_N[wide] for s in (1, scale)]
    torch.testing.assert_close(*normal, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize(("scale", "aggregation"), GRPO_SETTINGS)
@given(data=rewards_and_group_size(), randomness=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_within_and_of_groups_does_not_matter(scale, aggregation, data, randomness):
    rewards, generations = data
    groups = list(range(rewards.shape[1] // generations))
    randomness.shuffle(groups)
    order = []
    for group in groups:
        members = list(range(generations))
        randomness.shuffle(members)
        order += [group * generations + member for member in members]
    arguments = (None, generations, scale, aggregation)
    expected = group_advantages(rewards, *arguments).advantages_N[order]
    torch.testing.assert_close(
        group_advantages(rewards[:, order], *arguments).advantages_N, expected, rtol=1e-6, atol=1e-4
    )
    rloo = leave_one_out_advantages(rewards, None, generations).advantages_N[order]
    torch.testing.assert_close(leave_one_out_advantages(rewards[:, order], None, generations).advantages_N, rloo)


@given(data=rewards_and_group_size())
@settings(max_examples=60, deadline=None)
def test_rloo_leaves_one_out(data):
    rewards, generations = data
    totals = total_rewards(rewards).tolist()
    actual = leave_one_out_advantages(rewards, None, generations).advantages_N.tolist()
    for position, (reward, advantage) in enumerate(zip(totals, actual, strict=True)):
        first = position - position % generations
        others = [
            totals[other]
            for other in range(first, first + generations)
            if other != position and not math.isnan(totals[other])
        ]
        expected = reward - sum(others) / len(others) if others and not math.isnan(reward) else 0.0
        assert advantage == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("scale", "aggregation"), GRPO_SETTINGS[:3])
def test_a_lone_scorable_completion_has_no_advantage(scale, aggregation):
    rewards = torch.tensor([[NAN, 5.0, NAN, 1.0, 2.0, 4.0]])
    result = group_advantages(rewards, None, 3, scale, aggregation)
    assert result.advantages_N[:3].tolist() == [0, 0, 0]
    assert result.advantages_N[3:].abs().min() > 0
    assert not result.zero_std_N.any()
    rloo = leave_one_out_advantages(rewards, None, 3).advantages_N
    torch.testing.assert_close(rloo, torch.tensor([0.0, 0, 0, -2, -0.5, 2.5]))


def test_one_generation_teaches_nothing():
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    assert leave_one_out_advantages(rewards, None, 1).advantages_N.tolist() == [0, 0, 0]
    assert group_advantages(rewards, None, 1).advantages_N.tolist() == [0, 0, 0]


def test_scales_by_hand():
    rewards = torch.tensor([[0.0, 2.0, 10.0, 14.0]], dtype=torch.float64)
    group = group_advantages(rewards, None, 2, "group").advantages_N
    group_std, other_std = math.sqrt(2), 2 * math.sqrt(2)
    expected = [-1 / (group_std + 1e-4), 1 / (group_std + 1e-4), -2 / (other_std + 1e-4), 2 / (other_std + 1e-4)]
    assert group.tolist() == pytest.approx(expected, rel=1e-12)
    batch = group_advantages(rewards, None, 2, "batch").advantages_N
    std = math.sqrt((6.5**2 + 4.5**2 + 3.5**2 + 7.5**2) / 3)
    assert batch.tolist() == pytest.approx([value / (std + 1e-4) for value in (-1, 1, -2, 2)], rel=1e-12)
    assert group_advantages(rewards, None, 2, "none").advantages_N.tolist() == [-1, 1, -2, 2]


def test_no_function_drowns_another_when_normalized_first():
    small, large = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 1000.0, 1000.0])
    rewards = torch.stack([small, large])
    summed = group_advantages(rewards, None, 4).advantages_N
    first = group_advantages(rewards, None, 4, multi_objective_aggregation="normalize_then_sum").advantages_N
    assert summed[1] - summed[0] < 0.01  # the small reward hardly counts
    assert float(first[1] - first[0]) == pytest.approx(float(first[2] - first[0]), rel=1e-3)


@pytest.mark.parametrize(("given", "name"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_booleans_are_scales(given, name):
    assert normalize_scale_rewards(given) == name
    rewards = torch.tensor([[0.0, 2.0, 10.0, 14.0]])
    assert_same(group_advantages(rewards, None, 2, given), group_advantages(rewards, None, 2, name))


def test_rloo_clips_before_the_kl_penalty():
    rewards, kl = torch.tensor([[5.0, -5.0]]), torch.tensor([10.0, 0.0])
    result = leave_one_out_advantages(rewards, None, 2, (-1.0, 1.0), kl, beta=0.1)
    assert result.advantages_N.tolist() == pytest.approx([0 - -1, -1 - 0])
    assert result.rewards_N.tolist() == [5, -5]
    assert not result.zero_std_N.any()
    even = leave_one_out_advantages(rewards, None, 2, (-1.0, 1.0), torch.tensor([20.0, 0.0]), beta=0.1)
    assert even.advantages_N.tolist() == pytest.approx([0, 0], abs=1e-7)
    assert even.zero_std_N.all()


def test_normalized_rloo_advantages():
    rewards = torch.randn(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages = leave_one_out_advantages(rewards, None, 4, normalize_advantages=True).advantages_N
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-12)
    assert float(advantages.std()) == pytest.approx(1, abs=1e-3)


def test_groups_that_teach_nothing_are_counted():
    rewards = torch.tensor([[0.1, 0.1, 0.1, 0.2, 0.3, 0.4]])
    assert group_advantages(rewards, None, 3).zero_std_N.tolist() == [True] * 3 + [False] * 3
    assert group_advantages(rewards, None, 3, "batch").zero_std_N.tolist() == [False] * 6
    assert leave_one_out_advantages(rewards, None, 3).zero_std_N.tolist() == [True] * 3 + [False] * 3


def test_trajectory_kl_leaves_out_what_is_masked():
    logps, ref = torch.tensor([[-1.0, NAN], [-1.0, -2.0]]), torch.tensor([[-1.5, 0.0], [-1.0, -1.0]])
    assert trajectory_kl(logps, ref, torch.tensor([[1, 0], [1, 1]])).tolist() == [0.5, -1.0]
    assert trajectory_kl(logps.half(), ref.half(), torch.ones(2, 2)).dtype == torch.float32
    impossible = trajectory_kl(logps, ref - math.inf, torch.tensor([[1, 0], [1, 1]]))
    assert impossible.isfinite().all()


def test_sample_deviation():
    values = torch.tensor([[1.0, 2.0, 4.0], [NAN, 2.0, 4.0], [NAN, NAN, 4.0]], dtype=torch.float64)
    stds = nan_std(values, dim=-1)
    assert stds[:2].tolist() == pytest.approx([values[0].std().item(), math.sqrt(2)])
    assert stds[2].isnan()
    assert nan_std(values).item() == pytest.approx(torch.tensor([1.0, 2, 4, 2, 4, 4]).double().std().item())


# ---- What is refused ----


def test_what_does_not_fit_is_named():
    rewards = torch.tensor([[0.0, 1.0, 2.0]])
    with pytest.raises(ValueError, match=re.escape("`num_generations=2`") + ".*Found 3 completions"):
        group_advantages(rewards, None, 2)
    with pytest.raises(ValueError, match="1 reward functions, but 2 weights"):
        leave_one_out_advantages(rewards, [1.0, 2.0], 3)
    with pytest.raises(ValueError, match=re.escape("shape (3,)")):
        total_rewards(rewards[0])
    with pytest.raises(ValueError, match="function 1 gave -inf for completion 2"):
        group_advantages(torch.tensor([[0.0, 1, 2], [0, 0, -math.inf]]), None, 3)
    with pytest.raises(ValueError, match="trajectory_kl"):
        leave_one_out_advantages(rewards, None, 3, beta=0.05)


def test_unknown_names_are_refused_with_the_nearest():
    rewards = torch.tensor([[0.0, 1.0]])
    with pytest.raises(ValueError, match="Did you mean 'batch'"):
        group_advantages(rewards, None, 2, "batches")
    with pytest.raises(ValueError, match="Did you mean 'normalize_then_sum'"):
        group_advantages(rewards, None, 2, multi_objective_aggregation="normalise_then_sum")


@pytest.mark.parametrize("bounds", [(1.0, -1.0), (1.0,), 5.0, ("a", "b"), (0.0, NAN), (1, 1)])
def test_reward_clip_range_is_two_numbers_in_order(bounds):
    with pytest.raises(ValueError, match="reward_clip_range.*Found"):
        check_reward_clip_range(bounds)
    for good in (None, (-1, 1), [0.0, math.inf]):
        check_reward_clip_range(good)


def test_completions_that_nothing_scores_are_warned_of():
    with pytest.warns(UserWarning, match=re.escape("2 of 3 completions (rows 0, 2)")):
        warn_of_unscorable(torch.tensor([NAN, 1.0, NAN]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unscorable(torch.tensor([0.0, 1.0]))
