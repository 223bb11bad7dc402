from __future__ import annotations

import math

import pytest
import torch

from trl.rollouts.user_rollouts import rollouts_of_user_function

PROMPTS = ["the sky is ", "the sea is "]


@pytest.fixture
def output(tokenizer):
    completions = [tokenizer(text)["input_ids"] for text in ("blue", "deep")]
    completions[1].append(tokenizer.eos_token_id)
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in PROMPTS],
        "completion_ids": completions,
        "logprobs": [[-0.5] * len(ids) for ids in completions],
    }


def rollouts_of(output, tokenizer, prompts=PROMPTS):
    return rollouts_of_user_function(output, prompts, tokenizer, [tokenizer.eos_token_id])


def test_lists_become_rollouts(output, tokenizer):
    first, second = rollouts_of(output, tokenizer)
    assert (first.completion, second.completion) == ("blue", "deep")
    assert (first.is_truncated, second.is_truncated) == (True, False)
    assert first.prompt == PROMPTS[0]
    assert first.completion_ids == output["completion_ids"][0]
    assert first.sampled_logps == [-0.5] * len(first.completion_ids)
    assert first.policy_mask == [1] * len(first.completion_ids)


def test_conversations_get_messages(output, tokenizer):
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert rollouts_of(output, tokenizer, prompts)[1].completion == [{"role": "assistant", "content": "deep"}]


def test_missing_keys_are_listed(output, tokenizer):
    del output["completion_ids"], output["logprobs"]
    with pytest.raises(ValueError, match="missing: completion_ids, logprobs. Found: prompt_ids"):
        rollouts_of(output, tokenizer)
    with pytest.raises(TypeError, match="must return a dict"):
        rollouts_of([1, 2], tokenizer)


@pytest.mark.parametrize("key", ["completion_ids", "score"])
def test_a_list_of_another_length_is_named(output, tokenizer, key):
    output[key] = [[1], [2], [3]]
    with pytest.raises(ValueError, match=f"3 values under '{key}' for 2 prompts"):
        rollouts_of(output, tokenizer)


def test_further_values_go_along(output, tokenizer):
    output.update(score=[1.0, 2.0], source="wiki", weight=torch.tensor([3, 4]), nothing=None)
    first, second = rollouts_of(output, tokenizer)
    assert first.extra == {"score": 1.0, "source": "wiki", "weight": 3, "nothing": None}
    assert second.extra == {"score": 2.0, "source": "wiki", "weight": 4, "nothing": None}


def test_the_mask_says_whose_tokens_they_are(output, tokenizer):
    output["env_mask"] = [[0] + [1] * (len(ids) - 1) for ids in output["completion_ids"]]
    first, _ = rollouts_of(output, tokenizer)
    assert first.policy_mask == [0] + [1] * (len(first.completion_ids) - 1)
    assert first.generated_length == len(first.completion_ids) - 1
    assert "env_mask" not in first.extra


@pytest.mark.parametrize("unknown", ["none at all", "none of a row"])
def test_logps_may_be_unknown(output, tokenizer, unknown):
    output["logprobs"] = None if unknown == "none at all" else [None, output["logprobs"][1]]
    first, second = rollouts_of(output, tokenizer)
    assert first.sampled_logps is None
    assert first.error is None
    assert (second.sampled_logps is None) == (unknown == "none at all")


def test_candidates_per_token_give_the_first(output, tokenizer):
    output["logprobs"] = [[[value, -9.0] for value in row] for row in output["logprobs"]]
    first, _ = rollouts_of(output, tokenizer)
    assert first.sampled_logps == [-0.5] * len(first.completion_ids)


def test_one_bad_sample_costs_one_sample(output, tokenizer):
    output["logprobs"][0] = output["logprobs"][0][:-1]
    output["logprobs"][1][0] = None
    first, second = rollouts_of(output, tokenizer)
    assert "sampled log-probabilities" in first.error
    assert first.generated_length == 0
    assert second.error is None
    assert math.isnan(second.sampled_logps[0])
