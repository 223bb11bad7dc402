"""DPOTrainer: recorded losses and metrics, what a reference can be, errors, and that it learns."""

from __future__ import annotations

import inspect
import math
import warnings

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from torch.nn.functional import log_softmax
from transformers import BitsAndBytesConfig

from trl import DPOConfig, DPOTrainer
from trl.models.reference import create_reference_model

from ..conftest import build_model, build_tokenizer, load_reference
from .preference_helpers import (
    LORA,
    TEXT_PAIRS,
    build_lora_model,
    make_dpo_trainer,
    make_pairs,
    recorded_scores,
)

CASES = {name: case for name, case in load_reference("preference").items() if "validation" not in name}
REJECTED = {name: case for name, case in load_reference("preference").items() if "validation" in name}


# ---- The recorded figures ----


@pytest.mark.parametrize("name", CASES)
def test_recorded_losses_gradients_and_metrics(tmp_path, monkeypatch, name):
    case = CASES[name]
    trainer = make_dpo_trainer(tmp_path, **case["config"])
    policy, reference = recorded_scores(case), recorded_scores(case, prefix="ref_")
    policy.logps.requires_grad_()
    monkeypatch.setattr(trainer, "score", lambda *args, reference=False, **kwargs: recorded[reference])
    recorded = {False: policy, True: reference}
    trainer.model.train("eval" not in name)
    keys = ("input_ids", "attention_mask", "completion_mask")
    inputs = {key: torch.tensor(case["inputs"][key]) for key in keys}

    loss = trainer.compute_loss(trainer.model, inputs)

    tolerance = {"abs": 1e-6, "rel": 1e-6} if case["dtype"] == "float64" else {"abs": 1e-5, "rel": 1e-5}
    assert loss.item() == pytest.approx(case["outputs"]["loss"], **tolerance)
    loss.backward()
    expected = torch.tensor(case["outputs"]["grad_per_token_logps"], dtype=policy.logps.dtype)
    here = policy.mask  # what a token outside the completion would weigh is of no consequence
    torch.testing.assert_close(policy.logps.grad[here], expected[here], atol=tolerance["abs"], rtol=0)
    metrics = trainer.reducer.reduce("eval" if "eval" in name else "train")
    recorded_metrics = case["outputs"]["metrics"]
    if "eval" in name:
        metrics.pop("loss")
        recorded_metrics = {key: value for key, value in recorded_metrics.items() if key != "num_tokens"}
        metrics.pop("num_tokens", None)
    assert metrics == pytest.approx(recorded_metrics, **tolerance)


@pytest.mark.parametrize("name", REJECTED)
def test_bad_settings_are_refused_at_the_latest_where_recorded(tmp_path, name):
    case = REJECTED[name]
    stages = ("config_raises", "init_raises", "first_step_raises")
    error = next((case["outputs"][stage] for stage in stages if case["outputs"][stage]), None)
    if "robust_half" in name:
        error = "ValueError"  # there a division by zero in the first step
    if error is None:
        assert DPOConfig("out", use_cpu=True, **case["config"]).loss_type == case["outputs"]["loss_type"]
        return
    with pytest.raises({"ValueError": ValueError, "NotImplementedError": NotImplementedError}[error]):
        make_dpo_trainer(tmp_path, **case["config"])


# ---- Against a plain computation ----


def summed_logps(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + completion])
    logps = log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].double(), dim=-1)
    return logps.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def test_the_loss_is_the_papers(tmp_path):
    """Nothing but -log σ(β (log-ratio of chosen - log-ratio of rejected)), from the bare logits of two models."""
    rows, policy, reference = make_pairs(6), build_model(seed=1), build_model(seed=2)
    expected = []
    with torch.no_grad():
        for row in rows:
            chosen, rejected = (
                summed_logps(policy, row["prompt_ids"], row[side])
                - summed_logps(reference, row["prompt_ids"], row[side])
                for side in ("chosen_ids", "rejected_ids")
            )
            expected.append(-torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).item())
    trainer = make_dpo_trainer(tmp_path, rows, model=policy, ref_model=reference, beta=0.3)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    with torch.no_grad():
        assert trainer.compute_loss(policy, batch).item() == pytest.approx(sum(expected) / 6, abs=1e-5)


# ---- What the reference can be ----

