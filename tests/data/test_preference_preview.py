"""The preview of preferences shows what the collator keeps, marked as what it is."""

import re

import pytest

from trl.data.preference_preparation import (
    PreferenceOptions,
    prepare_preference_dataset,
    prepare_reward_dataset,
    prepare_unpaired_dataset,
)
from trl.data.preference_preview import preview_preferences

PAIRS = [
    {
        "prompt": [{"role": "user", "content": "what is 2 plus 1?"}],
        "chosen": [{"role": "assistant", "content": "the answer is 3."}],
        "rejected": [{"role": "assistant", "content": "the sea is deep"}],
    },
    {"prompt": [{"role": "user", "content": "hello"}], "chosen": [], "rejected": []},
]
LABELLED = [
    {"prompt": PAIRS[0]["prompt"], "completion": PAIRS[0]["chosen"], "label": label} for label in (True, False)
]
PROMPT = "<|im_start|>user\nwhat is 2 plus 1?<|im_end|>\n<|im_start|>assistant\n"


def show(rows, tokenizer, prepare, color=False, **options) -> str:
    return preview_preferences(rows, tokenizer, PreferenceOptions(**options), prepare, color=color)


def test_pair(tokenizer):
    """The prompt once, each answer marked whole, and the row that is dropped with its reason."""
    text = show(PAIRS[:1], tokenizer, prepare_preference_dataset)
    prompt = len(tokenizer(PROMPT)["input_ids"])
    assert f"prompt, {prompt} tokens:\n{PROMPT}\n" in text
    assert "tokens:\n⟦the answer is 3.<|im_end|>\n⟧" in text
    assert "tokens:\n⟪the sea is deep<|im_end|>\n⟫" in text
    assert "cut:" not in text.split("\n", 1)[1]


def test_a_dropped_row_says_why(tokenizer):
    long_prompt = {**PAIRS[0], "prompt": [{"role": "user", "content": "how are you today? " * 20}]}
    text = show([long_prompt, PAIRS[0]], tokenizer, prepare_preference_dataset, max_length=60)
    assert re.search(r"── row 0: dropped — .+\n── row 1\n", text)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_cut(tokenizer, mode):
    prompt, answer = (len(tokenizer(text)["input_ids"]) for text in (PROMPT, "the answer is 3.<|im_end|>\n"))
    kept = prompt + answer - 3
    text = show(PAIRS[:1], tokenizer, prepare_preference_dataset, max_length=kept, truncation_mode=mode)
    if mode == "keep_start":
        assert f"chosen, {answer} tokens, 3 of them cut:" in text
        end = tokenizer.decode(tokenizer("the answer is 3.<|im_end|>\n")["input_ids"][-3:])
        assert f"⟨cut: {end}⟩" in text
    else:
        start = tokenizer.decode(tokenizer(PROMPT)["input_ids"][:3])
        assert f"⟨cut: {start}⟩" in text
        assert f"chosen, {answer} tokens:" in text


def test_labels(tokenizer):
    text = show(LABELLED, tokenizer, prepare_unpaired_dataset)
    first, second = text.split("── row 1")
    assert "label True" in first
    assert "⟦the answer is 3." in first
    assert "label False" in second
    assert "⟪the answer is 3." in second


def test_pairs_taken_apart_stay_under_their_row(tokenizer):
    text = show(PAIRS[:1], tokenizer, prepare_unpaired_dataset)
    assert text.count("── row") == 1
    assert text.index("label True") < text.index("label False")


def test_whole_sequences_share_what_they_have_in_common(tokenizer):
    text = show(PAIRS[:1], tokenizer, prepare_reward_dataset)
    before = PROMPT + "the"  # the answers begin with the same word
    assert text.split("tokens:\n")[1].startswith(before)
    assert "⟦ answer is 3.<|im_end|>" in text
    assert "⟪ sea is deep<|im_end|>" in text


def test_colors(tokenizer):
    text = show(PAIRS[:1], tokenizer, prepare_preference_dataset, color=True)
    assert "\033[1;32mthe answer is 3." in text
    assert "\033[1;33mthe sea is deep" in text
    assert "⟦" not in text


def test_no_rows(tokenizer):
    with pytest.raises(ValueError, match="no rows"):
        show([], tokenizer, prepare_preference_dataset)
