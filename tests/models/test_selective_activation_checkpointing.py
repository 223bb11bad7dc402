import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import build_model
from trl.models.selective_activation_checkpointing import enable_selective_activation_checkpointing


class CountKernels(TorchDispatchMode):
    """Counts attention kernels and matrix products that really run."""

    def __init__(self):
        super().__init__()
        self.attention = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.attention += "scaled_dot_product" in name and "backward" not in name
        self.products += name.startswith(("aten.mm", "aten.addmm"))
        return func(*args, **(kwargs or {}))


def _step(model, prepare=None):
    """Loss and gradients of one step, and what ran in the backward pass."""
    model.train()
    if prepare is not None:
        prepare(model)
    ids = torch.arange(24).reshape(2, 12)
    loss = model(input_ids=ids, labels=ids).loss
    with CountKernels() as counts:
        loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}, counts


def _plain(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _selective(model):
    enable_selective_activation_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})


def test_attention_is_kept_and_the_rest_recomputed():
    loss, gradients, without = _step(build_model())
    _, plain_gradients, plain = _step(build_model(), _plain)
    selective_loss, selective_gradients, selective = _step(build_model(), _selective)
    assert without.attention == 0
    assert plain.attention == 2  # one per layer, again
    assert selective.attention == 0
    assert selective.products == plain.products > without.products
    assert torch.equal(loss, selective_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, selective_gradients[name]), name
        assert torch.equal(gradient, plain_gradients[name]), name


def test_takes_effect_where_checkpointing_is_on_already():
    def prepare(model):
        model.gradient_checkpointing_enable()
        enable_selective_activation_checkpointing(model)

    assert _step(build_model(), prepare)[2].attention == 0


def test_with_an_adapter():
    from peft import LoraConfig, get_peft_model

    def adapted():
        torch.manual_seed(0)
        model = get_peft_model(build_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        model.enable_input_require_grads()
        return model

    _, gradients, _ = _step(adapted())
    _, selective_gradients, counts = _step(adapted(), _selective)
    assert counts.attention == 0
    for name, gradient in gradients.items():
        assert gradient is None or torch.equal(gradient, selective_gradients[name]), name


def test_a_copy_checkpoints_itself(tiny_model):
    """`gradient_checkpointing_enable` of a deep copy must not switch on the original's."""
    enable_selective_activation_checkpointing(tiny_model)
    copied = copy.deepcopy(tiny_model)
    copied.gradient_checkpointing_enable()
    assert copied.is_gradient_checkpointing
    assert not tiny_model.is_gradient_checkpointing


def test_reentrant_is_refused(tiny_model):
    enable_selective_activation_checkpointing(tiny_model)
    with pytest.raises(ValueError, match="non-reentrant"):
        tiny_model.gradient_checkpointing_enable({"use_reentrant": True})


def test_model_without_checkpointing_is_refused():
    with pytest.raises(ValueError, match="Linear does not support gradient checkpointing"):
        enable_selective_activation_checkpointing(nn.Linear(1, 1))
