"""Datasets become training examples: the recorded figures, the order of steps, caching, and what bad input is told."""

import json

import pytest
from datasets import Dataset

from tests.conftest import REFERENCE_DIR, load_reference
from trl.data.collators import DataCollatorForLanguageModeling
from trl.data.preparation import (
    LanguageModelingOptions,
    prepare_language_modeling_dataset,
)

CASES = {name: case for name, case in load_reference("prep").items() if name.startswith("sft_")}
PREPARED = [name for name, case in CASES.items() if "rows" in case["outputs"]]


@pytest.fixture(scope="module")
def word_tokenizer():
    """The word-level tokenizer with which the reference figures were recorded."""
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


def options_of(config: dict) -> LanguageModelingOptions:
    names = LanguageModelingOptions.__dataclass_fields__
    return LanguageModelingOptions(**{name: value for name, value in config.items() if name in names})


def prepare(rows, tokenizer, name="train", formatting_func=None, streaming=False, **options):
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    if streaming:
        dataset = dataset.to_iterable_dataset()
    return prepare_language_modeling_dataset(
        dataset, tokenizer, LanguageModelingOptions(**options), formatting_func=formatting_func, name=name
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", PREPARED)
def test_reference_rows(name, streaming, word_tokenizer):
    """Tokens, labels, truncation, dropping and packing are those recorded; a stream gives the same rows."""
    case = CASES[name]
    dataset = Dataset.from_list(case["inputs"]["rows"])
    if streaming:
        dataset = dataset.to_iterable_dataset()
    prepared, _ = prepare_language_modeling_dataset(dataset, word_tokenizer, options_of(case["config"]))
    rows = list(prepared)
    expected = case["outputs"]["rows"]
    assert [{key: row[key] for key in expected[0]} for row in rows] == expected
    assert set(rows[0]) == set(case["outputs"]["columns"])


@pytest.mark.parametrize("name", PREPARED)
def test_reference_batches(name, word_tokenizer):
    """The first two prepared rows make the recorded batch."""
    case = CASES[name]
    config = case["config"]
    prepared, _ = prepare_language_modeling_dataset(
        Dataset.from_list(case["inputs"]["rows"]), word_tokenizer, options_of(config)
    )
    packs_documents = config.get("packing", False) and config.get("packing_strategy", "bfd") != "wrapped"
    collator = DataCollatorForLanguageModeling(
        pad_token_id=0,
        padding_free=config.get("padding_free", False) or packs_documents,
        pad_to_multiple_of=config.get("pad_to_multiple_of"),
    )
    columns = [column for column in ("input_ids", "labels", "seq_lengths") if column in prepared.column_names]
    batch = collator(list(prepared.select_columns(columns))[:2])
    plain = {key: value if isinstance(value, int) else value.tolist() for key, value in batch.items()}
    assert plain == case["outputs"]["collated_first_two"]


@pytest.mark.parametrize("name", ["sft_text_assistant_only", "sft_pack_max_none", "sft_eos_token_unknown"])
def test_reference_errors(name, word_tokenizer):
    case = CASES[name]
    with pytest.raises(ValueError):
        prepare_language_modeling_dataset(
            Dataset.from_list(case["inputs"]["rows"]), word_tokenizer, options_of(case["config"])
        )
