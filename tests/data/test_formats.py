"""Which kind of example is this, and what an error says when it is of the wrong kind."""

from __future__ import annotations

import datasets
import pytest
from datasets import Dataset, IterableDataset, load_dataset

from tests.conftest import load_reference
from trl.data import formats
from trl.data.formats import (
    DatasetColumnError,
    DatasetFormatError,
    check_columns,
    check_rows,
    describe_rows,
    get_dataset_column_names,
    is_conversational,
    is_conversational_from_value,
    kind_of_value,
    language_modeling,
    recognize_shape,
    suggest_renaming,
)

HAS_JSON = pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no JSON columns")

CASES = load_reference("data")
USER = [{"role": "user", "content": "What color is the sky?"}]
ASSISTANT = [{"role": "assistant", "content": "It is blue."}]
SFT_SHAPES = [
    formats.TOKENIZED,
    formats.CONVERSATION,
    formats.SHAREGPT,
    formats.PROMPT_COMPLETION,
    formats.LANGUAGE_MODELING,
]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("is_conversational_")])
def test_recorded_is_conversational(name):
    assert is_conversational(CASES[name]["inputs"]) is CASES[name]["outputs"]["value"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("chatml_")])
def test_recorded_is_conversational_from_value(name):
    assert (
        is_conversational_from_value(CASES[name]["inputs"]) is CASES[name]["outputs"]["is_conversational_from_value"]
    )


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"messages": USER}, True),
        ({"completion": ASSISTANT}, True),
        ({"prompt": "text", "completion": ASSISTANT}, False),  # the first present column decides
        ({"messages": []}, False),
        ({"messages": None}, False),
        ({"messages": ["text"]}, False),
        ({"conversations": USER}, False),
        ({"text": "plain"}, False),
        ({}, False),
    ],
)
def test_is_conversational_looks_at_the_first_element(example, expected):
    assert is_conversational(example) is expected


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text"], formats.LANGUAGE_MODELING),
        (["messages", "tools"], formats.CONVERSATION),
        (["conversations", "id"], formats.SHAREGPT),
        (["prompt"], formats.PROMPT_ONLY),
        (["prompt", "completion"], formats.PROMPT_COMPLETION),
        (["prompt", "chosen", "rejected"], formats.PREFERENCE),
        (["chosen", "rejected"], formats.IMPLICIT_PREFERENCE),
        (["prompt", "completion", "label"], formats.UNPAIRED_PREFERENCE),
        (["prompt", "chosen", "rejected", "reference"], formats.TRIPLE_PREFERENCE),
        (["prompt", "completions", "labels"], formats.STEPWISE),
        (["input_ids", "labels", "text"], formats.TOKENIZED),
        (["chosen_ids", "rejected_ids"], formats.TOKENIZED_PREFERENCE),
        (["question", "answer"], None),
    ],
)
def test_shapes_are_told_by_their_columns(columns, expected):
    assert recognize_shape(columns) is expected


def test_text_column_of_another_name():
    assert recognize_shape(["body"], text_field="body") == language_modeling("body")
    assert recognize_shape(["text"], text_field="body") is None


def test_column_names_of_a_stream_come_from_its_first_row():
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a", "completion": "b"}]))
    assert get_dataset_column_names(stream) == ["prompt", "completion"]
    assert get_dataset_column_names(IterableDataset.from_generator(lambda: iter([]))) == []
    assert get_dataset_column_names(Dataset.from_dict({"text": ["a"]})) == ["text"]


# ---------------------------------------------------------------------------------------------------------------------
# Missing columns


def test_the_first_accepted_shape_is_found():
    assert check_columns(["text", "messages"], SFT_SHAPES, "SFTTrainer") is formats.CONVERSATION
    assert check_columns(["chosen", "rejected", "id"], [formats.IMPLICIT_PREFERENCE], "DPOTrainer")


