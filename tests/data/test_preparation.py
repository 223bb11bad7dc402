"""Datasets become training examples: the recorded figures, the order of steps, caching, and what bad input is told."""

import json
import subprocess
import sys
import time
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, load_dataset

from tests.conftest import CHAT_TEMPLATE, build_tokenizer, load_reference
from trl.data.collators import DataCollatorForLanguageModeling
from trl.data.fingerprints import fingerprint_processing_class
from trl.data.formats import DatasetFormatError
from trl.data.preparation import (
    LanguageModelingOptions,
    check_unprepared_columns,
    encode_rows,
    prepare_language_modeling_dataset,
)

CASES = {name: case for name, case in load_reference("prep").items() if name.startswith("sft_")}
PREPARED = [name for name, case in CASES.items() if "rows" in case["outputs"]]


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


# ---- Steps and their order ----


def test_plain_text_ends_with_eos_once(word_tokenizer):
    prepared, _ = prepare([{"text": "sky"}, {"text": "sky [EOS]"}], word_tokenizer)
    assert prepared["input_ids"][:] == [[11, 2], [11, 2]]


def test_pad_equal_to_eos_still_trains_the_stop_token(word_tokenizer):
    """Masks follow positions: the last token is trained though it has the padding token's id."""
    import copy

    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    prepared, _ = prepare(
        [{"prompt": "sky", "completion": " is blue"}, {"prompt": "a", "completion": " b"}], tokenizer
    )
    batch = DataCollatorForLanguageModeling(pad_token_id=2)(list(prepared.select_columns(["input_ids", "labels"])))
    assert batch["labels"].tolist() == [[-100, 9, 15, 2], [-100, 25, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_formatting_func_replaces_the_rows_text(word_tokenizer):
    rows = [{"messages": [{"role": "user", "content": "sky"}], "q": "sky"}]
    prepared, _ = prepare(rows, word_tokenizer, formatting_func=lambda row: f"the {row['q']}")
    assert prepared["input_ids"][:] == [[10, 11, 2]]
    assert "messages" not in prepared.column_names
    assert prepared["text"][:] == ["the sky"]


def test_formatting_func_wins_over_another_text_column(word_tokenizer):
    """The text that is tokenized is the function's, also where `dataset_text_field` names another column."""
    prepared, _ = prepare(
        [{"body": "sea"}], word_tokenizer, formatting_func=lambda row: "the sky", dataset_text_field="body"
    )
    assert prepared["input_ids"][:] == [[10, 11, 2]]


def test_formatting_func_is_ignored_on_tokens(word_tokenizer):
    with pytest.warns(UserWarning, match="tokenized already.*formatting_func is ignored"):
        prepared, _ = prepare([{"input_ids": [3, 4]}], word_tokenizer, formatting_func=lambda row: "sky")
    assert prepared["labels"][:] == [[3, 4]]


def test_other_columns_and_text_field(word_tokenizer):
    prepared, _ = prepare([{"body": "sky", "id": 7}], word_tokenizer, dataset_text_field="body")
    assert prepared["input_ids"][:] == [[11, 2]]
    assert prepared["id"][:] == [7]


@pytest.mark.parametrize("packing", [False, True])
def test_shuffle_keeps_rows_and_follows_the_seed(packing, word_tokenizer):
    rows = [{"text": word} for word in ["a", "b", "c", "d", "e", "f", "g", "h"]]
    settings = {"packing": packing, "max_length": 4, "shuffle": True}
    plain, _ = prepare(rows, word_tokenizer, packing=packing, max_length=4)
    one, _ = prepare(rows, word_tokenizer, seed=1, **settings)
    again, _ = prepare(rows, word_tokenizer, seed=1, **settings)
    other, _ = prepare(rows, word_tokenizer, seed=2, **settings)
    assert one["input_ids"][:] == again["input_ids"][:] != other["input_ids"][:]
    tokens = [sorted(chain.from_iterable(dataset["input_ids"][:])) for dataset in (plain, one)]
    assert tokens[0] == tokens[1]


def test_tools_and_template_kwargs_per_row(tokenizer):
    """Tools as a list or as JSON text, and each row's own template arguments, reach the template."""
    tokenizer.chat_template = "{{ (tools[0].name if tools else 'none') ~ ' ' ~ style|default('-') }}"
    messages = [{"role": "user", "content": "hi"}]
    rows = [
        {"messages": messages, "tools": '[{"name": "add"}]', "chat_template_kwargs": {"style": "x", "n": None}},
        {"messages": messages, "tools": "", "chat_template_kwargs": {"style": None, "n": 1}},
        {"messages": messages, "tools": None, "chat_template_kwargs": None},
    ]
    prepared, _ = prepare(rows, tokenizer)
    assert tokenizer.batch_decode(prepared["input_ids"][:]) == ["add x", "none -", "none -"]


def test_merged_prompt_tokens_warn_once(tokenizer, caplog):
    """Where the prompt's end merges with the completion, the merged token is trained as completion."""
    rows = [{"prompt": "the sk", "completion": "y is blue"}, {"prompt": "what is", "completion": " 12"}]
    prepared, report = prepare(rows, tokenizer)
    warned = [record for record in caplog.records if "beginning of prompt and completion together" in record.message]
    assert len(warned) == 1
    assert "row 0" in warned[0].message
    assert report.prompts_merged.count == 1
    assert report.prompts_merged.rows == [0]
    ids, labels = prepared["input_ids"][0], prepared["labels"][0]
    boundary = labels.index(next(label for label in labels if label != -100))
    assert tokenizer.decode(ids[boundary:]) == " sky is blue<|im_end|>"
    assert "prompt_tokens_merged" not in prepared.column_names


def test_merged_prompt_tokens_warn_once_in_a_stream(tokenizer, caplog):
    prepared, report = prepare([{"prompt": "the sk", "completion": "y"}] * 1100, tokenizer, streaming=True)
    assert len(list(prepared)) == report.prompts_merged.count == 1100
    assert len([record for record in caplog.records if "prompt and completion together" in record.message]) == 1


def test_processor_for_text_only_rows(tokenizer):
    """A processor's template reads content as blocks; its tokens come out unbatched."""
    processor = build_processor(tokenizer)
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]}]
    prepared, _ = prepare(rows, processor)
    assert tokenizer.decode(prepared["input_ids"][0]) == "user: hi<|im_end|>assistant: you<|im_end|>"
    plain, _ = prepare([{"text": "hi"}], processor)
    assert tokenizer.decode(plain["input_ids"][0]) == "hi<|im_end|>"


