"""The built-in reward functions against recorded figures, in any thread, and under the limits that they promise."""

from __future__ import annotations

import pickle
import threading
import time

import pytest

import trl.rewards
from tests.conftest import load_reference
from trl.rewards import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)
from trl.rewards.math_verification import MathVerifier

CASES = load_reference("data")
# What no computer algebra system finishes, in one operation that gives no other thread a turn.
ENDLESS = r"\boxed{9^{9^{9^{9}}}}"


def as_messages(contents: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": content}] for content in contents]


def cases(prefix: str) -> list:
    found = [pytest.param(case, id=name) for name, case in CASES.items() if name.startswith(prefix)]
    assert found
    return found


def check(rewards: list[float | None], expected: list[float | None]) -> None:
    assert rewards == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("given", [as_messages, list], ids=["messages", "text"])
def test_think_format(given):
    case = CASES["think_format"]
    check(think_format_reward(given(case["inputs"]["contents"])), case["outputs"]["rewards"])


@pytest.mark.parametrize("given", [as_messages, list], ids=["messages", "text"])
def test_accuracy(given):
    case = CASES["accuracy"]
    rewards = accuracy_reward(given(case["inputs"]["contents"]), case["inputs"]["solutions"])
    check(rewards, case["outputs"]["rewards"])


@pytest.mark.parametrize("case", cases("reasoning_accuracy"))
def test_reasoning_accuracy(case):
    completions, solutions = as_messages(case["inputs"]["contents"]), case["inputs"]["solutions"]
    check(reasoning_accuracy_reward(completions, solutions, **case["config"]), case["outputs"]["rewards"])


@pytest.mark.parametrize("case", cases("cosine_"))
def test_cosine_scaled(case):
    inputs = case["inputs"]
    ids = [[1] * length for length in inputs["completion_lengths"]]
    reward = get_cosine_scaled_reward(**case["config"])
    rewards = reward(completions=as_messages(inputs["contents"]), solution=inputs["solutions"], completion_ids=ids)
    check(rewards, case["outputs"]["rewards"])


@pytest.mark.parametrize("case", cases("repetition_"))
def test_repetition_penalty(case):
    if "raises" in case["outputs"]:
        with pytest.raises(ValueError, match="max_penalty"):
            get_repetition_penalty_reward(**case["config"])
        return
    reward = get_repetition_penalty_reward(**case["config"])
    check(reward(completion_ids=case["inputs"]["completion_ids"]), case["outputs"]["rewards"])


@pytest.mark.parametrize("case", cases("overlong_"))
def test_soft_overlong(case):
    reward = get_soft_overlong_punishment(**case["config"])
    ids = [[1] * length for length in case["inputs"]["completion_lengths"]]
    check(reward(completion_ids=ids), case["outputs"]["rewards"])


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (get_cosine_scaled_reward(100), "cosine_scaled_reward"),
        (get_repetition_penalty_reward(), "repetition_penalty_reward"),
        (get_soft_overlong_punishment(100, 20), "soft_overlong_punishment_reward"),
        (accuracy_reward, "accuracy_reward"),
        (think_format_reward, "think_format_reward"),
    ],
)
def test_rewards_have_names_and_travel(reward, name):
    """A reward goes to another process as it is: pickled, with its name."""
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.__name__ == reward.__name__ == name
    assert copy == reward


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="ngram_size"):
        get_repetition_penalty_reward(ngram_size=0)
    with pytest.raises(ValueError, match="max_len"):
        get_cosine_scaled_reward(max_len=0)


def test_what_was_understood_is_logged():
    extra = {}
    accuracy_reward(as_messages([r"\boxed{\frac{2}{6}}", "no idea"]), ["1/3", "4"], log_extra=extra.__setitem__)
    assert extra == {"solution": ["1/3", "4"], "gold_parsed": ["1/3", "4"], "answer_parsed": ["1/3", ""]}


def test_last_answer_of_several_turns_counts():
    turns = [
        {"role": "assistant", "content": r"Let me compute \boxed{1}.", "tool_calls": []},
        {"role": "tool", "name": "add", "content": r"\boxed{2}"},
        {"role": "assistant", "content": [{"type": "text", "text": r"\boxed{3}"}]},
    ]
    assert accuracy_reward([turns, turns[:2]], ["3", "1"]) == [1.0, 1.0]


def test_parsed_reasoning_counts_as_written():
    """A tokenizer that parses answers moves the reasoning to a field of its own; it was written all the same."""
    message = {"role": "assistant", "reasoning_content": "easy", "content": r"\boxed{4}"}
    assert think_format_reward([[message]]) == [1.0]
    assert reasoning_accuracy_reward([[message]], ["4"]) == [1.0]


def test_solutions_of_a_mixed_dataset():
    """A number is a solution as its text is; a row without one is not judged."""
    assert accuracy_reward([r"\boxed{4}"] * 3, [4, None, 4.5]) == [1.0, None, 0.0]


def test_accuracy_without_math_verify(monkeypatch):
    monkeypatch.setattr("trl.rewards.accuracy_rewards.is_math_verify_available", lambda: False)
    with pytest.raises(ImportError, match="pip install math-verify"):
        accuracy_reward(as_messages(["4"]), ["4"])


def test_accuracy_needs_a_solution_for_each():
    with pytest.raises(ValueError, match="2 completions, 1 solutions"):
        accuracy_reward(["a", "b"], ["4"])


@pytest.mark.parametrize("in_thread", [False, True], ids=["main thread", "other thread"])
def test_time_limit_of_comparison(in_thread):
    """One endless answer costs its own limit, not the run, and the next one is compared as ever."""
    verifier = MathVerifier(parse_limit_s=2.0, verify_limit_s=2.0)
    verdicts = []

    def compare() -> None:
        verdicts.append(verifier.verify(answer=ENDLESS, gold="4"))
        verdicts.append(verifier.verify(answer=r"\boxed{4}", gold="4"))

    start = time.monotonic()
    if in_thread:
        thread = threading.Thread(target=compare)
        thread.start()
        thread.join()
    else:
        compare()
    try:
        assert (verdicts[0].gold, verdicts[0].equal) == ("4", False)
        assert verdicts[0].given_up is not None
        assert verdicts[1].equal is True
        assert time.monotonic() - start < 60
    finally:
        verifier.close()


def test_names_are_there():
    assert set(trl.rewards.__all__) >= {
        "accuracy_reward",
        "accuracy_rewards",
        "format_rewards",
        "get_cosine_scaled_reward",
        "get_repetition_penalty_reward",
        "get_soft_overlong_punishment",
        "other_rewards",
        "reasoning_accuracy_reward",
        "think_format_reward",
    }
    for name in trl.rewards.__all__:
        assert getattr(trl.rewards, name) is not None
