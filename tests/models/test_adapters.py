import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

from tests.conftest import build_model
from trl.models import adapters
from trl.models.adapters import get_peft_config, prepare_peft_model, use_adapter

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def _args(**changes):
    return SimpleNamespace(**{"gradient_checkpointing": False, "gradient_checkpointing_kwargs": None, **changes})


# ---- prepare_peft_model ----


def test_wraps_and_freezes(tiny_model):
    model = prepare_peft_model(tiny_model, LoraConfig(**LORA), _args())
    assert isinstance(model, PeftModel)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_no_adapter_is_no_change(tiny_model):
    assert prepare_peft_model(tiny_model, None, _args()) is tiny_model
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())


def test_wrong_type(tiny_model):
    with pytest.raises(TypeError, match="peft.PeftConfig.*found dict.*LoraConfig"):
        prepare_peft_model(tiny_model, LORA, _args())


def test_two_adapters(tiny_model):
    with pytest.raises(ValueError, match="has an adapter already.*merge_and_unload"):
        prepare_peft_model(get_peft_model(tiny_model, LoraConfig(**LORA)), LoraConfig(**LORA), _args())


def test_peft_missing(tiny_model, monkeypatch):
    monkeypatch.setattr(adapters, "is_peft_available", lambda: False)
    assert prepare_peft_model(tiny_model, None, _args()) is tiny_model
    with pytest.raises(ImportError, match="pip install peft"):
        prepare_peft_model(tiny_model, LoraConfig(**LORA), _args())
    with pytest.raises(ValueError, match="pip install peft"):
        get_peft_config(SimpleNamespace(use_peft=True))
    with pytest.raises(ImportError, match="pip install peft"), use_adapter(tiny_model, None):
        pass


def test_adapter_on_the_head(tiny_model):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="covers the output head.*modules_to_save"):
        prepare_peft_model(tiny_model, config, _args())


def test_head_in_modules_to_save_is_fine(tiny_model):
    model = prepare_peft_model(tiny_model, LoraConfig(**LORA, modules_to_save=["lm_head"]), _args())
    assert any("modules_to_save" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_reach_the_adapter_under_checkpointing(tiny_model, use_reentrant):
    model = prepare_peft_model(tiny_model, LoraConfig(**LORA), _args(gradient_checkpointing=True))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_zero3_keeps_one_dtype_and_forces_reentrant():
    args = _args(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.warns(UserWarning, match="re-entrant"):
        model = prepare_peft_model(build_model().bfloat16(), LoraConfig(**LORA), args, is_zero3=True)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    plain = prepare_peft_model(build_model().bfloat16(), LoraConfig(**LORA), _args())
    assert {p.dtype for p in plain.parameters() if p.requires_grad} == {torch.float32}


def test_zero3_without_a_user_value_does_not_warn(tiny_model):
    args = _args(gradient_checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_peft_model(tiny_model, LoraConfig(**LORA), args, is_zero3=True)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": True}


def test_quantized_base_trains_in_bfloat16_but_for_magnitudes(tiny_model):
    tiny_model.is_loaded_in_4bit = True
    model = prepare_peft_model(tiny_model, LoraConfig(**LORA, use_dora=True), _args())
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    magnitudes = {name for name in dtypes if "lora_magnitude_vector" in name}
    assert magnitudes
    assert {dtypes[name] for name in magnitudes} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in magnitudes} == {torch.bfloat16}


def test_frozen_adapter_warns(tiny_model, tmp_path):
    get_peft_model(tiny_model, LoraConfig(**LORA)).save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(build_model(), tmp_path)
    with pytest.warns(UserWarning, match="is_trainable=True"):
        prepare_peft_model(frozen, None, _args())


def test_prefix_tuning_on_a_device_map_with_an_old_peft(tiny_model, monkeypatch):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tiny_model.hf_device_map = {"": 0}
    monkeypatch.setattr("peft.__version__", "0.17.1")
    with pytest.raises(ValueError, match="Prefix tuning.*device_map"):
        prepare_peft_model(tiny_model, config, _args())
    monkeypatch.undo()
    assert isinstance(prepare_peft_model(tiny_model, config, _args()), PeftModel)


# ---- get_peft_config ----


def _model_args(**changes):
    defaults = {
        "use_peft": True, "lora_task_type": "CAUSAL_LM", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
        "lora_target_modules": None, "lora_target_parameters": None, "lora_modules_to_save": None,
        "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **changes})


def test_get_peft_config():
    assert get_peft_config(_model_args(use_peft=False)) is None
    config = get_peft_config(_model_args(lora_r=3, lora_target_modules="all-linear", use_rslora=True))
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (3, 32, 0.05, "none")
    assert config.target_modules == "all-linear"
    assert config.use_rslora
    assert not config.use_dora
    assert get_peft_config(_model_args(lora_target_parameters=["a.b"])).target_parameters == ["a.b"]


# ---- use_adapter ----


def _two_adapters():
    model = get_peft_model(build_model(), LoraConfig(**LORA, init_lora_weights=False))
    model.add_adapter("ref", LoraConfig(**LORA, init_lora_weights=False))
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.requires_grad = False
    return model


def test_use_adapter_switches_and_restores():
    model, ids = _two_adapters(), torch.arange(6)[None]
    base = build_model()(ids).logits
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    default = model(ids).logits
    with use_adapter(model, "ref"):
        reference = model(ids).logits
    with use_adapter(model, None):
        bare = model(ids).logits
    assert model.active_adapter == "default"
    assert torch.equal(model(ids).logits, default)
    assert not torch.equal(reference, default)
    torch.testing.assert_close(bare, base)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained


@pytest.mark.parametrize("name", ["ref", None])
def test_use_adapter_thaws_nothing(name):
    """PEFT makes the adapter it activates trainable; one that was frozen must be frozen afterwards."""
    model = _two_adapters()
    model.requires_grad_(False)
    with use_adapter(model, name):
        pass
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_use_adapter_restores_after_an_error():
    model = _two_adapters()
    with pytest.raises(RuntimeError, match="inside"), use_adapter(model, "ref"):
        raise RuntimeError("inside")
    assert model.active_adapter == "default"


def test_use_adapter_refuses(tiny_model):
    with pytest.raises(TypeError, match="takes a PeftModel"), use_adapter(tiny_model, None):
        pass
    with (
        pytest.raises(ValueError, match="no adapter 'other'. It has: default, ref"),
        use_adapter(_two_adapters(), "other"),
    ):
        pass