def build_processor(tokenizer):
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    template = (
        "{% for m in messages %}{{ m.role + ': ' }}{% for b in m.content %}"
        "{{ '<image>' if b.type == 'image' else b.text }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    )
    return LlavaProcessor(
        image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=template
    )


def test_formats_and_selections_of_the_dataset(word_tokenizer):
    """A torch format does not leak into tokenization, and selected rows are the ones prepared."""
    dataset = Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6]], "labels": [[1, 2], [3, 4], [-100, 6]]})
    prepared, report = prepare(dataset.with_format("torch").select([2, 0]), word_tokenizer, max_length=None)
    assert prepared["labels"][:] == [[-100, 6], [1, 2]]
    assert report.rows_in == 2
    assert report.tokens_trained == 2


def test_num_proc_gives_the_same_rows(word_tokenizer):
    rows = [{"text": word} for word in ["a", "b", "c", "d"]]
    one, _ = prepare(rows, word_tokenizer)
    two, _ = prepare(rows, word_tokenizer, num_proc=2)
    assert one["input_ids"][:] == two["input_ids"][:]


def test_encode_rows_neither_cuts_nor_drops(word_tokenizer):
    rows = [{"prompt": "the sky", "completion": " is blue"}]
    (ids, labels), *_ = encode_rows(rows, word_tokenizer, LanguageModelingOptions(max_length=1))
    assert (ids, labels) == ([10, 11, 9, 15, 2], [-100, -100, 9, 15, 2])


# ---- Caching ----


def prepare_file(path: str, cache: str) -> list[str]:
    """Prepare a file's rows with a tokenizer that was used before; the fingerprint and the files of the result."""
    dataset = load_dataset("json", data_files=path, split="train", cache_dir=cache)
    tokenizer = build_tokenizer()
    tokenizer(["used before"], padding="max_length", truncation=True, max_length=2 + time.time_ns() % 50)
    prepared, _ = prepare(dataset, tokenizer, max_length=8, packing=True)
    return [prepared._fingerprint, *(file["filename"] for file in prepared.cache_files)]


def write_rows(folder: Path) -> str:
    path = folder / "rows.jsonl"
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "how are you today?"}]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(20)))
    return str(path)


