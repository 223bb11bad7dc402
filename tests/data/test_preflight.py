"""The report before the first step counts what the prepared rows hold; the preview shows them token by token."""

import re
import sys

import numpy as np
import pytest
from datasets import Dataset, IterableDataset

from trl.data.dataset_report import HOPELESS_ROWS
from trl.data.preflight import PreparationReport, preview
from trl.data.preparation import LanguageModelingOptions, prepare_language_modeling_dataset


def report_of(rows, tokenizer, **options):
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    prepared, report = prepare_language_modeling_dataset(dataset, tokenizer, LanguageModelingOptions(**options))
    return prepared, report


def tokens(*labels):
    """Tokenized rows of which only the labels matter: 1 is trained, 0 is not."""
    rows = [[int(label) for label in row] for row in labels]
    return [{"input_ids": [7] * len(row), "labels": [7 if label else -100 for label in row]} for row in rows]


# ---- Counts ----


def test_counts(tokenizer):
    """Trained, context, cut and dropped tokens, each counted by hand."""
    _, report = report_of(tokens("0011", "000000", "001111", "000001", "1000"), tokenizer, max_length=4)
    assert (report.rows_in, report.rows_kept, report.rows_dropped) == (5, 2, 3)
    assert report.dropped["no trained token"].rows == [1, 4]
    assert report.dropped["no trained token left after truncation"].rows == [3]
    assert (report.tokens_trained, report.tokens_context) == (4, 4)
    assert (report.rows_truncated, report.tokens_cut) == (1, 2)
    assert (report.longest, report.median) == (6, 6)


def test_counts_are_those_of_the_prepared_rows(tokenizer):
    """What the report says is what the dataset holds, whatever the layout."""
    rows = [{"prompt": "what is " + "3 " * n, "completion": "the answer is " + "4, " * n} for n in range(1, 30)]
    for options in (
        {"max_length": 40},
        {"max_length": 40, "truncation_mode": "keep_end"},
        {"max_length": None},
        {"max_length": 64, "packing": True},
        {"max_length": 64, "packing": True, "packing_strategy": "bfd_split"},
        {"max_length": 64, "packing": True, "packing_strategy": "wrapped"},
    ):
        prepared, report = report_of(rows, tokenizer, **options)
        trained = context = 0
        for row in prepared:
            starts = np.cumsum([0, *row.get("seq_lengths", [])])[:-1] if "seq_lengths" in row else [0]
            labels = [-100 if i in set(starts) else label for i, label in enumerate(row["labels"])]
            trained += sum(label != -100 for label in labels)
            context += sum(label == -100 for label in labels)
        assert (report.tokens_trained, report.tokens_context) == (trained, context), options
        if options.get("packing"):
            places = len(prepared) * options["max_length"]
            assert report.rows_packed == len(prepared)
            assert report.packing_efficiency == pytest.approx((trained + context) / places)


def test_stop_token_share(tokenizer):
    """Cut rows lose their stop token, and the report shows it."""
    rows = [{"text": "hello"}, {"text": "the sky is blue and the sea is deep"}]
    assert report_of(rows, tokenizer)[1].stop_token_share == 1.0
    _, report = report_of(rows, tokenizer, max_length=4)
    assert report.stop_token_share == 0.5
    assert "<|im_end|> trained in 50.0% of examples" in report.render()


def test_note_on_another_end_of_turn(tokenizer):
    """Where turns end with another token than the end-of-sequence token, generation would not stop: the report says so."""
    tokenizer.eos_token = "<|endoftext|>"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    _, report = report_of([{"messages": turns}] * 3, tokenizer)
    assert report.stop_token_share == 0.0
    assert len(report.notes) == 1
    assert "eos_token='<|im_end|>'" in report.notes[0]
    assert "eos_token='<|im_end|>'" in report.render().replace("\n", " ")


