"""Weights on their way to a server: what is declared, the headers of files, and the files."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from trl.rollouts import weight_staging
from trl.rollouts.weight_staging import (
    ConflictError,
    ExpectedWeight,
    MismatchError,
    SentWeight,
    TooLargeError,
    UnknownUpdateError,
    WeightsError,
    WeightStaging,
    check_declaration,
    check_header,
)

EXPECTED = {
    "a.weight": ExpectedWeight("float32", (4, 3)),
    "b.weight": ExpectedWeight("bfloat16", (2,)),
    "steps": ExpectedWeight("int64", ()),
}
DECLARED = [["a.weight", "float32", [4, 3]], ["b.weight", "float32", [2]], ["steps", "int64", []]]
TENSORS = {"a.weight": torch.arange(12.0).view(4, 3), "b.weight": torch.ones(2), "steps": torch.tensor(7)}


def declared() -> dict[str, SentWeight]:
    return check_declaration(DECLARED, EXPECTED)


def split(data: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(data[:8], "little")
    return data[8 : 8 + size], data[8 + size :]


def joined(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


# ---- What is declared ----


def test_declaration_keeps_its_order_and_knows_its_sizes():
    weights = check_declaration(DECLARED[::-1], EXPECTED)
    assert list(weights) == ["steps", "b.weight", "a.weight"]
    assert [weight.size for weight in weights.values()] == [8, 8, 48]


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        (DECLARED[:2], "no steps"),
        ([*DECLARED, ["c", "float32", [1]]], "no c"),
        ([*DECLARED, DECLARED[1]], "twice: b.weight"),
        ([["a.weight", "float32", [3, 4]], *DECLARED[1:]], r"a.weight \[3, 4\] \(served: \[4, 3\]\)"),
        ([["a.weight", "float32", [4, 3, 1]], *DECLARED[1:]], "a.weight"),
        ([["a.weight", "int8", [4, 3]], *DECLARED[1:]], "a.weight int8"),
        ([["a.weight", "float8", [4, 3]], *DECLARED[1:]], "a.weight float8"),
        ([*DECLARED[:2], ["steps", "float32", []]], "steps float32"),
        ([*DECLARED, ["lm_head.weight", "float32", [1]]], "tie_word_embeddings"),
    ],
)
def test_declaration_of_another_model(parameters, told):
    with pytest.raises(MismatchError, match=told):
        check_declaration(parameters, EXPECTED)


def test_only_the_first_offenders_are_named():
    parameters = [*DECLARED, *([f"x{number}", "float32", [1]] for number in range(1000))]
    with pytest.raises(MismatchError, match="x4 and 995 more") as caught:
        check_declaration(parameters, EXPECTED)
    assert len(str(caught.value)) < 500


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["float32", "steps"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(json_values)
def test_declaration_of_anything(value):
    with pytest.raises(WeightsError):
        check_declaration(value, EXPECTED)


@given(st.sampled_from(range(3)), st.sampled_from(range(3)), json_values)
def test_declaration_with_one_thing_changed(entry, part, value):
    parameters = json.loads(json.dumps(DECLARED))
    parameters[entry][part] = value
    try:
        weights = check_declaration(parameters, EXPECTED)
    except WeightsError:
        return
    assert {name: weight.shape for name, weight in weights.items()} == {n: e.shape for n, e in EXPECTED.items()}


# ---- Headers ----


def test_header_of_a_whole_file():
    header, data = split(save(TENSORS, metadata={"format": "pt"}))
    assert sorted(check_header(header, len(data), declared())) == sorted(TENSORS)


def entry(begin: int, end: int, dtype: str = "F32", shape: tuple = (2,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


B, A, STEPS = entry(0, 8), entry(8, 56, shape=(4, 3)), entry(56, 64, "I64", ())


@pytest.mark.parametrize(
    ("table", "data_bytes", "told"),
    [
        ({}, 0, "no tensors"),
        ({"__metadata__": {}}, 0, "no tensors"),
        ([], 0, "not an object"),
        ({"b.weight": B}, 9, "data has 9"),
        ({"b.weight": B}, 0, "data has 0"),
        ({"b.weight": entry(1, 9)}, 9, "begins at byte 1"),
        ({"b.weight": entry(-8, 0)}, 8, "whole numbers"),
        ({"b.weight": entry(8, 0)}, 8, "span"),
        ({"b.weight": entry(0, 12)}, 12, "span"),
        ({"b.weight": entry(2**64, 2**64 + 8)}, 8, "begins"),
        ({"b.weight": B, "a.weight": entry(0, 48, shape=(4, 3))}, 48, "begins"),
        ({"b.weight": B, "a.weight": entry(9, 57, shape=(4, 3))}, 57, "begins"),
        ({"b.weight": entry(0, 4, "F16")}, 4, "declared as float32"),
        ({"b.weight": entry(0, 8, "F8_E5M2", (8,))}, 8, "declared as float32"),
        ({"b.weight": entry(0, 8, shape=(1, 2))}, 8, "another shape"),
        ({"b.weight": {**B, "shape": [True, 2]}}, 8, "whole numbers"),
        ({"b.weight": {**B, "more": 1}}, 8, "has to say"),
        ({"b.weight": {**B, "data_offsets": [0, 4, 8]}}, 8, "span"),
        ({"unknown": B}, 8, "not declared"),
    ],
)
def test_headers_that_lie(table, data_bytes, told):
    with pytest.raises(WeightsError, match=told):
        check_header(json.dumps(table).encode(), data_bytes, declared())


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"b.weight": ' + json.dumps(B).encode() + b', "b.weight": ' + json.dumps(B).encode() + b"}",
        b'{"b.weight": {"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}',
        b'{"b.weight": {"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,8]}}',
        b"\xff\xfe",
    ],
)
def test_headers_that_are_not_one(header):
    with pytest.raises(WeightsError):
        check_header(header, 8, declared())


names = st.sampled_from(["a.weight", "b.weight", "steps", "c", "__metadata__"])
entries = st.sampled_from([A, B, STEPS]) | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I64", "F16", "BOOL"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-8, 72), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=300)
@given(st.dictionaries(names, entries, max_size=4), st.sampled_from([8, 48, 56, 64]))
def test_accepted_headers_are_read_alike_by_safetensors(tmp_path_factory, table, data_bytes):
    """Whatever is let through, the library that reads the file later sees the declared tensors in it."""
    header, wanted = json.dumps(table).encode(), declared()
    try:
        found = check_header(header, data_bytes, wanted)
    except WeightsError:
        return
    if "__metadata__" in table:
        return  # ignored here; the library has its own opinion of it
    loaded = load(joined(header, bytes(data_bytes)))
    assert set(loaded) == set(found)
    for name, tensor in loaded.items():
        assert (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) == (
            wanted[name].dtype,
            wanted[name].shape,
        )


# ---- Updates ----


@pytest.fixture
def staging(tmp_path):
    staging = WeightStaging(str(tmp_path))
    yield staging
    staging.close()


def receive(update, tensors: dict) -> None:
    header, data = split(save(tensors))
    incoming = update.receive(header, len(data))
    incoming.write(data)
    incoming.finish()


def test_files_come_back_as_they_were_sent(staging):
    update = staging.begin("me", declared())
    assert update.missing_bytes == 64
    receive(update, {"b.weight": TENSORS["b.weight"]})
    assert not update.is_complete
    receive(update, {name: TENSORS[name] for name in ("a.weight", "steps")})
    assert update.is_complete
    assert update.missing_bytes == 0
    found = {}
    for path in update.folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in TENSORS.items()}


def test_nobody_else_can_read_the_files(staging):
    update = staging.begin("me", declared())
    receive(update, TENSORS)
    assert os.stat(staging.folder).st_mode & 0o077 == 0
    assert os.stat(update.folder).st_mode & 0o077 == 0


def test_a_tensor_is_sent_once(staging):
    update = staging.begin("me", declared())
    header, data = split(save({"b.weight": TENSORS["b.weight"]}))
    incoming = update.receive(header, len(data))
    with pytest.raises(WeightsError, match="came already"):  # while it is on its way, too
        update.receive(header, len(data))
    incoming.abort()
    assert update.missing_bytes == 64
    assert list(update.folder.iterdir()) == []
    receive(update, {"b.weight": TENSORS["b.weight"]})


def test_an_update_is_not_complete_while_a_file_is_on_its_way(staging):
    update = staging.begin("me", declared())
    header, data = split(save(TENSORS))
    incoming = update.receive(header, len(data))
    assert not update.wanted
    assert not update.is_complete
    incoming.write(data)
    incoming.finish()
    assert update.is_complete


def test_the_same_owner_begins_anew(staging):
    old = staging.begin("me", declared())
    header, data = split(save(TENSORS))
    incoming = old.receive(header, len(data))
    new = staging.begin("me", declared())
    assert not old.folder.exists()
    with pytest.raises(UnknownUpdateError):
        staging.find(old.token)
    assert staging.find(new.token) is new
    incoming.write(data)
    with pytest.raises(UnknownUpdateError, match="dropped"):
        incoming.finish()


def test_another_owner_waits_until_the_first_is_idle(staging, monkeypatch):
    update = staging.begin("me", declared())
    with pytest.raises(ConflictError, match="'me' is sending"):
        staging.begin("you", declared())
    now = update._touched
    monkeypatch.setattr(weight_staging.time, "monotonic", lambda: now + 61)
    assert staging.begin("you", declared()).owner == "you"


def test_no_update_takes_the_place_of_one_that_is_loaded(staging, monkeypatch):
    update = staging.begin("me", declared())
    update.is_loading = True
    monkeypatch.setattr(weight_staging, "IDLE_SECONDS", -1.0)
    for owner in ("me", "you"):
        with pytest.raises(ConflictError, match="being loaded"):
            staging.begin(owner, declared())


def test_no_room(staging, monkeypatch):
    monkeypatch.setattr(weight_staging.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 63})())
    with pytest.raises(TooLargeError, match="TRL_SERVER_STAGING_DIR"):
        staging.begin("me", declared())
    assert staging.current is None


@pytest.mark.parametrize("token", ["", "x", "\udcff", "é" * 10])
def test_unknown_tokens(staging, token):
    with pytest.raises(UnknownUpdateError):
        staging.find(token)
    staging.begin("me", declared())
    with pytest.raises(UnknownUpdateError):
        staging.find(token)


def test_nothing_is_left_on_disk(tmp_path):
    staging = WeightStaging(str(tmp_path))
    receive(staging.begin("me", declared()), TENSORS)
    staging.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_server_left_is_removed_and_a_living_ones_is_not(tmp_path, staging):
    abandoned = tmp_path / f"{weight_staging.FOLDER_PREFIX}old"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    (abandoned / "000000.safetensors").write_bytes(b"x")
    other = tmp_path / f"{weight_staging.FOLDER_PREFIX}without-lock"
    other.mkdir()
    second = WeightStaging(str(tmp_path))
    try:
        assert not abandoned.exists()
        assert other.exists()
        assert staging.folder.exists()
    finally:
        second.close()


def test_safetensors_refuses_what_is_cut():
    """What the check of lengths rests on: a file is never read with less data than its header says."""
    data = save(TENSORS)
    with pytest.raises(SafetensorError):
        load(data[:-1])
