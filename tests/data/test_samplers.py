"""Repetition in the recorded order, resumed orders, and streams that repeat as indices do."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import load_reference
from trl.data.samplers import RepeatSampler, WholeStream, repeat_iterable_dataset

CASES = {
    name: case
    for name, case in load_reference("sampler").items()
    if "indices" in case["outputs"] or "len" in case["outputs"]
}


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("repeat_")])
def test_recorded_orders(name):
    """Two passes over one sampler, and its length."""
    config, outputs = dict(CASES[name]["config"]), CASES[name]["outputs"]
    sampler = RepeatSampler(range(config.pop("n")), **config)
    assert list(sampler) == outputs["first_pass"]
    if "second_pass" in outputs:
        assert list(sampler) == outputs["second_pass"]
    assert len(sampler) == outputs["len"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("grpo_")])
def test_recorded_orders_of_online_trainers(name):
    """The samplers that online methods build from their own settings."""
    config, outputs = CASES[name]["config"], CASES[name]["outputs"]
    if "eval" in name:
        sampler = RepeatSampler(range(config["n"]), config["num_generations_eval"], seed=config["seed"])
    else:
        sampler = RepeatSampler(
            range(config["n"]),
            mini_repeat_count=config["num_generations"],
            batch_size=config["generation_batch_size"] // config["num_generations"],
            repeat_count=config["num_iterations"] * config["steps_per_generation"],
            shuffle=config["shuffle_dataset"],
            seed=config["seed"],
        )
    assert list(sampler) == outputs["indices"]
    assert len(sampler) == outputs["len"]


settings = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2}


@given(st.integers(0, 20), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3))
def test_stream_repeats_as_the_sampler_does(n, mini_repeat_count, batch_size, repeat_count, seed):
    """Length, number of appearances and the agreement of both forms, for any sizes."""
    sizes = {"mini_repeat_count": mini_repeat_count, "batch_size": batch_size, "repeat_count": repeat_count}
    sampler = RepeatSampler(range(n), **sizes, shuffle=False)
    order = list(sampler)
    assert len(order) == len(sampler)
    stream = IterableDataset.from_generator(lambda: ({"i": i} for i in range(n)))
    assert [row["i"] for row in repeat_iterable_dataset(stream, **sizes)] == order
    shuffled = list(RepeatSampler(range(n), **sizes, seed=seed))
    assert len(shuffled) == len(order)
    assert {shuffled.count(i) for i in set(shuffled)} <= {mini_repeat_count * repeat_count}


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_resumed_epoch_has_the_order_of_the_uninterrupted_run(seed, epoch):
    """A new sampler told the epoch goes on as the old one did; so does one sent back."""
    torch.manual_seed(5)
    sampler = RepeatSampler(range(9), **settings, seed=seed)
    passes = [list(sampler) for _ in range(5)]
    assert len({tuple(order) for order in passes}) == 5
    torch.manual_seed(5)
    resumed = RepeatSampler(range(9), **settings, seed=seed)
    resumed.set_epoch(epoch)
    assert [list(resumed), list(resumed)] == passes[epoch : epoch + 2]
    resumed.set_epoch(0)
    assert list(resumed) == passes[0]


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(1)
    first = list(RepeatSampler(range(50), 1))
    other = list(RepeatSampler(range(50), 1))
    torch.manual_seed(1)
    assert list(RepeatSampler(range(50), 1)) == first != other


def test_resume_through_the_accelerate_dataloader():
    """The loader tells the sampler its epoch, as a trainer that resumes in a later epoch relies on."""
    from accelerate.data_loader import prepare_data_loader

    def loader():
        data = torch.arange(12)
        sampler = RepeatSampler(data, 2, batch_size=2, seed=3)
        return prepare_data_loader(torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler))

    whole = loader()
    epochs = [torch.cat(list(whole)).tolist() for _ in range(3)]
    resumed = loader()
    resumed.set_epoch(2)
    assert torch.cat(list(resumed)).tolist() == epochs[2]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("name", ["mini_repeat_count", "batch_size", "repeat_count"])
def test_counts_below_one(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        RepeatSampler(range(3), **{"mini_repeat_count": 1, name: 0})


def test_stream_keeps_types_and_can_be_resumed():
    """Features stay known, values are untouched, and a saved position continues within a repeated batch."""
    dataset = Dataset.from_dict({"prompt": [f"p{i}" for i in range(6)], "ids": [[i] for i in range(6)]})
    stream = repeat_iterable_dataset(dataset.to_iterable_dataset(), **settings)
    assert stream.features == dataset.features
    rows = list(stream)
    assert [row["prompt"] for row in rows[:12]] == ["p0", "p0", "p1", "p1", "p2", "p2"] * 2
    assert rows[4] == {"prompt": "p2", "ids": [2]}
    iterator = iter(stream)
    for _ in range(12):
        next(iterator)
    state = stream.state_dict()
    fresh = repeat_iterable_dataset(dataset.to_iterable_dataset(), **settings)
    fresh.load_state_dict(state)
    assert list(fresh) == rows[12:]


def test_processes_share_the_groups_of_a_sharded_stream():
    """Each of two processes gets its block of every batch, however many shards the stream has."""
    from accelerate import PartialState
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    PartialState(cpu=True)
    stream = Dataset.from_dict({"x": list(range(4))}).to_iterable_dataset(num_shards=4)
    repeated = WholeStream(repeat_iterable_dataset(stream, mini_repeat_count=4))
    rows = []
    for index in range(2):
        loader = prepare_data_loader(
            DataLoader(repeated, batch_size=2, collate_fn=list), num_processes=2, process_index=index,
            put_on_device=False, dispatch_batches=False,
        )  # fmt: skip
        rows.append([[row["x"] for row in batch] for batch in loader.base_dataloader])
    assert rows[0] == rows[1] == [[0, 0], [1, 1], [2, 2], [3, 3]]