def test_note_on_unused_mask(tokenizer):
    rows = [{"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]}]
    _, report = report_of(rows, tokenizer)
    assert any("`completion_mask` is there but not used" in note for note in report.notes)
    _, report = report_of(rows, tokenizer, completion_only_loss=True)
    assert not any("completion_mask" in note for note in report.notes)


# ---- The table ----


def test_table(tokenizer):
    _, report = report_of(tokens("0011", "0000", "001111"), tokenizer, max_length=4)
    text = re.sub(r"[│╭╮╰╯─┬┴]", " ", report.render())
    lines = {re.split(r"\s{2,}", line.strip())[0]: line for line in text.splitlines() if line.strip()}
    assert "Pre-flight: train dataset" in text
    assert re.search(r"examples\s+3", lines["examples"])
    assert "1 — no trained token (row 1)" in lines["dropped"]
    assert "4 (50.0%)" in lines["tokens trained"]
    assert "1 examples, 2 tokens cut at max_length=4" in lines["truncated"]
    assert "median 4, longest 6" in lines["length"]


def test_table_without_rich(tokenizer, monkeypatch):
    _, report = report_of(tokens("0011", "0000"), tokenizer, max_length=None)
    boxed = report.render()
    for module in ("rich", "rich.box", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, module, None)
    plain = report.render()
    assert plain != boxed
    assert plain.splitlines()[0] == "Pre-flight: train dataset"
    for label, value in report.rows():
        assert re.search(rf"^\s*{re.escape(label.strip())}\s+{re.escape(value)}$", plain, re.MULTILINE)
        assert value in boxed


def test_packed_table(tokenizer):
    _, report = report_of(tokens("01", "01", "0111"), tokenizer, max_length=4, packing=True)
    assert "2 rows (bfd), 100.0% full" in report.render()


# ---- Unusable ----


@pytest.mark.parametrize("rows_in", [0, 3])
def test_unusable(rows_in):
    report = PreparationReport(name="eval", rows_in=rows_in)
    report.drop("no trained token", range(rows_in))
    with pytest.raises(ValueError, match="empty" if rows_in == 0 else "rows 0, 1, 2: no trained token") as info:
        report.raise_if_unusable()
    assert "The eval dataset" in str(info.value)


def test_usable():
    PreparationReport(rows_in=2, rows_kept=1, tokens_trained=1).raise_if_unusable()
    PreparationReport(streaming=True).raise_if_unusable()  # nothing has been read yet


def test_stream_counts_each_reason(caplog):
    """Rows lost to their masks and rows lost to the cut are told apart, and each kind is warned of once."""
    report = PreparationReport(streaming=True)
    for first in (0, 3):
        report.count_stream(range(first, first + 3), np.array([0, 2, 2]), np.array([0, 0, 1]))
    assert (report.rows_in, report.rows_kept) == (6, 2)
    assert {reason: dropped.rows for reason, dropped in report.dropped.items()} == {
        "no trained token": [0, 3],
        "no trained token left after truncation": [1, 4],
    }
    assert len([record for record in caplog.records if "Further ones are counted" in record.message]) == 2
    assert "unknown: the dataset is streamed" in report.render()


def test_hopeless_stream_ends():
    report = PreparationReport(streaming=True)
    nothing = np.zeros(HOPELESS_ROWS - 1, int)
    report.count_stream(range(len(nothing)), nothing, nothing)
    with pytest.raises(ValueError, match="no token to train on"):
        report.count_stream([len(nothing)], np.array([0]), np.array([0]))


# ---- Preview ----

PAIR = {"prompt": "the sky", "completion": " is blue"}


def test_preview_marks(tokenizer):
    text = preview([PAIR], tokenizer, LanguageModelingOptions(), color=False)
    legend, header, body = text.split("\n", 2)
    assert legend == "Tokens: context ⟦trained⟧ ⟨cut: cut⟩"
    assert re.fullmatch(r"── row 0: (\d+) tokens \((\d+) context, (\d+) trained, 0 cut\)", header)
    assert body == "the sky⟦ is blue<|im_end|>⟧"


@pytest.mark.parametrize(("mode", "side"), [("keep_start", "end"), ("keep_end", "start")])
def test_preview_shows_the_cut(mode, side, tokenizer):
    length = len(tokenizer("the sky is blue")["input_ids"]) + 1
    options = LanguageModelingOptions(max_length=length - 1, truncation_mode=mode)
    body = preview([PAIR], tokenizer, options, color=False).split("\n", 2)[2]
    assert body == ("the sky⟦ is blue⟧⟨cut: <|im_end|>⟩" if side == "end" else "⟨cut: the⟩ sky⟦ is blue<|im_end|>⟧")


def test_preview_agrees_with_training(tokenizer):
    """The preview's trained tokens are those that the prepared rows train."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello world"}]
    rows = [{"messages": turns}, {"messages": turns * 2}, {"messages": turns * 3}]
    options = LanguageModelingOptions(max_length=40, assistant_only_loss=True)
    _, report = prepare_language_modeling_dataset(Dataset.from_list(rows), tokenizer, options)
    text = preview(rows, tokenizer, options, color=False)
    counts = re.findall(r"\((\d+) context, (\d+) trained, (\d+) cut\)", text)
    context, trained, cut = np.array(counts, int).sum(axis=0)
    assert (trained, context, cut) == (report.tokens_trained, report.tokens_context, report.tokens_cut)
    assert cut > 0


def test_preview_warns_of_rows_that_will_be_dropped(tokenizer):
    text = preview([PAIR], tokenizer, LanguageModelingOptions(max_length=1), color=False)
    assert "nothing trained: this row will be dropped" in text


def test_preview_colours_each_line(tokenizer):
    text = preview([{"text": "the sky\nis blue"}], tokenizer, LanguageModelingOptions())
    body = text.split("\n", 2)[2].split("\n")
    assert len(body) == 2
    assert all(line.endswith("\033[0m") for line in body)
    plain = re.sub(r"\033\[[0-9;]*m", "", "\n".join(body))
    assert plain == "the sky\nis blue<|im_end|>"


@pytest.mark.parametrize("kind", [list, Dataset.from_list, lambda rows: IterableDataset.from_generator(lambda: rows)])
def test_preview_of_any_rows(kind, tokenizer):
    """Lists, datasets and streams, the first rows of them; packing is left out."""
    options = LanguageModelingOptions(packing=True, max_length=64)
    text = preview(kind([{"text": "hello"}, {"text": "world"}, {"text": "sky"}]), tokenizer, options, n=2, color=False)
    assert text.count("── row") == 2
    assert "⟦" in text


def test_preview_of_formatted_and_tokenized_rows(tokenizer):
    text = preview(
        [{"q": "sky"}],
        tokenizer,
        LanguageModelingOptions(),
        color=False,
        formatting_func=lambda row: f"the {row['q']}",
    )
    assert "sky" in text
    assert "q" not in text.split("\n", 2)[2]
    ids = tokenizer("the sky is blue")["input_ids"]
    row = {"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]}
    body = preview([row], tokenizer, LanguageModelingOptions(), color=False).split("\n", 2)[2]
    assert re.fullmatch(r"the sky.*⟦.+⟧", body)


@pytest.mark.parametrize(
    ("rows", "message"), [([], "nothing to preview"), ([{"question": "a", "answer": "b"}], "rename_columns")]
)
def test_preview_of_nothing(rows, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        preview(rows, tokenizer, LanguageModelingOptions())
