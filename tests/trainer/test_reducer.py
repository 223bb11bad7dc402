"""Means over items, whatever the cut; totals that survive a checkpoint."""

import json

import pytest
import torch
from accelerate import Accelerator

from trl.trainer.reducer import Reducer


@pytest.fixture
def reducer():
    return Reducer(Accelerator(cpu=True))


@pytest.mark.parametrize("cut", [[6], [1, 5], [2, 2, 2], [1, 1, 1, 1, 1, 1]])
def test_mean_does_not_depend_on_the_cut(reducer, cut):
    values = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
    for piece in values.split(cut):
        reducer.add("train", "entropy", piece.sum(), piece.numel())
    assert reducer.reduce("train") == {"entropy": pytest.approx(23 / 6, abs=1e-12)}


def test_modes_are_apart_and_a_reduction_clears(reducer):
    reducer.add("train", "loss", 2.0, 1)
    reducer.add("eval", "loss", 10.0, 4)
    assert reducer.reduce("eval") == {"loss": 2.5}
    assert reducer.reduce("train") == {"loss": 2.0}
    assert reducer.reduce("train") == {}


def test_a_mean_over_nothing_is_left_out(reducer):
    reducer.add("train", "entropy", torch.tensor(0.0), torch.tensor(0))
    assert reducer.reduce("train") == {}


def test_totals_run_on(reducer):
    reducer.add_total("num_tokens", torch.tensor(5))
    assert reducer.reduce("train")["num_tokens"] == 5
    reducer.add_total("num_tokens", 7)
    assert reducer.reduce("eval")["num_tokens"] == 12


def test_replicated_batches_count_once():
    reducer = Reducer(Accelerator(cpu=True), replicas=2)
    reducer.add_total("num_tokens", 10)
    assert reducer.reduce("train")["num_tokens"] == 5


def test_state_takes_up_where_it_left_off(reducer):
    for value in (0.1, 0.2):
        reducer.add("train", "loss", value, 1)
    reducer.add_total("num_tokens", 3)
    stored = json.loads(json.dumps(reducer.state()))
    resumed = Reducer(Accelerator(cpu=True))
    resumed.load_state(stored)
    for each in (reducer, resumed):
        each.add("train", "loss", 0.7, 1)
        each.add_total("num_tokens", 4)
    assert resumed.reduce("train") == reducer.reduce("train")


def test_no_gradient_is_kept(reducer):
    x = torch.tensor(1.0, requires_grad=True)
    reducer.add("train", "loss", x * 2, 1)
    assert not reducer._pending["train"]["loss"].requires_grad
