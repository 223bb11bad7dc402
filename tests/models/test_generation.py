from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator

from trl.models.generation import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.models.utils import _ForwardRedirection


def _functions(model):
    return [layer._gradient_checkpointing_func for layer in model.model.layers]


def test_checkpointing_is_off_inside_and_the_same_afterwards(tiny_model):
    tiny_model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    before = _functions(tiny_model)
    with disable_gradient_checkpointing(tiny_model, {"use_reentrant": False}):
        assert not tiny_model.is_gradient_checkpointing
    assert tiny_model.is_gradient_checkpointing
    assert _functions(tiny_model) == before


def test_what_was_off_stays_off(tiny_model):
    with disable_gradient_checkpointing(tiny_model):
        pass
    assert not tiny_model.is_gradient_checkpointing


def test_restored_after_an_error(tiny_model):
    tiny_model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="inside"), disable_gradient_checkpointing(tiny_model):
        raise RuntimeError("inside")
    assert tiny_model.is_gradient_checkpointing


def test_unwrap_for_generation(tiny_model):
    """Inside: the plain model, its cache usable, its generation config overridden. Afterwards: as before."""
    wrapper = torch.nn.parallel.DataParallel(tiny_model, device_ids=None)
    tiny_model.gradient_checkpointing_enable()
    tiny_model.generation_config.top_k = 7
    with unwrap_model_for_generation(wrapper, Accelerator(cpu=True), generation_kwargs={"top_k": 3}) as model:
        assert model is tiny_model
        assert not model.is_gradient_checkpointing
        assert model.generation_config.top_k == 3
        output = model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert output.shape == (1, 7)
    assert tiny_model.is_gradient_checkpointing
    assert tiny_model.generation_config.top_k == 7


class _Zero3Accelerator:
    """What the function reads of an accelerator under ZeRO-3."""

    class state:
        class deepspeed_plugin:
            zero_stage = 3

    @staticmethod
    def unwrap_model(model):
        return model.module


class _Hook:
    def __init__(self, log):
        self.log = log

    def remove(self):
        self.log.append("removed")


def _engine(model, log):
    class Offload:
        module = model
        forward_hooks = [_Hook(log)]
        backward_hooks = [_Hook(log)]

        def _register_deepspeed_module(self, module):
            log.append("added" if module is model else "other")

    class Optimizer:
        parameter_offload = Offload()

    class Engine(torch.nn.Module):
        optimizer = Optimizer()

    engine = Engine()
    engine.module = model
    for parameter in model.parameters():
        parameter.ds_active_sub_modules = {1}
    return engine


@pytest.mark.parametrize("gather", [True, False])
def test_zero3_gathers_once_with_hooks_off(tiny_model, monkeypatch, gather):
    import sys
    import types

    log = []

    @contextmanager
    def gathered(parameters, **kwargs):
        log.append("gathered")
        yield
        log.append("released")

    fake = types.ModuleType("deepspeed")
    fake.zero = types.SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    engine = _engine(tiny_model, log)
    with unwrap_model_for_generation(engine, _Zero3Accelerator(), gather_deepspeed3_params=gather) as model:
        assert model is tiny_model
        log.append("block")
    if gather:
        assert log == ["gathered", "removed", "removed", "block", "added", "released"]
        assert not any(parameter.ds_active_sub_modules for parameter in tiny_model.parameters())
    else:
        assert log == ["block"]


def test_forward_redirection_runs_the_wrappers_forward(tiny_model):
    log = []

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            log.append("wrapper")
            return self.module(*args, **kwargs)

    class Redirection(_ForwardRedirection):
        def on_after_inner_forward(self, wrapper_module, original_module):
            log.append("inner")

        def on_after_outer_forward(self, wrapper_module, original_module):
            log.append("outer")

    def method(ids, scale):
        log.append("method")
        return scale * tiny_model(ids).logits  # the model's own forward is back here

    ids = torch.arange(3)[None]
    forward = tiny_model.forward
    output = Redirection()(Wrapper(tiny_model), tiny_model, method, ids, scale=2)
    assert torch.equal(output, 2 * tiny_model(ids).logits)
    assert log == ["wrapper", "method", "inner", "outer"]
    with pytest.raises(ZeroDivisionError):
        _ForwardRedirection()(Wrapper(tiny_model), tiny_model, lambda ids: 1 / 0, ids)
    assert tiny_model.forward == forward
