"""Rollouts as tensors, and back to where each completion token stands."""

from __future__ import annotations

import math

import pytest
import torch

from trl.ops.scoring import score_tokens
from trl.rollouts.types import Rollout
from trl.trainer.rollout_batches import (
    completion_values,
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
