"""The reward script on a tiny model: a language model becomes one that scores, from flags alone."""

import json

import pytest
from peft import AutoPeftModelForSequenceClassification
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from trl.scripts import reward

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
    """Runs the script with more flags, and returns what it printed."""

    def run(*more: str) -> str:
        reward.main(*reward.make_parser().parse_args_and_config([*make_flags(ROWS), "--learning_rate", "1e-2", *more]))
        return capsys.readouterr().out

    return run


def test_trains_saves_and_evaluates(run, tmp_path):
    printed = run("--eval_strategy", "steps", "--eval_steps", "1", "--center_rewards_coefficient", "0.01")
    assert printed.count("'eval_accuracy'") == 2
    assert "Training is complete." in printed
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1
    assert model.config.pad_token_id is not None


def test_trains_an_adapter_and_the_head(run, tmp_path, recwarn):
    """The flags' default task type is a language model's; the script knows better, without a warning."""
    run("--use_peft", "--lora_r", "2")
    assert not [warning for warning in recwarn if "task_type" in str(warning.message)]
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["r"], saved["task_type"]) == (2, "SEQ_CLS")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as weights:
        assert any("score" in name for name in weights.keys())  # noqa: SIM118
    AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1)


def test_a_setting_that_cannot_work_is_refused_when_it_is_read(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--center_rewards_coefficient", "-1"]
    with pytest.raises(ValueError, match="center_rewards_coefficient"):
        reward.make_parser().parse_args_and_config(flags)
