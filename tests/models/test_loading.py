import os
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

from tests.conftest import build_model
from trl.models.loading import (
    create_model_from_path,
    get_config_model_id,
    get_quantization_config,
    load_processing_class,
)


def test_loads_the_saved_architecture_in_float32(tiny_model_path):
    model = create_model_from_path(tiny_model_path)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.float32
    assert get_config_model_id(model.config) == tiny_model_path


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype(tiny_model_path, dtype):
    assert create_model_from_path(tiny_model_path, dtype=dtype).dtype == torch.bfloat16
    assert create_model_from_path(tiny_model_path, torch_dtype=dtype).dtype == torch.bfloat16


def test_unknown_dtype(tiny_model_path):
    with pytest.raises(ValueError, match="`dtype` is one of 'auto', 'bfloat16', 'float16', 'float32'.*'int4'"):
        create_model_from_path(tiny_model_path, dtype="int4")


def test_architecture_can_be_chosen(tiny_model_path):
    model = create_model_from_path(tiny_model_path, AutoModelForSequenceClassification)
    assert type(model).__name__ == "LlamaForSequenceClassification"


def test_missing_hub_model_says_what_was_tried():
    with pytest.raises(
        OSError, match=r"(?s)No model 'nobody/no-such-model'.*Tried: the folder.*offline.*hf auth login"
    ):
        create_model_from_path("nobody/no-such-model")


def test_missing_folder_says_how_far_it_exists(tmp_path):
    with pytest.raises(OSError, match="There is no folder .*/a/b .*what exists of it: " + str(tmp_path)):
        create_model_from_path(str(tmp_path / "a" / "b"))


def test_folder_without_a_model_names_the_checkpoint(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(OSError, match="has no model that can be loaded. .*Did you mean .*checkpoint-7"):
        create_model_from_path(str(tmp_path))


def test_adapter_folder_says_how_to_load_it(tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(build_model(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="holds a PEFT adapter.*(?s:.)*AutoPeftModelForCausalLM"):
        create_model_from_path(str(tmp_path))


def test_config_without_weights(tmp_path, tiny_model):
    tiny_model.config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="has no model that can be loaded. It holds: config.json"):
        create_model_from_path(str(tmp_path))


def test_device_map_default(monkeypatch):
    from trl.models import loading

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert loading._default_device_map() == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert loading._default_device_map() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert loading._default_device_map() is None


def test_processing_class_sides(tiny_model_path):
    plain = load_processing_class(tiny_model_path)
    left = load_processing_class(tiny_model_path, padding_side="left", truncation_side="left")
    assert (plain.padding_side, plain.truncation_side) == ("right", "right")
    assert (left.padding_side, left.truncation_side) == ("left", "left")
    assert load_processing_class(tiny_model_path, text_only=True).get_vocab() == plain.get_vocab()


def test_processing_class_of_a_model_in_memory():
    with pytest.raises(ValueError, match="made in memory.*processing_class"):
        load_processing_class("")


def test_processing_class_missing(tmp_path):
    with pytest.raises((OSError, ValueError), match=str(os.path.basename(tmp_path))):
        load_processing_class(str(tmp_path))


def _model_args(**changes):
    defaults = {"load_in_4bit": False, "load_in_8bit": False, "dtype": "float32", "bnb_4bit_quant_type": "nf4"}
    return SimpleNamespace(**{**defaults, "use_bnb_nested_quant": False, "bnb_4bit_quant_storage": None, **changes})


def test_quantization_config():
    assert get_quantization_config(_model_args()) is None
    assert get_quantization_config(_model_args(load_in_8bit=True)).load_in_8bit
    four = get_quantization_config(
        _model_args(load_in_4bit=True, dtype="bfloat16", use_bnb_nested_quant=True, bnb_4bit_quant_storage="uint8")
    )
    assert four.load_in_4bit
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    assert four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_quant_storage == torch.uint8
    assert get_quantization_config(_model_args(load_in_4bit=True)).bnb_4bit_compute_dtype == torch.float32
    assert (
        get_quantization_config(_model_args(load_in_4bit=True, dtype="auto")).bnb_4bit_compute_dtype == torch.bfloat16
    )
