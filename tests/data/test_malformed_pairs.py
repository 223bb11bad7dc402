"""
Two hundred malformed rows for each preparation, as a dataset and as a stream: each ends in an error that names the row
and the column, or in a counted drop. None ends in a traceback from the depths, and none is trained on.
"""

import random
import re

import pytest
from datasets import Dataset, IterableDataset

from trl.data.formats import DatasetFormatError
from trl.data.preference_preparation import (
    PreferenceOptions,
    prepare_preference_dataset,
    prepare_reward_dataset,
    prepare_unpaired_dataset,
)

GOOD_ROWS, BAD_ROW = 3, 2  # the bad row goes between good ones, as row 2
WORDS = ["the", "sky", "is", "blue", "and", "sea", "deep", "what", "plus", "answer", "today", "world", "hello"]
JUNK = [5, 2.5, True, ["a", "b"], [1, 2], [[]], [["a"]], {"a": 1}, {"text": "x"}, [None], [{}], [{"a": {"b": [1]}}]]


def words(rng, at_least=1):
    return " ".join(rng.choices(WORDS, k=rng.randint(at_least, 5)))


def good_row(rng, conversational, columns):
    texts = {"prompt": words(rng), "chosen": "yes " + words(rng), "rejected": "no " + words(rng)}
    texts["completion"] = texts["chosen"]
    if conversational:
        roles = {"prompt": "user"}
        row = {name: [{"role": roles.get(name, "assistant"), "content": text}] for name, text in texts.items()}
    else:
        row = {name: (text if name == "prompt" else " " + text) for name, text in texts.items()}
    row["label"] = rng.random() < 0.5
    row = {column: row[column] for column in columns}
    if "prompt" not in columns:  # the prompt is what both answers begin with
        prefix = [{"role": "user", "content": texts["prompt"]}] if conversational else texts["prompt"]
        row |= {answer: prefix + row[answer] for answer in ("chosen", "rejected")}
    return row


def text_columns(row):
    return [column for column in row if column not in ("label", "margin")]


# ---- What may be wrong with a row. Each takes a random generator, a good row and the columns of answers, and changes
# the row; it says which columns a message may name, or `None` where the row is to be dropped. ----


def missing(rng, row, answers):
    column = rng.choice(text_columns(row))
    row[column] = None
    return {column}


def absent(rng, row, answers):
    column = rng.choice(text_columns(row))
    del row[column]
    return {column}


def junk(rng, row, answers):
    column = rng.choice(text_columns(row))
    row[column] = rng.choice(JUNK)
    return {column}


def mixed_kinds(rng, row, answers):
    column = rng.choice(text_columns(row))
    value = row[column]
    row[column] = [{"role": "user", "content": value}] if isinstance(value, str) else value[0]["content"]
    return set(row)


def empty_answer(rng, row, answers):
    answer = rng.choice(answers)
    empty = [{"role": "assistant", "content": rng.choice(["", " "])}]
    if isinstance(row[answer], str):
        # Without a prompt, an answer that has nothing but the prompt in it is no empty one: its last letter is left.
        row[answer] = rng.choice(["", " ", "\n\t"])
    else:
        row[answer] = rng.choice([[], [*row[answer][:-1], *empty]])
    return None


def same_answers(rng, row, answers):
    if len(answers) == 1:
        return empty_answer(rng, row, answers)
    row["rejected"] = row["chosen"]
    return None


def bad_message(rng, row, answers):
    column = rng.choice(text_columns(row))
    if isinstance(row[column], str):
        return junk(rng, row, answers)
    message = dict(row[column][-1])
    message |= rng.choice(
        [
            {"role": None},
            {"role": ""},
            {"role": 3},
            {"role": "asistant"},
            {"role": "human"},
            {"role": "Assistant"},
            {"content": None},
            {"content": 5},
            {"content": {"text": "x"}},
            {"content": ["x"]},
            {"content": [{"type": "text"}]},
        ]
    )
    row[column] = [*row[column][:-1], message]
    return {column, *answers}


def wrong_role(rng, row, answers):
    answer = rng.choice(answers)
    if isinstance(row[answer], str):
        return junk(rng, row, answers)
    role = rng.choice(["user", "system", "tool", "narrator"])
    row[answer] = [{**message, "role": role} for message in row[answer]]
    return {answer, *answers}


def swapped(rng, row, answers):
    """Prompt and answer exchanged, or the label and the answer."""
    if "label" in row and rng.random() < 0.5:
        row["label"], row["completion"] = row["completion"], row["label"]
        return {"label", "completion"}
    if "prompt" not in row or isinstance(row["prompt"], str):
        return junk(rng, row, answers)
    answer = rng.choice(answers)
    row["prompt"], row[answer] = row[answer], row["prompt"]
    return {answer}


