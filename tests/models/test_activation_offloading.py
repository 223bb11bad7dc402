"""The hooks are tested on the CPU by taking it for an accelerator; the streams need a real one (marked gpu)."""

import gc

import pytest
import torch
from torch import nn

from tests.conftest import build_model
from trl.models import activation_offloading
from trl.models.activation_offloading import (
    NoOpManager,
    OffloadActivations,
    _Offloaded,
    get_act_offloading_ctx_manager,
)


class OffloadFromCpu(OffloadActivations):
    """Moves CPU tensors too, into copies of theirs."""

    def _is_on_accelerator(self, tensor):
        return tensor.device.type != "meta"


@pytest.fixture
def from_cpu(monkeypatch):
    monkeypatch.setattr(activation_offloading, "OffloadActivations", OffloadFromCpu)


@pytest.fixture
def counted(monkeypatch):
    """Every tensor that is moved to the host."""
    moved = []
    store = _Offloaded.store

    def counting(self, tensor, non_blocking):
        moved.append(tensor)
        store(self, tensor, non_blocking)

    monkeypatch.setattr(_Offloaded, "store", counting)
    return moved


def _step(model, manager=None, checkpointing=False):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.arange(64).reshape(4, 16)
    with manager or NoOpManager():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return loss, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_losses_and_gradients_are_bit_identical(from_cpu, counted, checkpointing, architecture):
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    settings = sizes if architecture == "gpt2" else {}
    loss, gradients = _step(build_model(architecture=architecture, **settings), None, checkpointing)
    model = build_model(architecture=architecture, **settings)
    manager = get_act_offloading_ctx_manager(model)
    for _ in range(2):  # it can be entered again
        model.zero_grad()
        counted.clear()
        offloaded_loss, offloaded_gradients = _step(model, manager, checkpointing)
        assert counted
        assert torch.equal(loss, offloaded_loss)
        assert all(torch.equal(a, b) for a, b in zip(gradients, offloaded_gradients, strict=True))


def test_parameters_and_their_views_stay(from_cpu, counted):
    model = build_model()
    _step(model, get_act_offloading_ctx_manager(model))
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert counted
    assert not [tensor for tensor in counted if tensor.untyped_storage().data_ptr() in storages]


def test_the_head_stays(from_cpu, counted):
    model = build_model()
    _step(model, get_act_offloading_ctx_manager(model))
    hidden = model.config.hidden_size
    with_head = len(counted)
    counted.clear()
    other = build_model()
    manager = OffloadFromCpu()
    manager.update_model_params(other)
    _step(other, manager)
    assert len(counted) > with_head
    assert hidden == 32


def test_head_hook_is_undone_after_an_error(from_cpu, counted):
    model = build_model()
    manager = get_act_offloading_ctx_manager(model)
    with pytest.raises(RuntimeError), manager:
        model.lm_head(torch.zeros(1, 5))  # wrong size
    x = torch.randn(32, 32, requires_grad=True)
    with manager:
        y = x.exp() * x
    assert counted  # no NoOpManager was left on the stack
    y.sum().backward()


def test_nothing_moves_on_the_cpu(counted):
    model = build_model()
    loss, _ = _step(build_model())
    offloaded_loss, _ = _step(model, get_act_offloading_ctx_manager(model))
    assert torch.equal(loss, offloaded_loss)
    assert not counted


def test_small_tensors_stay(counted):
    x = torch.randn(16, 16, requires_grad=True)  # 1024 bytes
    with OffloadFromCpu(min_offload_size=1025):
        x.exp().sum().backward()
    assert not counted
    with OffloadFromCpu(min_offload_size=1024):
        x.exp().sum().backward()
    assert len(counted) == 1


def test_a_tensor_saved_twice_moves_once(counted):
    x = torch.randn(32, 32, requires_grad=True)
    with OffloadFromCpu():
        hidden = x.exp()
        (hidden.sin() + hidden.cos() + hidden.tanh()).sum().backward()
    assert sum(torch.equal(tensor, hidden) for tensor in counted) == 1


def test_changed_in_place_is_another_tensor(counted):
    with OffloadFromCpu() as manager:
        x = torch.zeros(32, 32)
        first = manager.pack_hook(x)
        x.add_(1)
        second = manager.pack_hook(x)
        assert manager.unpack_hook(first).sum() == 0
        assert manager.unpack_hook(second).sum() == 32 * 32


