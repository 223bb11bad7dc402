"""Packing: the recorded rows exactly, the properties that hold for any input, and every kind of dataset."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import load_reference
from trl.data.packing import (
    assign_bins,
    get_dataset_format,
    pack_best_fit,
    pack_dataset,
    pack_wrapped,
    packing_efficiency,
)

PACKING_CASES = {name: case for name, case in load_reference("data").items() if name.startswith("pack_")}
BEST_FIT = ["bfd", "bfd_split"]
STRATEGIES = [*BEST_FIT, "wrapped"]


def running_rows(lengths, with_labels=True):
    """Columns of running integers cut into rows of these lengths, so that each token is told by its value."""
    ends = np.cumsum(lengths)
    columns = {"input_ids": [list(range(end - n, end)) for n, end in zip(lengths, ends, strict=True)]}
    if with_labels:
        columns["labels"] = [[-100 if token % 3 == 0 else token for token in row] for row in columns["input_ids"]]
    return columns


@pytest.mark.parametrize("name", PACKING_CASES)
def test_recorded_rows(name):
    """Rows, their order and the lengths of their documents are the recorded ones, per map batch."""
    case = PACKING_CASES[name]
    dataset = Dataset.from_dict(running_rows(case["inputs"]["lengths"], "labels" in case["inputs"]))
    config = case["config"]
    map_kwargs = {"batch_size": config["map_batch_size"]} if "map_batch_size" in config else None
    packed = pack_dataset(dataset, config["seq_length"], config["strategy"], map_kwargs)
    assert packed[:] == case["outputs"]


# ---------------------------------------------------------------------------------------------------------------------
# Properties

lengths_and_capacity = st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 20))


@settings(deadline=None, max_examples=200)
@given(lengths_and_capacity)
def test_split_keeps_every_token_once_and_documents_in_order(drawn):
    """bfd_split: no token is lost or doubled, no row overflows, every document is a run of consecutive tokens."""
    lengths, capacity = drawn
    packed = pack_best_fit(pa.table(running_rows(lengths)), seq_length=capacity, split_overlong=True).to_pydict()
    tokens = [token for row in packed["input_ids"] for token in row]
    assert sorted(tokens) == list(range(sum(lengths)))
    for row, labels, documents in zip(packed["input_ids"], packed["labels"], packed["seq_lengths"], strict=True):
        assert 0 < len(row) == len(labels) == sum(documents) <= capacity
        assert labels == [-100 if token % 3 == 0 else token for token in row]
        start = 0
        for n in documents:
            assert row[start : start + n] == list(range(row[start], row[start] + n))
            start += n


@settings(deadline=None, max_examples=200)
@given(lengths_and_capacity)
def test_bfd_keeps_the_beginning_of_every_document(drawn):
    """bfd: each document is whole in one row, or its first `seq_length` tokens are."""
    lengths, capacity = drawn
    rows = running_rows(lengths)
    packed = pack_best_fit(pa.table(rows), seq_length=capacity, split_overlong=False).to_pydict()
    found = []
    for row, documents in zip(packed["input_ids"], packed["seq_lengths"], strict=True):
        ends = np.cumsum(documents)
        found += [row[end - n : end] for n, end in zip(documents, ends, strict=True)]
    assert sorted(found) == [row[:capacity] for row in rows["input_ids"] if row]


@settings(deadline=None, max_examples=200)
@given(lengths_and_capacity)
def test_wrapped_is_one_stream_cut_evenly(drawn):
    """wrapped: the rows joined are the documents joined, and only the last row may be short."""
    lengths, capacity = drawn
    packed = pack_wrapped(pa.table(running_rows(lengths)), seq_length=capacity).to_pydict()
    assert [token for row in packed["input_ids"] for token in row] == list(range(sum(lengths)))
    assert all(len(row) == capacity for row in packed["input_ids"][:-1])
    assert all(row for row in packed["input_ids"])


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 30).flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), max_size=60), st.just(c))))
def test_bins_are_chosen_by_best_fit(drawn):
    """Replaying the placement, longest first: each item lies in a fullest bin that had room, or opened the next one."""
    lengths, capacity = drawn
    order, counts = assign_bins(lengths, capacity)
    assert sorted(order) == list(range(len(lengths)))
    bin_of = dict(zip(order.tolist(), np.repeat(np.arange(len(counts)), counts).tolist(), strict=True))
    room = []
    for item in np.argsort(-np.array(lengths, dtype=int), kind="stable").tolist():
        fitting = [free for free in room if free >= lengths[item]]
        chosen = bin_of[item]
        if fitting:
            assert room[chosen] == min(fitting)
        else:
            assert chosen == len(room)
            room.append(capacity)
        room[chosen] -= lengths[item]
    assert len(room) == len(counts)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of datasets


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_kind_of_dataset_gives_the_same_rows(strategy):
    """A dict of datasets and streams are packed as the plain dataset is."""
    dataset = Dataset.from_dict(running_rows([5, 2, 3, 1, 4, 7, 2] * 4))
    expected = pack_dataset(dataset, 8, strategy, {"batch_size": 10}).to_list()
    stream = dataset.to_iterable_dataset()
    generated = IterableDataset.from_generator(dataset.__iter__)
    assert list(pack_dataset(stream, 8, strategy, {"batch_size": 10})) == expected
    assert list(pack_dataset(generated, 8, strategy, {"batch_size": 10})) == expected
    both = pack_dataset(DatasetDict(train=dataset, test=dataset), 8, strategy, {"batch_size": 10})
    assert isinstance(both, DatasetDict)
    assert both["train"].to_list() == both["test"].to_list() == expected
    streams = pack_dataset(IterableDatasetDict(train=stream), 8, strategy, {"batch_size": 10})
    assert isinstance(streams, IterableDatasetDict)
    assert list(streams["train"]) == expected


def test_sliced_and_filtered_rows_are_packed_as_seen():
    """Arrow slices and index mappings share one buffer with rows that were left out; none of those may leak in."""
    dataset = Dataset.from_dict(running_rows([5, 2, 3, 1, 4]))
    assert pack_dataset(dataset.select(range(2, 4)), 4)["input_ids"][:] == [[7, 8, 9, 10]]
    assert pack_dataset(dataset.select([4, 3]), 5)["input_ids"][:] == [[11, 12, 13, 14, 10]]
    table = pa.table(running_rows([5, 2, 3, 1, 4])).slice(1, 2)
    packed = pack_best_fit(table, seq_length=5, split_overlong=False)
    assert packed["input_ids"].to_pylist() == [[7, 8, 9, 5, 6]]


@pytest.mark.parametrize("kind", [List(Value("int32")), List(Value("int64")), List(Value("int32"), length=3)])
def test_token_types_are_kept(kind):
    """Ids stay 32-bit where they were; lists of fixed length become lists."""
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]]}).cast_column("input_ids", kind)
    packed = pack_dataset(dataset, 6)
    assert packed.features["input_ids"] == List(kind.feature)
    assert packed["input_ids"][:] == [[1, 2, 3, 4, 5, 6]]


def test_large_lists():
    """Columns with 64-bit offsets are packed, and stay such columns."""
    table = pa.table({"input_ids": pa.array([[1, 2], [3]], type=pa.large_list(pa.int64()))})
    packed = pack_best_fit(table, seq_length=3, split_overlong=True)
    assert packed["input_ids"].to_pylist() == [[1, 2, 3]]
    assert packed.schema.field("input_ids").type == pa.large_list(pa.int64())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_missing_and_empty_rows_vanish(strategy):
    """A row without tokens, or without a list at all, is no document."""
    table = Dataset.from_dict({"input_ids": [[], [1, 2], None, [3]]})
    packed = pack_dataset(table, 4, strategy)
    assert packed["input_ids"][:] == [[1, 2, 3]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_to_pack(strategy):
    """A dataset, or a batch of it, without any token gives no row."""
    nothing = Dataset.from_dict({"input_ids": [[], []]}).cast_column("input_ids", List(Value("int64")))
    assert len(pack_dataset(nothing, 4, strategy)) == 0
    assert len(pack_dataset(nothing.select([]), 4, strategy)) == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_format_is_restored(strategy):
    """Packing goes through Arrow, but the user sees the format of before, with the new column in it."""
    dataset = Dataset.from_dict(running_rows([3, 1])).with_format("torch", columns=["input_ids"])
    packed = pack_dataset(dataset, 4, strategy)
    assert packed.format["type"] == "torch"
    assert set(packed.format["columns"]) == {"input_ids"} | (set() if strategy == "wrapped" else {"seq_lengths"})
    assert packed[0]["input_ids"].tolist() == [0, 1, 2, 3]
    plain = pack_dataset(Dataset.from_dict(running_rows([3, 1])), 4, strategy)
    assert plain.format["type"] is None
    stream = Dataset.from_dict(running_rows([3, 1])).to_iterable_dataset().with_format("numpy")
    assert isinstance(next(iter(pack_dataset(stream, 4, strategy)))["input_ids"], np.ndarray)


def test_get_dataset_format_round_trip():
    """What is read from a dataset brings its format back."""
    dataset = Dataset.from_dict(running_rows([3, 1]))
    formatted = dataset.with_format("numpy", columns=["labels"], output_all_columns=True, dtype="float32")
    restored = dataset.with_format(**get_dataset_format(formatted))
    assert restored.format == formatted.format
    assert dataset.with_format(**get_dataset_format(dataset)).format == dataset.format


def test_second_run_hits_the_cache(tmp_path):
    """A second process finds the packed rows of the first: the fingerprint depends on the data and options alone."""
    script = (
        "import sys; from datasets import load_from_disk; from trl import pack_dataset; "
        "d = load_from_disk(sys.argv[1]); p = pack_dataset(d, int(sys.argv[2]), sys.argv[3]); "
        "print(p.cache_files[0]['filename'])"
    )
    Dataset.from_dict(running_rows([5, 2, 3])).save_to_disk(tmp_path / "rows")

    def run(*options):
        command = [sys.executable, "-c", script, str(tmp_path / "rows"), *options]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    first, second, other = run("6", "bfd"), run("6", "bfd"), run("6", "bfd_split")
    assert first.stdout == second.stdout != other.stdout
    assert "Map:" in first.stderr
    assert "Map:" not in second.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_unknown_strategy():
    with pytest.raises(
        ValueError, match="Unknown packing strategy 'ffd': choose one of 'bfd', 'bfd_split', 'wrapped'"
    ):
        pack_dataset(Dataset.from_dict(running_rows([3])), 4, "ffd")


@pytest.mark.parametrize("seq_length", [0, -1])
def test_seq_length_below_one(seq_length):
    with pytest.raises(ValueError, match="`seq_length` must be at least 1 token"):
        pack_dataset(Dataset.from_dict(running_rows([3])), seq_length)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_column_that_is_no_list(strategy):
    with pytest.raises(TypeError, match="`text` holds string. Select the token columns first"):
        pack_dataset(Dataset.from_dict({"input_ids": [[1]], "text": ["a"]}), 4, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_columns_of_unequal_lengths(strategy):
    rows = {"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3]]}
    with pytest.raises(ValueError, match="in row 1 of the batch `input_ids` has 2 and `labels` has 1"):
        pack_dataset(Dataset.from_dict(rows), 4, strategy)


# ---------------------------------------------------------------------------------------------------------------------
# Efficiency


def test_packing_efficiency():
    """Tokens over places, from packed rows or their lengths."""
    packed = pack_dataset(Dataset.from_dict(running_rows([3, 3, 2])), 4)
    assert packed["input_ids"][:] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert packing_efficiency(packed, 4) == packing_efficiency([3, 3, 2], 4) == pytest.approx(8 / 12)
    assert packing_efficiency([], 4) == 0.0