REFERENCES = {
    "copy": {},
    "given": {"ref_model": True},
    "lora": {"peft_config": LoraConfig(**LORA)},
    "given_lora": {"model": "lora"},
    "precomputed": {"precompute_ref_log_probs": True},
    "precomputed_given": {"precompute_ref_log_probs": True, "ref_model": True},
    "precomputed_lora": {"precompute_ref_log_probs": True, "peft_config": LoraConfig(**LORA)},
    "precomputed_given_lora": {"precompute_ref_log_probs": True, "model": "lora"},
    "synced": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


def reference_settings(name: str) -> dict:
    settings = dict(REFERENCES[name])
    if settings.pop("ref_model", False):
        settings["ref_model"] = create_reference_model(build_model())
    if settings.get("model") == "lora":
        settings["model"] = build_lora_model()
    return settings


@pytest.mark.parametrize("name", REFERENCES)
def test_the_first_loss_is_ln_2(tmp_path, name):
    """Policy and reference agree before the first step, whatever the reference is; and it stays where it was."""
    settings = reference_settings(name)
    trainer = make_dpo_trainer(tmp_path, make_pairs(6), max_steps=3, learning_rate=1e-2, **settings)
    before = {name: value.clone() for name, value in trainer.ref_model.named_parameters()} if trainer.ref_model else {}
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["loss"] < math.log(2) - 1e-3 or name == "synced"
    for key, value in before.items():
        assert torch.equal(trainer.ref_model.get_parameter(key), value) == (name != "synced"), key


@pytest.mark.parametrize("name", [name for name in REFERENCES if name != "synced"])
def test_every_reference_gives_the_same_training(tmp_path, name):
    """The ways of having the same reference differ in memory and time, not in numbers."""
    lora = "lora" in name
    plain = "given_lora" if "given_lora" in name else "lora" if lora else "copy"

    def losses(which: str) -> list[float]:
        trainer = make_dpo_trainer(
            tmp_path / which, make_pairs(6), max_steps=4, learning_rate=1e-2, **reference_settings(which)
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(name) == pytest.approx(losses(plain), abs=1e-5)


@pytest.mark.parametrize("name", ["copy", "lora", "given_lora"])
def test_mixed_precision_reaches_policy_and_reference(tmp_path, name):
    """Both compute in bfloat16, so they agree with each other before the first step, and not quite with float32."""
    logps = {}
    for bf16 in (False, True):
        trainer = make_dpo_trainer(
            tmp_path, make_pairs(6), max_steps=1, bf16=bf16, per_device_train_batch_size=6, **reference_settings(name)
        )
        trainer.train()
        log = trainer.state.log_history[0]
        assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert trainer.model.lm_head.weight.dtype == torch.float32
        logps[bf16] = log["logps/chosen"]
    assert 0 < abs(logps[True] - logps[False]) < 0.5


def test_an_adapter_that_came_along_is_the_reference(tmp_path):
    """The reference of a PEFT model is what it was when it came, adapter included, not its bare base."""
    model = build_lora_model()
    trainer = make_dpo_trainer(tmp_path, make_pairs(4), model=model)
    assert set(model.peft_config) == {"default", "ref"}
    assert not any(value.requires_grad for name, value in model.named_parameters() if ".ref." in name)
    assert model.active_adapter == "default"
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    chosen, _ = trainer.compute_ref_log_probs(trainer.model, batch)
    with torch.no_grad(), model.disable_adapter():
        row = trainer.train_dataset[0]
        base = summed_logps(model, row["prompt_ids"], row["chosen_ids"])
    assert abs(chosen[0] - base) > 1e-2


def test_the_base_under_an_adapter_never_changes(tmp_path):
    base = build_model()
    before = {name: value.clone() for name, value in base.named_parameters()}
    trainer = make_dpo_trainer(
        tmp_path, make_pairs(4), model=base, peft_config=LoraConfig(**LORA), max_steps=3, learning_rate=1e-2
    )
    trainer.train()
    after = trainer.model.get_base_model()
    named = {name.replace(".base_layer", ""): value for name, value in after.named_parameters() if "lora_" not in name}
    for name, value in before.items():
        assert torch.equal(named[name], value), name


def test_precomputed_log_probs_are_kept_on_disk(tmp_path, monkeypatch):
    """The second run reads them; other weights, or another limit, make their own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    computed = []
    original = DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *args: computed.append(1) or original(*args))

    def columns(**settings):
        computed.clear()
        trainer = make_dpo_trainer(tmp_path, make_pairs(5), precompute_ref_log_probs=True, **settings)
        return len(computed), trainer.train_dataset["ref_chosen_logps"][:]

    first = columns(precompute_ref_batch_size=2)
    assert first[0] == 3
    assert columns() == (0, first[1])
    assert columns(model=build_model(seed=5))[0] == 1
    assert columns(max_length=6)[0] == 1
    assert columns(ld_alpha=0.5)[0] == 1


def test_a_damaged_file_of_log_probs_is_made_again(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    first = make_dpo_trainer(tmp_path, make_pairs(5), precompute_ref_log_probs=True)
    (file,) = (tmp_path / "cache").rglob("reference-logps-*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    again = make_dpo_trainer(tmp_path, make_pairs(5), precompute_ref_log_probs=True)
    assert again.train_dataset["ref_chosen_logps"][:] == first.train_dataset["ref_chosen_logps"][:]


def test_precomputed_log_probs_of_another_dataset(tmp_path):
    """A dataset given to `evaluate` gets them as long as the reference is there."""
    rows = Dataset.from_list(make_pairs(3, seed=7))
    trainer = make_dpo_trainer(tmp_path, make_pairs(6), precompute_ref_log_probs=True, max_steps=1, learning_rate=1e-2)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate(rows)
    lora = make_dpo_trainer(
        tmp_path, make_pairs(6), precompute_ref_log_probs=True, max_steps=1, peft_config=LoraConfig(**LORA)
    )
    lora.train()
    assert lora.evaluate(rows)["eval_rewards/accuracies"] >= 0


def test_the_reference_follows(tmp_path):
    """new = (1 - α) old + α policy, at the steps asked for."""
    trainer = make_dpo_trainer(
        tmp_path, make_pairs(6), sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25,
        max_steps=3, learning_rate=1e-2, per_device_train_batch_size=2,
    )  # fmt: skip
    name = "model.layers.0.self_attn.q_proj.weight"
    start = trainer.ref_model.get_parameter(name).clone()
    policy = {}
    from transformers import TrainerCallback

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            policy[state.global_step] = model.get_parameter(name).detach().clone()

    trainer.add_callback(Record())
    trainer.train()
    torch.testing.assert_close(trainer.ref_model.get_parameter(name), 0.75 * start + 0.25 * policy[2])


# ---- Learning ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": "hinge", "use_weighting": True},
        {"loss_type": "sft", "use_weighting": True},
        {"loss_type": "ipo", "f_divergence_type": "js_divergence"},
        {"ld_alpha": 0.5, "layout": "shared_prefix"},
        {"loss_type": "aot"},
        {"peft_config": LoraConfig(**LORA), "gradient_checkpointing": True, "learning_rate": 2e-2},
    ],
    ids=["sigmoid", "mpo", "wpo_hinge", "wpo_sft", "ipo_js", "ld_shared", "aot", "lora_checkpointing"],
)
def test_it_learns_to_prefer(tmp_path, settings):
    trainer = make_dpo_trainer(
        tmp_path, **{"max_steps": 25, "learning_rate": 5e-3, "per_device_train_batch_size": 5, **settings}
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    assert log[-1]["rewards/chosen"] > 0
    if settings.get("loss_type") != "sft":  # which knows of no rejected completion, and whose weights move with it
        assert log[-1]["loss"] < log[0]["loss"]
        assert log[-1]["rewards/accuracies"] == 1.0
        assert log[-1]["rewards/margins"] > 0.1


def test_evaluation_is_exact(tmp_path):
    """The mean over pairs (and, for `sft`, over tokens), however the rows are cut into batches."""
    rows = make_pairs(7, seed=3)
    results = []
    for batch_size in (1, 3, 7):
        trainer = make_dpo_trainer(
            tmp_path, make_pairs(2), model=build_model(seed=1), ref_model=build_model(seed=2),
            eval_dataset={"a": Dataset.from_list(rows), "b": Dataset.from_list(rows[:2])},
            per_device_eval_batch_size=batch_size, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5],
        )  # fmt: skip
        metrics = trainer.evaluate()
        results.append({key: value for key, value in metrics.items() if "runtime" not in key and "second" not in key})
    assert results[0]["eval_a_loss"] != results[0]["eval_b_loss"]
    for result in results[1:]:
        assert result == pytest.approx(results[0], abs=1e-5)


def test_compute_metrics_gets_logits_and_labels(tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"half": 0.5}

    rows = Dataset.from_list(make_pairs(2))
    trainer = make_dpo_trainer(
        tmp_path, make_pairs(2), eval_dataset=rows, compute_metrics=compute_metrics, per_device_eval_batch_size=2
    )
    assert trainer.evaluate()["eval_half"] == 0.5
    width = max(len(r["prompt_ids"] + r[side]) for r in rows for side in ("chosen_ids", "rejected_ids"))
    assert seen["shapes"] == ((4, width, 512), (4, width))


def test_return_outputs_warns(tmp_path):
    trainer = make_dpo_trainer(tmp_path, make_pairs(2))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    with pytest.warns(FutureWarning, match="return_outputs"):
        _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.logits.shape[0] == 4


def test_a_stream_trains(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(TEXT_PAIRS))
    trainer = make_dpo_trainer(tmp_path, stream, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_mixture_of_experts(tmp_path):
    """The router's loss is added with its coefficient and logged; every layout gives the same one."""
    results = {}
    for layout in ("padded", "packed", "shared_prefix"):
        model = build_model(architecture="mixtral", num_local_experts=4, num_experts_per_tok=2)
        trainer = make_dpo_trainer(
            tmp_path, make_pairs(4), model=model, router_aux_loss_coef=0.1, layout=layout, max_steps=1,
            per_device_train_batch_size=4,
        )  # fmt: skip
        trainer.train()
        results[layout] = trainer.state.log_history[0]
    log = results["padded"]
    assert log["loss"] == pytest.approx(math.log(2) + 0.1 * log["aux_loss"], abs=1e-5)
    for layout in ("packed", "shared_prefix"):
        assert results[layout]["loss"] == pytest.approx(log["loss"], abs=1e-5), layout
        assert results[layout]["grad_norm"] == pytest.approx(log["grad_norm"], abs=1e-4), layout


# ---- Interface and errors ----


def test_signature_and_attributes(tmp_path):
    names = list(inspect.signature(DPOTrainer).parameters)
    assert names == [
        "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class",
        "compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config",
    ]  # fmt: skip
    trainer = make_dpo_trainer(tmp_path, padding_free=True)
    assert trainer.padding_free and trainer.beta == 0.1 and trainer.loss_types == ["sigmoid"]
    assert trainer.loss_weights == [1.0] and trainer.ld_alpha is None and not trainer.precompute_ref_logps
    assert trainer._name == "DPO" and trainer._tag_names == ["trl", "dpo"] and not trainer.loss_is_scaled_for_ga
    assert not trainer.aux_loss_enabled and trainer.ref_model is not None


def test_default_output_folder(tmp_path, monkeypatch, tiny_model_path):
    monkeypatch.chdir(tmp_path)
    trainer = DPOTrainer(tiny_model_path, train_dataset=Dataset.from_list(TEXT_PAIRS))
    assert trainer.args.output_dir.endswith("-DPO")
    assert trainer.args.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precompute_ref_log_probs": True, "sync_ref_model": True}, "sync_ref_model"),
        ({"layout": "shared"}, "shared_prefix"),
        ({"padding_free": True, "layout": "shared_prefix"}, "padding_free"),
        ({"beta": 0.0}, "beta"),
        ({"loss_type": "sigmod"}, "sigmoid"),
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": 2}, "max_length"),
    ],
)
def test_errors_of_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_dpo_trainer(tmp_path, **settings)