def test_message_says_needed_found_and_nearest():
    """The whole message, as a person reads it."""
    with pytest.raises(DatasetFormatError) as raised:
        check_columns(["question", "answer_a", "answer_b"], [formats.IMPLICIT_PREFERENCE], "DPOTrainer", num_rows=1731)
    assert str(raised.value) == (
        "DPOTrainer needs a preference dataset: columns `chosen` and `rejected` (and `prompt`, or a common "
        "beginning).\n"
        "Found: `question`, `answer_a`, `answer_b` (train_dataset, 1,731 rows).\n"
        'Rename them, e.g. dataset.rename_columns({"question": "prompt", "answer_a": "chosen", '
        '"answer_b": "rejected"}).'
    )


def test_message_lists_every_accepted_shape():
    with pytest.raises(DatasetFormatError) as raised:
        check_columns(["image"], SFT_SHAPES, "SFTTrainer", "eval_dataset", 1, hint="pass `formatting_func`")
    message = str(raised.value)
    assert message.startswith("SFTTrainer needs one of:\n- a tokenized dataset: column `input_ids`\n")
    assert "- a prompt-completion dataset: columns `prompt` and `completion`\n" in message
    assert "Found: `image` (eval_dataset, 1 row).\n" in message
    assert message.endswith("make it with dataset.map, or pass `formatting_func`.")


@pytest.mark.parametrize(
    ("found", "accepted", "renaming"),
    [
        (["question", "answer"], SFT_SHAPES, {"question": "prompt", "answer": "completion"}),
        (["instruction", "output"], SFT_SHAPES, {"instruction": "prompt", "output": "completion"}),
        (["instruction", "response", "id"], SFT_SHAPES, {"instruction": "prompt", "response": "completion"}),
        (["prompt", "response"], SFT_SHAPES, {"response": "completion"}),
        (["conversation"], SFT_SHAPES, {"conversation": "messages"}),
        (["content"], SFT_SHAPES, {"content": "text"}),
        (["Text"], SFT_SHAPES, {"Text": "text"}),
        (["promt"], [formats.PROMPT_ONLY], {"promt": "prompt"}),
        (["prompt", "chosen", "rejeted"], [formats.PREFERENCE], {"rejeted": "rejected"}),
        (["response_0", "response_1"], [formats.PREFERENCE, formats.IMPLICIT_PREFERENCE],
         {"response_0": "chosen", "response_1": "rejected"}),
        (["prompt", "steps", "labels"], [formats.STEPWISE], {"steps": "completions"}),
        (["tokens"], [formats.TOKENIZED], {"tokens": "input_ids"}),
        (["question", "id"], [formats.PREFERENCE], {}),
        ([], SFT_SHAPES, {}),
    ],
)  # fmt: skip
def test_nearest_renaming(found, accepted, renaming):
    """Other usual names and misspellings are recognised; a shape that no renaming reaches gives no advice."""
    assert suggest_renaming(found, accepted) == renaming


@pytest.mark.parametrize("accepted", [SFT_SHAPES, [formats.PREFERENCE], [formats.IMPLICIT_PREFERENCE]])
def test_following_the_advice_helps(accepted):
    """The columns after the renaming pass the check that failed before."""
    dataset = Dataset.from_dict({"query": ["q"], "answer_a": ["a"], "answer_b": ["b"], "response": ["c"]})
    with pytest.raises(DatasetFormatError):
        check_columns(dataset.column_names, accepted, "Trainer")
    renamed = dataset.rename_columns(suggest_renaming(dataset.column_names, accepted))
    check_columns(renamed.column_names, accepted, "Trainer")


def test_column_error_is_a_key_error_that_reads_well():
    error = DatasetColumnError("line one\nline two")
    assert isinstance(error, (KeyError, ValueError))
    assert isinstance(error, KeyError)
    assert str(error) == "line one\nline two"


# ---------------------------------------------------------------------------------------------------------------------
# Rows of another format than the rest


def test_rows_without_a_value_are_named():
    dataset = Dataset.from_dict({"text": ["a", None, "b", None]})
    with pytest.raises(DatasetFormatError, match=r"`text` 2 rows hold text and 2 hold nothing: rows 1, 3\.\n.*filter"):
        check_rows(dataset, formats.LANGUAGE_MODELING, "SFTTrainer")


