"""What several tests of data preparation need."""

import copy
import json

import pytest

from tests.conftest import REFERENCE_DIR


@pytest.fixture(scope="session")
def _word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spec = json.loads((REFERENCE_DIR / "prep.json").read_text())["tokenizer"]
    backend = Tokenizer(models.WordLevel(spec["vocab"], unk_token=spec["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=spec["pad_token"],
        unk_token=spec["unk_token"],
        eos_token=spec["eos_token"],
        additional_special_tokens=spec["additional_special_tokens"],
    )
    tokenizer.chat_template = spec["chat_template"]
    return tokenizer


@pytest.fixture
def word_tokenizer(_word_tokenizer):
    """The word-level tokenizer with which the reference figures were recorded; a copy per test."""
    return copy.deepcopy(_word_tokenizer)
