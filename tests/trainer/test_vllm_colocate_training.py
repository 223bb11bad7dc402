"""GRPO and RLOO with vLLM in the training process: they learn, sample what they train, and resume exactly."""

from __future__ import annotations

import statistics
import warnings

import pytest
import torch
from datasets import Dataset

from trl.rollouts import vllm_adapter, vllm_colocate

from ..conftest import build_tokenizer
from ..data.vision_helpers import build_image, build_processor
from ..rollouts.test_image_prompts import TEMPLATE, build_llava
from .grpo_helpers import Counter, look_up
from .test_resume import weights_of
from .vllm_helpers import COUNTS, LOOKS_UP, build_policy, logged, make_tool_trainer, make_vllm_trainer

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(300)
DIFFERENCE = "sampling/sampling_logp_difference/max"


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    """Engines end with their test, not whenever the collector comes by."""
    engines = []
    make = vllm_adapter.make_engine
    built = vllm_colocate.VLLMColocateEngine.__init__

    def init(self, *args, **kwargs):
        built(self, *args, **kwargs)
        engines.append(self)

    monkeypatch.setattr(vllm_colocate.VLLMColocateEngine, "__init__", init)
    yield
    assert vllm_adapter.make_engine is make
    for engine in engines:
        engine.close()


# ---- Learning ----


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_learns_with_vllm_as_with_transformers(tmp_path, method):
    gains = {}
    for use_vllm in (True, False):
        trainer = make_vllm_trainer(tmp_path, method=method, use_vllm=use_vllm, max_steps=30, beta=0.0)
        trainer.train()
        rewards = logged(trainer, "reward")
        gains[use_vllm] = statistics.mean(rewards[-5:]) - statistics.mean(rewards[:5])
    assert min(gains.values()) > 0.1, gains


# ---- Agreement ----


@pytest.mark.parametrize(
    "settings",
    [{}, {"tied": False}, {"lora": True}, {"lora": True, "tied": False}, {"method": "rloo"}],
    ids=["tied", "untied", "lora", "lora_untied", "rloo"],
)
def test_engine_and_trainer_agree_after_every_update(tmp_path, settings):
    """After 1, 10 and 50 updates, and all between; the weights move far enough for stale ones to be noticed."""
    trainer = make_vllm_trainer(tmp_path, max_steps=51, **settings)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    differences = logged(trainer, DIFFERENCE)
    assert len(differences) == 51
    assert max(differences) <= 1e-4
    assert max(map(abs, logged(trainer, "sampling/sampling_kl"))) <= 1e-4
    after = trainer.model.state_dict()
    moved = max((after[name] - value).abs().max() for name, value in before.items() if after[name].is_floating_point())
    assert moved > 0.05
    if "lora" in settings:
        for name, value in before.items():
            if "lora_" not in name:
                assert torch.equal(after[name], value), name
    if settings.get("method") != "rloo":
        assert logged(trainer, "sampling/importance_sampling_ratio/mean") == pytest.approx([1.0] * 51, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 20, "repetition_penalty": 1.2},
        {"temperature": 1.3, "generation_kwargs": {"min_p": 0.05}},
    ],
    ids=["temperature", "top_p", "penalty", "generation_kwargs"],
)
def test_log_probs_are_those_of_the_loss(tmp_path, settings):
    """Over the whole vocabulary, at the temperature of sampling, whatever shapes the distribution besides."""
    trainer = make_vllm_trainer(tmp_path, max_steps=2, **settings)
    trainer.train()
    differences = logged(trainer, DIFFERENCE)
    assert len(differences) == 2
    assert max(differences) <= 1e-4


def test_what_vllm_cannot_tell_is_left_out_with_a_warning(tmp_path):
    settings = {"temperature": 0.7, "generation_kwargs": {"presence_penalty": 1.0}}
    with pytest.warns(UserWarning, match="presence_penalty"):
        trainer = make_vllm_trainer(tmp_path, max_steps=1, **settings)
    trainer.train()
    assert not logged(trainer, DIFFERENCE)


# ---- Weights that do not arrive ----


def test_a_stale_head_is_repaired_and_a_lasting_one_ends_the_run(tmp_path, monkeypatch, caplog):
    refresh, calls = vllm_adapter.refresh_tied_head, []

    def forgetful(model):
        calls.append(1)
        return [] if len(calls) == 3 else refresh(model)  # the third update; the fourth call is its repair

    monkeypatch.setattr(vllm_adapter, "refresh_tied_head", forgetful)
    trainer = make_vllm_trainer(tmp_path, max_steps=4)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert len(calls) == 5
    assert max(logged(trainer, DIFFERENCE)) <= 1e-4

    calls.clear()
    monkeypatch.setattr(
        vllm_adapter, "refresh_tied_head", lambda model: calls.append(1) or refresh(model) if len(calls) < 2 else []
    )
    trainer = make_vllm_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match="does not have the trainer's weights"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()


