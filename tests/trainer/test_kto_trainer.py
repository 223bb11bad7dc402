"""KTOTrainer: recorded losses and metrics, the estimate of the drift, errors, and that it learns."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from trl import KTOConfig, KTOTrainer
from trl.models.reference import create_reference_model

from ..conftest import build_model, load_reference
from .preference_helpers import (
    LORA,
    TEXT_PAIRS,
    build_lora_model,
    make_kto_trainer,
    make_unpaired,
    recorded_scores,
)

CASES = {name: case for name, case in load_reference("sft").items() if name.startswith("kto")}


@pytest.mark.parametrize("name", CASES)
def test_recorded_losses_gradients_and_metrics(tmp_path, monkeypatch, name):
    case = CASES[name]
    trainer = make_kto_trainer(tmp_path, make_unpaired(4), **case["config"])
    inputs, with_kl = case["inputs"], "KL_per_token_logps" in case["inputs"]
    policy, reference = recorded_scores(case), recorded_scores(case, prefix="ref_")
    policy.logps.requires_grad_()
    batch = {key: torch.tensor(inputs[key]) for key in ("attention_mask", "completion_mask", "label")}
    batch["input_ids"] = batch["attention_mask"]
    batch["ref_logps"] = reference.logps.sum(dim=1)
    scores = {False: policy}
    if with_kl:
        batch["KL_completion_mask"] = torch.tensor(inputs["KL_completion_mask"])
        batch["ref_KL_logps"] = recorded_scores(case, "ref_KL_", "KL_completion_mask").logps.sum(dim=1)
        scores[True] = recorded_scores(case, "KL_", "KL_completion_mask")
    # Only the mismatched rows come without a mask of their own.
    monkeypatch.setattr(trainer, "score", lambda model, rows, *rest, **kwargs: scores["input_ids" not in rows])
    trainer.model.train()

    loss = trainer.compute_loss(trainer.model, batch)

    assert loss.item() == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    loss.backward()
    expected = torch.tensor(case["outputs"]["grad_per_token_logps"], dtype=policy.logps.dtype)
    torch.testing.assert_close(policy.logps.grad[policy.mask], expected[policy.mask], atol=1e-6, rtol=0)
    assert trainer.reducer.reduce("train") == pytest.approx(case["outputs"]["metrics"], abs=1e-6)


# ---- The estimate of the drift ----


def test_the_drift_is_that_of_the_whole_step(tmp_path):
    """However a step is cut, its KL estimate is over all of its rows, each with the completion of the row before."""
    rows = make_unpaired(8)
    estimates = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = make_kto_trainer(
            tmp_path, rows, model=build_model(seed=4), ref_model=build_model(seed=1), max_steps=1,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        paired = [row["KL_completion_ids"] for row in trainer.train_dataset]
        assert paired == [rows[i - 1]["completion_ids"] for i in range(8)]
        trainer.train()
        estimates.append(trainer.state.log_history[0])
    for estimate in estimates[1:]:
        assert estimate["kl"] == pytest.approx(estimates[0]["kl"], abs=1e-5)
        assert estimate["loss"] == pytest.approx(estimates[0]["loss"], abs=1e-5)
    assert estimates[0]["kl"] > 0


def test_a_short_run_on_pairs_sees_both_classes(tmp_path):
    trainer = make_kto_trainer(tmp_path, TEXT_PAIRS, per_device_train_batch_size=2)
    labels = trainer.train_dataset["label"][:]
    assert len(labels) == 10 and sum(labels) == 5
    assert all(set(labels[i : i + 2]) == {True, False} for i in range(0, 10, 2))
    prompts = trainer.train_dataset["prompt"][:]
    assert all(prompts[i] != prompts[i + 1] for i in range(0, 10, 2))


# ---- What the reference can be ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precompute_ref_log_probs": True},
        {"peft_config": LoraConfig(**LORA)},
        {"precompute_ref_log_probs": True, "peft_config": LoraConfig(**LORA)},
        {"model": "lora"},
        {"loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True},
    ],
    ids=["copy", "precomputed", "lora", "precomputed_lora", "given_lora", "apo_precomputed"],
)
def test_every_reference_starts_from_the_policy(tmp_path, settings):
    """With no drift yet, each row's loss is 1 - σ(0)."""
    settings = dict(settings)
    if settings.get("model") == "lora":
        settings["model"] = build_lora_model()
    trainer = make_kto_trainer(
        tmp_path, make_unpaired(6), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=6, **settings
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert log[-1]["loss"] < 0.5 - 1e-3
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert (log[-1]["kl"] > 0) <= trainer.calculate_KL


def test_precomputed_is_the_same_training(tmp_path):
    runs = []
    for precompute in (False, True):
        trainer = make_kto_trainer(
            tmp_path, make_unpaired(6), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=3,
            precompute_ref_log_probs=precompute,
        )  # fmt: skip
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
    assert trainer.ref_model is None


# ---- Learning, evaluation ----


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_it_learns(tmp_path, loss_type):
    trainer = make_kto_trainer(
        tmp_path, max_steps=25, learning_rate=5e-3, per_device_train_batch_size=10, loss_type=loss_type
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log[-1]["rewards/margins"] > 0.1
    assert log[-1]["rewards/margins"] == pytest.approx(log[-1]["rewards/chosen"] - log[-1]["rewards/rejected"])
    assert log[-1]["loss"] < log[0]["loss"] - 0.01


def test_evaluation_of_the_loss_without_drift_is_exact(tmp_path):
    rows = Dataset.from_list(make_unpaired(7, seed=3))
    results = []
    for batch_size in (2, 7):
        trainer = make_kto_trainer(
            tmp_path, make_unpaired(2), model=build_model(seed=1), ref_model=build_model(seed=2), eval_dataset=rows,
            per_device_eval_batch_size=batch_size, loss_type="apo_zero_unpaired",
        )  # fmt: skip
        metrics = trainer.evaluate()
        results.append({key: value for key, value in metrics.items() if "runtime" not in key and "second" not in key})
    assert results[1] == pytest.approx(results[0], abs=1e-5)


def test_margins_need_both_classes(tmp_path):
    rows = [{**row, "label": True} for row in make_unpaired(4)]
    trainer = make_kto_trainer(tmp_path, rows, max_steps=1, per_device_train_batch_size=4)
    trainer.train()
    log = trainer.state.log_history[0]
    assert "rewards/chosen" in log and "rewards/rejected" not in log and "rewards/margins" not in log


def test_a_stream_trains(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(TEXT_PAIRS))
    trainer = make_kto_trainer(tmp_path, stream, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


# ---- Interface and errors ----


def test_signature_and_attributes(tmp_path):
    assert list(inspect.signature(KTOTrainer).parameters)[:2] == ["model", "ref_model"]
    trainer = make_kto_trainer(tmp_path, make_unpaired(4))
    assert trainer.calculate_KL and trainer.loss_type == "kto" and trainer.beta == 0.1
    assert trainer.desirable_weight == trainer.undesirable_weight == 1.0
    assert trainer._name == "KTO" and not trainer.loss_is_scaled_for_ga


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size"),
        ({"train_sampling_strategy": "random"}, "sequential"),
        ({"loss_type": "bco"}, "apo_zero_unpaired"),
        ({"desirable_weight": -1.0}, "desirable_weight"),
    ],
)
def test_errors_of_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_kto_trainer(tmp_path, make_unpaired(4), **settings)


def test_apo_takes_any_order_and_size(tmp_path):
    trainer = make_kto_trainer(
        tmp_path, make_unpaired(4), loss_type="apo_zero_unpaired", per_device_train_batch_size=1,
        train_sampling_strategy="random", max_steps=1,
    )  # fmt: skip
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_weights_that_do_not_balance_warn(tmp_path):
    with pytest.warns(UserWarning, match="desirable_weight"):
        make_kto_trainer(tmp_path, make_unpaired(6))
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*desirable_weight.*")
        make_kto_trainer(tmp_path, make_unpaired(6), undesirable_weight=1.8)


def test_labels_must_fit_the_batch(tmp_path):
    trainer = make_kto_trainer(tmp_path, make_unpaired(4))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    batch["label"] = batch["label"][:1]
    with pytest.raises(ValueError, match="1 labels for 2 completions"):
        trainer.compute_loss(trainer.model, batch)


def test_images_have_to_be_unpaired(tmp_path):
    with pytest.raises(ValueError, match="unpaired"):
        make_kto_trainer(tmp_path, [{**row, "image": "none"} for row in TEXT_PAIRS])


def test_the_experimental_path_warns(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.kto import KTOConfig as OldConfig
    from trl.experimental.kto import KTOTrainer as OldTrainer

    with pytest.warns(FutureWarning, match="trl.KTOConfig"):
        config = OldConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=2)
    assert isinstance(config, KTOConfig)
    model = build_model()
    with pytest.warns(FutureWarning, match="trl.KTOTrainer"):
        trainer = OldTrainer(
            model, create_reference_model(model), config, None, Dataset.from_list(make_unpaired(4)),
            processing_class=make_kto_trainer(tmp_path, make_unpaired(4)).processing_class,
        )  # fmt: skip
    assert isinstance(trainer, KTOTrainer)
