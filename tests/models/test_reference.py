import pytest
import torch
from torch import nn

from tests.conftest import build_model
from trl.models import reference as reference_module
from trl.models.reference import create_reference_model, disable_dropout_in_model, hash_module


def _storages(model):
    return {parameter.data_ptr() for parameter in model.parameters()}


def test_copy_is_frozen_and_apart(tiny_model):
    tiny_model.train()
    reference = create_reference_model(tiny_model)
    assert not reference.training
    assert tiny_model.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())
    assert not _storages(reference) & _storages(tiny_model)
    assert hash_module(reference) == hash_module(tiny_model)


@pytest.mark.parametrize("pattern", [None, "model.layers.{layer}"])
@pytest.mark.parametrize("tied", [False, True])
def test_first_layers_are_shared_and_frozen(pattern, tied):
    model = build_model(tie_word_embeddings=tied)
    reference = create_reference_model(model, num_shared_layers=1, pattern=pattern)
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        shared = name.startswith(("model.layers.0.", "model.embed_tokens."))
        assert (theirs[name] is parameter) is shared, name
        assert parameter.requires_grad is not shared, name
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    ids = torch.arange(5)[None]
    assert torch.equal(model(ids).logits, reference(ids).logits)


@pytest.mark.parametrize(("layers", "pattern"), [(7, None), (1, "blocks.{layer}")])
def test_layer_not_found(tiny_model, layers, pattern):
    with pytest.raises(ValueError, match=f"No layer {layers} was found.*such as 'model.layers"):
        create_reference_model(tiny_model, num_shared_layers=layers, pattern=pattern)
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())


def test_layer_1_is_not_layer_10():
    model = build_model(num_hidden_layers=11)
    del model.model.layers[1]
    model.model.layers = nn.ModuleDict({str(index): layer for index, layer in zip([0, 10], model.model.layers)})  # noqa: B905
    with pytest.raises(ValueError, match="No layer 1 "):
        create_reference_model(model, num_shared_layers=1)


def test_zero3_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(reference_module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3"):
        create_reference_model(tiny_model)


def test_public_path_warns(tiny_model):
    import trl

    with pytest.warns(FutureWarning, match="create_reference_model"):
        reference = trl.create_reference_model(tiny_model)
    assert hash_module(reference) == hash_module(tiny_model)


def test_disable_dropout():
    model = build_model(architecture="gpt2", n_embd=32, n_head=4, n_layer=2)
    model.train()
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout_in_model(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_hash_sees_every_bit(tiny_model):
    before = hash_module(tiny_model)
    assert hash_module(build_model()) == before
    assert hash_module(build_model(seed=1)) != before
    weight = tiny_model.model.norm.weight
    with torch.no_grad():
        weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
    assert hash_module(tiny_model) != before
    assert hash_module(build_model().bfloat16()) != before


def test_hash_sees_names():
    a, b = nn.Module(), nn.Module()
    a.x, b.y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert hash_module(a) != hash_module(b)


def test_disabled_dropout_reaches_attention():
    """Attention hands its probability to a function, so no layer of its own shows it."""
    model = build_model(attention_dropout=0.5).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout_in_model(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
