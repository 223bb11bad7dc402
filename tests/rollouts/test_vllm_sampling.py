import json
from itertools import pairwise

import pytest
import torch

from trl.rollouts.types import SamplingParams
from trl.rollouts.vllm_sampling import draw_seed, logps_mode, request_seeds, request_settings, shaping_settings

# ---- What a request says ----


def test_every_setting_is_in_vllms_words():
    """The values of the config reach vLLM under its own names, all of them plain JSON."""
    sampling = SamplingParams(
        max_completion_length=7,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        with_logps=True,
    )
    settings = request_settings(sampling, stop_token_ids=(2, 9))
    assert settings == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "max_tokens": 7,
        "stop_token_ids": [2, 9],
        "logprobs": 0,
    }
    assert json.loads(json.dumps(settings)) == settings


def test_what_is_not_asked_for():
    """No log-probs, and nothing that vLLM would take for a limit: a `min_p` of None is 0."""
    settings = request_settings(SamplingParams(), max_tokens=3)
    assert settings["logprobs"] is None
    assert (settings["min_p"], settings["top_k"], settings["top_p"]) == (0.0, 0, 1.0)
    assert settings["max_tokens"] == 3
    assert settings["stop_token_ids"] == []
    assert not {"n", "seed"} & set(settings)


def test_generation_kwargs_win():
    kwargs = {"temperature": 0.2, "min_tokens": 2, "logit_bias": {5: 1.0}, "stop_token_ids": [4]}
    settings = request_settings(SamplingParams(temperature=1.0, generation_kwargs=kwargs), stop_token_ids=[2])
    assert {name: settings[name] for name in kwargs} == kwargs


def test_a_regular_expression_wins_over_other_structured_outputs():
    """Two ways to say it: one counts, and it is said which."""
    kwargs = {"structured_outputs": {"json": {"type": "object"}}}
    sampling = SamplingParams(generation_kwargs=kwargs)
    assert request_settings(sampling)["structured_outputs"] == {"json": {"type": "object"}}
    with pytest.warns(UserWarning, match="both given; the regular expression counts"):
        settings = request_settings(sampling, structured_outputs_regex="a+")
    assert settings["structured_outputs"] == {"regex": "a+"}
    assert sampling.generation_kwargs == kwargs


def test_the_settings_are_vllms(tokenizer):
    """All of them, and further ones, make a `vllm.SamplingParams`; one that it does not know is an error."""
    pytest.importorskip("vllm")
    from trl.rollouts.vllm_adapter import sampling_params

    kwargs = {"logit_bias": {5: 1.0}, "min_tokens": 1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
    sampling = SamplingParams(max_completion_length=7, min_p=0.1, with_logps=True, generation_kwargs=kwargs)
    made = sampling_params({**request_settings(sampling, structured_outputs_regex="a+"), "n": 2, "seed": 2**62 - 1})
    assert (made.n, made.max_tokens, made.min_p, made.logprobs, made.logit_bias) == (2, 7, 0.1, 0, {5: 1.0})
    assert made.structured_outputs.regex == "a+"
    assert made.seed == 2**62 - 1
    assert not made.detokenize
    assert sampling_params({"stop": ["\n"]}).detokenize
    with pytest.raises(TypeError, match="num_beams"):
        sampling_params({"num_beams": 2})


# ---- Which log-probs ----


@pytest.mark.parametrize(
    ("settings", "shaping"),
    [
        ({}, []),
        ({"temperature": 0.3}, []),
        ({"top_p": 0.9}, ["top_p"]),
        ({"top_k": 5}, ["top_k"]),
        ({"top_k": -1}, []),
        ({"min_p": 0.1}, ["min_p"]),
        ({"repetition_penalty": 1.1}, ["repetition_penalty"]),
        ({"top_p": 0.9, "min_p": 0.1}, ["top_p", "min_p"]),
        ({"generation_kwargs": {"presence_penalty": 0.5}}, ["presence_penalty"]),
        ({"generation_kwargs": {"frequency_penalty": 0.5}}, ["frequency_penalty"]),
        ({"generation_kwargs": {"min_tokens": 4}}, ["min_tokens"]),
        ({"generation_kwargs": {"min_tokens": 0, "presence_penalty": 0.0}}, []),
        ({"generation_kwargs": {"logit_bias": {3: 1.0}}}, ["logit_bias"]),
        ({"generation_kwargs": {"bad_words": ["no"]}}, ["bad_words"]),
        ({"generation_kwargs": {"allowed_token_ids": [1, 2]}}, ["allowed_token_ids"]),
        ({"generation_kwargs": {"structured_outputs": {"regex": "a"}}}, ["structured_outputs"]),
        ({"generation_kwargs": {"top_p": 0.5}}, ["top_p"]),
    ],
)
def test_log_probs_are_raw_where_not_every_token_may_be_drawn(settings, shaping):
    """Processed ones are those of the tokens that were left, and would bias a correction."""
    asked = request_settings(SamplingParams(**settings))
    assert shaping_settings(asked) == shaping
    assert logps_mode(asked) == ("raw_logprobs" if shaping else "processed_logprobs")


def test_a_regular_expression_leaves_few_tokens():
    assert logps_mode(request_settings(SamplingParams(), structured_outputs_regex="a")) == "raw_logprobs"


# ---- Seeds ----


def test_a_seed_is_torchs_next_number():
    """A run that restores torch's generator draws the same seeds again, and no two generations have the same."""
    torch.manual_seed(3)
    first = [draw_seed() for _ in range(4)]
    torch.manual_seed(3)
    assert [draw_seed() for _ in range(4)] == first
    assert len(set(first)) == 4
    assert all(0 <= seed < 2**62 for seed in first)


def test_each_request_has_a_seed_of_its_own():
    """Also those next to each other: vLLM adds the index of a completion to its request's seed."""
    state = torch.random.get_rng_state()
    seeds = request_seeds(5, 200)
    assert torch.equal(state, torch.random.get_rng_state())
    assert seeds == request_seeds(5, 200)
    assert request_seeds(5, 3) == seeds[:3]
    assert not set(seeds) & set(request_seeds(6, 200))
    ordered = sorted(seeds)
    assert min(later - earlier for earlier, later in pairwise(ordered)) > 1000
    assert all(seed + 1000 < 2**63 for seed in seeds)
    assert request_seeds(5, 0) == []
