import io

import pytest
from rich.console import Console

from tests.callbacks.helpers import make_trainer
from trl.callbacks import rich_progress
from trl.callbacks.rich_progress import RichProgressCallback


@pytest.fixture
def screen(monkeypatch):
    """What rich writes, as text."""
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=True, color_system=None)
    monkeypatch.setattr("rich.get_console", lambda: console)
    monkeypatch.setattr("rich.live.get_console", lambda: console)
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    return output


def test_training_with_evaluation(tokenizer, tmp_path, screen):
    callback = RichProgressCallback()
    trainer = make_trainer(tokenizer, tmp_path, [callback], eval_strategy="steps", eval_steps=2)
    trainer.train()
    text = screen.getvalue()
    assert "Training" in text
    assert "4/4" in text
    assert "loss" in text
    assert "eval_loss" in text
    assert callback._progress is None


def test_metrics_are_grouped_by_prefix(tokenizer, tmp_path, screen):
    callback = RichProgressCallback()
    trainer = make_trainer(tokenizer, tmp_path, [callback])
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    callback.on_log(
        trainer.args,
        trainer.state,
        trainer.control,
        logs={"rewards/mean": 0.25, "rewards/std": 1.5, "loss": 1.23456, "total_flos": 7},
    )
    callback.on_train_end(trainer.args, trainer.state, trainer.control)
    lines = screen.getvalue().splitlines()
    assert any("rewards" in line and "mean" not in line for line in lines)  # the group's title
    assert any("mean" in line and "0.25" in line for line in lines)
    assert "1.235" in screen.getvalue()
    assert "total_flos" not in screen.getvalue()


def test_evaluation_and_prediction_alone(tokenizer, tmp_path, screen):
    callback = RichProgressCallback()
    trainer = make_trainer(tokenizer, tmp_path, [callback])
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert screen.getvalue().count("Evaluation") >= 2
    assert "2/2" in screen.getvalue()
    assert callback._progress is None


def test_other_processes_are_silent(tokenizer, tmp_path, screen):
    callback = RichProgressCallback()
    trainer = make_trainer(tokenizer, tmp_path, [callback])
    trainer.state.is_world_process_zero = False
    for event in ("on_train_begin", "on_step_end", "on_prediction_step", "on_evaluate", "on_log", "on_train_end"):
        getattr(callback, event)(trainer.args, trainer.state, trainer.control)
    assert screen.getvalue() == ""


def test_rich_missing(monkeypatch):
    monkeypatch.setattr(rich_progress, "is_rich_available", lambda: False)
    with pytest.raises(ImportError, match="pip install rich"):
        RichProgressCallback()
