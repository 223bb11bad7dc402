import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState

from tests.callbacks.helpers import make_trainer
from tests.conftest import build_model, load_reference
from trl.callbacks import bema
from trl.callbacks.bema import BEMACallback

REFERENCE = {name: case for name, case in load_reference("extra").items() if name.startswith("bema_")}


class Flat(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_figures(name):
    """Frozen parameters between the trained ones change nothing."""
    case = REFERENCE[name]
    callback = BEMACallback(**case["config"])
    weights = case["inputs"]["weights_by_step"]
    model, state = Flat(weights[0]), TrainerState()
    args = types.SimpleNamespace(output_dir=".", resume_from_checkpoint=None)
    callback.on_train_begin(args, state, TrainerControl(), model=model)
    for expected in case["outputs"]["states"]:
        state.global_step = expected["step"]
        model.weight.data = torch.tensor(weights[expected["step"]])
        callback.on_step_end(args, state, TrainerControl(), model=model)
        torch.testing.assert_close(
            callback.bema_params["weight"], torch.tensor(expected["bema"]), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(callback.ema_params["weight"], torch.tensor(expected["ema"]), rtol=1e-5, atol=1e-5)
    assert set(callback.ema_params) == {"weight"}


class Recorder(TrainerCallback):
    """The weights after each step, in float64, from which BEMA is worked out again."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.model.norm.weight.detach().double().clone())

    on_step_end = on_train_begin


def test_training_saves_a_model_of_averages(tokenizer, tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tokenizer, tmp_path, [recorder, BEMACallback(update_freq=1)])
    trainer.train()
    start, *weights = recorder.weights
    ema = start.clone()
    for step, current in enumerate(weights, start=1):
        beta = (10 + step) ** -0.5
        ema = (1 - beta) * ema + beta * current
    expected = ema + (10 + len(weights)) ** -0.2 * (weights[-1] - start)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bema")
    torch.testing.assert_close(saved.model.norm.weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(saved.model.norm.weight, trainer.model.model.norm.weight)
    assert (tmp_path / "bema" / "tokenizer.json").is_file()


def test_tied_weights_are_saved_once_and_alike(tokenizer, tmp_path):
    callback = BEMACallback(update_freq=1)
    make_trainer(tokenizer, tmp_path, [callback], model=build_model(tie_word_embeddings=True)).train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bema")
    assert torch.equal(saved.lm_head.weight, saved.model.embed_tokens.weight)
    assert torch.equal(saved.lm_head.weight, callback.bema_params["model.embed_tokens.weight"])


def test_adapter(tokenizer, tmp_path):
    """Only the adapter is averaged and saved; frozen parameters do not crash it."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(build_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    callback = BEMACallback(update_freq=1)
    make_trainer(tokenizer, tmp_path, [callback], model=model).train()
    saved = PeftModel.from_pretrained(build_model(), tmp_path / "bema").state_dict()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert set(callback.bema_params) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(saved[name], callback.bema_params[name])
    assert callback.bema_params[name].abs().sum() > 0


class Thaw(TrainerCallback):
    """Freezes the final norm and trains the head instead, after one step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.requires_grad_(False)
        model.model.norm.requires_grad_(True)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.requires_grad_(False)
            model.lm_head.requires_grad_(True)


@pytest.mark.parametrize("update_after", [0, 1, 2])
def test_parameters_frozen_and_unfrozen_while_training(tokenizer, tmp_path, update_after):
    """Averaged is what is trained when the average starts; anything else is saved as it is."""
    callback = BEMACallback(update_freq=1, update_after=update_after)
    trainer = make_trainer(tokenizer, tmp_path, [Thaw(), callback], max_grad_norm=0)
    trainer.train()
    name = "model.norm.weight" if update_after == 0 else "lm_head.weight"
    assert set(callback.bema_params) == {name}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bema").state_dict()
    current = trainer.model.state_dict()
    assert torch.equal(saved[name], callback.bema_params[name])
    assert [key for key in saved if not torch.equal(saved[key], current[key])] == [name]


def test_a_run_too_short_for_an_update_is_said(tokenizer, tmp_path, caplog):
    make_trainer(tokenizer, tmp_path, [BEMACallback(update_freq=5)], max_steps=4).train()
    assert "before the first update at step 5" in caplog.text
    caplog.clear()
    make_trainer(tokenizer, tmp_path, [BEMACallback(update_freq=4)], max_steps=4).train()
    assert "before the first update" not in caplog.text


def test_resuming_continues_the_average(tokenizer, tmp_path):
    whole = BEMACallback(update_freq=1)
    make_trainer(tokenizer, tmp_path / "a", [whole], save_strategy="steps", save_steps=2).train()
    resumed = BEMACallback(update_freq=1)
    trainer = make_trainer(tokenizer, tmp_path / "a", [resumed], save_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, weights in whole.bema_params.items():
        assert torch.equal(weights, resumed.bema_params[name]), name
    assert "theta0.model.norm.weight" in load_file(tmp_path / "a" / "checkpoint-2" / bema.STATE_NAME)


def test_sharded_weights_are_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(bema, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="needs whole weights"):
        make_trainer(tokenizer, tmp_path, [BEMACallback()]).train()


def test_half_precision_is_averaged_in_float32():
    """In bfloat16 a small share of the new weights would round to nothing."""
    model = Flat([1.0]).bfloat16()
    callback = BEMACallback(update_freq=1, ema_power=1.0, lag=1000)
    state, args = TrainerState(), types.SimpleNamespace(output_dir=".", resume_from_checkpoint=None)
    callback.on_train_begin(args, state, TrainerControl(), model=model)
    model.weight.data += 1
    state.global_step = 1
    callback.on_step_end(args, state, TrainerControl(), model=model)
    assert callback.ema_params["weight"].item() == pytest.approx(1 + 1 / 1001, rel=1e-6)
    assert callback.bema_state_dict(model)["weight"].dtype == torch.bfloat16
