"""Rows become ids and masks, and token columns are cut, labelled and counted like plain lists would be."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl.data.formats import DatasetFormatError
from trl.data.token_lists import (
    IGNORE_INDEX,
    TokenLists,
    build_labels,
    count_trained,
    truncate_table,
)
from trl.data.tokenization import RowTokenizer, append_eos, get_tokenizer, parse_tools, prompt_boundary, tokenize_text

rows_of_tokens = st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=6)


def column(rows, kind=None):
    return pa.array(rows, kind or pa.list_(pa.int64()))


# ---- Rows ----


def test_text_gets_the_tokenizers_own_special_tokens(tokenizer):
    from tokenizers.processors import TemplateProcessing

    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    assert tokenize_text(tokenizer, ["sky"])[0][0] == 0
    assert tokenize_text(tokenizer, []) == []


def test_text_ignores_the_padding_and_truncation_of_the_last_call(tokenizer):
    before = tokenize_text(tokenizer, ["the sky", "a"])
    tokenizer(["the sky", "a"], padding="max_length", truncation=True, max_length=2)
    assert tokenize_text(tokenizer, ["the sky", "a"]) == before


@pytest.mark.parametrize(
    ("text", "eos", "expected"), [("a", "</s>", "a</s>"), ("a</s>", "</s>", "a</s>"), ("a", None, "a"), ("a", "", "a")]
)
def test_append_eos(text, eos, expected):
    assert append_eos(text, eos) == expected


@pytest.mark.parametrize(
    ("prompt", "sequences", "boundary"),
    [
        ([1, 2], ([1, 2, 3],), 2),
        ([1, 2], ([1, 9, 3],), 1),
        ([1, 2], ([1, 2, 3], [1, 5]), 1),
        ([1, 2, 3], ([1, 2],), 2),
        ([1], (), 1),
        ([], ([1],), 0),
    ],
)
def test_prompt_boundary(prompt, sequences, boundary):
    """The least common beginning over all branches, never beyond the prompt."""
    assert prompt_boundary(prompt, *sequences) == boundary


def test_pairs_of_text(tokenizer):
    batch = RowTokenizer(tokenizer, eos_token="<|im_end|>")({"prompt": ["the sky"], "completion": [" is"]})
    assert tokenizer.decode(batch["input_ids"][0]) == "the sky is<|im_end|>"
    trained = [token for token, mask in zip(batch["input_ids"][0], batch["completion_mask"][0], strict=True) if mask]
    assert tokenizer.decode(trained) == " is<|im_end|>"
    assert batch["prompt_tokens_merged"] == [0]


def test_pairs_of_messages_with_both_masks(tokenizer):
    """The assistant's turn in the prompt is in the assistant mask but not in the completion mask."""
    prompt = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "you?"},
    ]
    rows = {"prompt": [prompt], "completion": [[{"role": "assistant", "content": "sky"}]]}
    batch = RowTokenizer(tokenizer, assistant_mask=True)(rows)

    def masked(name):
        pairs = zip(batch["input_ids"][0], batch[name][0], strict=True)
        return tokenizer.decode([token for token, mask in pairs if mask])

    assert masked("assistant_masks") == "blue<|im_end|>sky<|im_end|>"
    assert masked("completion_mask") == "sky<|im_end|>\n"


def test_conversations_end_as_their_template_ends_them(tokenizer):
    rows = {"messages": [[{"role": "user", "content": "hi"}]]}
    batch = RowTokenizer(tokenizer, eos_token="<|endoftext|>")(rows)
    assert tokenizer.decode(batch["input_ids"][0]) == "<|im_start|>user\nhi<|im_end|>\n"
    assert set(batch) == {"input_ids"}