def test_reused_memory_is_another_tensor():
    """The caching allocator hands out the same address again; the values must not be those of the first tensor."""
    with OffloadFromCpu() as manager:
        handles = []
        for value in range(20):
            tensor = torch.full((64, 64), float(value))
            handles.append(manager.pack_hook(tensor))
            del tensor
        assert [manager.unpack_hook(handle)[0, 0].item() for handle in handles] == list(range(20))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.t(),
        lambda x: x[5:, 3:40],
        lambda x: x[::2, ::3],
        lambda x: x.permute(1, 0)[3:],
        lambda x: x[:1].expand(64, 64),
        lambda x: x[:, :1].expand(64, 64),
        lambda x: x[None, :, None].expand(3, 64, 2, 64),
        lambda x: x.unflatten(1, (4, 16)).transpose(1, 2),
    ],
)
def test_layouts_come_back(view):
    with OffloadFromCpu() as manager:
        tensor = view(torch.arange(4096.0).reshape(64, 64))
        packed = manager.pack_hook(tensor)
        assert isinstance(packed, _Offloaded)
        assert packed.host.is_contiguous()
        restored = manager.unpack_hook(packed)
        assert restored.data_ptr() != tensor.data_ptr()
        assert restored.stride() == tensor.stride()
        assert torch.equal(restored, tensor)
        assert packed.nbytes() <= 64 * 64 * 4  # a broadcast moves what it holds


def test_what_cannot_be_rebuilt_stays():
    class Wrapped(torch.Tensor):
        pass

    with OffloadFromCpu() as manager:
        windows = torch.arange(4096.0).unfold(0, 64, 1)  # overlapping
        assert manager.pack_hook(windows) is windows
        subclass = torch.zeros(4096).as_subclass(Wrapped)
        assert manager.pack_hook(subclass) is subclass
        parameter = nn.Parameter(torch.zeros(4096))
        assert manager.pack_hook(parameter) is parameter


def test_second_backward_over_a_kept_graph():
    x = torch.randn(32, 32, requires_grad=True)
    with OffloadFromCpu():
        y = x.exp().sum()
        y.backward(retain_graph=True)
        first = x.grad.clone()
        y.backward()
    assert torch.equal(x.grad, 2 * first)


def test_backward_after_the_block():
    x = torch.randn(32, 32, requires_grad=True)
    with OffloadFromCpu():
        y = x.exp().sum()
    y.backward()
    assert torch.equal(x.grad, x.detach().exp())


def test_memory_goes_with_the_graph():
    manager = OffloadFromCpu()
    with manager:
        y = torch.randn(32, 32, requires_grad=True).exp()
        (handle,) = (reference() for reference in manager._order)
        assert handle is not None
        del handle, y
        gc.collect()
        assert [reference() for reference in manager._order] == [None]
    assert not manager._order
    assert not manager._known
    assert not manager._stash


def test_refusals():
    with pytest.raises(ValueError, match="`max_fwd_stash_size` is at least 1"):
        OffloadActivations(max_fwd_stash_size=0)
    with pytest.raises(ValueError, match="Unknown saved tensor 3"):
        OffloadActivations().unpack_hook(3)


def test_much_host_memory_warns(monkeypatch):
    monkeypatch.setattr(activation_offloading.psutil, "virtual_memory", lambda: type("M", (), {"total": 6000}))
    x = torch.randn(32, 32, requires_grad=True)
    with pytest.warns(UserWarning, match="Offloaded activations take .* more than 60%"), OffloadFromCpu():
        x.exp()


def test_no_head_warns():
    with pytest.warns(UserWarning, match="No output head was found in Sequential"):
        get_act_offloading_ctx_manager(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("use_streams", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_an_accelerator(use_streams, checkpointing):
    device = torch.accelerator.current_accelerator()
    ids = torch.randint(0, 512, (8, 256), device=device)

    def run(manager_of):
        model = build_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=8).to(device).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        manager = manager_of(model)
        for _ in range(3):
            model.zero_grad()
            with manager:
                loss = model(input_ids=ids, labels=ids).loss
                forward_memory = torch.accelerator.memory_allocated()
                loss.backward()
        return loss, [parameter.grad for parameter in model.parameters()], forward_memory

    loss, gradients, memory = run(lambda model: NoOpManager())
    offloaded = run(lambda model: get_act_offloading_ctx_manager(model, use_streams=use_streams))
    assert torch.equal(loss, offloaded[0])
    assert all(torch.equal(a, b) for a, b in zip(gradients, offloaded[1], strict=True))
    assert offloaded[2] < memory
