import importlib.machinery
import logging
import sys
import types

import pytest
from transformers import GenerationConfig

from tests.callbacks.helpers import PROMPTS, make_trainer
from trl.callbacks import weave as weave_module
from trl.callbacks.weave import WeaveCallback

GREEDY = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=3, eos_token_id=2)


class FakeWeave(types.ModuleType):
    """The part of Weave's interface that is used; keeps what it is given."""

    def __init__(self):
        super().__init__("weave")
        self.__spec__ = importlib.machinery.ModuleSpec("weave", None)
        self.projects, self.traces, self.predictions, self.summaries = [], [], [], []

    def init(self, project):
        self.projects.append(project)

    def op(self, name):
        def decorate(function):
            def traced(**kwargs):
                self.traces.append((name, kwargs, function(**kwargs)))

            return traced

        return decorate

    def EvaluationLogger(self, model, dataset):
        outer = self

        class Prediction:
            def __init__(self, inputs, output):
                self.entry = {"inputs": inputs, "output": output, "scores": {}, "finished": False}
                outer.predictions.append(self.entry)

            def log_score(self, scorer, score):
                self.entry["scores"][scorer] = score

            def finish(self):
                self.entry["finished"] = True

        return types.SimpleNamespace(
            log_prediction=lambda inputs, output: Prediction(inputs, output),
            log_summary=lambda summary: outer.summaries.append((model, dataset, summary)),
        )


@pytest.fixture
def weave(monkeypatch):
    fake = FakeWeave()
    monkeypatch.setitem(sys.modules, "weave", fake)
    return fake


def _train(tokenizer, tmp_path, **options):
    trainer = make_trainer(tokenizer, tmp_path, eval_strategy="steps", eval_steps=2)
    options = {"project_name": "me/project", "generation_config": GREEDY, "model_name": "tiny", **options}
    callback = WeaveCallback(trainer, **options)
    trainer.add_callback(callback)
    trainer.train()
    return callback


def test_traces(tokenizer, tmp_path, weave):
    callback = _train(tokenizer, tmp_path)
    assert not callback.is_evaluation_mode
    assert weave.projects == ["me/project"]
    assert [inputs["prompt"] for _, inputs, _ in weave.traces] == PROMPTS * 2
    assert [inputs["training_step"] for _, inputs, _ in weave.traces] == [2, 2, 2, 4, 4, 4]
    assert {inputs["model_name"] for _, inputs, _ in weave.traces} == {"tiny"}


def test_scores(tokenizer, tmp_path, weave, caplog):
    def fails_on_lists(prompt, completion):
        if "list" in prompt:
            raise RuntimeError("no lists")
        return 2.0

    scorers = {"length": lambda prompt, completion: len(prompt), "picky": fails_on_lists}
    weave_module.logger.addHandler(caplog.handler)
    try:
        callback = _train(tokenizer, tmp_path, scorers=scorers, dataset_name="held out")
    finally:
        weave_module.logger.removeHandler(caplog.handler)
    assert callback.is_evaluation_mode
    model, dataset, summary = weave.summaries[-1]
    assert (model, dataset) == ("tiny", "held out")
    assert summary["avg_length"] == sum(map(len, PROMPTS)) / 3
    assert summary["avg_picky"] == 2.0
    assert (summary["successful_predictions"], summary["total_predictions"]) == (2, 3)
    assert weave.predictions[0]["scores"] == {"length": len(PROMPTS[0]), "picky": 2.0}
    assert all(prediction["finished"] for prediction in weave.predictions)
    assert "The scorer 'picky' failed: RuntimeError: no lists" in caplog.text


def test_a_failing_service_does_not_stop_training(tokenizer, tmp_path, weave, caplog):
    def broken(**kwargs):
        raise ConnectionError("down")

    weave.EvaluationLogger = broken
    weave_module.logger.addHandler(caplog.handler)
    try:
        _train(tokenizer, tmp_path, scorers={"a": lambda prompt, completion: 1})
    finally:
        weave_module.logger.removeHandler(caplog.handler)
    assert "Weave logged nothing at step 2: ConnectionError: down" in caplog.text


def test_project_of_the_wandb_run(tokenizer, tmp_path, weave, monkeypatch):
    fake = types.ModuleType("wandb")
    fake.run = types.SimpleNamespace(entity="team", project="runs")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    _train(tokenizer, tmp_path, project_name=None)
    assert weave.projects == ["team/runs"]


def test_no_project(tokenizer, tmp_path, weave):
    with pytest.raises(ValueError, match="has no project: pass `project_name`"):
        _train(tokenizer, tmp_path, project_name=None)


def test_weave_missing_only_warns(tokenizer, tmp_path, caplog):
    weave_module.logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING)
    try:
        _train(tokenizer, tmp_path)
    finally:
        weave_module.logger.removeHandler(caplog.handler)
    assert "Weave is not installed" in caplog.text
