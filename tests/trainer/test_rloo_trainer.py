"""RLOOTrainer: its advantages and loss on record, what it logs, what it refuses, and that it learns."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl import RLOOConfig, RLOOTrainer
from trl.ops.scoring import TokenScores
from trl.rollouts.types import Rollout
from trl.trainer.online_metrics import CompletionFigures

from ..conftest import build_model, build_tokenizer, load_reference
from .grpo_helpers import LORA, PROMPTS, vowels

FIGURES = {name: case for name, case in load_reference("policy").items() if case.get("trainer") == "RLOOTrainer"}


def make_trainer(tmp_path, rewards=vowels, data=PROMPTS, model=None, tokenizer=None, eval_dataset=None, **settings):
    ours = inspect.signature(RLOOTrainer.__init__).parameters
    options = {name: settings.pop(name) for name in list(settings) if name in ours}
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        **settings,
    }
    tokenizer = tokenizer or build_tokenizer()
    model = model or build_model(vocab_size=len(tokenizer))
    return RLOOTrainer(model, rewards, RLOOConfig(str(tmp_path), **settings), data, eval_dataset, tokenizer, **options)


def as_tensor(values, dtype=torch.float64):
    return torch.tensor([[math.nan if value is None else value for value in row] for row in values], dtype=dtype)


# ---- Recorded figures ----


@pytest.mark.parametrize("name", [name for name, case in FIGURES.items() if "loss" in case["outputs"]])
def test_recorded_losses_through_the_trainer(tmp_path, monkeypatch, name):
    case = FIGURES[name]
    inputs, outputs = case["inputs"], case["outputs"]
    trainer = make_trainer(tmp_path, **case["config"])
    mask = torch.tensor(inputs["completion_mask"])
    old = [[value] + [0.0] * (mask.shape[1] - 1) for value in inputs["old_logps"]]  # only their sum counts
    batch = {
        "train_mask": mask,
        "completion_mask": mask,
        "advantages": torch.tensor(inputs["advantages"], dtype=torch.float64),
        "old_logps": torch.tensor(old, dtype=torch.float64),
    }
    logps = torch.tensor(inputs["per_token_logps"], dtype=torch.float64, requires_grad=True)
    scores = TokenScores(logps=logps, entropies=torch.tensor(inputs["entropies"], dtype=torch.float64))
    monkeypatch.setattr(trainer, "score_completions", lambda *args, **kwargs: scores)
    trainer.model.train()

    loss = trainer.compute_loss(trainer.model, batch)

    assert loss.item() == pytest.approx(outputs["loss"], abs=1e-6)
    loss.backward()
    expected = torch.tensor(outputs["grad_per_token_logps"], dtype=torch.float64)
    torch.testing.assert_close(logps.grad, expected, rtol=1e-6, atol=1e-6)
    logged = trainer.reducer.reduce("train")
    assert {name: logged[name] for name in outputs["metrics"]} == pytest.approx(outputs["metrics"], abs=1e-6)


@pytest.mark.parametrize("name", [name for name, case in FIGURES.items() if "advantages" in case["outputs"]])
def test_recorded_advantages_through_the_trainer(tmp_path, name):
    case = FIGURES[name]
    inputs, config = case["inputs"], dict(case["config"])
    weights = config.pop("reward_weights")
    functions = [lambda completions, **kwargs: [0.0] * len(completions)] * len(weights)
    trainer = make_trainer(tmp_path, functions, reward_weights=weights, per_device_train_batch_size=24, **config)
    rewards_FM = as_tensor(inputs["rewards_per_func"], torch.float32).T
    count = rewards_FM.shape[1]
    batch = {}
    if "ref_per_token_logps" in inputs:
        batch = {
            "old_logps": torch.tensor(inputs["old_per_token_logps"]),
            "ref_logps": torch.tensor(inputs["ref_per_token_logps"]),
            "train_mask": torch.tensor(inputs["completion_mask"]),
        }
        trainer.add_generation_values(batch)
    zeros = torch.zeros(count)
    figures = CompletionFigures(rewards_FM, batch.get("penalties", zeros), *[zeros] * 6)
    trainer.model.train()
    result = trainer.compute_advantages(figures)
    expected = torch.tensor(case["outputs"]["advantages"])
    torch.testing.assert_close(result.advantages_N.float(), expected, rtol=1e-5, atol=1e-5)


# ---- Training ----


def test_a_run_logs_what_it_should(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, eval_dataset=PROMPTS.select(range(3)))
    trainer.train()
    evaluation = trainer.evaluate()
    names = {
        "reward", "reward_std", "frac_reward_zero_std", "rewards/vowels/mean", "rewards/vowels/std", "kl", "entropy",
        "completions/mean_length", "completions/clipped_ratio", "num_tokens", "clip_ratio/low_mean",
        "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max", "clip_ratio/region_mean",
    }  # fmt: skip
    first = trainer.state.log_history[0]
    assert names | {"loss", "step_time"} <= set(first)
    assert {f"eval_{name}" for name in names} | {"eval_loss"} <= set(evaluation)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert trainer.ref_model is not None


def test_advantages_of_a_group_sum_to_zero(tmp_path):
    advantages = []
    trainer = make_trainer(tmp_path, num_generations=4, steps_per_generation=2, beta=0.3, learning_rate=0.1)
    make = trainer.make_training_batch

    def note(*args):
        batches = make(*args)
        by_group = {}
        for batch in batches:
            for group, value in zip(batch["groups"].tolist(), batch["advantages"].tolist(), strict=True):
                by_group.setdefault(group, []).append(value)
        advantages.extend(by_group.values())
        return batches

    trainer.make_training_batch = note
    trainer.train()
    assert all(len(values) == 4 and abs(sum(values)) < 1e-6 for values in advantages)
    assert any(abs(value) > 1e-3 for values in advantages for value in values)


def test_it_learns(tmp_path):
    tokenizer = build_tokenizer()
    wanted = tokenizer.convert_tokens_to_ids("a")

    def reward(completion_ids, **kwargs):
        return [float(wanted in ids) for ids in completion_ids]

    trainer = make_trainer(
        tmp_path, reward, tokenizer=tokenizer, per_device_train_batch_size=32, num_generations=8,
        max_completion_length=4, learning_rate=2e-2, max_steps=25, logging_steps=25, lr_scheduler_type="constant",
        eval_dataset=PROMPTS.select(range(4)), per_device_eval_batch_size=32, normalize_advantages=True,
    )  # fmt: skip
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before + 0.3


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_the_adapter_that_a_model_came_with_is_kept(tmp_path, beta):
    tokenizer = build_tokenizer()
    model = get_peft_model(build_model(vocab_size=len(tokenizer)), LORA)
    trainer = make_trainer(tmp_path, model=model, tokenizer=tokenizer, beta=beta)
    assert set(model.peft_config) == {"default", "ref"}
    trainer.train()
    assert trainer.state.log_history[0].get("kl", 0) == pytest.approx(0, abs=1e-6)


def test_the_kl_is_in_the_reward(tmp_path):
    """Where all rewards are the same, a completion that left the reference has a negative advantage."""
    trainer = make_trainer(
        tmp_path, lambda completions, **kwargs: [1.0] * len(completions), num_generations=2, beta=1.0, max_steps=1
    )
    for parameter in trainer.ref_model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    made = []
    make = trainer.make_training_batch
    trainer.make_training_batch = lambda *args: made.extend(batches := make(*args)) or batches
    trainer.train()
    (batch,) = made
    kl = ((batch["old_logps"] - batch["ref_logps"]) * batch["train_mask"]).sum(dim=1)
    order = torch.argsort(batch["groups"], stable=True)
    kl, advantages = kl[order].view(-1, 2), batch["advantages"][order].view(-1, 2)
    torch.testing.assert_close(advantages[:, 0], kl[:, 1] - kl[:, 0], atol=1e-5, rtol=1e-5)
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 0


def test_a_lone_completion_in_an_evaluation_has_no_advantage(tmp_path):
    trainer = make_trainer(tmp_path, num_generations_eval=1, eval_dataset=PROMPTS.select(range(3)))
    assert trainer.evaluate()["eval_loss"] == 0


@pytest.mark.parametrize(
    "settings", [{"num_iterations": 2}, {"reward_clip_range": (0.0, 0.1)}, {"beta": 0.0}], ids=str
)
def test_options_run(tmp_path, settings):
    trainer = make_trainer(tmp_path, **settings)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert not all(map(torch.equal, before, trainer.model.parameters()))


def test_old_logps_only_where_they_are_needed(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.0)
    trainer.model.train()
    assert not trainer.needs_old_logps()
    assert make_trainer(tmp_path, beta=0.1).needs_old_logps()
    trainer = make_trainer(tmp_path, beta=0.0, num_iterations=2)
    trainer.model.train()
    assert trainer.needs_old_logps()


# ---- Names and errors ----


def test_signature_and_attributes(tmp_path):
    names = list(inspect.signature(RLOOTrainer.__init__).parameters)[1:]
    assert names == [
        "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class", "reward_processing_classes",
        "callbacks", "optimizers", "quantization_config", "peft_config", "compute_metrics",
    ]  # fmt: skip
    trainer = make_trainer(tmp_path)
    for name in (
        "async_loop", "async_loop_ready_event", "async_loop_thread", "aux_loss_enabled", "beta", "chat_template_kwargs", "continuous_batching_config", "eos_token_ids",
        "epsilon_high", "epsilon_low", "generation_config", "generation_kwargs", "log_completions", "log_multimodal",
        "log_unique_prompts", "mask_truncated_completions", "max_completion_length", "min_p", "normalize_advantages",
        "num_completions_to_print", "num_generations", "num_generations_eval", "num_iterations", "pad_to_multiple_of",
        "ref_model", "repetition_penalty", "reward_clip_range", "reward_func_names", "reward_funcs",
        "reward_processing_classes", "reward_weights", "router_aux_loss_coef", "shuffle_dataset", "temperature",
        "top_k", "top_p", "use_transformers_continuous_batching", "use_vllm", "vllm_generation",
        "vllm_gpu_memory_utilization", "vllm_mode", "vllm_tensor_parallel_size",
    ):  # fmt: skip
        assert hasattr(trainer, name), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": None}, "train_dataset"),
        ({"rewards": None}, "no source of reward"),
        ({"reward_clip_range": (1.0, 0.0)}, "reward_clip_range"),
        ({"beta": 0.0, "sync_ref_model": True}, "beta"),
    ],
)
def test_what_cannot_work_is_refused_at_once(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_a_broken_rollout_has_no_part(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    generate = trainer.rollouts.engine.generate

    def broken(prompts, sampling):
        rollouts = generate(prompts, sampling)
        return [Rollout(rollouts[0].prompt_ids, rollouts[0].completion_ids, error="lost"), *rollouts[1:]]

    trainer.rollouts.engine.generate = broken
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/vowels/none_rate"] == 0.25
    assert math.isfinite(log["loss"])


def test_lora_config_is_accepted(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer.train()
    assert trainer.ref_model is None
