"""Chat templates applied, prompts found, pairs taken apart: recorded figures and properties."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import load_reference
from trl.data.templating import (
    apply_chat_template,
    common_prefix_length,
    drop_none_fields,
    extract_prompt,
    maybe_apply_chat_template,
    maybe_convert_to_chatml,
    maybe_extract_prompt,
    maybe_unpair_preference_dataset,
    tokenize,
    unpair_preference_dataset,
)

CASES = load_reference("data")
SYSTEM = [{"role": "system", "content": "Be brief."}]
USER = [{"role": "user", "content": "What color is the sky?"}]
BLUE = [{"role": "assistant", "content": "It is blue."}]
GREEN = [{"role": "assistant", "content": "It is green."}]
USER_TEXT = "<|im_start|>user\nWhat color is the sky?<|im_end|>\n"
HEADER = "<|im_start|>assistant\n"


def cases(prefix):
    return [name for name in CASES if name.startswith(prefix)]


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates

TEMPLATED = [
    ({"messages": USER + BLUE}, {"text": USER_TEXT + HEADER + "It is blue.<|im_end|>\n"}),
    ({"prompt": USER}, {"prompt": USER_TEXT + HEADER}),
    (
        {"prompt": USER, "completion": BLUE},
        {"prompt": USER_TEXT + HEADER, "completion": "It is blue.<|im_end|>\n"},
    ),
    (
        {"prompt": USER, "chosen": BLUE, "rejected": GREEN},
        {
            "prompt": USER_TEXT + HEADER,
            "chosen": "It is blue.<|im_end|>\n",
            "rejected": "It is green.<|im_end|>\n",
        },
    ),
    (
        {"chosen": USER + BLUE, "rejected": USER + GREEN},
        {
            "chosen": USER_TEXT + HEADER + "It is blue.<|im_end|>\n",
            "rejected": USER_TEXT + HEADER + "It is green.<|im_end|>\n",
        },
    ),
    (
        {"prompt": USER, "completion": BLUE, "label": True},
        {"prompt": USER_TEXT + HEADER, "completion": "It is blue.<|im_end|>\n", "label": True},
    ),
]


@pytest.mark.parametrize(("example", "expected"), TEMPLATED, ids=[" ".join(example) for example, _ in TEMPLATED])
def test_apply_chat_template(tokenizer, example, expected):
    """Each of the six sets of columns, and nothing of the example is changed."""
    before = copy.deepcopy(example)
    assert apply_chat_template({**example, "id": 3}, tokenizer) == expected
    assert maybe_apply_chat_template(example, tokenizer) == expected
    assert example == before


def test_prompt_that_ends_with_the_assistant_is_left_open(tokenizer):
    opened = [{"role": "assistant", "content": "The sky"}]
    rendered = apply_chat_template({"prompt": USER + opened}, tokenizer)
    assert rendered == {"prompt": USER_TEXT + HEADER + "The sky"}


def test_prompt_that_ends_with_a_tool_result_is_answered(tokenizer):
    tool = [{"role": "tool", "content": "blue"}]
    rendered = apply_chat_template({"prompt": USER + tool}, tokenizer)
    assert rendered["prompt"].endswith("<|im_start|>tool\nblue<|im_end|>\n" + HEADER)


@pytest.mark.parametrize("prompt", [SYSTEM, []])
def test_prompt_that_nobody_answers(tokenizer, prompt):
    with pytest.raises(ValueError, match="A prompt must end with a message of `user` or `tool`"):
        apply_chat_template({"prompt": prompt}, tokenizer)


@pytest.mark.parametrize("columns", [["completion"], ["prompt", "chosen"], ["messages", "prompt"], ["text"]])
def test_other_sets_of_columns_are_refused(tokenizer, columns):
    with pytest.raises(KeyError) as raised:
        apply_chat_template(dict.fromkeys(columns, USER), tokenizer)
    assert "`prompt`, `chosen`, `rejected`" in str(raised.value)
    assert str(raised.value).endswith(f"Found: {', '.join(f'`{column}`' for column in columns)}.")


def test_text_is_left_alone(tokenizer):
    example = {"prompt": "The sky is", "completion": " blue."}
    assert maybe_apply_chat_template(example, tokenizer) is example


THINKING_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not loop.last %}{{ m.content[-3:] }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"
)


def test_what_the_renderings_share_is_the_prompt(tokenizer):
    """The prompt's rendering need not begin that of the whole; nothing of an answer may be lost by it."""
    tokenizer.chat_template = THINKING_TEMPLATE
    example = {
        "prompt": USER,
        "chosen": [{"role": "assistant", "content": "<think>hm</think>yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    rendered = apply_chat_template(example, tokenizer)
    assert rendered["prompt"] == "<user>What color is the sky?<assistant>"
    assert rendered["chosen"] == "<think>hm</think>yes"
    assert rendered["rejected"] == "no"


KWARGS_TEMPLATE = (
    "{{ style | default('plain') }}|{% if tools is not none %}{{ tools[0]['function']['name'] }}{% else %}no tools"
    "{% endif %}|{% for m in messages %}{{ m.content }}{% endfor %}"
)


def test_template_arguments_and_tools(tokenizer):
    """Arguments reach the template, a row's own win; an empty list of tools is no tools; JSON tools are read."""
    tokenizer.chat_template = KWARGS_TEMPLATE
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    row = {"messages": BLUE}
    assert apply_chat_template(row, tokenizer)["text"] == "plain|no tools|It is blue."
    assert apply_chat_template(row, tokenizer, tools=[], style="x")["text"] == "x|no tools|It is blue."
    assert apply_chat_template(row, tokenizer, tools=tools)["text"].startswith("plain|look|")
    assert apply_chat_template(row, tokenizer, tools=json.dumps(tools))["text"].startswith("plain|look|")
    row = {"messages": BLUE, "chat_template_kwargs": {"style": "row"}}
    assert apply_chat_template(row, tokenizer, style="x")["text"].startswith("row|")
    assert apply_chat_template({"messages": BLUE, "chat_template_kwargs": None}, tokenizer)["text"].startswith(
        "plain|"
    )


def test_keys_that_arrow_filled_are_not_seen_by_the_template(tokenizer):
    """In a dataset every message has every key; a template that asks `is defined` must not see those made up."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.tool_calls is defined %}[{{ m.tool_calls[0].function.name }}"
        "({{ m.tool_calls[0].function.arguments | tojson }})]{% endif %}{% endfor %}"
    )
    calls = [
        {"function": {"name": "look", "arguments": {"where": "up", "how": None}}},
        {"function": {"name": "see", "arguments": {"where": None, "how": "well"}}},
    ]
    messages = [*USER, *({"role": "assistant", "content": "", "tool_calls": [call]} for call in calls)]
    row = Dataset.from_list([{"messages": messages}])[0]
    assert row["messages"][0]["tool_calls"] is None
    assert apply_chat_template(row, tokenizer)["text"] == (
        'What color is the sky?[look({"where": "up"})][see({"how": "well"})]'
    )


def test_drop_none_fields_keeps_content():
    messages = [{"role": "assistant", "content": None, "name": None, "calls": [{"a": None, "b": 1}]}]
    assert drop_none_fields(messages) == [{"role": "assistant", "content": None, "calls": [{"b": 1}]}]
    assert "name" in messages[0]


def test_tokenize(tokenizer):
    """A text, or a conversation through the template; plain lists of ids."""
    assert tokenize(tokenizer, "the sky")["input_ids"] == tokenizer("the sky")["input_ids"]
    ids = tokenize(tokenizer, USER, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == USER_TEXT + HEADER


@pytest.mark.parametrize("name", cases("chatml_"))
def test_recorded_chatml(name):
    inputs = CASES[name]["inputs"]
    before = copy.deepcopy(inputs)
    assert maybe_convert_to_chatml(inputs) == CASES[name]["outputs"]["maybe_convert_to_chatml"]
    assert inputs == before


def test_chatml_where_arrow_merged_both_forms():
    """A message keeps the form that has values."""
    rows = [{"messages": [{"from": "user", "value": "a"}]}, {"messages": [{"role": "user", "content": "b"}]}]
    converted = [maybe_convert_to_chatml(row)["messages"] for row in Dataset.from_list(rows)]
    assert converted == [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize("name", cases("common_prefix_"))
def test_recorded_common_prefix(name):
    assert (
        common_prefix_length(**dict(zip(("ids", "other_ids"), CASES[name]["inputs"].values(), strict=True)))
        == (CASES[name]["outputs"]["value"])
    )


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_length(a, b):
    """The first n elements agree and the next ones, where there are such, do not."""
    n = common_prefix_length(a, b)
    assert a[:n] == b[:n]
    assert n in (len(a), len(b)) or a[n] != b[n]


@pytest.mark.parametrize("name", cases("extract_prompt_"))
def test_recorded_extract_prompt(name):
    assert extract_prompt(CASES[name]["inputs"]) == CASES[name]["outputs"]


@pytest.mark.parametrize("name", cases("maybe_extract_prompt_"))
def test_recorded_maybe_extract_prompt(name):
    assert maybe_extract_prompt(CASES[name]["inputs"]) == CASES[name]["outputs"]


texts = st.text(alphabet="ab ", min_size=1, max_size=12)
conversations = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), texts),
    min_size=1,
    max_size=5,
)


@given(st.one_of(st.tuples(texts, texts), st.tuples(conversations, conversations)))
def test_extract_prompt_round_trip(pair):
    """Prompt and answer joined are what was given; no answer is empty; the prompt is as long as it can be."""
    chosen, rejected = pair
    split = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert split["prompt"] + split["chosen"] == chosen
    assert split["prompt"] + split["rejected"] == rejected
    assert split["chosen"]
    assert split["rejected"]
    longer = chosen[: len(split["prompt"]) + 1]
    assert (
        split["chosen"][0] == " " or len(longer) in (len(chosen), len(rejected)) or rejected[: len(longer)] != longer
    )


@pytest.mark.parametrize("pair", [("", ""), ("", "ab"), ([], USER), (" b", " c"), ("xyz ", "abc ")])
def test_extract_prompt_of_next_to_nothing(pair):
    """Nothing in common, or nothing at all: the prompt is empty and the answers are as they were."""
    chosen, rejected = pair
    assert extract_prompt({"chosen": chosen, "rejected": rejected}) == {
        "prompt": chosen[:0],
        "chosen": chosen,
        "rejected": rejected,
    }


def test_textual_prompt_beside_conversations_is_replaced():
    example = {"prompt": "What color is the sky?", "chosen": USER + BLUE, "rejected": USER + GREEN}
    assert maybe_extract_prompt(example) == {"prompt": USER, "chosen": BLUE, "rejected": GREEN}
    example = {"prompt": None, "chosen": USER + BLUE, "rejected": USER + GREEN}
    assert maybe_extract_prompt(example)["prompt"] == USER


@pytest.mark.parametrize("example", [{"text": "a"}, {"prompt": "a"}, {"prompt": "a", "completion": "b"}])
def test_what_is_no_pair_is_left_alone(example):
    assert maybe_extract_prompt(example) is example


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


@pytest.mark.parametrize("name", [*cases("unpair_"), *cases("maybe_unpair_")])
def test_recorded_unpairing(name):
    dataset = Dataset.from_list(CASES[name]["inputs"]["rows"])
    assert maybe_unpair_preference_dataset(dataset).to_list() == CASES[name]["outputs"]["rows"]
    if not name.startswith("maybe"):
        assert unpair_preference_dataset(dataset).to_list() == CASES[name]["outputs"]["rows"]


PAIRS = [{"id": i, "prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(5)]


def test_unpairing_keeps_everything():
    """Per batch the chosen come first; other columns are repeated; pairs can be put together again."""
    dataset = Dataset.from_list(PAIRS)
    rows = unpair_preference_dataset(dataset, batch_size=2).to_list()
    assert [row["id"] for row in rows] == [0, 1, 0, 1, 2, 3, 2, 3, 4, 4]
    assert list(rows[0]) == ["id", "prompt", "completion", "label"]
    answers = {(row["id"], row["label"]): row["completion"] for row in rows}
    assert [
        {**pair, "chosen": answers[pair["id"], True], "rejected": answers[pair["id"], False]} for pair in PAIRS
    ] == PAIRS


def test_unpairing_every_kind_of_dataset():
    dataset = Dataset.from_list(PAIRS)
    expected = unpair_preference_dataset(dataset).to_list()
    both = maybe_unpair_preference_dataset(DatasetDict(train=dataset, test=dataset), num_proc=1, desc="Unpairing")
    assert both["train"].to_list() == both["test"].to_list() == expected
    stream = IterableDataset.from_generator(lambda: iter(PAIRS))
    assert list(maybe_unpair_preference_dataset(stream)) == expected
    assert list(unpair_preference_dataset(dataset.to_iterable_dataset())) == expected
    formatted = unpair_preference_dataset(dataset.with_format("numpy", columns=["chosen", "id"]))
    assert formatted.format["type"] == "numpy"
    assert set(formatted.format["columns"]) == {"completion", "id"}


def test_unpairing_answers_of_different_types():
    """One side may have keys, or be of a type, that the other has not."""
    rows = [{"chosen": [{**BLUE[0], "name": "x"}], "rejected": GREEN}]
    unpaired = unpair_preference_dataset(Dataset.from_list(rows)).to_list()
    assert [drop_none_fields(row["completion"]) for row in unpaired] == [rows[0]["chosen"], GREEN]


def test_types_survive_unpairing():
    features = Features(
        {"prompt": Value("large_string"), "chosen": List(Value("int32")), "rejected": List(Value("int32"))}
    )
    dataset = Dataset.from_list([{"prompt": "p", "chosen": [1], "rejected": [2]}], features=features)
    assert unpair_preference_dataset(dataset).features == {
        "prompt": Value("large_string"),
        "completion": List(Value("int32")),
        "label": Value("bool"),
    }


def test_unpaired_already():
    dataset = Dataset.from_list([{"prompt": "p", "completion": "c", "label": True}])
    assert maybe_unpair_preference_dataset(dataset) is dataset


# ---------------------------------------------------------------------------------------------------------------------
# Caching


CHAIN = """
import sys
from datasets import load_from_disk
from transformers import AutoTokenizer
from trl import apply_chat_template, extract_prompt, maybe_convert_to_chatml, unpair_preference_dataset

def run(rows_path, tokenizer_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    dataset = load_from_disk(rows_path).map(maybe_convert_to_chatml).map(extract_prompt)
    dataset = dataset.map(apply_chat_template, fn_kwargs={"processing_class": tokenizer})
    return unpair_preference_dataset(dataset).cache_files[0]["filename"]
"""


def test_second_run_hits_the_cache(tmp_path, tokenizer, capfd):
    """The functions can be mapped: another process, with the same tokenizer, finds what the first wrote."""
    paths = [str(tmp_path / "rows"), str(tmp_path / "tokenizer")]
    Dataset.from_list([{"chosen": USER + BLUE, "rejected": USER + GREEN}]).save_to_disk(paths[0])
    tokenizer.save_pretrained(paths[1])
    here: dict = {}
    exec(CHAIN, here)
    capfd.readouterr()
    written = here["run"](*paths)
    assert capfd.readouterr().err.count("Map: 100%") == 4
    command = [sys.executable, "-c", CHAIN + "print(run(*sys.argv[1:]))", *paths]
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == written
    assert "Map:" not in other.stderr