def bad_number(rng, row, answers):
    if "label" in row:
        row["label"] = rng.choice([None, "good", 2, -1, 0.5, float("nan"), [True]])
        return {"label"}
    if "margin" in row:
        row["margin"] = rng.choice([None, "large", float("nan"), float("inf"), -float("inf"), [1.0]])
        return {"margin"}
    return missing(rng, row, answers)


def bad_extras(rng, row, answers):
    if isinstance(row[answers[0]], str):
        return junk(rng, row, answers)
    column = rng.choice(["tools", "chat_template_kwargs"])
    row[column] = rng.choice(["{", '{"a": 1}', 5] if column == "tools" else ["x", 5, ["a"]])
    return {column}


def other_prompts(rng, row, answers):
    """Conversations that have nothing in common, or an empty prompt."""
    if isinstance(row[answers[0]], str):
        return junk(rng, row, answers)
    if "prompt" in row:
        row["prompt"] = []
        return {"prompt"}
    row["rejected"] = [{"role": "user", "content": "another question"}, row["rejected"][-1]]
    return {"chosen", "rejected"}


MUTATIONS = [
    missing, absent, junk, mixed_kinds, empty_answer, same_answers, bad_message, wrong_role, swapped, bad_number,
    bad_extras, other_prompts,
]  # fmt: skip


def malformed(kind, seed):
    """Rows, of which the one numbered `BAD_ROW` is malformed; the columns to be named; the names of both."""
    rng = random.Random(f"{kind} {seed}")
    conversational = rng.random() < 0.5
    pair = rng.choice([("prompt", "chosen", "rejected"), ("chosen", "rejected")])
    columns = pair if kind != "unpaired" or rng.random() < 0.4 else ("prompt", "completion", "label")
    rows = [good_row(rng, conversational, columns) for _ in range(GOOD_ROWS + 1)]
    if kind == "reward":
        rows = [{**row, "margin": rng.random()} for row in rows]
    mutation = MUTATIONS[seed % len(MUTATIONS)]
    answers = ("completion",) if "label" in columns else ("chosen", "rejected")
    if kind == "reward" and mutation in (other_prompts, swapped) and conversational:
        mutation = bad_message  # a reward model reads whole conversations: these are as good as others
    named = mutation(rng, rows[BAD_ROW], answers)
    for column in ("tools", "chat_template_kwargs"):
        if column in rows[BAD_ROW]:  # a stream takes its columns from the first row
            rows = [{column: None, **row} for row in rows]
    return rows, named, f"{mutation.__name__}, {'messages' if conversational else 'text'}, {columns}"


PREPARE = {
    "pairs": prepare_preference_dataset,
    "reward": prepare_reward_dataset,
    "unpaired": prepare_unpaired_dataset,
}


@pytest.mark.parametrize("kind", list(PREPARE))
def test_malformed_rows(kind, tokenizer):
    options = PreferenceOptions(kl_block_size=2 if kind == "unpaired" else None)
    for seed in range(200):
        rows, named, what = malformed(kind, seed)
        datasets = [IterableDataset.from_generator(lambda rows=rows: iter(rows))]
        if seed // len(MUTATIONS) % 3 == 0:  # a map-style dataset runs the same checks; a third will do
            datasets.append(Dataset.from_list(rows, on_mixed_types="use_json"))
        for dataset in datasets:
            check_end(PREPARE[kind], dataset, tokenizer, options, named, f"{kind} {seed}: {what}: {rows[BAD_ROW]}")


def check_end(prepare, dataset, tokenizer, options, named, what):
    try:
        prepared, report = prepare(dataset, tokenizer, options)
        kept = list(prepared)
    except DatasetFormatError as error:
        message = str(error)
        assert named is not None, f"{what} should be dropped, but: {message}"
        assert re.search(r"[Rr]ows?\b.* ?2\b", message) or "column" in message, f"{what}: names no row: {message}"
        assert any(f"`{column}`" in message for column in named), f"{what}: names no column: {message}"
    except Exception as error:
        raise AssertionError(f"{what} fails in the depths: {type(error).__name__}: {error}") from error
    else:
        assert named is None, f"{what} is trained on"
        assert (report.rows_in, report.rows_kept) == (GOOD_ROWS + 1, GOOD_ROWS), what
        assert [dropped.rows for dropped in report.dropped.values()] == [[BAD_ROW]], what
        assert len(kept) in (GOOD_ROWS, 2 * GOOD_ROWS), what


def test_the_good_rows_are_good(tokenizer):
    """The rows around the malformed ones are kept, so that it is the malformed one that ends a preparation."""
    for kind, prepare in PREPARE.items():
        for seed in range(20):
            rows, _, what = malformed(kind, seed)
            rows.pop(BAD_ROW)
            _, report = prepare(Dataset.from_list(rows), tokenizer, PreferenceOptions())
            assert report.rows_kept == report.rows_in == GOOD_ROWS, what