def test_errors_of_arguments(tmp_path):
    model = build_model()
    with pytest.raises(ValueError, match="same object"):
        make_dpo_trainer(tmp_path, model=model, ref_model=model)
    with pytest.raises(TypeError, match="from_pretrained"):
        make_dpo_trainer(tmp_path, model=model, ref_model="somewhere")
    with pytest.raises(ValueError, match="quantization_config"):
        DPOTrainer(
            model,
            args=DPOConfig(str(tmp_path), use_cpu=True),
            train_dataset=Dataset.from_list(TEXT_PAIRS),
            processing_class=build_tokenizer(),
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        )
    with pytest.raises(ValueError, match="train_dataset"):
        DPOTrainer(model, args=DPOConfig(str(tmp_path), use_cpu=True), processing_class=build_tokenizer())
    with pytest.raises(TypeError, match="split"):
        make_dpo_trainer(tmp_path, {"train": Dataset.from_list(TEXT_PAIRS)})
    with pytest.raises(NotImplementedError, match="adapter"):
        make_dpo_trainer(tmp_path, sync_ref_model=True, peft_config=LoraConfig(**LORA))
    stream = IterableDataset.from_generator(lambda: iter(TEXT_PAIRS))
    with pytest.raises(ValueError, match="stream"):
        make_dpo_trainer(tmp_path, stream, precompute_ref_log_probs=True, max_steps=1)
    with pytest.raises(ValueError, match="processor"):
        make_dpo_trainer(tmp_path, [{**row, "image": "none"} for row in TEXT_PAIRS])


def test_a_layout_that_cannot_be_is_refused_at_once(tmp_path):
    model = build_model(architecture="mamba", state_size=4)
    with pytest.raises(ValueError, match="shared_prefix"):
        make_dpo_trainer(tmp_path, model=model, layout="shared_prefix")
    with pytest.raises(ValueError, match="packed"):
        make_dpo_trainer(tmp_path, model=model, padding_free=True)


def test_deprecated_options_warn():
    with pytest.warns(FutureWarning, match="keep_end"):
        DPOConfig("out", truncation_mode="keep_end", use_cpu=True)
    with pytest.warns(FutureWarning, match="pad_token"):
        DPOConfig("out", pad_token="x", use_cpu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        DPOConfig("out", use_cpu=True)


def test_saved_adapter_loads_in_peft(tmp_path):
    trainer = make_dpo_trainer(tmp_path, peft_config=LoraConfig(**LORA), max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build_model(), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
