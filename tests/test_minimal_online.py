"""The minimal scripts of the methods that sample: they learn, and for the same completions give the trainers' losses."""

from __future__ import annotations

import importlib
import json
import random
from collections import Counter

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.losses.advantages import group_advantages, leave_one_out_advantages
from trl.rollouts.transformers_engine import TransformersEngine
from trl.rollouts.types import Rollout, as_prompts

from .test_examples import as_flags, load_script, logged_losses, quiet_run

METHODS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
ANSWER = "3, 1, 2"


class ScriptedSampler:
    """In the place of sampling: completions that depend on the prompt and on how often it was asked before, alone."""

    def __init__(self, tokenizer):
        self.answer = tokenizer(ANSWER)["input_ids"]
        self.stop = tokenizer.eos_token_id
        self.asked = Counter()

    def complete(self, prompt_ids: list[int]) -> list[int]:
        """Beginnings of the answer, some with wrong tokens, some without a stop token."""
        key = tuple(prompt_ids)
        rng = random.Random(f"{key} {self.asked[key]}")
        self.asked[key] += 1
        ids = [token if rng.random() < 0.7 else rng.randrange(10, 200) for token in self.answer]
        return ids[: rng.randint(1, len(ids))] + [self.stop] * (rng.random() < 0.7)

    # As the scripts' `sample`, and as a trainer's engine.
    def sample(self, model, tokenizer, rows, args, greedy=False):
        return [self.complete(row["prompt_ids"]) for row in rows]

    def generate(self, prompts, sampling):
        return [Rollout(prompt.ids, self.complete(prompt.ids)) for prompt in as_prompts(prompts)]


@pytest.fixture
def rows_file(tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"sort the list {' '.join('312'[: 1 + i % 3])} {i}"}],
            "answer": ANSWER,
        }
        for i in range(9)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 6)])
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_gives_the_trainers_losses(
    tmp_path, monkeypatch, tiny_model_path, rows_file, method, batch_size, accumulation, iterations
):
    """
    Groups of 4, of 2 or 3 prompts; a micro-batch may cut a group, and 9 prompts leave some over at the end of an epoch.
    With two iterations ratios leave 1, and some are clipped.
    """
    minimal = load_script(f"minimal/{method}.py", monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    shared = {"learning_rate": 5e-3, "weight_decay": 0.1, "warmup_steps": 2, "num_generations": 4, "epsilon": 0.05}
    if method == "rloo":
        shared["beta"] = 0.2
    options = {"model": tiny_model_path, "data": rows_file, "output": tmp_path / "minimal", "eval_rows": 0}
    options |= {
        "batch_size": batch_size,
        "accumulation": accumulation,
        "epochs": 2,
        "seed": 3,
        "iterations": iterations,
    }
    monkeypatch.setattr(minimal, "sample", ScriptedSampler(tokenizer).sample)
    result = minimal.main(as_flags({**options, **shared}))

    def reward(completions, answer, **kwargs):
        texts = [messages[-1]["content"] for messages in completions]
        return [grpo.reward(text, {"answer": right}) for text, right in zip(texts, answer, strict=True)]

    grpo = load_script("minimal/grpo.py", monkeypatch)
    trainer_class, config_class = METHODS[method]
    trainer = trainer_class(
        model=tiny_model_path,
        reward_funcs=reward,
        args=config_class(
            **quiet_run(tmp_path / "trainer", batch_size, accumulation), **shared, num_iterations=iterations
        ),
        train_dataset=Dataset.from_json(str(rows_file)),
    )
    sampler = ScriptedSampler(tokenizer)
    monkeypatch.setattr(TransformersEngine, "generate", lambda self, *args: sampler.generate(*args))
    trainer.train()

    prompts = batch_size * accumulation // 4
    losses = logged_losses(trainer)
    assert len(losses) == trainer.state.max_steps == 2 * (9 // prompts) * iterations
    assert result["losses"] == pytest.approx(losses, abs=1e-5)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert result["rewards"] == pytest.approx(rewards, abs=1e-6)
    assert 0.05 < sum(rewards) / len(rewards) < 0.95
    if iterations == 2:
        clipped = [entry["clip_ratio/region_mean"] for entry in trainer.state.log_history if "loss" in entry]
        assert max(clipped) > 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "minimal").state_dict()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, atol=2e-4, rtol=0, msg=name)


def test_advantages_are_the_librarys(monkeypatch):
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    grpo, rloo = (load_script(f"minimal/{name}.py", monkeypatch) for name in ("grpo", "rloo"))
    expected = group_advantages(rewards[None], num_generations=4).advantages_N
    torch.testing.assert_close(grpo.group_advantages(rewards, 4), expected, check_dtype=False)
    expected = leave_one_out_advantages(rewards[None], num_generations=4).advantages_N
    torch.testing.assert_close(rloo.leave_one_out(rewards, 4), expected, check_dtype=False)


def test_samples_stop_after_the_stop_token(tmp_path, monkeypatch, tiny_model_path):
    """Prompts of different lengths, padded on the left, are continued as each alone would be."""
    minimal = load_script("minimal/grpo.py", monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    args = minimal.make_online_parser("", "").parse_args(["--max_completion_length", "12"])
    rows = [{"prompt": [{"role": "user", "content": "abc" * times}]} for times in (1, 5, 2)]
    rows = [minimal.encode(tokenizer, row) for row in rows]
    together = minimal.sample(model, tokenizer, rows, args, greedy=True)
    assert together == [minimal.sample(model, tokenizer, [row], args, greedy=True)[0] for row in rows]
    assert model.training
    assert minimal.cut_after([5, 2, 7, 2], 2) == [5, 2]
    assert minimal.cut_after([5, 7], 2) == [5, 7]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_standin_learns(tmp_path, monkeypatch, method):
    """Without arguments it needs no download. An easier check than its own is learnt in 25 generations."""
    monkeypatch.chdir(tmp_path)
    minimal = load_script(f"minimal/{method}.py", monkeypatch)
    grpo = minimal if method == "grpo" else importlib.import_module("grpo")

    def share_of_letters_in_the_word(reply, row):
        return sum(letter in row["prompt"][0]["content"] for letter in reply) / max(len(reply), 1)

    make_rows = grpo.make_standin_rows
    monkeypatch.setattr(grpo, "make_standin_rows", lambda: make_rows()[:264])
    monkeypatch.setattr(grpo, "reward", share_of_letters_in_the_word)
    result = minimal.main(["--batch_size", "64", "--learning_rate", "1e-3"])
    assert result["before"] < 0.1
    assert result["after"] > 0.3
    assert AutoModelForCausalLM.from_pretrained(f"{method}_output").num_parameters() < 3_000_000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_standin_learns_its_own_task(tmp_path, monkeypatch, method):
    """What the scripts promise: a model that knows nothing finds out what is asked. It ends between 0.5 and 0.8."""
    monkeypatch.chdir(tmp_path)
    result = load_script(f"minimal/{method}.py", monkeypatch).main([])
    assert result["before"] < 0.1
    assert result["after"] > 0.4
