"""Preference data becomes training examples: the recorded figures, what is dropped, the order of labelled rows."""

import json
from itertools import pairwise

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value, load_dataset

from tests.conftest import load_reference
from trl.data.formats import DatasetFormatError
from trl.data.pair_report import EMPTY_ANSWER, IDENTICAL, NOTHING_SCORED, PROMPT_FILLS, SAME_AFTER_CUT, TOO_LONG
from trl.data.preference_preparation import (
    PreferenceOptions,
    prepare_preference_dataset,
    prepare_reward_dataset,
    prepare_unpaired_dataset,
)
from trl.data.unpairing import balanced_order, rotation

PREPARE = {"dpo": prepare_preference_dataset, "reward": prepare_reward_dataset, "kto": prepare_unpaired_dataset}
CASES = {
    name: case
    for name, case in load_reference("prep").items()
    if name.split("_")[0] in PREPARE and "rows" in case["outputs"]
}


def prepare(kind, rows, tokenizer, streaming=False, **options):
    """The prepared rows as a list, and the report."""
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    if streaming:
        dataset = dataset.to_iterable_dataset()
    prepared, report = PREPARE[kind](dataset, tokenizer, PreferenceOptions(**options))
    return list(prepared), report


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def drops(report):
    return {reason: dropped.rows for reason, dropped in report.dropped.items()}


def without_exchange(row):
    return {key: value for key, value in row.items() if key != "KL_completion_ids"}


def token_ids(row):
    return tuple(tuple(value) if isinstance(value, list) else value for key, value in sorted(row.items()))


# ---- The recorded figures ----


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_reference_rows(name, streaming, word_tokenizer):
    """Columns, tokens, drops and exchanged answers are those recorded; a stream gives the same rows."""
    case = CASES[name]
    kind, config, outputs = name.split("_")[0], case["config"], case["outputs"]
    options = {key: config[key] for key in ("max_length", "truncation_mode") if key in config}
    if "KL_completion_ids" in outputs["columns"]:
        options["kl_block_size"] = config["per_device_train_batch_size"]
    rows, _ = prepare(kind, case["inputs"]["rows"], word_tokenizer, streaming, **options)
    expected = outputs["rows"]
    if rows:
        assert sorted(rows[0]) == outputs["columns"]
    names = list(expected[0]) if expected else []
    found = [{key: row[key] for key in names} for row in rows]
    if "_from_" in name:  # pairs: ours come in a balanced order, so that other rows exchange their answers
        found, expected = (sorted(map(without_exchange, rows), key=token_ids) for rows in (found, expected))
    assert found == expected


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_rows_are_kept_whole_by_name(kind, tokenizer):
    """Other columns stay with their rows, also where rows between them are dropped."""
    rows = [{**pair("the", " sky", " sea"), "id": i} for i in range(4)]
    rows[1]["chosen"] = ""
    for streaming in (False, True):
        kept, _ = prepare(kind, rows, tokenizer, streaming)
        assert [row["id"] for row in kept] == [0, 2, 3]


# ---- Tokens ----


@pytest.mark.parametrize("merged", ["chosen", "rejected"])
def test_both_answers_begin_at_the_shorter_boundary(merged, tokenizer, caplog):
    """Where one answer merges with the prompt's end, the prompt of both ends before the merged token, and all is kept."""
    other = "rejected" if merged == "chosen" else "chosen"
    [row], report = prepare("dpo", [{"prompt": "the sk", merged: "y is blue", other: " 12"}], tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "the"
    assert tokenizer.decode(row[f"{merged}_ids"]) == " sky is blue<|im_end|>"
    assert tokenizer.decode(row[f"{other}_ids"]) == " sk 12<|im_end|>"
    assert report.prompts_merged.rows == [0]
    assert "1 end within a token (row 0)" in report.render()
    assert len([record for record in caplog.records if "beginning of prompt and completion" in record.message]) == 1


def test_merged_prompts_of_a_stream_are_warned_of_once(tokenizer, caplog):
    rows = [pair("the sk", "y is blue", "y is red")] * 1100
    _, report = prepare("dpo", rows, tokenizer, streaming=True)
    assert report.prompts_merged.count == 1100
    assert len([record for record in caplog.records if "beginning of prompt and completion" in record.message]) == 1


TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ '<tool ' + tool['function']['name'] + '>' }}{% endfor %}"
    "{{ '<' + style + '>' if style is defined else '' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["dpo", "reward", "kto"])
