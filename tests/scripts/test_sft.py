"""The SFT script on a tiny model."""

import json

import pytest

from trl.scripts import sft

ROWS = [{"prompt": f"what is {i} plus 1? ", "completion": f"the answer is {i + 1}."} for i in range(12)]


def arguments(*args: str):
    return sft.make_parser().parse_args_and_config(list(args))


@pytest.fixture
def flags(make_flags):
    return make_flags(ROWS)


def test_trains_saves_and_evaluates(flags, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    sft.main(*arguments(*flags, "--eval_strategy", "steps", "--eval_steps", "1"))
    output = capsys.readouterr().out
    assert output.count("'eval_loss'") == 2
    assert "Training is complete." in output
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_trains_an_adapter(flags, tmp_path):
    sft.main(*arguments(*flags, "--use_peft", "--lora_r", "2", "--packing"))
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["r"] == 2
