from __future__ import annotations

import pytest

from trl.rollouts.environments import (
    EnvironmentPool,
    append_observation,
    environment_tools,
)


class Base:
    def reset(self, **row):
        pass

    def inherited(self) -> str:
        """From the base."""
        return "inherited"


class Room(Base):
    made = 0
    constant = str

    def __init__(self):
        type(self).made += 1
        self.reward = 1.0
        self.on_the_instance = lambda: "not a tool"

    def look(self) -> str:
        """Look around."""
        return "dark"

    async def wait(self) -> str:
        """Wait."""
        return "still dark"

    @property
    def exploding(self):
        raise AssertionError("a property must not be read")

    def _private(self):
        pass

    def get_reward(self):
        return self.reward


class Garden(Base):
    async def get_reward(self):
        return 5.0


class Cellar(Room):
    pass


class Yard(Base):
    pass


def test_tools_are_the_public_functions_of_the_class():
    assert [tool.__name__ for tool in environment_tools(Room())] == ["inherited", "look", "wait"]


def test_instances_are_made_when_needed_and_used_again():
    Room.made = 0
    pool = EnvironmentPool(Room)
    assert Room.made == 1
    first = list(pool.acquire([{}, {}, {}]))
    assert len({id(one) for one in first}) == 3
    second = list(pool.acquire([{}, {}]))
    assert [id(one) for one in second] == [id(one) for one in first[:2]]
    assert Room.made == 3
    assert pool.environments == second


def test_rows_choose_among_several():
    pool = EnvironmentPool({"room": Room, "garden": Garden})
    rows = [{"environment": name} for name in ("garden", "room", "garden")]
    assert [type(one) for one in pool.acquire(rows)] == [Garden, Room, Garden]
    assert pool.reset_arguments({"environment": "room", "level": 2}) == {"level": 2}
    with pytest.raises(ValueError, match="is 'attic', for which there is no factory.*'room', 'garden'"):
        pool.acquire([{"environment": "attic"}])
    with pytest.raises(ValueError, match="is None"):
        pool.acquire([{}])


def test_with_one_factory_the_column_is_like_any_other():
    pool = EnvironmentPool(Room)
    assert pool.reset_arguments({"environment": "warm"}) == {"environment": "warm"}


def test_reset_gets_copies():
    row = {"notes": ["first"]}
    EnvironmentPool(Room).reset_arguments(row)["notes"].append("second")
    assert row == {"notes": ["first"]}


def test_what_is_no_environment_is_refused():
    class WithoutReset:
        def __init__(self):
            self.reset = lambda: None

    with pytest.raises(ValueError, match="WithoutReset has no `reset` method"):
        EnvironmentPool(WithoutReset)
    with pytest.raises(ValueError, match="empty dict"):
        EnvironmentPool({})
    with pytest.raises(TypeError, match="must be a class or function"):
        EnvironmentPool({"room": "Room"})


TEXT, BLOCK = "hello", {"type": "text", "text": "hello"}
IMAGE = {"type": "image", "image": "picture"}


@pytest.mark.parametrize(
    ("content", "observation", "expected"),
    [
        ("hello", " world", "hello world"),
        ("hello", None, "hello"),
        ("hello", [IMAGE], [BLOCK, IMAGE]),
        ([BLOCK], "hello", [BLOCK, BLOCK]),
        ([BLOCK], [IMAGE], [BLOCK, IMAGE]),
        ("", [IMAGE], [IMAGE]),
        (None, "hello", "hello"),
    ],
)
def test_observations_come_after_the_last_message(content, observation, expected):
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
    joined = append_observation(prompt, observation)
    assert joined == [prompt[0], {"role": "user", "content": expected}]
    assert prompt[1]["content"] == content


def test_observations_after_text():
    assert append_observation("the sky", " is blue") == "the sky is blue"
    with pytest.raises(TypeError, match="need a conversational prompt"):
        append_observation("the sky", [IMAGE])
    with pytest.raises(TypeError, match="found int"):
        append_observation("the sky", 3)


def test_classes_that_give_rewards():
    """Each class once, whatever the number of its names."""
    pool = EnvironmentPool({"room": Room, "cellar": Cellar, "again": Room, "garden": Garden, "yard": Yard})
    assert pool.classes == [Room, Cellar, Garden, Yard]
    assert pool.rewarding_classes == [Room, Cellar, Garden]
