"""Datasets from wherever they lie, alone and mixed."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict
from hypothesis import given
from hypothesis import strategies as st

from trl.data.mixture import load_any_dataset, load_mixture, share_rows


def rows_of(n, source="a"):
    return [{"text": f"{source}{i}", "i": i} for i in range(n)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with one small dataset in every form."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    folder.mkdir()
    dataset = Dataset.from_list(rows_of(3))
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(3))
    (folder / "rows.jsonl").write_text(lines)
    (folder / "rows.json").write_text(lines)
    with gzip.open(folder / "rows.jsonl.gz", "wt") as file:
        file.write(lines)
    dataset.to_csv(folder / "rows.csv", index=False)
    (folder / "rows.tsv").write_text((folder / "rows.csv").read_text().replace(",", "\t"))
    dataset.to_parquet(folder / "rows.parquet")
    dataset.save_to_disk(folder / "saved")
    DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(folder / "saved_dict")
    (folder / "plain").mkdir()
    (folder / "plain" / "train.jsonl").write_text(lines)
    return folder


FORMS = [
    "rows.jsonl",
    "rows.json",
    "rows.jsonl.gz",
    "rows.csv",
    "rows.tsv",
    "rows.parquet",
    "saved",
    "saved_dict",
    "plain",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_local_form(files, form, streaming):
    """One split, the same rows, loaded or streamed."""
    dataset = load_any_dataset(str(files / form), split="train", streaming=streaming)
    assert list(dataset) == rows_of(3)


def test_all_splits(files):
    assert set(load_any_dataset(str(files / "saved_dict"))) == {"train", "test"}
    assert set(load_any_dataset(str(files / "saved_dict"), streaming=True)) == {"train", "test"}
    assert set(load_any_dataset(str(files / "rows.jsonl"))) == {"train"}


def test_loader_with_files(files):
    """A loader's name with `data_files` works as in the datasets library."""
    dataset = load_any_dataset("json", data_files=str(files / "rows.jsonl"), split="train[:2]")
    assert dataset.to_list() == rows_of(2)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "missing.jsonl"])
def test_nothing_there(path):
    with pytest.raises(FileNotFoundError, match=f"There is no dataset at {path}"):
        load_any_dataset(path)


def test_file_of_another_kind(tmp_path):
    (tmp_path / "rows.docx").write_text("")
    with pytest.raises(ValueError, match=r"rows.docx is a file of a kind.*\.jsonl"):
        load_any_dataset(str(tmp_path / "rows.docx"))


def test_unknown_split(files):
    with pytest.raises(ValueError, match="has no split 'dev'; it has 'train', 'test'"):
        load_any_dataset(str(files / "saved_dict"), split="dev")


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures


def part(path, **options):
    defaults = {
        "name": None,
        "data_dir": None,
        "data_files": None,
        "split": "train",
        "columns": None,
        "fraction": None,
    }
    return SimpleNamespace(path=str(path), **{**defaults, **options})


def mixture(*parts, streaming=False, test_split_size=None):
    return SimpleNamespace(datasets=list(parts), streaming=streaming, test_split_size=test_split_size)


@pytest.fixture
def two(tmp_path):
    """Ten rows `a0..a9` and four rows `b0..b3`, the latter with one column more."""
    Dataset.from_list(rows_of(10)).save_to_disk(tmp_path / "a")
    Dataset.from_list([{**row, "extra": "x"} for row in rows_of(4, "b")]).save_to_disk(tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def test_parts_follow_one_another(two):
    loaded = load_mixture(mixture(part(two[0], columns=["text"]), part(two[1], columns=["text"])))
    assert isinstance(loaded, DatasetDict)
    assert set(loaded) == {"train"}
    assert loaded["train"].column_names == ["text"]
    assert loaded["train"]["text"][:] == [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(4)]


def test_fractions_take_the_first_rows(two):
    """Shares are relative to one another; the scarcer dataset gives all it has."""
    options = {"columns": ["text"]}
    loaded = load_mixture(mixture(part(two[0], fraction=0.2, **options), part(two[1], fraction=0.2, **options)))
    assert loaded["train"]["text"][:] == [f"{source}{i}" for source in "ab" for i in range(4)]
    loaded = load_mixture(mixture(part(two[0], fraction=2, **options), part(two[1], fraction=1, **options)))
    assert loaded["train"]["text"][:] == [f"a{i}" for i in range(8)] + [f"b{i}" for i in range(4)]


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 1)), min_size=1, max_size=5))
def test_shares_are_as_asked_and_as_large_as_can_be(drawn):
    """No dataset gives more than it has, one gives everything, and each count is its share rounded."""
    num_rows, fractions = map(list, zip(*drawn, strict=True))
    counts = share_rows(num_rows, fractions)
    assert all(count <= rows for count, rows in zip(counts, num_rows, strict=True))
    assert any(count == rows for count, rows in zip(counts, num_rows, strict=True))
    scale = min(rows / fraction for rows, fraction in drawn)
    for count, fraction in zip(counts, fractions, strict=True):
        assert abs(count - fraction * scale) <= 0.5 + 1e-6


def test_test_split(two):
    loaded = load_mixture(mixture(part(two[0]), test_split_size=0.2))
    assert (len(loaded["train"]), len(loaded["test"])) == (8, 2)
    assert sorted(loaded["train"]["i"][:] + loaded["test"]["i"][:]) == list(range(10))
    assert len(load_mixture(mixture(part(two[0]), test_split_size=3))["test"]) == 3


def test_streaming(two):
    loaded = load_mixture(mixture(part(two[0]), part(two[1], columns=["text", "i"]), streaming=True))
    assert isinstance(loaded, IterableDatasetDict)
    assert [row["text"] for row in loaded["train"]] == [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mixture(), "The dataset mixture is empty"),
        (mixture(part("a", fraction=0.5), part("b")), "it is missing for b"),
        (mixture(part("a", fraction=0.5), streaming=True), "`fraction` does not go with streaming"),
        (mixture(part("a", fraction=0.0)), "Every `fraction` must be above 0"),
        (mixture(part("a"), streaming=True, test_split_size=0.1), "`test_split_size` does not go with streaming"),
    ],
)
def test_what_cannot_be_mixed_is_refused_before_loading(config, message):
    with pytest.raises(ValueError, match=message):
        load_mixture(config)


def test_missing_columns_are_named(two):
    with pytest.raises(ValueError, match="has no column 'prompt'; it has 'text', 'i'"):
        load_mixture(mixture(part(two[0], columns=["text", "prompt"])))