def test_a_full_check_names_the_layer(tmp_path, monkeypatch):
    load = vllm_adapter.update_weights

    def one_short(engine, weights):
        wrong = "model.layers.1.mlp.up_proj.weight"
        load(engine, ((name, tensor * 1.01 if name == wrong else tensor) for name, tensor in weights))

    monkeypatch.setattr(vllm_adapter, "update_weights", one_short)
    trainer = make_vllm_trainer(tmp_path, max_steps=1, vllm_verify="full")
    with pytest.raises(RuntimeError, match=r"layers differ: model\.layers\.1\.mlp\.gate_proj"):
        trainer.train()


# ---- Resume ----


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_resumed_run_samples_and_learns_the_same(tmp_path, lora):
    """Stopped within a generation and between two; an evaluation in between draws nothing of training's."""
    settings = {
        "lora": lora, "max_steps": 5, "save_strategy": "steps", "save_steps": 1, "steps_per_generation": 2,
        "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8, "eval_strategy": "steps", "eval_steps": 2,
        "eval_dataset": [{"prompt": "the sea"}, {"prompt": "the sky"}],
    }  # fmt: skip

    def make(folder):
        sampled = []
        torch.manual_seed(1)  # of the adapter's first weights
        own = {**settings, "eval_dataset": Dataset.from_list(settings["eval_dataset"])}

        def reward(completions, completion_ids, **kwargs):
            sampled.append([list(ids) for ids in completion_ids])
            return [float(sum(ids) % 7) for ids in completion_ids]

        trainer = make_vllm_trainer(folder, rewards=reward, **own)
        trainer.create_model_card = lambda *args, **kwargs: None
        return trainer, sampled

    whole, sampled = make(tmp_path / "whole")
    whole.train()
    for step in (1,) if lora else (1, 2):
        resumed, again = make(tmp_path / f"from_{step}")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert again == sampled[-len(again) :]
        assert len(again) >= 2
        expected, actual = weights_of(whole), weights_of(resumed)
        assert all(torch.equal(expected[name], actual[name]) for name in expected)


# ---- What goes with it ----


def test_evaluation_greedy_and_at_the_temperature_of_training(tmp_path):
    data = Dataset.from_list([{"prompt": "the sea"}, {"prompt": "the sky"}])
    seen = []

    def measure(prediction):
        seen.append(prediction.completions)
        return {"length": sum(map(len, prediction.completions)) / len(prediction.completions)}

    trainer = make_vllm_trainer(
        tmp_path, eval_dataset=data, eval_temperature=0.0, compute_metrics=measure, per_device_eval_batch_size=2
    )
    first, second = trainer.evaluate(), trainer.evaluate()
    assert seen[0] == seen[1]
    assert first["eval_length"] == second["eval_length"] > 0
    own = make_vllm_trainer(
        tmp_path, eval_dataset=data, eval_temperature=0.0, compute_metrics=measure, per_device_eval_batch_size=2,
        use_vllm=False, model=trainer.model,
    )  # fmt: skip
    own.evaluate()
    assert seen[2] == seen[0]


def test_a_rollout_function_samples_with_the_engine(tmp_path):
    def rollout(prompts, trainer):
        ids = [trainer.processing_class(prompt[0]["content"]).input_ids for prompt in prompts]
        prompt_ids, completion_ids, logps, _ = trainer.vllm_generation.generate(ids, None, num_generations=1)
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logps}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_vllm_trainer(tmp_path, rollout_func=rollout, max_steps=3)
    trainer.train()
    differences = logged(trainer, DIFFERENCE)
    assert len(differences) == 3
    assert max(differences) <= 1e-4


def test_regular_expressions_bind_completions(tmp_path):
    texts = []

    def reward(completions, **kwargs):
        texts.extend(completion[0]["content"] for completion in completions)
        return [text.count("a") / 4 for text in texts[-len(completions) :]]

    make_vllm_trainer(tmp_path, rewards=reward, max_steps=2, vllm_structured_outputs_regex=r"[ab]{4}").train()
    assert len(texts) == 32
    assert all(len(text) == 4 and set(text) <= {"a", "b"} for text in texts)


def test_options_that_cannot_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must divide the number of processes"):
        make_vllm_trainer(tmp_path, vllm_tensor_parallel_size=2)
    with pytest.warns(UserWarning, match="no effect on a CPU"):
        make_vllm_trainer(tmp_path, vllm_enable_sleep_mode=True)
    model = build_policy()
    model.is_loaded_in_8bit = True
    with pytest.raises(ValueError, match="8 bits"):
        make_vllm_trainer(tmp_path, model=model)


