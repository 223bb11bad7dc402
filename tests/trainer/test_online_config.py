"""Configs of the methods that sample: what follows from what, and what is refused."""

from __future__ import annotations

import pytest

from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.rloo_config import RLOOConfig

CONFIGS = [GRPOConfig, RLOOConfig]


def make(config_class=GRPOConfig, **settings):
    return config_class("out", use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_the_generation_batch(config_class):
    config = make(config_class, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert (config.steps_per_generation, config.generation_batch_size) == (2, 8)
    config = make(config_class, per_device_train_batch_size=4, steps_per_generation=6)
    assert config.generation_batch_size == 24
    config = make(config_class, per_device_train_batch_size=4, generation_batch_size=16)
    assert config.steps_per_generation == 4


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_batch_size": 8, "steps_per_generation": 1}, "twice"),
        ({"per_device_train_batch_size": 4, "generation_batch_size": 10}, "multiple of the 4"),
        ({"num_generations": 1}, "at least 2"),
        ({"num_generations": 3, "per_device_train_batch_size": 8}, "multiple of `num_generations=3`"),
        ({"eval_strategy": "steps", "num_generations_eval": 3}, "num_generations_eval"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"vllm_mode": "serve"}, "Did you mean 'server'"),
        ({"layout": "shared"}, "layout"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"generation_kwargs": "{top_k: 3}"}, "generation_kwargs"),
    ],
)
def test_what_cannot_work_is_refused(config_class, settings, message):
    with pytest.raises(ValueError, match=message):
        make(config_class, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_completions_hub_repo": "me/it"}, "log_completions"),
        ({"loss_type": "grpoo"}, "Did you mean 'grpo'"),
        ({"scale_rewards": "row"}, "scale_rewards"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation"),
        ({"vllm_importance_sampling_clip_min": 3.0, "vllm_importance_sampling_clip_max": 2.0}, "clip_min"),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "clip_max",
        ),
    ],
)
def test_what_cannot_work_in_grpo_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_rloo_reward_clip_range():
    assert make(RLOOConfig, reward_clip_range=[-1.0, 1.0]).reward_clip_range == (-1.0, 1.0)
    for bounds in ((1.0, -1.0), (0.0,)):
        with pytest.raises(ValueError, match="reward_clip_range"):
            make(RLOOConfig, reward_clip_range=bounds)


@pytest.mark.parametrize(("given", "resolved"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_scale_rewards_takes_booleans(given, resolved):
    assert make(scale_rewards=given).scale_rewards == resolved


def test_old_names_warn():
    with pytest.warns(FutureWarning, match="vllm_importance_sampling_cap"):
        assert make(vllm_importance_sampling_cap=2.0).vllm_importance_sampling_clip_max == 2.0
    with pytest.warns(FutureWarning, match="use_transformers_paged"):
        assert make(use_transformers_paged=True).use_transformers_continuous_batching


def test_json_on_a_command_line():
    config = make(generation_kwargs='{"top_k": 3}', chat_template_kwargs='{"thinking": false}')
    assert config.generation_kwargs == {"top_k": 3} and config.chat_template_kwargs == {"thinking": False}
