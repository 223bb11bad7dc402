"""GRPOTrainer: what it is given, what it samples, what it logs, what it refuses, and that it learns."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import warnings

import pandas
import pytest
import torch
from datasets import IterableDataset
from peft import get_peft_model

from trl import GRPOTrainer
from trl.losses.entropy import EntropyController
from trl.losses.policy import PolicyLossInputs
from trl.ops.scoring import TokenScores
from trl.rewards import RewardError, RewardValueError
from trl.rollouts import vllm_adapter

from ..conftest import build_model, build_tokenizer, load_reference
from .grpo_helpers import LORA, PROMPTS, Counter, fixed_rollouts, look_up, make_trainer, vowels

FIGURES = load_reference("policy")
# ---- Recorded figures ----


@pytest.mark.parametrize(
    "name", [name for name, case in FIGURES.items() if "old_per_token_logps_computed" in case["outputs"]]
)
def test_old_logps_are_computed_when_the_policy_may_have_changed(tmp_path, name):
    case = FIGURES[name]
    trainer = make_trainer(tmp_path, **case["config"])
    trainer.model.train()
    assert trainer.needs_old_logps() == case["outputs"]["old_per_token_logps_computed"]
    trainer.model.eval()
    assert not trainer.needs_old_logps()


RECORDED = [
    name
    for name, case in FIGURES.items()
    if case.get("trainer") == "GRPOTrainer"
    and "loss" in case["outputs"]
    and not {"gradient_accumulation_steps", "steps_per_generation", "mode", "use_vllm"} & set(case["config"])
]


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_losses_through_the_trainer(tmp_path, monkeypatch, name):
    """A micro-batch alone: loss, gradients and metrics are those on record, through `compute_loss`."""
    case = FIGURES[name]
    inputs, outputs, dtype = case["inputs"], case["outputs"], getattr(torch, case["dtype"])
    config = {"use_bias_correction_kl": False, **case["config"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of combinations that are defined, but seldom meant
        trainer = make_trainer(tmp_path, **config)

    def tensor(key):
        return torch.tensor(inputs[key], dtype=dtype) if key in inputs else None

    mask = torch.tensor(inputs["completion_mask"]) * torch.tensor(inputs.get("tool_mask", 1))
    batch = {"train_mask": mask, "completion_mask": mask, "advantages": tensor("advantages")}
    named = {"old_logps": "old_per_token_logps", "ref_logps": "ref_per_token_logps"}
    named["rollout_logps"] = "sampling_per_token_logps"
    batch.update({key: tensor(recorded) for key, recorded in named.items() if recorded in inputs})
    logps = tensor("per_token_logps").requires_grad_()
    scores = TokenScores(logps=logps, entropies=tensor("entropies"))
    monkeypatch.setattr(trainer, "score_completions", lambda *args, **kwargs: scores)
    trainer.model.train()
    trainer.count_step(
        [trainer.count_items(batch), trainer.count_forward_units(trainer.model, [batch])], torch.device("cpu")
    )
    trainer.current_gradient_accumulation_steps = 1

    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=mask.sum())

    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(outputs["loss"], rel=tolerance, abs=tolerance)
    loss.backward()
    expected = torch.tensor(outputs["grad_per_token_logps"], dtype=dtype)
    torch.testing.assert_close(logps.grad, expected, rtol=tolerance, atol=tolerance)
    logged = trainer.reducer.reduce("train")
    metrics = {name: value for name, value in outputs["metrics"].items() if name != "entropy_coef"}
    assert {name: logged[name] for name in metrics} == pytest.approx(metrics, rel=1e-5, abs=1e-6)


# ---- Training ----


def test_a_run_logs_what_it_should(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.1, gradient_accumulation_steps=2, eval_dataset=PROMPTS.select(range(3)))
    trainer.train()
    evaluation = trainer.evaluate()
    names = {
        "reward", "reward_std", "frac_reward_zero_std", "rewards/vowels/mean", "rewards/vowels/std", "kl", "entropy",
        "completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio",
        "completions/mean_terminated_length", "completions/min_terminated_length", "num_tokens",
        "completions/max_terminated_length", "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean",
        "clip_ratio/high_max", "clip_ratio/region_mean",
    }  # fmt: skip
    first = trainer.state.log_history[0]
    assert names | {"loss", "step_time"} <= set(first)
    assert {f"eval_{name}" for name in names} | {"eval_loss"} <= set(evaluation)
    assert first["completions/max_length"] <= 6
    assert first["frac_reward_zero_std"] == 0
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # the policy is its reference
    assert first["step_time"] > 0
    assert trainer.state.log_history[1]["num_tokens"] == trainer.state.num_input_tokens_seen > first["num_tokens"] > 0


def test_it_learns(tmp_path):
    """The probability of the rewarded token rises, that of the others falls."""
    tokenizer = build_tokenizer()
    wanted = tokenizer.convert_tokens_to_ids("a")

    def reward(completion_ids, **kwargs):
        return [float(wanted in ids) for ids in completion_ids]

    trainer = make_trainer(
        tmp_path,
        reward,
        tokenizer=tokenizer,
        per_device_train_batch_size=32,
        num_generations=16,
        max_completion_length=4,
        learning_rate=2e-2,
        max_steps=25,
        logging_steps=25,
        lr_scheduler_type="constant",
        eval_dataset=PROMPTS.select(range(4)),
        per_device_eval_batch_size=64,
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before + 0.3


def test_evaluation_does_not_disturb_training(tmp_path):
    """The same rollouts and weights with and without evaluations in between; two evaluations of one policy agree."""
    weights = []
    for strategy in ("no", "steps"):
        trainer = make_trainer(
            tmp_path, eval_strategy=strategy, eval_steps=1, eval_dataset=PROMPTS.select(range(3)), max_steps=3,
            per_device_eval_batch_size=8,
        )  # fmt: skip
        trainer.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
    assert torch.equal(*weights)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_reward"] == second["eval_reward"]


def test_greedy_evaluation_and_metrics_on_text(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"length": sum(map(len, prediction.completion_ids)) / len(prediction)}

    trainer = make_trainer(
        tmp_path, eval_temperature=0.0, compute_metrics=metrics, eval_dataset=PROMPTS.select(range(5)),
        per_device_eval_batch_size=2,
    )  # fmt: skip
    assert trainer.num_generations_eval == 1
    result = trainer.evaluate()
    (prediction,) = seen
    assert result["eval_length"] == sum(map(len, prediction.completion_ids)) / 5
    assert sorted(prediction.columns["answer"]) == [0, 1, 2, 3, 4]
    assert prediction.rewards["vowels"] == pytest.approx(vowels(prediction.completions))
    trainer.evaluate()
    assert seen[1].completions == prediction.completions


def test_a_text_metric_chooses_the_best_checkpoint(tmp_path):
    figures = iter([0.2, 0.9, 0.4])
    trainer = make_trainer(
        tmp_path, compute_metrics=lambda prediction: {"accuracy": next(figures)}, eval_dataset=PROMPTS.select(range(2)),
        eval_strategy="steps", eval_steps=1, save_strategy="best", metric_for_best_model="eval_accuracy",
        greater_is_better=True, max_steps=3, per_device_eval_batch_size=8,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_metric == 0.9


@pytest.mark.parametrize("conversational", [True, False])
def test_rewards_get_texts_columns_and_the_state(tmp_path, conversational):
    calls = []

    def reward(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
        calls.append((prompts, completions, completion_ids, answer, trainer_state.global_step))
        log_extra("seen", answer)
        log_metric("mine", 2.0)
        return [None if index == 0 else float(index) for index in range(len(prompts))]

    data = PROMPTS if conversational else PROMPTS.map(lambda row: {"prompt": row["prompt"][0]["content"]})
    trainer = make_trainer(tmp_path, reward, data, log_completions=True, num_completions_to_print=1)
    trainer.train()
    prompts, completions, ids, answer, step = calls[0]
    assert len(prompts) == len(completions) == len(ids) == len(answer) == 4
    assert len(set(answer)) == 1
    assert step == 0
    if conversational:
        assert prompts[0] == [{"role": "user", "content": f"the number {answer[0]}"}]
        assert completions[0][0]["role"] == "assistant"
    else:
        assert prompts[0] == f"the number {answer[0]}"
        assert isinstance(completions[0], str)
    log = trainer.state.log_history[0]
    assert log["mine"] == 2.0
    assert log["rewards/reward/mean"] == 2.0  # of 1, 2 and 3
    assert log["rewards/reward/none_rate"] == 0.25
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert set(table.columns) >= {"step", "prompt", "completion", "reward", "seen", "advantage"}
    assert table["advantage"].tolist()[0] == 0  # nothing scored it
    assert sum(table["advantage"]) == pytest.approx(0, abs=1e-5)


def test_several_rewards_are_weighted(tmp_path):
    def zero(completions, **kwargs):
        return [1.0] * len(completions)

    async def later(completions, **kwargs):
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    trainer = make_trainer(tmp_path, [zero, later], reward_weights=[0.5, 2.0], max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["reward"] == 4.5
    assert log["rewards/later/mean"] == 2.0
    assert log["frac_reward_zero_std"] == 1.0
    assert (trainer.reward_func_names, trainer.reward_weights.tolist()) == (["zero", "later"], [0.5, 2.0])


@pytest.mark.parametrize("mask_truncated", [True, False])
def test_truncated_completions(tmp_path, mask_truncated):
    """They count in rewards and metrics; with the option they are not trained on."""
    eos = build_tokenizer().eos_token_id
    batches = []
    trainer = make_trainer(
        tmp_path, rollout_func=fixed_rollouts([[8, eos], [9, 10, 11]]), mask_truncated_completions=mask_truncated
    )
    make = trainer.make_training_batch
    trainer.make_training_batch = lambda *args: batches.extend(made := make(*args)) or made
    trainer.train()
    masks = {int(present.sum()): trained[: int(present.sum())].tolist() for present, trained in zip(
        batches[0]["completion_mask"], batches[0]["train_mask"], strict=True
    )}  # fmt: skip
    assert masks == {2: [1, 1], 3: [0, 0, 0] if mask_truncated else [1, 1, 1]}
    log = trainer.state.log_history[0]
    assert log["completions/clipped_ratio"] == 0.5
    assert log["completions/mean_length"] == 2.5
    assert log["completions/mean_terminated_length"] == 2


def test_a_step_without_a_trained_token_is_told_and_trains_nothing(tmp_path, caplog):
    trainer = make_trainer(
        tmp_path, rollout_func=fixed_rollouts([[8], [9]]), mask_truncated_completions=True, max_steps=1
    )
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "nothing to learn from" in caplog.text
    assert all(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": loss_type}
        for loss_type in ("grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
    ]
    + [
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"num_iterations": 2, "delta": 2.0, "off_policy_mask_threshold": 0.5},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"generation_batch_size": 8, "gradient_accumulation_steps": 1},
        {"top_entropy_quantile": 0.3, "entropy_coef": 0.01},
        {"use_adaptive_entropy": True, "entropy_target": 9.0},
        {"scale_rewards": "batch", "gradient_accumulation_steps": 2},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"layout": "padded", "gradient_checkpointing": False},
        {"balance_micro_batches": True, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
        {"cast_lm_head_to_fp32": True, "bf16": True},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "min_p": 0.01},
        {"generation_kwargs": {"top_k": 2}, "cache_implementation": "static"},
        {"pad_to_multiple_of": 8, "num_generations_eval": 2},
    ],
    ids=str,
)  # fmt: skip
def test_options_run_and_change_the_weights(tmp_path, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(tmp_path, **{"eval_dataset": PROMPTS.select(range(2)), **settings})
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert not all(map(torch.equal, before, trainer.model.parameters()))
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_continuous_batching_samples(tmp_path):
    trainer = make_trainer(
        tmp_path, use_transformers_continuous_batching=True, max_steps=1,
        transformers_continuous_batching_config={"num_blocks": 16, "block_size": 32},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["completions/max_length"] == 6


def test_one_generation_serves_its_micro_steps(tmp_path):
    """`steps_per_generation` × `num_iterations` micro-steps go through what was sampled once."""
    calls = []
    plain = fixed_rollouts([[8, 9], [10]])

    def rollout_func(prompts, trainer):
        calls.append((trainer.state.global_step, len(prompts)))
        return plain(prompts, trainer)

    trainer = make_trainer(tmp_path, rollout_func=rollout_func, steps_per_generation=2, num_iterations=2, max_steps=8)
    trainer.train()
    assert calls == [(0, 8), (4, 8)]


def test_groups_are_neighbours_and_each_prompt_comes_once(tmp_path):
    trainer = make_trainer(tmp_path, generation_batch_size=8, num_iterations=2)
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 16 // 2 * 4
    answers = [[row["answer"] for row in batch] for batch in batches]
    assert all(row[:4] == [row[0]] * 4 and row[4:] == [row[4]] * 4 for row in answers)
    assert answers[0] == answers[3] != answers[4]
    assert sorted({answer for row in answers for answer in row}) == list(range(16))


def test_a_stream(tmp_path):
    data = IterableDataset.from_generator(lambda: iter(PROMPTS.to_list()))
    trainer = make_trainer(tmp_path, data=data, eval_dataset=data.take(3), gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert math.isfinite(trainer.evaluate()["eval_reward"])
    batch = next(iter(trainer.get_train_dataloader()))
    assert [len({row["answer"] for row in batch[start : start + 4]}) for start in (0, 4)] == [1, 1]


@pytest.mark.parametrize("when", ["at construction", "by evaluate"])
def test_a_stream_is_evaluated_beside_a_dataset_that_is_none(tmp_path, when):
    stream = IterableDataset.from_generator(lambda: iter(PROMPTS.to_list()[:3]))
    trainer = make_trainer(tmp_path, eval_dataset={"stream": stream} if when == "at construction" else None)
    metrics = trainer.evaluate() if when == "at construction" else trainer.evaluate({"stream": stream})
    assert math.isfinite(metrics["eval_stream_reward"])


# ---- Adapters and references ----


def test_an_adapter_is_trained_and_is_its_own_reference(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LORA, beta=0.1, learning_rate=0.1)
    base = trainer.model.get_base_model().model.embed_tokens.weight.detach().clone()
    trainer.train()
    assert trainer.ref_model is None
    assert torch.equal(base, trainer.model.get_base_model().model.embed_tokens.weight)
    first, second = (log["kl"] for log in trainer.state.log_history[:2])
    assert first == pytest.approx(0, abs=1e-6)
    assert second > 1e-6


def test_a_given_adapter_is_kept_as_the_reference(tmp_path):
    tokenizer = build_tokenizer()
    model = get_peft_model(build_model(vocab_size=len(tokenizer)), LORA)
    trainer = make_trainer(tmp_path, model=model, tokenizer=tokenizer, beta=0.1)
    assert set(model.peft_config) == {"default", "ref"}
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_the_reference_follows(tmp_path):
    trainer = make_trainer(
        tmp_path, beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, learning_rate=1e-2
    )
    trainer.train()
    for policy, reference in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True):
        assert torch.equal(policy, reference)


def test_no_reference_without_beta(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer.reference is None
    assert trainer.ref_model is None


# ---- What is refused ----


def environment_without_reset():
    return object()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rewards": None}, ValueError, "no source of reward"),
        ({"rewards": [vowels, vowels], "reward_weights": [1.0]}, ValueError, "reward_weights"),
        ({"data": PROMPTS.rename_column("prompt", "question")}, ValueError, "`question`"),
        ({"data": PROMPTS.select([])}, ValueError, "empty"),
        ({"data": PROMPTS.select(range(1)), "generation_batch_size": 8}, ValueError, "only 1 rows"),
        ({"data": PROMPTS.to_list()}, TypeError, "Dataset"),
        ({"data": None, "max_steps": -1}, ValueError, "max_steps"),
        ({"sync_ref_model": True}, ValueError, "beta"),
        ({"sync_ref_model": True, "beta": 0.1, "peft_config": LORA}, NotImplementedError, "adapter"),
        ({"environment_factory": environment_without_reset}, ValueError, "reset"),
        ({"environment_factory": {"a": Counter}, "data": None}, ValueError, "train_dataset"),
        ({"tools": [look_up]}, ValueError, "template"),
        (
            {"rewards": lambda completions, answer: [], "remove_unused_columns": True},
            RewardError,
            "remove_unused_columns",
        ),
        ({"use_vllm": True, "use_transformers_continuous_batching": True}, ValueError, "two ways"),
        ({"use_vllm": True, "vllm_mode": "elsewhere"}, ValueError, "vllm_mode"),
        ({"use_vllm": True, "vllm_verify": "twice"}, ValueError, "vllm_verify"),
        ({"use_vllm": True, "vllm_dtype": "int8"}, ValueError, "vllm_dtype"),
        ({"reward_time_limits": [1.0, 2.0]}, ValueError, "time_limits"),
        ({"reward_on_error": "ignore"}, ValueError, "reward_on_error"),
        ({"temperature": 0}, ValueError, "temperature"),
        ({"layout": "stacked"}, ValueError, "layout"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_at_once(tmp_path, settings, error, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(error, match=message):
            make_trainer(tmp_path, **settings)


def test_without_vllm_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_adapter, "is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match=r"trl\[vllm\]"):
        make_trainer(tmp_path, use_vllm=True)


def test_errors_of_reward_functions_name_them(tmp_path):
    def too_few(completions, **kwargs):
        return [1.0]

    def raises(completions, **kwargs):
        raise RuntimeError("no connection")

    for reward, error in ((too_few, RewardValueError), (raises, RewardError)):
        with pytest.raises(error, match=reward.__name__):
            make_trainer(tmp_path, reward).train()


def test_return_outputs_and_an_uneven_evaluation_batch_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=PROMPTS, per_device_eval_batch_size=6)
    with pytest.raises(ValueError, match="num_generations_eval"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="outputs"):
        trainer.compute_loss(trainer.model, {}, return_outputs=True)


def test_nothing_sampled_anywhere_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, rollout_func=fixed_rollouts([[]]))
    with pytest.raises(RuntimeError, match="All completions are empty"):
        trainer.train()


# ---- Names that users' scripts know ----


def test_signature_and_attributes(tmp_path):
    names = list(inspect.signature(GRPOTrainer.__init__).parameters)[1:]
    assert names == [
        "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class", "reward_processing_classes",
        "callbacks", "optimizers", "quantization_config", "peft_config", "tools", "rollout_func", "environment_factory",
        "compute_metrics",
    ]  # fmt: skip
    trainer = make_trainer(tmp_path, beta=0.1)
    for name in (
        "async_loop", "async_loop_ready_event", "async_loop_thread", "aux_loss_enabled", "beta", "chat_template", "chat_template_kwargs", "commit_scheduler",
        "continuous_batching_config", "entropy_coef", "environment_factories", "environments", "eos_token_ids",
        "epsilon_high", "epsilon_low", "generation_config", "generation_kwargs", "importance_sampling_level",
        "log_completions", "log_multimodal", "log_unique_prompts", "loss_type", "mask_truncated_completions",
        "max_completion_length", "max_tool_calling_iterations", "min_p", "multi_objective_aggregation",
        "num_completions_to_print", "num_generations", "num_generations_eval", "num_iterations",
        "off_policy_mask_threshold", "pad_to_multiple_of", "ref_model", "repetition_penalty", "reward_func_names",
        "reward_funcs", "reward_processing_classes", "reward_weights", "rollout_func", "router_aux_loss_coef",
        "scale_rewards", "shuffle_dataset", "temperature", "tools", "top_entropy_quantile", "top_k", "top_p",
        "use_adaptive_entropy", "use_transformers_continuous_batching", "use_vllm", "vllm_generation",
        "vllm_gpu_memory_utilization", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_mode",
        "vllm_tensor_parallel_size",
    ):  # fmt: skip
        assert hasattr(trainer, name), name
    assert trainer.reward_funcs == [vowels]
    assert trainer.generation_config.max_new_tokens == 6
    assert trainer.eos_token_ids == [trainer.processing_class.eos_token_id]


@pytest.mark.parametrize("name", [name for name in FIGURES if name.startswith("high_entropy_mask")])
def test_high_entropy_mask(tmp_path, name):
    case = FIGURES[name]
    mask = torch.tensor(case["inputs"]["mask"])
    found = make_trainer(tmp_path).get_high_entropy_mask(
        torch.tensor(case["inputs"]["entropies"]), mask, case["config"]["threshold_quantile"]
    )
    assert found.long().tolist() == case["outputs"]["mask"]


def test_the_adaptive_entropy_coefficient_is_in_the_checkpoint(tmp_path):
    settings = {"use_adaptive_entropy": True, "entropy_target": 99.0, "entropy_coef_delta": 0.25}
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["entropy_coef"] == 0.25
    with open(tmp_path / "checkpoint-1" / "entropy_ctrl_state.json") as file:
        state = json.load(file)
    controller = EntropyController.of(trainer.loss_options)
    controller.load_state_dict(state)
    assert controller.coef == 0.25
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.entropy_controller.coef == trainer.entropy_controller.coef == 0.5


def test_pieces_of_the_loss():
    logps, sampled = torch.tensor([[-1.0, -3.0], [-1.0, -1.0]]), torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
    mask, advantages = torch.ones(2, 2, dtype=torch.long), torch.tensor([-1.0, -1.0])
    kept = GRPOTrainer.get_off_policy_mask(advantages, logps, sampled, mask, 0.5)
    assert kept.flatten().tolist() == [0, 1]
    weights = GRPOTrainer.get_gamma_weights(advantages, logps - logps, mask, None)
    assert weights.flatten().tolist() == [1.0, 1.0]
    assert PolicyLossInputs(logps, advantages, mask).old_logps_BT is None
