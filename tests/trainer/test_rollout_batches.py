"""Rollouts as tensors, and back to where each completion token stands."""

from __future__ import annotations

import math

import pytest
import torch

from trl.ops.scoring import score_tokens
from trl.rollouts.types import Rollout
from trl.trainer.rollout_batches import (
    IMAGE_INPUTS,
    RolloutBuffer,
    balance_rows,
    completion_values,
    inputs_of,
    join_batches,
    labels_of,
    rollouts_to_batch,
    select_rows,
    shuffle_groups,
)

from ..conftest import build_model

ROLLOUTS = [
    Rollout([5, 6, 7], [8, 9], sampled_logps=[-1.0, -2.0]),
    Rollout([5, 6, 7], [10, 11, 12, 13], policy_mask=[1, 0, 0, 1]),
    Rollout([4], [14], is_truncated=True),
]


def make_batch(**options):
    options = {"pad_token_id": 3, "device": torch.device("cpu"), **options}
    return rollouts_to_batch(ROLLOUTS, [0, 0, 1], **options)


def test_rows_and_masks():
    batch = make_batch()
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3, 3], [5, 6, 7, 10, 11, 12, 13], [4, 14, 3, 3, 3, 3, 3]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 7, 2]
    assert batch["completion_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["train_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0]]
    assert batch["rollout_logps"][0].tolist() == [-1.0, -2.0, 0.0, 0.0]
    assert all(math.isnan(value) for value in batch["rollout_logps"][1].tolist())
    assert make_batch(mask_truncated=True)["train_mask"][2].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("mask", ["train_mask", "completion_mask"])
def test_values_stand_at_their_tokens(mask):
    """The log-prob of a completion token is that of a forward over its row alone, wherever the row was padded."""
    model, batch = build_model().eval(), make_batch(pad_to_multiple_of=8)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        scores = score_tokens(model, {**inputs, "labels": labels_of(batch, batch[mask])})
        values = completion_values(scores.logps, batch)
        for row, rollout in enumerate(ROLLOUTS):
            ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            expected = logps[len(rollout.prompt_ids) - 1 :] * batch[mask][row, : len(rollout.completion_ids)]
            torch.testing.assert_close(values[row, : len(expected)], expected)
            assert not values[row, len(expected) :].any()


def test_selected_rows_are_as_narrow_as_they_can_be():
    selected = select_rows(make_batch(), torch.tensor([2, 0]))
    assert selected["input_ids"].tolist() == [[4, 14, 3, 3, 3], [5, 6, 7, 8, 9]]
    assert selected["train_mask"].tolist() == [[1, 0], [1, 1]]
    assert selected["groups"].tolist() == [1, 0]
    assert select_rows(make_batch(), torch.tensor([2]), pad_to_multiple_of=4)["input_ids"].shape == (1, 4)


@pytest.mark.parametrize(("size", "piece"), [(4, 4), (8, 4), (2, 2), (3, 1)])
def test_groups_stay_together(size, piece):
    groups = torch.arange(6).repeat_interleave(4)
    order = shuffle_groups(groups, size, torch.Generator().manual_seed(1))
    assert sorted(order.tolist()) == list(range(24))
    assert order.tolist() != list(range(24))
    for start in range(0, 24, piece):
        assert len(set(groups[order[start : start + piece]].tolist())) == 1


# ---- Joining ----