def test_a_fresh_process_finds_the_cache(tmp_path):
    """Another process, with a tokenizer that was used otherwise, reads the files that this one wrote."""
    path, cache = write_rows(tmp_path), str(tmp_path / "cache")
    first = prepare_file(path, cache)
    times = [Path(file).stat().st_mtime_ns for file in first[1:]]
    assert times
    code = (
        f"from tests.data.test_preparation import prepare_file; print(*prepare_file({path!r}, {cache!r}), sep='\\n')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert run.stdout.split("\n")[-len(first) - 1 : -1] == first
    assert [Path(file).stat().st_mtime_ns for file in first[1:]] == times


def test_another_limit_reuses_the_tokens(tmp_path, tokenizer, monkeypatch):
    """Tokenizing is the costly step; it happens once for all limits and packings, and again for other tokens."""
    import trl.data.preparation as preparation

    dataset = load_dataset("json", data_files=write_rows(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    calls = []
    original = preparation._tokenize_batch

    def counting(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(preparation, "_tokenize_batch", counting)
    for options in ({"max_length": 4}, {"max_length": 6}, {"max_length": 6, "packing": True}):
        prepare(dataset, tokenizer, **options)
    assert len(calls) == 1
    prepare(dataset, tokenizer, assistant_only_loss=True)
    assert len(calls) == 2
    tokenizer.chat_template = CHAT_TEMPLATE.replace("'\n' }}{% endfor %}", "' ' }}{% endfor %}")
    prepare(dataset, tokenizer)
    assert len(calls) == 3


def test_processing_fingerprint_is_content():
    one, other = build_tokenizer(), build_tokenizer()
    before = fingerprint_processing_class(one)
    one(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert fingerprint_processing_class(one) == before == fingerprint_processing_class(other)
    other.add_tokens(["<new>"])
    assert fingerprint_processing_class(other) != before
    one.chat_template = "{{ messages }}"
    assert fingerprint_processing_class(one) != before


# ---- Streams ----


def test_stream_counts_and_warns_while_it_is_read(word_tokenizer, caplog):
    rows = [{"prompt": "the sky", "completion": " is"}, {"prompt": "a b c d", "completion": " e"}] * 2
    prepared, report = prepare(rows, word_tokenizer, streaming=True, max_length=4)
    assert report.streaming
    assert report.rows_in == 0
    assert "streamed" in report.render()
    assert len(list(prepared)) == 2
    assert (report.rows_in, report.rows_kept, report.rows_dropped) == (4, 2, 2)
    assert sum("dropped" in record.message for record in caplog.records) == 1


def test_stream_without_any_trained_token_is_an_error(word_tokenizer):
    """A stream that never yields a row would look like a hang."""

    def rows():
        while True:
            yield {"input_ids": [1, 2], "labels": [-100, -100]}

    prepared, _ = prepare(IterableDataset.from_generator(rows), word_tokenizer)
    with pytest.raises(ValueError, match="no token to train on"):
        next(iter(prepared))


# ---- Bad input ----


def error(match, rows, tokenizer, kind=ValueError, **options):
    with pytest.raises(kind, match=match) as info:
        prepare(rows, tokenizer, **options)
    return str(info.value)


def test_missing_columns(word_tokenizer):
    message = error("`question`, `answer`", [{"question": "a", "answer": "b"}], word_tokenizer, DatasetFormatError)
    assert "prompt" in message
    assert "completion" in message
    assert "rename_columns" in message
    assert "1 row" in message


def test_mixed_formats(word_tokenizer):
    """A row without a value, and conversations of two forms, are named."""
    error("row 1", [{"text": "a"}, {"text": None}, {"text": "b"}], word_tokenizer, DatasetFormatError)

    def rows():
        yield {"messages": "sky"}
        yield {"messages": [{"role": "user", "content": "sky"}]}

    prepared, _ = prepare(IterableDataset.from_generator(rows), word_tokenizer)
    with pytest.raises(DatasetFormatError, match="`messages` of row 0 is a text.*of row 1 is a list"):
        list(prepared)


def test_empty_dataset(word_tokenizer):
    error("The train dataset is empty", Dataset.from_dict({"text": []}), word_tokenizer)
    stream = IterableDataset.from_generator(lambda: iter(()))
    error("The train dataset is empty", stream, word_tokenizer)


def test_all_rows_masked(word_tokenizer):
    rows = [{"input_ids": [1, 2], "labels": [-100, -100]}] * 7
    message = error("no token to train on", rows, word_tokenizer)
    assert "7 rows" in message
    assert "rows 0, 1, 2, 3, 4 and 2 more" in message


def test_everything_cut_off(word_tokenizer):
    message = error("max_length=3", [{"prompt": "a b c", "completion": " d"}], word_tokenizer, max_length=3)
    assert "raise max_length" in message
    assert "row 0" in message


def test_a_single_trained_first_token_does_not_count(word_tokenizer):
    """Nothing predicts the first token, so a row that trains only that one trains nothing."""
    rows = [{"input_ids": [5, 6], "labels": [5, -100]}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    prepared, report = prepare(rows, word_tokenizer)
    assert prepared["labels"][:] == [[-100, 6]]
    assert report.dropped["no trained token"].rows == [0]


def test_eos_not_in_vocabulary(word_tokenizer):
    message = error("eos_token='</n>' is not in the vocabulary", [{"text": "a"}], word_tokenizer, eos_token="</n>")
    assert "Did you mean '</m>'" in message


def test_assistant_only_on_plain_text(word_tokenizer):
    error("assistant_only_loss=True needs conversations", [{"text": "a"}], word_tokenizer, assistant_only_loss=True)
    error("neither `assistant_masks`", [{"input_ids": [1, 2]}], word_tokenizer, assistant_only_loss=True)


def test_conversation_without_assistant(word_tokenizer):
    turns = [{"role": "user", "content": "sky"}]
    rows = [{"messages": [*turns, {"role": "assistant", "content": "blue"}]}, {"messages": turns}]
    error("no assistant token was found in row 1", rows, word_tokenizer, RuntimeError, assistant_only_loss=True)


def test_template_errors_name_the_row(word_tokenizer):
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "oracle", "content": "b"}]}]
    error("row 1 of the dataset", rows, word_tokenizer, Exception)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"truncation_mode": "middle"}, "truncation_mode='middle' is unknown; use one of 'keep_start', 'keep_end'"),
        ({"packing": True, "packing_strategy": "ffd"}, "packing_strategy='ffd' is unknown"),
        ({"packing": True, "max_length": None}, "packing=True needs max_length"),
        ({"max_length": 0}, "max_length=0 leaves no token"),
    ],
)
def test_unknown_settings(options, match):
    with pytest.raises(ValueError, match=match):
        LanguageModelingOptions(**options)


