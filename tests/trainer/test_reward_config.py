"""RewardConfig: the defaults, values resolved or refused when the config is made."""

import pytest
from transformers import HfArgumentParser, TrainingArguments

from trl import RewardConfig

DEFAULTS = {
    "activation_offloading": False,
    "center_rewards_coefficient": None,
    "chat_template_path": None,
    "dataset_num_proc": None,
    "disable_dropout": True,
    "eos_token": None,
    "gradient_checkpointing": True,
    "learning_rate": 1e-4,
    "logging_steps": 10,
    "max_length": 1024,
    "model_init_kwargs": None,
    "pad_to_multiple_of": None,  # "auto", resolved on this machine
    "pad_token": None,
    "trust_remote_code": False,
}


def make(tmp_path, **kwargs):
    return RewardConfig(output_dir=str(tmp_path), report_to="none", **kwargs)


def test_defaults(tmp_path):
    config = make(tmp_path)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_every_own_field_is_documented_and_listed():
    inherited = TrainingArguments.__dataclass_fields__
    own = {name for name in RewardConfig.__dataclass_fields__ if name not in inherited}
    assert own <= set(DEFAULTS)
    for name in own:
        assert RewardConfig.__dataclass_fields__[name].metadata.get("help"), name


@pytest.mark.parametrize(("given", "resolved"), [("auto", None), ("none", None), ("64", 64), (8, 8), (None, None)])
def test_pad_to_multiple_of(tmp_path, given, resolved):
    assert make(tmp_path, pad_to_multiple_of=given).pad_to_multiple_of == resolved


def test_json_field(tmp_path):
    config = make(tmp_path, model_init_kwargs='{"dtype": "float32"}')
    assert config.model_init_kwargs == {"dtype": "float32"}
    with pytest.raises(ValueError, match="model_init_kwargs"):
        make(tmp_path, model_init_kwargs="dtype=float32")


def test_pad_token_is_deprecated(tmp_path):
    with pytest.warns(FutureWarning, match="pad_token"):
        make(tmp_path, pad_token="<|pad|>")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"center_rewards_coefficient": -0.1}, "center_rewards_coefficient.*-0.1"),
        ({"center_rewards_coefficient": float("nan")}, "center_rewards_coefficient"),
        ({"max_length": 0}, "max_length"),
        ({"pad_to_multiple_of": "many"}, "pad_to_multiple_of.*many"),
    ],
)
def test_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)


def test_flags():
    parser = HfArgumentParser(RewardConfig)
    flags = ["--output_dir", "x", "--center_rewards_coefficient", "0.01", "--disable_dropout", "false"]
    (config,) = parser.parse_args_into_dataclasses([*flags, "--max_length", "64", "--report_to", "none"])
    assert (config.center_rewards_coefficient, config.disable_dropout, config.max_length) == (0.01, False, 64)