def assert_same_batch(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if name != IMAGE_INPUTS:
            torch.testing.assert_close(actual[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
            continue
        assert [row.keys() for row in actual[name]] == [row.keys() for row in value]
        for row, expected_row in zip(actual[name], value, strict=True):
            assert all(torch.equal(row[key], expected_row[key]) for key in expected_row)


@pytest.mark.parametrize("pieces", [[[0, 1, 2]], [[0], [1], [2]], [[2], [0, 1]], [[1, 2], [0]]])
def test_pieces_are_joined_to_what_they_were_cut_from(pieces):
    batch = make_batch()
    order = torch.tensor([row for rows in pieces for row in rows])
    batch["advantages"] = torch.tensor([1.0, 2.0, 3.0])
    joined = join_batches([select_rows(batch, torch.tensor(rows)) for rows in pieces], pad_token_id=3)
    assert_same_batch(joined, {name: value[order] for name, value in batch.items()})


def test_batches_that_have_different_values_are_joined():
    """Two generations in one step: one knows the engine's log-probs and its correction, the other has images."""
    first, second = make_batch(), with_images(make_batch())
    first["engine_ratios"] = torch.tensor([[0.5], [2.0], [1.0]])  # one for all tokens of a completion
    del second["rollout_logps"]
    for batches in ([first, second], [second, first]):
        joined = join_batches(batches, pad_token_id=3)
        start = 3 * (batches[0] is second)
        known, unknown = slice(start, start + 3), slice(3 - start, 6 - start)
        torch.testing.assert_close(
            joined["rollout_logps"][known], first["rollout_logps"], rtol=0, atol=0, equal_nan=True
        )
        assert joined["rollout_logps"][unknown].isnan().all()
        assert torch.equal(joined["engine_ratios"][known], first["engine_ratios"].expand(3, 4))
        assert (joined["engine_ratios"][unknown] == 1).all()
        assert joined[IMAGE_INPUTS][known] == [{}, {}, {}]
        assert joined[IMAGE_INPUTS][unknown] == second[IMAGE_INPUTS]


# ---- Balancing ----


def lengths_batch(prompts: list[int], completions: list[int], groups: list[int]):
    rollouts = [Rollout([5] * p, [6] * c) for p, c in zip(prompts, completions, strict=True)]
    return rollouts_to_batch(rollouts, groups, pad_token_id=3, device=torch.device("cpu"))


def load_of(batch, rows, prompts_shared: bool) -> int:
    prompts = {(batch["groups"][row].item() if prompts_shared else row): row for row in rows.tolist()}
    return int(sum(batch["prompt_lengths"][row] for row in prompts.values()) + batch["completion_mask"][rows].sum())


@pytest.mark.parametrize("prompts_shared", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_balanced_pieces_are_all_rows_once(count, prompts_shared):
    generator = torch.Generator().manual_seed(count)
    completions = torch.randint(1, 30, (8,), generator=generator).tolist()
    batch = lengths_batch([10, 10, 10, 10, 3, 3, 3, 3], completions, [0, 0, 0, 0, 1, 1, 1, 1])
    pieces = balance_rows(batch, count, prompts_shared)
    assert len(pieces) == count
    assert all(len(piece) for piece in pieces)
    assert sorted(torch.cat(pieces).tolist()) == list(range(8))
    if count <= 2:
        assert all(len(set(batch["groups"][piece].tolist())) == 2 // count for piece in pieces), "groups stay whole"


def test_balanced_pieces_have_about_equally_many_tokens():
    """Four long and four short groups in four pieces: one of each, whatever the order they came in."""
    lengths = [2, 20, 2, 20, 20, 2, 20, 2]
    batch = lengths_batch(
        [5] * 16, [length for length in lengths for _ in range(2)], [g for g in range(8) for _ in "ab"]
    )
    for prompts_shared, expected in ((True, 2 * 5 + 44), (False, 4 * 5 + 44)):
        pieces = balance_rows(batch, 4, prompts_shared)
        assert [load_of(batch, piece, prompts_shared) for piece in pieces] == [expected] * 4
    in_order = [torch.arange(start, start + 4) for start in range(0, 16, 4)]
    assert max(load_of(batch, piece, True) for piece in in_order) == expected - 2 * 5
    lengths = [20, 20, 2, 2] * 2  # in order, half of the pieces would have nearly all tokens
    batch = lengths_batch(
        [5] * 16, [length for length in lengths for _ in range(2)], [g for g in range(8) for _ in "ab"]
    )
    assert max(load_of(batch, piece, True) for piece in in_order) == 2 * 5 + 80
    assert max(load_of(batch, piece, True) for piece in balance_rows(batch, 4)) == 2 * 5 + 44


def test_the_widest_group_is_cut_where_there_are_too_few():
    batch = lengths_batch([4] * 6, [9, 9, 9, 9, 1, 1], [0, 0, 0, 0, 1, 1])
    assert sorted(piece.tolist() for piece in balance_rows(batch, 3)) == [[0, 1], [2, 3], [4, 5]]


# ---- Images ----


def with_images(batch):
    """The first row has two images, the second none, the third one; patches of an image are rows of `pixel_values`."""
    rows = [2, 0, 1]
    batch[IMAGE_INPUTS] = [
        {"pixel_values": torch.full((4 * count, 3), float(index)), "image_grid_thw": torch.full((count, 3), index)}
        if count
        else {}
        for index, count in enumerate(rows)
    ]
    return batch


def test_images_follow_their_rows():
    batch = with_images(make_batch())
    assert inputs_of(batch, batch["train_mask"])["pixel_values"][:, 0].tolist() == [0.0] * 8 + [2.0] * 4
    selected = select_rows(batch, torch.tensor([2, 1]))
    inputs = inputs_of(selected, selected["train_mask"])
    assert inputs["pixel_values"][:, 0].tolist() == [2.0] * 4
    assert inputs["image_grid_thw"].tolist() == [[2, 2, 2]]
    joined = join_batches([selected, select_rows(batch, torch.tensor([0]))], pad_token_id=3)
    assert inputs_of(joined, joined["train_mask"])["pixel_values"][:, 0].tolist() == [2.0] * 4 + [0.0] * 8


def test_rows_without_images_have_none():
    selected = select_rows(with_images(make_batch()), torch.tensor([1]))
    assert set(inputs_of(selected, selected["train_mask"])) == {"input_ids", "attention_mask", "labels"}


# ---- In a checkpoint ----


def test_the_buffer_comes_back(tmp_path):
    """More than ten micro-batches, some with images, and values of every type."""
    batch = with_images(make_batch())
    batch |= {"advantages": torch.tensor([1.0, -2.0, 0.5]), "old_logps": torch.randn(3, 4)}
    buffer = RolloutBuffer()
    buffer.micro_batches = [select_rows(batch, torch.tensor([index % 3, 0])) for index in range(12)]
    buffer.save(str(tmp_path), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts_1.safetensors"]

    restored = RolloutBuffer()
    restored.load(str(tmp_path), 1, torch.device("cpu", 0))  # as processes on a CPU name their device
    assert len(restored) == 12
    for actual, expected in zip(restored.micro_batches, buffer.micro_batches, strict=True):
        assert_same_batch(actual, expected)
        assert all(actual[name].dtype == value.dtype for name, value in expected.items() if name != IMAGE_INPUTS)

    restored.load(str(tmp_path), 0, torch.device("cpu"))
    assert len(restored) == 0, "another process's file is not taken"


def test_an_empty_buffer_leaves_no_file(tmp_path):
    RolloutBuffer().save(str(tmp_path), 0)
    assert not list(tmp_path.iterdir())
