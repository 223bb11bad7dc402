"""GRPOTrainer with tools, environments and the user's own rollouts."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

from tests.rollouts.helpers import ScriptedEngine, build_tool_tokenizer, tool_call

from ..conftest import build_model
from .grpo_helpers import PROMPTS, Counter, fixed_rollouts, look_up, make_trainer


def use_script(trainer, script):
    trainer.rollouts.conversations.engine = ScriptedEngine(trainer.processing_class, script, with_logps=False)
    trainer.rollouts.conversations.engine.update_weights = lambda model: None


def make_tool_trainer(tmp_path, rewards, script, **settings):
    tokenizer = build_tool_tokenizer()
    trainer = make_trainer(
        tmp_path, rewards, tokenizer=tokenizer, model=build_model(vocab_size=len(tokenizer), max_position_embeddings=2048),
        max_completion_length=400, num_generations=2, per_device_train_batch_size=2, max_steps=1, **settings,
    )  # fmt: skip
    use_script(trainer, script)
    return trainer


def test_tools_are_called_and_their_results_not_trained_on(tmp_path):
    seen, batches = [], []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return [float(index) for index in range(len(completions))]

    script = [[tool_call("look_up", word="sky"), tool_call("look_up", word="bad")], ["It is.", "Sorry."]]
    trainer = make_tool_trainer(tmp_path, reward, script, tools=[look_up])
    make = trainer.make_training_batch
    trainer.make_training_batch = lambda *args: batches.extend(made := make(*args)) or made
    trainer.train()
    assert [[message["role"] for message in messages] for messages in seen] == [["assistant", "tool", "assistant"]] * 2
    assert seen[0][1]["content"] == "sky is a word"
    assert "error" in seen[1][1]["content"]
    log = trainer.state.log_history[0]
    assert log["tools/call_frequency"] == 1.0
    assert log["tools/failure_frequency"] == 0.5
    (batch,) = batches
    trained, present = batch["train_mask"].sum(), batch["completion_mask"].sum()
    assert 0 < trained < present
    assert log["completions/mean_length"] == trained / 2


def test_environments(tmp_path):
    def has_environment(environments, prompts, **kwargs):
        assert all("count to" in prompt[-1]["content"] for prompt in prompts)
        return [float(environment.total) for environment in environments]

    with pytest.warns(UserWarning, match="environment_factory"):
        trainer = make_tool_trainer(
            tmp_path, has_environment, [[tool_call("add", amount=3), tool_call("add", amount=4)], ["Done.", "Done."]],
            environment_factory=Counter, data=Dataset.from_list(PROMPTS.to_list()[3:4]),
        )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/has_environment/mean"] == 3.5
    assert log["rewards/Counter/mean"] == 0.5
    assert trainer.reward_func_names == ["has_environment", "Counter"]


def test_an_environment_may_be_all_there_is(tmp_path):
    """No dataset and no reward function: empty prompts, and the environment's own reward."""

    class Fixed(Counter):
        def reset(self, **row):
            return super().reset(answer=4)

    trainer = make_tool_trainer(
        tmp_path, None, [[tool_call("add", amount=3), tool_call("add", amount=4)], ["Done.", "Done."]],
        environment_factory=Fixed, data=None,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["rewards/Fixed/mean"] == 0.5


def test_rollout_func(tmp_path):
    seen = {}

    def reward(completions, origin, everyone, **kwargs):
        seen.update(origin=origin, everyone=everyone)
        return [float(index) for index in range(len(completions))]

    function = fixed_rollouts([[8, 9, 10]], origin=["web", "book"], env_mask=[[1, 0, 1]])

    def rollout_func(prompts, trainer):
        assert prompts[0][0]["role"] == "user"
        return {**function(prompts, trainer), "everyone": 7}

    with pytest.warns(UserWarning, match="rollout_func"):
        trainer = make_trainer(tmp_path, reward, rollout_func=rollout_func)
    trainer.train()
    assert seen == {"origin": ["web", "book"] * 2, "everyone": [7] * 4}
    assert trainer.state.log_history[0]["completions/mean_length"] == 2


def test_a_broken_sample_costs_one_sample(tmp_path, caplog):
    def rollout_func(prompts, trainer):
        ids = [[8, 9], [10], [11, "x"], [12]]
        return {
            "prompt_ids": [[5]] * 4,
            "completion_ids": ids,
            "logprobs": [[-1.0, None], [float("nan")], None, [-2.0]],
        }

    def reward(completions, **kwargs):
        return [1.0, 2.0, 300.0, 3.0]

    trainer = make_trainer(tmp_path, reward, rollout_func=rollout_func, max_steps=1)
    with caplog.at_level("WARNING"):
        trainer.train()
    log = trainer.state.log_history[0]
    assert log["reward"] == 2.0
    assert log["completions/error_rate"] == 0.25
    assert math.isfinite(log["loss"])
    assert "1 of 4 samples" in caplog.text


def test_a_reward_that_sets_the_seed_does_not_repeat_what_is_sampled(tmp_path):
    seen = []

    def reward(completion_ids, **kwargs):
        torch.manual_seed(7)
        seen.append(completion_ids)
        return [float(index) for index in range(len(completion_ids))]

    make_trainer(tmp_path, reward, Dataset.from_list([PROMPTS[0]] * 4), learning_rate=0.0, max_steps=3).train()
    assert seen[1] != seen[2]


def test_a_completion_longer_than_the_context_is_told(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        make_trainer(tmp_path, max_completion_length=512)
    assert "context has 512 tokens" in caplog.text
