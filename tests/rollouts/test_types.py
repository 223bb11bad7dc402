import math

import pytest

from trl.rollouts.types import Prompt, Rollout, SamplingParams, as_prompts, is_truncated


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -3}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"n": 0}, "n"),
    ],
)
def test_sampling_params_out_of_range_are_named(settings, named):
    with pytest.raises(ValueError, match=f"`{named}` must be"):
        SamplingParams(**settings)


def test_greedy_keeps_the_rest():
    sampling = SamplingParams(max_completion_length=7, temperature=0.7, n=4, repetition_penalty=1.2).greedy()
    assert (sampling.temperature, sampling.n) == (0.0, 1)
    assert (sampling.max_completion_length, sampling.repetition_penalty) == (7, 1.2)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        Prompt([])
    assert as_prompts([(1, 2), Prompt([3])]) == [Prompt([1, 2]), Prompt([3])]


def test_a_good_rollout_counts_every_token_as_the_policys():
    rollout = Rollout([1], [2, 3], sampled_logps=[-0.5, -1.0])
    assert rollout.error is None
    assert rollout.policy_mask == [1, 1]
    assert rollout.generated_length == 2


def test_unknown_logps_are_nan_and_cost_nothing():
    """An engine that cannot tell one token's log-probability must not end the run, nor lose the sample."""
    rollout = Rollout([1], [2, 3, 4, 5], sampled_logps=[None, float("nan"), float("-inf"), -1.5])
    assert rollout.error is None
    assert [math.isnan(value) for value in rollout.sampled_logps] == [True, True, True, False]
    assert rollout.generated_length == 4


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"sampled_logps": [-1.0]}, "1 sampled log-probabilities for 2"),
        ({"policy_mask": [1, 0, 1]}, "3 mask values for 2"),
        ({"completion_ids": [2, -7]}, "`completion_ids` are not token ids"),
        ({"completion_ids": [2.5, 3]}, "`completion_ids` are not token ids"),
        ({"completion_ids": None}, "`completion_ids` are not token ids"),
        ({"error": "the server went away"}, "the server went away"),
    ],
)
def test_a_bad_sample_costs_one_sample(fields, complaint):
    rollout = Rollout(**{"prompt_ids": [1], "completion_ids": [2, 3], **fields})
    assert complaint in rollout.error
    assert rollout.generated_length == 0
    assert len(rollout.policy_mask) == len(rollout.completion_ids)


def test_is_truncated():
    assert is_truncated([4, 5], [7])
    assert is_truncated([], [7])
    assert not is_truncated([4, 7], [7, 8])