def test_rows_of_another_shape_are_named():
    """Some rows have `text`, others `messages`: whichever the trainer takes, the others lack it."""
    dataset = Dataset.from_list([{"messages": USER + ASSISTANT}, {"text": "a"}, {"messages": USER + ASSISTANT}])
    shape = check_columns(dataset.column_names, SFT_SHAPES, "SFTTrainer")
    with pytest.raises(
        DatasetFormatError, match="2 rows hold messages with `role` and `content` and 1 hold nothing: row 1"
    ):
        check_rows(dataset, shape, "SFTTrainer")


@HAS_JSON
def test_text_among_conversations_is_named(tmp_path):
    """A JSON lines file may mix both in one column."""
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        '{"prompt": [{"role": "user", "content": "a"}]}\n{"prompt": "b"}\n{"prompt": [{"role": "user", "content": "c"}]}\n'
    )
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        DatasetFormatError, match="2 rows hold messages with `role` and `content` and 1 hold text: row 1"
    ):
        check_rows(dataset, formats.PROMPT_ONLY, "GRPOTrainer")


@pytest.mark.parametrize("options", [{}, pytest.param({"on_mixed_types": "use_json"}, marks=HAS_JSON)])
def test_sharegpt_among_chatml_is_named(options):
    """Whether Arrow holds such messages as structs with all keys or as JSON."""
    contents = ["hi", [{"type": "text", "text": "hi"}]] if options else ["hi", "ho"]  # JSON is for what is mixed
    rows = [[{"role": "user", "content": contents[0]}], [{"from": "user", "value": "hi", "content": contents[1]}]]
    dataset = Dataset.from_dict({"messages": rows}, **options)
    with pytest.raises(DatasetFormatError, match="1 hold messages with `from` and `value`: row"):
        check_rows(dataset, formats.CONVERSATION, "SFTTrainer")


def test_row_numbers_are_those_of_the_whole_stream():
    dataset = Dataset.from_dict({"text": ["a", None, "b"]})
    with pytest.raises(DatasetFormatError, match=r"row 2001\."):
        check_rows(dataset, formats.LANGUAGE_MODELING, "SFTTrainer", first_row=2000)


def test_column_without_any_value():
    dataset = Dataset.from_dict({"text": [None, None]})
    with pytest.raises(DatasetFormatError, match="column `text` of eval_dataset holds no value in any row"):
        check_rows(dataset, formats.LANGUAGE_MODELING, "SFTTrainer", "eval_dataset")


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"prompt": "q", "completion": ASSISTANT}, formats.PROMPT_COMPLETION),
        ({"chosen": ASSISTANT, "rejected": "no"}, formats.IMPLICIT_PREFERENCE),
    ],
)
def test_columns_of_different_formats(row, shape):
    with pytest.raises(
        DatasetFormatError, match="in one format, but .* holds messages|in one format, but .* holds text"
    ):
        check_rows(Dataset.from_list([row]), shape, "Trainer")


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"text": "a"}, formats.LANGUAGE_MODELING),
        ({"messages": USER}, formats.CONVERSATION),
        ({"messages": []}, formats.CONVERSATION),
        ({"conversations": [{"from": "user", "value": "a"}]}, formats.SHAREGPT),
        ({"prompt": "a", "completion": "b", "label": True}, formats.UNPAIRED_PREFERENCE),
        ({"prompt": "a", "chosen": USER + ASSISTANT, "rejected": USER + ASSISTANT}, formats.PREFERENCE),
        ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, formats.STEPWISE),
        ({"input_ids": [1, 2]}, formats.TOKENIZED),
    ],
)
def test_good_rows_pass(row, shape):
    check_rows(Dataset.from_list([row, row]), shape, "Trainer")
    check_rows(Dataset.from_list([row]).select([]), shape, "Trainer")


def test_kind_of_value():
    assert [kind_of_value(value) for value in (None, "a", USER, [{"from": "a", "value": "b"}], [1], [])] == [
        "missing", "text", "messages", "from_value", "other", "other",
    ]  # fmt: skip


def test_describe_rows():
    assert describe_rows([7]) == "row 7"
    assert describe_rows(range(5)) == "rows 0, 1, 2, 3, 4"
    assert describe_rows(range(2000)) == "rows 0, 1, 2, 3, 4 and 1,995 more"