@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_template_arguments_per_row(kind, as_json, tokenizer):
    tokenizer.chat_template = TOOL_TEMPLATE
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
    question = [{"role": "user", "content": "12 plus 30?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("42", "43")]
    rows = [
        {
            **pair(question, *answers),
            "tools": json.dumps(tools) if as_json else tools,
            "chat_template_kwargs": {"style": "short"},
        },
        {**pair(question, *answers), "tools": None, "chat_template_kwargs": None},
    ]
    kept, _ = prepare(kind, rows, tokenizer)
    texts = [tokenizer.decode(row.get("prompt_ids", row.get("chosen_ids"))) for row in kept]
    with_tools = [text for text in texts if text.startswith("<tool add><short><|im_start|>user")]
    assert len(with_tools) == len(texts) / 2
    assert all(text.startswith("<|im_start|>user") for text in texts if text not in with_tools)


def test_prompt_of_messages_opens_the_answer(tokenizer):
    rows = [pair([{"role": "user", "content": "hello"}], *([{"role": "assistant", "content": c}] for c in ("a", "b")))]
    [row], _ = prepare("dpo", rows, tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row["chosen_ids"]) == "a<|im_end|>\n"


def test_extracted_prompts_have_the_type_of_answers(tokenizer):
    """Also where the first answers have nothing in common, which leaves their prompt without a first message to tell."""
    rows = [{"chosen": "yes", "rejected": "no"}] * 3 + [{"chosen": "sky blue", "rejected": "sky red"}]
    dataset = Dataset.from_list(rows)
    prepared, report = prepare_preference_dataset(dataset, tokenizer, PreferenceOptions())
    assert prepared.features["prompt"] == dataset.features["chosen"]
    assert prepared["prompt"][:] == ["", "", "", "sky"]
    assert any("3 rows have no prompt token" in note for note in report.notes)


def test_a_first_batch_without_tokens_decides_no_type(tokenizer):
    rows = [pair("the", "", " sea")] * 1000 + [pair("the", " sky", " sea")]
    prepared, report = prepare_preference_dataset(Dataset.from_list(rows), tokenizer, PreferenceOptions())
    assert report.rows_kept == 1
    assert prepared.features["chosen_ids"] == List(Value("int32"))


def test_a_prompt_column_is_never_searched_for(tokenizer):
    """An explicit prompt stays as it is, also where the answers begin alike."""
    [row], _ = prepare("dpo", [pair("the sky", " is blue", " is red")], tokenizer)
    assert (row["prompt"], row["chosen"]) == ("the sky", " is blue")
    assert tokenizer.decode(row["prompt_ids"]) == "the sky"


def test_eos_token_may_be_chosen(tokenizer):
    [row], report = prepare("dpo", [pair("the", " sky", " sea")], tokenizer, eos_token="<|endoftext|>")
    assert tokenizer.decode(row["chosen_ids"]) == " sky<|endoftext|>"
    assert (report.stop_tokens, report.stop_token_share) == (["<|endoftext|>"], 1.0)
    with pytest.raises(ValueError, match="is not in the vocabulary"):
        prepare("dpo", [pair("the", " sky", " sea")], tokenizer, eos_token="<|im_ende|>")


def test_a_template_that_refuses_a_row_says_which(tokenizer):
    tokenizer.chat_template = "{% if messages[0]['content'] == 'boom' %}{{ raise_exception('no boom') }}{% endif %}x"
    rows = [
        pair([{"role": "user", "content": c}], *([{"role": "assistant", "content": a}] for a in "ab"))
        for c in ("a", "boom")
    ]
    with pytest.raises(DatasetFormatError, match="no boom.*row 1"):
        prepare("dpo", rows, tokenizer)


def test_text_only_rows_of_a_processor(tokenizer):
    """A processor's template reads content as blocks; the tokens are those of its tokenizer."""
    from transformers import ProcessorMixin

    class TextProcessor(ProcessorMixin):
        attributes = ("tokenizer",)
        tokenizer_class = "AutoTokenizer"

        def __init__(self, tokenizer):
            self.tokenizer = tokenizer
            self.chat_template = TOOL_TEMPLATE.replace("message['content']", "message['content'][0]['text']")

    rows = [pair([{"role": "user", "content": "hello"}], *([{"role": "assistant", "content": c}] for c in ("a", "b")))]
    [row], _ = prepare("dpo", rows, TextProcessor(tokenizer))
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == (
        "<|im_start|>user hello<|im_end|><|im_start|>assistant a<|im_end|>"
    )


# ---- Drops and counts ----


def test_each_reason_is_counted_apart(tokenizer):
    rows = [
        pair("the sky is", " blue", " red"),
        pair("the", " ", " sea"),
        pair("the", " sky", " sky"),
        pair("the sky is blue and the sea is deep", " yes", " no"),
        pair("the sky", " is blue and deep", " is blue and red"),
    ]
    for streaming in (False, True):
        kept, report = prepare("dpo", rows, tokenizer, streaming, max_length=5)
        assert len(kept) == report.rows_kept == 1
        assert drops(report) == {EMPTY_ANSWER: [1], IDENTICAL: [2], PROMPT_FILLS: [3], SAME_AFTER_CUT: [4]}
        assert report.rows_in == 5
    text = report.render()
    assert all(reason in text for reason in drops(report))


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_prompt_needs_room_for_one_token(kind, word_tokenizer):
    for max_length, expected in ((3, {PROMPT_FILLS: [0]}), (4, {})):
        _, report = prepare(kind, [pair("a b c", " d", " e")], word_tokenizer, max_length=max_length)
        assert drops(report) == expected


def test_keep_end_keeps_long_prompts(tokenizer):
    """What is cut then is the beginning: a long prompt is no reason to drop, an end in common may be."""
    rows = [pair("the sky is blue and the sea is deep", " yes", " no"), pair("the", " red is deep", " blue is deep")]
    kept, report = prepare("dpo", rows, tokenizer, max_length=3, truncation_mode="keep_end")
    assert len(kept) == 1
    assert drops(report) == {SAME_AFTER_CUT: [1]}


def test_answers_without_a_token_to_predict(tokenizer):
    """Without a prompt the first token of an answer is not predicted from anything, and an answer of one is nothing."""
    rows = [
        {"prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6, 7]},
        {"prompt_ids": [4], "chosen_ids": [5], "rejected_ids": [6, 7]},
    ]
    kept, report = prepare("dpo", rows, tokenizer)
    assert kept == rows[1:]
    assert drops(report) == {NOTHING_SCORED: [0]}
    _, report = prepare("dpo", rows[1:], tokenizer, max_length=1, truncation_mode="keep_end")
    assert drops(report) == {NOTHING_SCORED: [0]}


def test_reward_rows_are_never_cut(word_tokenizer):
    rows = [pair("the sky is", " blue", " red"), pair("the", " sky", " sea is deep a b c d")]
    kept, report = prepare("reward", rows, word_tokenizer, max_length=6)
    assert [len(kept[0][column]) for column in ("chosen_ids", "rejected_ids")] == [5, 5]
    assert drops(report) == {TOO_LONG: [1]}


@pytest.mark.parametrize("kind", list(PREPARE))
def test_nothing_left(kind, tokenizer):
    """The report tells why, and is asked by the trainer; the dataset itself is empty."""
    rows = [pair("the sky is blue", " yes", " no")]
    kept, report = prepare(kind, rows, tokenizer, max_length=2, kl_block_size=2 if kind == "kto" else None)
    assert kept == []
    with pytest.raises(ValueError, match=r"none of its 1 rows is left \(row 0: .*max_length.*Raise max_length"):
        report.raise_if_unusable()


def test_a_hopeless_stream_ends(tokenizer):
    rows = [pair("the", " sky", " sky")] * 1100
    with pytest.raises(ValueError, match="chosen and rejected are the same"):
        prepare("dpo", rows, tokenizer, streaming=True)


def test_figures(word_tokenizer):
    rows = [
        pair("a b c d", " e f", " g"),  # 4 + 3 | 4 + 2 tokens with the end of sequence
        pair("a b", " e f g h", " e f"),  # 2 + 5 (cut to 4) | 2 + 3
        pair("a b", " e", " f"),  # 2 + 2 | 2 + 2
    ]
    _, report = prepare("dpo", rows, word_tokenizer, max_length=6)
    assert report.lengths == {"prompt": (2.0, 4), "chosen": (3.0, 5), "rejected": (2.0, 3)}
    assert report.rows_truncated == 2
    prompts, answers = 2 * (4 + 2 + 2), (2 + 2) + (4 + 3) + (2 + 2)
    assert report.prompt_share == pytest.approx(prompts / (prompts + answers))
    assert report.chosen_longer_share == pytest.approx(2 / 3)
    assert report.stop_token_share == pytest.approx(1 / 3)
    text = report.render()
    assert "median 3 tokens, longest 5" in text
    assert "2 rows at max_length=6" in text
    assert "chosen in 66.7% of pairs, rejected in 0.0%" in text


def test_shared_tokens_of_whole_pairs(word_tokenizer):
    _, report = prepare("reward", [pair("a b c", " d e", " d f g")], word_tokenizer)
    assert report.prompt_share == pytest.approx(2 * 4 / (6 + 7))
    assert report.stop_token_share is None


@pytest.mark.parametrize(("longer", "word"), [("chosen", "more"), ("rejected", "less")])
def test_length_bias_is_remarked_on(longer, word, word_tokenizer):
    shorter = "rejected" if longer == "chosen" else "chosen"
    rows = [{"prompt": "a", longer: " b c d", shorter: " e"}] * 19 + [{"prompt": "a", longer: " b", shorter: " e"}]
    _, report = prepare("dpo", rows, word_tokenizer)
    assert any(
        f"The {longer} answer is the longer one in 95% of pairs" in note and word in note for note in report.notes
    )
    _, report = prepare("dpo", rows[:10] * 2 + [{"prompt": "a", longer: " b", shorter: " e f"}] * 15, word_tokenizer)
    assert not report.notes


def test_another_end_of_turn_is_remarked_on(tokenizer):
    tokenizer.eos_token = "<|endoftext|>"
    rows = [pair([{"role": "user", "content": "hello"}], *([{"role": "assistant", "content": c}] for c in ("a", "b")))]
    _, report = prepare("dpo", rows, tokenizer)
    assert any("most examples end with <|im_end|>" in note for note in report.notes)


def test_roles_that_the_template_does_not_name_are_remarked_on(tokenizer):
    def rows(role):
        prompt = [{"role": role, "content": "be kind"}, {"role": "user", "content": "hello"}]
        return [pair(prompt, *([{"role": "assistant", "content": text}] for text in ("a", "b")))] * 3

    _, report = prepare("dpo", rows("narrator"), tokenizer)
    assert any("'narrator' (3 messages)" in note for note in report.notes)
    tokenizer.chat_template += "{# 'narrator' #}"
    for role in ("narrator", "system", "developer"):
        _, report = prepare("dpo", rows(role), tokenizer)
        assert not report.notes


# ---- Tokenized rows ----


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", list(PREPARE))
def test_tokenized_rows_are_used_as_they_are(kind, streaming, tokenizer):
    rows = {
        "dpo": {"prompt_ids": [4, 5], "chosen_ids": [6, 7], "rejected_ids": [8]},
        "reward": {"chosen_ids": [6, 7], "rejected_ids": [8], "margin": 0.5},
        "kto": {"prompt_ids": [4, 5], "completion_ids": [6, 7], "label": True},
    }
    kept, report = prepare(kind, [rows[kind]] * 2, tokenizer, streaming)
    assert kept == [rows[kind]] * 2
    assert report.rows_kept == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("ids", "match"),
    [(None, r"no `chosen_ids` \(None\) in row 1"), ([-100, 3], "Row 1 .*`chosen_ids` must be a list of token ids")],
)
def test_tokenized_rows_are_checked(ids, match, streaming, tokenizer):
    rows = [{"prompt_ids": [4], "chosen_ids": chosen, "rejected_ids": [8]} for chosen in ([5], ids)]
    with pytest.raises(DatasetFormatError, match=match):
        prepare("dpo", rows, tokenizer, streaming)


@pytest.mark.parametrize("ids", [["a"], "text", [1.5], 3])
def test_tokens_must_be_lists_of_whole_numbers(ids, tokenizer):
    rows = [{"prompt_ids": [4], "chosen_ids": ids, "rejected_ids": [8]}]
    for streaming in (False, True):
        with pytest.raises(DatasetFormatError, match="`chosen_ids` must be a list of token ids"):
            prepare("dpo", rows, tokenizer, streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_old_names_of_tokenized_columns(streaming, tokenizer):
    rows = [{"chosen_input_ids": [6, 7], "rejected_input_ids": [8]}]
    with pytest.warns(FutureWarning, match="chosen_input_ids"):
        kept, _ = prepare("reward", rows, tokenizer, streaming)
    assert kept == [{"chosen_ids": [6, 7], "rejected_ids": [8]}]


# ---- Labelled rows ----


@pytest.mark.parametrize("n_pairs", [3, 4, 5, 8, 31, 100])
def test_balanced_order(n_pairs):
    """Labels alternate, neighbours have different prompts, and every answer comes once."""
    order = balanced_order(n_pairs)
    assert sorted(order) == list(range(2 * n_pairs))
    prompts, labels = order % n_pairs, order < n_pairs
    assert (labels[:-1] != labels[1:]).all()
    assert (prompts[:-1] != prompts[1:]).all()


@pytest.mark.parametrize("n_rows", [1, 2, 5, 9])
@pytest.mark.parametrize("block", [2, 3, 4])
def test_rotation_stays_within_blocks(n_rows, block):
    source = rotation(n_rows, block)
    for start in range(0, n_rows, block):
        rows = list(range(start, min(start + block, n_rows)))
        assert list(source[rows]) == rows[-1:] + rows[:-1]


PAIRS = [pair(f"{i} is", f" good {i}", f" bad {i}") for i in range(9)]


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_become_balanced_rows(streaming, tokenizer):
    """What is dropped is dropped as a pair, before the rows are put in order and exchange their answers."""
    pairs = [*PAIRS[:4], pair("x", " same", " same"), *PAIRS[4:]]
    kept, report = prepare("kto", pairs, tokenizer, streaming, kl_block_size=4)
    assert drops(report) == {IDENTICAL: [4]}
    labels, prompts = [row["label"] for row in kept], [row["prompt"] for row in kept]
    assert labels == [True, False] * 9
    assert all(prompt != after for prompt, after in pairwise(prompts))
    for start in range(0, 18, 4):
        block = kept[start : start + 4]
        exchanged = [row["completion_ids"] for row in block]
        assert [row["KL_completion_ids"] for row in block] == exchanged[-1:] + exchanged[:-1]
    for row in kept:
        assert row["completion"].split()[0] == ("good" if row["label"] else "bad")
        assert tokenizer.decode(row["completion_ids"]) == row["completion"] + "<|im_end|>"
    if not streaming:
        assert (report.desirable, report.undesirable) == (9, 9)


def test_the_order_does_not_depend_on_processes(tokenizer):
    one, _ = prepare("kto", PAIRS, tokenizer, kl_block_size=4)
    two, _ = prepare("kto", PAIRS, tokenizer, kl_block_size=4, num_proc=2)
    assert one == two


def test_tokenized_pairs_become_rows(tokenizer):
    kept, _ = prepare(
        "kto", [{"prompt_ids": [4, i], "chosen_ids": [6, i], "rejected_ids": [8]} for i in range(4)], tokenizer
    )
    assert {key: kept[0][key] for key in kept[0]} == {"prompt_ids": [4, 0], "completion_ids": [6, 0], "label": True}


def test_answers_of_two_types_become_one_column(tokenizer):
    """One side may have keys that the other has not."""
    question = [{"role": "user", "content": "hello"}]
    rows = [
        {
            "prompt": question,
            "chosen": [{"role": "assistant", "content": "a", "name": "x"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
    ] * 4
    kept, _ = prepare("kto", rows, tokenizer)
    assert [row["completion"][0]["content"] for row in kept] == ["a", "b"] * 4


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_may_be_zero_and_one(streaming, tokenizer):
    rows = [{"prompt": "the", "completion": " sky", "label": label} for label in (1, 0)]
    kept, report = prepare("kto", rows, tokenizer, streaming)
    assert [row["label"] for row in kept] == [True, False]
    assert all(isinstance(row["label"], bool) for row in kept)
    if not streaming:
        assert "1 desirable (50.0%), 1 not" in report.render()


def test_class_labels(tokenizer):
    features = Features(prompt=Value("string"), completion=Value("string"), label=ClassLabel(names=["bad", "good"]))
    rows = [{"prompt": "the", "completion": " sky", "label": label} for label in (1, 0)]
    kept, _ = prepare("kto", Dataset.from_list(rows, features=features), tokenizer)
    assert [row["label"] for row in kept] == [True, False]


@pytest.mark.parametrize(("label", "missing"), [(True, "undesirable"), (False, "desirable")])
def test_a_missing_class_is_remarked_on(label, missing, tokenizer):
    rows = [{"prompt": "the", "completion": " sky", "label": label}] * 2
    _, report = prepare("kto", rows, tokenizer)
    assert any(f"no {missing} answer" in note for note in report.notes)


def test_sorted_labels_are_remarked_on(word_tokenizer):
    """KTO trains rows in their order, so that a short run over sorted rows sees one label only."""
    rows = [{"prompt": "a", "completion": " b", "label": i < 80} for i in range(160)]
    _, report = prepare("kto", rows, word_tokenizer)
    assert any("80 rows in a row have the same label" in note for note in report.notes)
    _, report = prepare("kto", Dataset.from_list(rows).shuffle(seed=0), word_tokenizer)
    assert not report.notes


def test_exchanged_answers_that_are_given_stay(tokenizer):
    rows = [{"prompt_ids": [4], "completion_ids": [5, i], "KL_completion_ids": [9], "label": True} for i in range(3)]
    kept, _ = prepare("kto", rows, tokenizer, kl_block_size=2)
    assert kept == rows


# ---- What is asked for ----


@pytest.mark.parametrize("kind", list(PREPARE))
def test_wrong_columns_name_the_nearest(kind, tokenizer):
    rows = [{"question": "a", "answer_a": "b", "answer_b": "c"}]
    with pytest.raises(DatasetFormatError, match='"question": "prompt", "answer_a": "chosen", "answer_b": "rejected"'):
        prepare(kind, rows, tokenizer)


def test_unpaired_columns_are_no_pairs(tokenizer):
    with pytest.raises(DatasetFormatError, match="`chosen` and `rejected`"):
        prepare("dpo", [{"prompt": "a", "completion": "b", "label": True}], tokenizer)


def test_conversations_in_sharegpt_form(tokenizer):
    turns = [[{"from": "human", "value": "hello"}, {"from": "gpt", "value": text}] for text in ("a", "b")]
    with pytest.raises(DatasetFormatError, match="maybe_convert_to_chatml"):
        prepare("dpo", [{"chosen": turns[0], "rejected": turns[1]}], tokenizer)


def test_text_that_is_not_unicode(tokenizer):
    stream = IterableDataset.from_generator(lambda: iter([pair("the", " sky\ud800", " sea")]))
    with pytest.raises(DatasetFormatError, match="Row 0 .*`chosen` holds text that is not valid Unicode"):
        list(prepare_preference_dataset(stream, tokenizer, PreferenceOptions())[0])


@pytest.mark.parametrize("rows", [[], {"train": Dataset.from_list(PAIRS)}, None])
def test_no_dataset(rows, tokenizer):
    dataset = Dataset.from_list(rows) if rows == [] else rows
    with pytest.raises(ValueError if rows == [] else TypeError, match="empty" if rows == [] else "must be a datasets"):
        prepare_preference_dataset(dataset, tokenizer, PreferenceOptions())


@pytest.mark.parametrize(
    "options", [{"max_length": 0}, {"truncation_mode": "keep_middle"}, {"kl_block_size": 1}], ids=str
)
def test_options_are_checked(options):
    with pytest.raises(ValueError):
        PreferenceOptions(**options)


def test_options_of_a_config():
    class Config:
        max_length, dataset_num_proc, eos_token = 7, 3, None

    options = PreferenceOptions.of(Config(), kl_block_size=4)
    assert options == PreferenceOptions(max_length=7, num_proc=3, kl_block_size=4)


# ---- The cache ----


def test_tokens_are_found_again(tmp_path, tokenizer, monkeypatch):
    """A second run, with another limit and after use of the tokenizer, reads the tokens that the first one wrote."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))

    def run(max_length, **options):
        dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
        prepared, _ = prepare_unpaired_dataset(
            dataset, tokenizer, PreferenceOptions(max_length=max_length, **{"kl_block_size": 4, **options})
        )
        return prepared._fingerprint, prepared.to_list()

    first = run(100)
    tokenizer(["a", "the sky is blue"], padding=True, truncation=True, max_length=3)
    monkeypatch.setattr("trl.data.tokenization.tokenize_text", lambda *_: pytest.fail("tokenized again"))
    assert run(100) == first
    assert run(99) == first
    assert run(100, kl_block_size=2)[1] != first[1]
    assert run(6)[1] != []
    with pytest.raises(pytest.fail.Exception):
        run(100, eos_token="<|endoftext|>")
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(pytest.fail.Exception):
        run(100)


def test_datasets_that_differ_in_drops_differ_in_name(tokenizer):
    """What follows is cached under the name of what is left, so that precomputed columns never meet other rows."""
    dataset = Dataset.from_list([pair("the " * n, " sky", " sea") for n in (1, 10, 20)])
    names = [
        prepare_preference_dataset(dataset, tokenizer, PreferenceOptions(max_length=limit))[0]._fingerprint
        for limit in (100, 8, 15)
    ]
    assert len(set(names)) == 3


def test_two_processes_give_the_same_rows(tokenizer):
    one, report = prepare("dpo", PAIRS, tokenizer)
    two, other = prepare("dpo", PAIRS, tokenizer, num_proc=2)
    assert one == two
    assert np.isclose(report.prompt_share, other.prompt_share)
