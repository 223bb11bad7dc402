"""The minimal script of reward models runs, learns, and gives the trainer's losses."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from trl import RewardConfig, RewardTrainer

from .test_examples import as_flags, load_script, logged_losses, make_preferences, quiet_run


@pytest.fixture
def minimal(monkeypatch):
    return load_script("minimal/reward.py", monkeypatch)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (3, 2)])
def test_gives_the_trainers_losses(tmp_path, minimal, tiny_model_path, batch_size, accumulation):
    """The last step of an epoch, and its last micro-batch, are shorter; some pairs are over `max_length`."""
    rows = make_preferences("dpo", 20)
    train_rows, held_out = rows[:15], rows[15:]
    longest = max(len(minimal.encode(load_tokenizer(tiny_model_path), row)["rejected"]) for row in train_rows)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"learning_rate": 5e-3, "max_length": longest - 1, "weight_decay": 0.1, "warmup_steps": 2}
    options = {
        "model": tiny_model_path,
        "data": data,
        "output": tmp_path / "minimal",
        "seed": 3,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "epochs": 2,
        "eval_rows": len(held_out),
        **shared,
    }
    result = minimal.main(as_flags(options))

    trainer = RewardTrainer(
        model=tiny_model_path,
        args=RewardConfig(**quiet_run(tmp_path / "trainer", batch_size, accumulation), **shared),
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out),
    )
    assert len(trainer.train_dataset) < 15
    assert len(trainer.eval_dataset) == len(held_out)  # else the script holds out other rows
    trainer.train()
    losses = logged_losses(trainer)
    assert result["losses"] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.1
    evaluation = trainer.evaluate()
    assert result["eval_loss"] == pytest.approx(evaluation["eval_loss"], abs=1e-4)
    assert result["eval_accuracy"] == pytest.approx(evaluation["eval_accuracy"])
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "minimal").state_dict()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, atol=2e-4, rtol=0, msg=name)


def load_tokenizer(path: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def test_standin_learns(tmp_path, monkeypatch, minimal):
    """Without arguments it needs no download; part of an epoch already tells most held-out pairs apart."""
    monkeypatch.chdir(tmp_path)
    rows = minimal.make_standin_rows
    monkeypatch.setattr(minimal, "make_standin_rows", lambda: rows()[:1000])
    result = minimal.main([])
    assert result["eval_accuracy"] > 0.9
    assert AutoModelForSequenceClassification.from_pretrained("reward_output").num_parameters() < 3_000_000