def test_messages_are_cleaned_of_what_arrow_filled_in(tokenizer):
    """A template that asks whether a key is there gets the answer that the author gave."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'tool_calls' in m }} {{ m.content is none }}"
        "{% for c in m.tool_calls or [] %} {{ c.function.arguments | tojson }}{% endfor %};{% endfor %}"
    )
    call = {"function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    messages = [
        {"role": "user", "content": "a", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    batch = RowTokenizer(tokenizer)({"messages": [messages]})
    assert tokenizer.decode(batch["input_ids"][0]) == 'False False;True True {"x": 1};'


def test_tools_may_be_json_text():
    tools = [{"type": "function", "function": {"name": "f", "parameters": None}}]
    assert parse_tools('[{"type": "function", "function": {"name": "f"}}]') == parse_tools(tools)
    assert parse_tools(None) is parse_tools([]) is parse_tools("") is parse_tools(" ") is None
    with pytest.raises(ValueError, match="Row 3: `tools` must be a list of tool schemas, found dict"):
        parse_tools('{"name": "f"}', 3)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ({"prompt": ["a"], "completion": [[{"role": "assistant", "content": "b"}]]}, "`prompt` of row 40 is a text"),
        ({"text": ["a", None]}, "Row 41 has no `text`"),
    ],
)
def test_odd_rows_are_named_by_their_number(rows, match, tokenizer):
    with pytest.raises(DatasetFormatError, match=match):
        RowTokenizer(tokenizer)(rows, range(40, 42)[: len(next(iter(rows.values())))])


def test_get_tokenizer_of_a_tokenizer(tokenizer):
    assert get_tokenizer(tokenizer) is tokenizer


# ---- Token columns ----


@given(rows_of_tokens, st.integers(1, 10), st.sampled_from(["keep_start", "keep_end"]))
def test_truncation_is_slicing(rows, max_length, mode):
    table = pa.table({"input_ids": column(rows), "labels": column(rows), "text": ["t"] * len(rows)})
    cut = truncate_table(table, max_length, mode)
    expected = [row[:max_length] if mode == "keep_start" else row[-max_length:] for row in rows]
    assert cut["input_ids"].to_pylist() == cut["labels"].to_pylist() == expected
    assert cut["text"] == table["text"]


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 3)])
def test_every_kind_of_arrow_list(kind):
    table = pa.table({"input_ids": column([[1, 2, 3], [4, 5, 6]], kind)}).slice(1)
    assert truncate_table(table, 2, "keep_end")["input_ids"].to_pylist() == [[5, 6]]
    assert TokenLists.from_arrow(table["input_ids"]).lengths.tolist() == [3]


def test_no_limit_and_unknown_mode():
    table = pa.table({"input_ids": column([[1, 2, 3]])})
    assert truncate_table(table, None) is table
    with pytest.raises(ValueError, match="'keep_start', 'keep_end'"):
        truncate_table(table, 2, "middle")


@given(rows_of_tokens, st.data())
def test_labels_are_the_tokens_where_all_masks_are_one(rows, data):
    masks = {
        name: [data.draw(st.lists(st.integers(0, 1), min_size=len(row), max_size=len(row))) for row in rows]
        for name in ("completion_mask", "assistant_masks")
    }
    lists = {name: TokenLists.from_lists(mask, np.int8) for name, mask in masks.items()}
    labels = build_labels(TokenLists.from_lists(rows), lists)
    expected = [
        [token if a and b else IGNORE_INDEX for token, a, b in zip(row, one, other, strict=True)]
        for row, one, other in zip(rows, *masks.values(), strict=True)
    ]
    assert labels.to_arrow().to_pylist() == expected
    assert [row.tolist() for row in labels.to_arrays()] == expected


@given(rows_of_tokens)
def test_without_masks_every_token_is_its_own_label(rows):
    tokens = TokenLists.from_lists(rows)
    labels = build_labels(tokens, {})
    assert labels.to_arrow().to_pylist() == rows
    assert not np.shares_memory(labels.values, tokens.values)


@given(st.lists(st.lists(st.sampled_from([IGNORE_INDEX, 7]), max_size=6), min_size=1, max_size=5), st.data())
def test_trained_tokens_leave_out_the_first_of_each_document(rows, data):
    seq_lengths = []
    for row in rows:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(row)), max_size=3)) | {0, len(row)})
        seq_lengths.append([end - start for start, end in itertools.pairwise(cuts)])
    table = pa.table({"labels": column(rows)})
    packed = table.append_column("seq_lengths", column(seq_lengths))
    assert count_trained(table).tolist() == [sum(label != IGNORE_INDEX for label in row[1:]) for row in rows]
    expected = []
    for row, lengths in zip(rows, seq_lengths, strict=True):
        starts = set(np.cumsum([0, *lengths])[:-1].tolist())
        expected.append(sum(label != IGNORE_INDEX for i, label in enumerate(row) if i not in starts))
    assert count_trained(packed).tolist() == expected
