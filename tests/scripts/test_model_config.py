"""ModelConfig: which model, and how."""

import pytest

from trl import ModelConfig, TrlParser


def test_defaults():
    config = ModelConfig()
    assert (config.dtype, config.model_revision, config.bnb_4bit_quant_type) == ("float32", "main", "nf4")
    assert (config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_task_type) == (
        16,
        32,
        0.05,
        "CAUSAL_LM",
    )


def test_one_target_module_is_unwrapped():
    """PEFT reads `all-linear`, or a pattern, only where it is no list."""
    assert ModelConfig(lora_target_modules=["all-linear"]).lora_target_modules == "all-linear"
    assert ModelConfig(lora_target_modules=["q_proj", "v_proj"]).lora_target_modules == ["q_proj", "v_proj"]
    (config,) = TrlParser(ModelConfig).parse_args_and_config(["--lora_target_modules", "all-linear"])
    assert config.lora_target_modules == "all-linear"


def test_two_quantizations_at_once():
    with pytest.raises(ValueError, match=r"load_in_8bit.*load_in_4bit"):
        ModelConfig(load_in_8bit=True, load_in_4bit=True)


@pytest.mark.parametrize("flags", [["--dtype", "float64"], ["--bnb_4bit_quant_type", "int4"]])
def test_choices(flags, capsys):
    with pytest.raises(SystemExit):
        TrlParser(ModelConfig).parse_args_and_config(flags)
    assert "invalid choice" in capsys.readouterr().err
