import sys
import types

import pytest
from datasets import Dataset
from transformers import GenerationConfig

from tests.callbacks.helpers import PROMPTS, make_trainer
from trl.callbacks import log_completions
from trl.callbacks.log_completions import LogCompletionsCallback

GREEDY = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=3, eos_token_id=2)


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for wandb: keeps what is logged."""
    logged = []
    fake = types.ModuleType("wandb")
    fake.Table = lambda columns, data: (columns, [list(row) for row in data])
    fake.log = logged.append
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return logged


def _add(trainer, **options):
    callback = LogCompletionsCallback(trainer, GREEDY, **options)
    trainer.add_callback(callback)
    trainer.args.report_to = ["wandb"]
    return callback


def test_table_grows(tokenizer, tmp_path, wandb):
    trainer = make_trainer(tokenizer, tmp_path)
    _add(trainer, freq=2)
    trainer.train()
    first, second = (entry["completions"] for entry in wandb)
    assert first[0] == ["step", "prompt", "completion"]
    assert [row[:2] for row in first[1]] == [["2", prompt] for prompt in PROMPTS]
    assert [row[0] for row in second[1]] == ["2"] * 3 + ["4"] * 3
    assert second[1][:3] == first[1]
    assert all(isinstance(row[2], str) for row in second[1])
    assert trainer.model.training


def test_completions_are_the_models(tokenizer, tmp_path, wandb):
    """Batched and left-padded, they are what the model says to each prompt alone."""
    trainer = make_trainer(tokenizer, tmp_path, learning_rate=0.0)
    callback = _add(trainer, freq=4)
    trainer.train()
    model = trainer.model.eval()
    for _, prompt, completion in callback.table:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**inputs, generation_config=GREEDY)
        expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert completion == expected


def test_training_is_the_same_with_it(tokenizer, tmp_path, wandb):
    """Generating in between draws no random numbers from training and leaves the model as it was."""

    def losses(with_callback):
        trainer = make_trainer(tokenizer, tmp_path / str(with_callback), gradient_checkpointing=True)
        if with_callback:
            _add(trainer, freq=1)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(False) == losses(True)


def test_eval_steps_is_the_rhythm(tokenizer, tmp_path, wandb):
    trainer = make_trainer(tokenizer, tmp_path, eval_strategy="steps", eval_steps=4)
    _add(trainer, num_prompts=2)
    trainer.train()
    assert len(wandb) == 1
    assert len(wandb[0]["completions"][1]) == 2


def test_conversations(tokenizer, tmp_path, wandb):
    turns = [{"role": "user", "content": "hello"}]
    answered = [*turns, {"role": "assistant", "content": "hi"}]
    trainer = make_trainer(tokenizer, tmp_path, eval_rows=[{"text": "hello world", "messages": answered}])
    callback = _add(trainer, freq=4)
    trainer.train()
    assert callback.table[0][1] == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def test_comet(tokenizer, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(
        log_completions, "log_table_to_comet_experiment", lambda name, table: sent.append((name, table))
    )
    trainer = make_trainer(tokenizer, tmp_path)
    _add(trainer, freq=4)
    trainer.args.report_to = ["comet_ml"]
    trainer.train()
    ((name, table),) = sent
    assert name == "completions.csv"
    assert list(table.columns) == ["step", "prompt", "completion"]
    assert table["prompt"].tolist() == PROMPTS


def test_refusals(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="Give the trainer an `eval_dataset`"):
        LogCompletionsCallback(trainer)
    trainer.eval_dataset = Dataset.from_list([{"text": "a"}])
    with pytest.raises(ValueError, match="needs a column `prompt`.*Found: text"):
        LogCompletionsCallback(trainer)