def test_tools_are_called_and_their_results_not_trained_on(tmp_path):
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return [float(len(completion[1]["content"])) for completion in completions]

    settings = {"tools": [look_up], "vllm_structured_outputs_regex": LOOKS_UP}
    trainer = make_tool_trainer(tmp_path, reward, **settings)
    trainer.train()
    assert [[message["role"] for message in messages] for messages in seen] == [["assistant", "tool", "assistant"]] * 8
    results = {message["content"] for messages in seen for message in messages if message["role"] == "tool"}
    assert len(results) > 1
    assert all("is a word" in result or "error" in result for result in results)
    assert logged(trainer, "tools/call_frequency") == [1.0, 1.0]
    assert max(logged(trainer, DIFFERENCE)) <= 1e-4  # of the policy's tokens, before and after the tool's


def test_environments_are_acted_in(tmp_path):
    with pytest.warns(UserWarning, match="environment_factory"):
        trainer = make_tool_trainer(tmp_path, None, environment_factory=Counter, vllm_structured_outputs_regex=COUNTS)
    trainer.train()
    assert len(logged(trainer, "rewards/Counter/mean")) == 2
    assert logged(trainer, "tools/call_frequency") == [1.0, 1.0]


def test_transformers_code_in_the_engine_leaves_the_trainers_alone(tmp_path):
    """vLLM compiles Transformers' classes; the trainer's model and those made later are of them, too."""
    trainer = make_vllm_trainer(tmp_path, max_steps=2, vllm_model_impl="transformers", gradient_checkpointing=True)
    with torch.no_grad():
        assert build_policy()(torch.arange(8)[None]).logits.isfinite().all()
    calls = []
    trainer.model.model.register_forward_hook(lambda *args: calls.append(1))
    trainer.train()
    assert calls  # a module whose class was changed would pass its hooks by
    assert max(logged(trainer, DIFFERENCE)) <= 1e-4


def test_images_reach_the_engine(tmp_path):
    """Log-probs depend on the image, and agree; after an update no embedding of an image is left from before."""
    processor = build_processor(build_tokenizer())
    processor.chat_template = TEMPLATE
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = build_llava(processor, **sizes)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data *= 20
    images = [build_image((240, 0, 0)), build_image((0, 0, 240))]
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "what is this?"}], "images": [image]} for image in images * 2]
    )
    # vLLM's own Llava code imports torchvision, which has no CPU build.
    trainer = make_vllm_trainer(
        tmp_path, model=model, tokenizer=processor, data=data, rewards=lambda completions, **kwargs: [
            float(index % 3) for index in range(len(completions))
        ], max_steps=3, per_device_train_batch_size=4, num_generations=2, vllm_model_impl="transformers",
    )  # fmt: skip
    batches, score = [], trainer._score_before_update

    def keep(policy, micro_batches):
        score(policy, micro_batches)
        batches.extend(
            {name: batch[name].clone() for name in ("old_logps", "rollout_logps")} for batch in micro_batches
        )
        for batch in micro_batches:
            batch = {**batch, "image_inputs": batch["image_inputs"][::-1]}
            batches[-1]["swapped"] = trainer.score_completions(policy, batch).logps.detach()

    trainer._score_before_update = keep
    trainer.train()
    assert len(batches) == 3
    for batch in batches:
        torch.testing.assert_close(batch["old_logps"], batch["rollout_logps"], atol=1e-4, rtol=0)
    assert max((batch["old_logps"] - batch["swapped"]).abs().max() for batch in batches) > 1e-2


@pytest.mark.parametrize("dtype", [None, "float32"], ids=["both", "trainer"])
def test_in_bfloat16_right_weights_pass_the_full_check(tmp_path, dtype):
    trainer = make_vllm_trainer(
        tmp_path, max_steps=3, bf16=True, vllm_verify="full", vllm_dtype=dtype, learning_rate=1e-3
    )
    trainer.train()
    assert 1e-5 < max(logged(trainer, DIFFERENCE)) < 0.5


def test_an_engine_ends_after_a_script_ended_all_process_groups(tmp_path):
    trainer = make_vllm_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.accelerator.end_training()
    assert not torch.distributed.is_initialized()
    another = make_vllm_trainer(tmp_path, max_steps=1)  # while the first one is there
    another.train()
    another.accelerator.end_training()
    another.rollouts.close()
    trainer.rollouts.close()
    make_vllm_trainer(tmp_path, max_steps=1).train()
