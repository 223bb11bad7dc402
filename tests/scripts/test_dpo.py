"""The DPO script on a tiny model: with each way of having a reference, from flags alone."""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl.scripts import dpo

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"what is {i} plus 1?"}],
        "chosen": [{"role": "assistant", "content": f"the answer is {i + 1}."}],
        "rejected": [{"role": "assistant", "content": f"the sky is {i}."}],
    }
    for i in range(12)
]


@pytest.fixture
def run(make_flags, capsys):
    """Runs the script with more flags, and returns what it logged."""

    def run(*more: str) -> list[dict[str, float]]:
        dpo.main(*dpo.make_parser().parse_args_and_config([*make_flags(ROWS), "--learning_rate", "1e-2", *more]))
        printed = capsys.readouterr().out
        assert "Training is complete." in printed
        entries = re.findall(r"^\{'.*\}$", printed, flags=re.MULTILINE)
        return [
            {key: float(value) for key, value in re.findall(r"'([^']+)': '?([-+.\deinfa]+)", line)} for line in entries
        ]

    return run


def test_trains_saves_and_evaluates(run, tmp_path, tiny_model_path):
    logs = run("--eval_strategy", "steps", "--eval_steps", "1", "--eval_on_start")
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] < losses[0]
    evaluations = [entry for entry in logs if "eval_loss" in entry]
    assert len(evaluations) == 3
    assert evaluations[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert evaluations[-1]["eval_rewards/margins"] > 0
    assert evaluations[-1]["eval_rewards/accuracies"] > 0.5
    before = AutoModelForCausalLM.from_pretrained(tiny_model_path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_trains_an_adapter(run, tmp_path):
    """Its reference is the model without it, so the first loss is ln 2 as well."""
    logs = run("--use_peft", "--lora_r", "2")
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2


def test_precomputed_reference_and_several_losses(run):
    logs = run("--precompute_ref_log_probs", "--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "0.5")
    assert logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert logs[0]["loss"] > math.log(2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--loss_type", "sigmoyd"], "sigmoyd"),
        (["--loss_type", "robust", "--label_smoothing", "0.5"], "label_smoothing"),
        (["--loss_type", "sigmoid", "sft", "--loss_weights", "1.0"], "loss_weights"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_read(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dpo.make_parser().parse_args_and_config(["--output_dir", str(tmp_path), *flags])