def test_transform_formats_are_refused(word_tokenizer):
    dataset = Dataset.from_list([{"text": "a"}]).with_transform(lambda batch: batch)
    error("has a transform.*skip_prepare_dataset", dataset, word_tokenizer)


def test_not_a_dataset(word_tokenizer):
    split = Dataset.from_list([{"text": "a"}])
    error(r"dataset\['train'\]", {"train": split}, word_tokenizer, TypeError)
    options = LanguageModelingOptions()
    with pytest.raises(TypeError, match="Dataset.from_list"):
        prepare_language_modeling_dataset([{"text": "a"}], word_tokenizer, options)


def test_formatting_func_and_completion_only(word_tokenizer):
    error("formatting_func makes one text", [{"q": "a"}], word_tokenizer, completion_only_loss=True,
          formatting_func=lambda row: "a")  # fmt: skip
    error("must return one string per row", [{"q": "a"}], word_tokenizer, TypeError, formatting_func=lambda row: ["a"])


def test_tools_that_are_not_json(word_tokenizer):
    rows = [{"messages": [{"role": "user", "content": "a"}], "tools": "[{"}]
    error("Row 0: `tools` is text but not JSON", rows, word_tokenizer)


def test_masks_of_other_lengths_and_missing_tokens(word_tokenizer):
    rows = [{"input_ids": [1, 2, 3], "completion_mask": [0, 1]}]
    error("one entry per token", rows, word_tokenizer, completion_only_loss=True)
    error("no `input_ids` .*row 1", [{"input_ids": [1, 2]}, {"input_ids": None}], word_tokenizer, DatasetFormatError)


def test_skipped_preparation_with_masks_only():
    with pytest.raises(ValueError, match="`completion_mask` but no `labels`"):
        check_unprepared_columns(["input_ids", "completion_mask"])
    check_unprepared_columns(["input_ids", "completion_mask", "labels"])


def test_long_texts_raise_no_length_warning(tokenizer, caplog):
    """That a text is longer than the model's context is for the report to say, once, not for the tokenizer."""
    tokenizer.model_max_length = 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = prepare([{"text": "the sky is blue " * 5}], tokenizer, max_length=8)
    assert not [record for record in caplog.records if "longer than" in record.message]
    assert report.rows_truncated == 1
    assert report.longest == report.tokens_cut + 8
    assert np.isclose(report.median, report.longest)


def test_packed_datasets_stay_packed(word_tokenizer):
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "seq_lengths": [3, 1]}]
    prepared, _ = prepare(rows, word_tokenizer, max_length=4)
    assert prepared[0] == rows[0]
    for streaming in (False, True):
        with pytest.raises(DatasetFormatError, match="row 0 have more than max_length=3"):
            list(prepare(rows, word_tokenizer, max_length=3, streaming=streaming)[0])
        error("packed already", rows, word_tokenizer, DatasetFormatError, packing=True, streaming=streaming)


def test_tokenized_streams_without_tokens(word_tokenizer):
    prepared, _ = prepare([{"input_ids": [1, 2]}, {"input_ids": None}], word_tokenizer, streaming=True)
    with pytest.raises(DatasetFormatError, match="no `input_ids` .None. in row 1"):
        list(prepared)


@pytest.mark.parametrize(("eos_token", "share"), [(None, 0.0), ("</m>", 1.0)])
def test_report_counts_the_stop_token_that_was_asked_for(eos_token, share, word_tokenizer):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    _, report = prepare(rows, word_tokenizer, eos_token=eos_token)
    assert report.stop_token_share == share
    assert any("consider eos_token='</m>'" in note for note in report.notes) == (share == 0)
