"""Copying a chat template with the tokens it needs: tokenizer, embeddings and end-of-sequence token agree afterwards."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import CHAT_TEMPLATE, build_model, build_tokenizer
from trl.data.template_cloning import clone_chat_template

NEW_TOKENS = ["<|turn|>", "<|done|>"]


@pytest.fixture
def source_path(tmp_path) -> str:
    source = build_tokenizer(CHAT_TEMPLATE)
    source.add_tokens(NEW_TOKENS, special_tokens=True)
    source.eos_token = "<|done|>"
    source.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def target():
    tokenizer = build_tokenizer(None)
    return build_model(vocab_size=len(tokenizer)), tokenizer


def test_template_tokens_and_eos_are_copied(source_path, target):
    model, tokenizer = target
    before = model.get_input_embeddings().weight.detach().clone()
    known = len(tokenizer)
    result, cloned, added = clone_chat_template(model, tokenizer, source_path)
    assert result is model and cloned is tokenizer
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.eos_token == "<|done|>"
    eos = tokenizer.convert_tokens_to_ids("<|done|>")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == eos
    assert tokenizer("<|turn|>")["input_ids"] == [tokenizer.convert_tokens_to_ids("<|turn|>")]
    torch.testing.assert_close(model.get_input_embeddings().weight[:known], before)
    assert added == list(range(known, len(tokenizer)))


def test_every_embedding_has_a_token(source_path, target):
    model, tokenizer = target
    known = len(tokenizer)
    _, _, added = clone_chat_template(model, tokenizer, source_path, resize_to_multiple_of=128)
    rows = model.get_input_embeddings().num_embeddings
    assert rows % 128 == 0
    assert rows == len(tokenizer) == model.config.vocab_size == model.get_output_embeddings().out_features
    assert len(added) == rows - known
    assert tokenizer.convert_ids_to_tokens(added)[:3] == [*NEW_TOKENS, "<extra_id_0>"]


def test_without_multiple_only_what_is_needed(source_path, target):
    model, tokenizer = target
    known = len(tokenizer)
    _, _, added = clone_chat_template(model, tokenizer, source_path, resize_to_multiple_of=None)
    assert tokenizer.convert_ids_to_tokens(added) == NEW_TOKENS
    assert model.get_input_embeddings().num_embeddings == known + 2


def test_spare_embeddings_are_kept_and_named(source_path):
    tokenizer = build_tokenizer(None)
    model = build_model(vocab_size=512)
    clone_chat_template(model, tokenizer, source_path)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == 512


def test_existing_names_are_passed_over(source_path, target):
    model, tokenizer = target
    tokenizer.add_tokens(["<extra_id_0>"])
    _, _, added = clone_chat_template(model, tokenizer, source_path)
    names = tokenizer.convert_ids_to_tokens(added)
    assert "<extra_id_0>" not in names and "<extra_id_1>" in names


def test_source_without_template(tmp_path, target):
    build_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        clone_chat_template(*target, str(tmp_path))


def test_sizes_that_cannot_agree(source_path, target, monkeypatch):
    model, tokenizer = target
    monkeypatch.setattr(model, "resize_token_embeddings", lambda **kwargs: model.get_input_embeddings())
    with pytest.raises(RuntimeError, match="embeddings"):
        clone_chat_template(model, tokenizer, source_path)
