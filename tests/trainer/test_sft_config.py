"""SFTConfig: the spec's defaults, values resolved or refused when the config is made."""

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from trl import SFTConfig

DEFAULTS = {
    "activation_offloading": False,
    "assistant_only_loss": False,
    "chat_template_path": None,
    "completion_only_loss": None,
    "dataset_kwargs": None,
    "dataset_num_proc": None,
    "dataset_text_field": "text",
    "eos_token": None,
    "eval_packing": None,
    "gradient_checkpointing": True,
    "learning_rate": 2e-5,
    "logging_steps": 10,
    "loss_type": "nll",
    "max_length": 1024,
    "model_init_kwargs": None,
    "packing": False,
    "packing_strategy": "bfd",
    "pad_to_multiple_of": None,  # "auto", resolved on this machine
    "pad_token": None,
    "padding_free": False,
    "router_aux_loss_coef": None,
    "shuffle_dataset": False,
    "truncation_mode": "keep_start",
    "trust_remote_code": False,
}


def make(tmp_path, **kwargs):
    return SFTConfig(output_dir=str(tmp_path), report_to="none", **kwargs)


def test_defaults(tmp_path):
    config = make(tmp_path)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_every_own_field_is_documented():
    inherited = TrainingArguments.__dataclass_fields__
    for name, field in SFTConfig.__dataclass_fields__.items():
        if name not in inherited:
            assert field.metadata.get("help"), name


def test_bf16_follows_the_hardware(tmp_path):
    if not torch.cuda.is_available():
        assert make(tmp_path).bf16 is False
    assert make(tmp_path, use_cpu=True).bf16 is True
    assert make(tmp_path, use_cpu=True, bf16=False).bf16 is False


@pytest.mark.parametrize(
    ("given", "resolved"), [("auto", None), ("none", None), ("null", None), ("16", 16), (8, 8), (None, None)]
)
def test_pad_to_multiple_of(tmp_path, given, resolved):
    assert make(tmp_path, pad_to_multiple_of=given).pad_to_multiple_of == resolved


def test_pad_to_multiple_of_refuses_words(tmp_path):
    with pytest.raises(ValueError, match="`pad_to_multiple_of` takes a whole number, 'auto' or 'none'. Found 'many'"):
        make(tmp_path, pad_to_multiple_of="many")


@pytest.mark.parametrize(
    ("field", "value", "near"),
    [
        ("loss_type", "nil", "Did you mean 'nll'"),
        ("packing_strategy", "bdf", "Did you mean 'bfd'"),
        ("truncation_mode", "keep_strat", "Did you mean 'keep_start'"),
    ],
)
def test_choices_name_the_nearest(tmp_path, field, value, near):
    with pytest.raises(ValueError, match=rf"`{field}` is one of .* Found '{value}'. {near}"):
        make(tmp_path, **{field: value})


@pytest.mark.parametrize(
    ("deprecated", "field", "becomes"),
    [
        ({"loss_type": "chunked_nll"}, "loss_type", "nll"),
        ({"packing_strategy": "bfd-requeue"}, "packing_strategy", "bfd_split"),
        ({"truncation_mode": "keep_end"}, "truncation_mode", "keep_end"),
        ({"pad_token": "<pad>"}, "pad_token", "<pad>"),
    ],
)
def test_deprecated_values_work_and_warn(tmp_path, deprecated, field, becomes):
    with pytest.warns(FutureWarning):
        assert getattr(make(tmp_path, **deprecated), field) == becomes


@pytest.mark.parametrize("field", ["model_init_kwargs", "dataset_kwargs", "lr_scheduler_kwargs"])
def test_json_fields(tmp_path, field):
    assert getattr(make(tmp_path, **{field: '{"a": {"b": 1}}'}), field) == {"a": {"b": 1}}
    with pytest.raises(ValueError, match=rf"`{field}` takes a dictionary.*Found '{{a: 1}}', which is not JSON"):
        make(tmp_path, **{field: "{a: 1}"})
    with pytest.raises(ValueError, match=rf"`{field}` takes a JSON object .* found list"):
        make(tmp_path, **{field: "[1]"})


def test_liger_warns_and_leaves_the_head_alone(tmp_path):
    with pytest.warns(FutureWarning, match="use_liger_kernel"):
        config = make(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": True})
    assert config.liger_kernel_config == {"rope": True, "fused_linear_cross_entropy": False}
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        make(tmp_path, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})


def test_a_parser_can_be_made_of_it(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--packing", "--max_length", "64", "--pad_to_multiple_of", "8"]
    (config,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses(arguments)
    assert (config.packing, config.max_length, config.pad_to_multiple_of) == (True, 64, 8)
