"""The suite that runs rewards: what functions get, what their values become, and what happens when they misbehave."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import build_tokenizer
from trl.rewards import RewardError, RewardSuite, RewardValueError, calls

PROMPTS = ["a", "a", "b"]
COMPLETIONS = ["one", "three", "seven"]
IDS = [[1], [1, 2, 3], [1, 2]]
NAN = math.nan


def score(suite: RewardSuite, **kwargs):
    try:
        return suite.score(PROMPTS, COMPLETIONS, IDS, **kwargs)
    finally:
        suite.close()


def values(suite: RewardSuite, **kwargs) -> list[list[float]]:
    return score(suite, **kwargs).values_FN.tolist()


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


async def async_length(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(len(completion)) for completion in completions]


def broken(completions, **kwargs):
    raise ZeroDivisionError("one over nothing")


async def async_broken(completions, **kwargs):
    raise ZeroDivisionError("one over nothing")


def returns(value, name="given"):
    def reward(**kwargs):
        return value

    reward.__name__ = name
    return reward


# ---- Names, weights and settings ----


class Judge:
    def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)


def test_names():
    """A function has its own name through any partial, an object that of its class, and no two share a curve."""
    twice = functools.partial(functools.partial(length, strict=True), loose=False)
    suite = RewardSuite([length, twice, Judge(), async_length])
    assert suite.names == ["length", "length_2", "Judge", "async_length"]
    assert RewardSuite([length, length], names=["a", "b"]).names == ["a", "b"]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"functions": None}, ValueError, "no source of reward"),
        ({"functions": []}, ValueError, "no source of reward"),
        ({"functions": [length], "weights": [1.0, 2.0]}, ValueError, "`reward_weights` has 2 values for 1"),
        ({"functions": [length], "processing_classes": [None, None]}, ValueError, "`reward_processing_classes` has 2"),
        ({"functions": [length], "time_limits": [1.0, None]}, ValueError, "`time_limits` has 2"),
        ({"functions": [length], "time_limits": 0}, ValueError, "above 0"),
        ({"functions": [length], "weights": [NAN]}, ValueError, "`reward_weights` is a finite number"),
        ({"functions": [length], "on_error": "ignore"}, ValueError, "`on_error` is one of 'raise', 'count'"),
        ({"functions": [length, 3]}, TypeError, "Found a int: 3"),
    ],
)
def test_settings_are_checked_at_once(kwargs, error, message):
    with pytest.raises(error, match=message):
        RewardSuite(**kwargs)


def test_totals_are_weighted_sums_of_what_applies():
    suite = RewardSuite([length, returns([None, 2.0, None]), returns([None, 1.0, None])], weights=[1.0, 0.5, -2.0])
    table = score(suite)
    torch.testing.assert_close(table.totals_N(), torch.tensor([3.0, 5.0 + 1.0 - 2.0, 5.0]))
    with pytest.warns(UserWarning, match="2 of 3 completions"):
        totals = score(RewardSuite(returns([None, 2.0, None]))).totals_N().tolist()
    assert totals == pytest.approx([NAN, 2.0, NAN], nan_ok=True)


# ---- What a function gets ----


def test_arguments():
    """Every column arrives as a list, with the state of the run; the columns that have other names do not."""
    got = {}

    def spy(**kwargs):
        got.update(kwargs)
        return [0.0] * 3

    columns = {"solution": ("x", "y", "z"), "prompt": PROMPTS, "completion": COMPLETIONS, "completion_ids": IDS}
    score(RewardSuite(spy), columns=columns, trainer_state="state", environments=["e1", "e2", "e3"])
    assert callable(got.pop("log_extra"))
    assert callable(got.pop("log_metric"))
    assert got == {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "completion_ids": IDS,
        "solution": ["x", "y", "z"],
        "trainer_state": "state",
        "environments": ["e1", "e2", "e3"],
    }


def test_function_without_kwargs_gets_what_it_names():
    def named(completions, solution, scale=2.0):
        return [scale * (completion == answer) for completion, answer in zip(completions, solution, strict=True)]

    assert values(RewardSuite(named), columns={"solution": ["one", "two", "seven"], "other": PROMPTS}) == [[2, 0, 2]]


def test_missing_column_is_named():
    def needy(completions, solution, **kwargs):
        return [0.0] * 3

    with pytest.raises(RewardError, match=r"'needy' needs `solution`.*`answer`"):
        score(RewardSuite(needy), columns={"answer": ["x", "y", "z"]})


def test_functions_do_not_see_each_others_changes():
    def vandal(completions, **kwargs):
        completions.clear()
        return [0.0] * 3

    assert values(RewardSuite([vandal, length])) == [[0, 0, 0], [3, 5, 5]]


def test_reports_of_functions():
    def reporter(completions, log_extra, log_metric, **kwargs):
        log_extra("upper", [completion.upper() for completion in completions])
        log_metric("mean_length", 4)
        log_metric("mean_length", torch.tensor(5.0))
        return [0.0] * 3

    async def other(completions, log_metric, **kwargs):
        log_metric("calls", 1)
        return [0.0] * 3

    table = score(RewardSuite([reporter, other]))
    assert table.extras == {"upper": ["ONE", "THREE", "SEVEN"]}
    assert table.metrics == {"mean_length": [4.0, 5.0], "calls": [1.0]}


def test_extra_column_of_wrong_length():
    def reporter(completions, log_extra, **kwargs):
        log_extra("upper", ["A"])
        return [0.0] * 3

    with pytest.raises(RewardValueError, match=r"'reporter' logged 1 values as 'upper' for 3 completions"):
        score(RewardSuite(reporter))


# ---- What becomes of its values ----


@pytest.mark.parametrize(
    "returned",
    [
        [1, True, 0.5],
        (1, 1.0, 0.5),
        np.array([1, 1, 0.5]),
        torch.tensor([1, 1, 0.5], requires_grad=True),
        [np.float32(1), torch.tensor([1.0]), np.array(0.5)],
    ],
)
def test_kinds_of_values(returned):
    assert values(RewardSuite(returns(returned))) == [[1.0, 1.0, 0.5]]


@given(st.lists(st.none() | st.floats(width=32, allow_infinity=False), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None)
def test_values_arrive_unchanged(given_values):
    """Every float arrives bit for bit; `None` and NaN are one thing: does not apply."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = score(RewardSuite(returns(given_values)))
    expected = [NAN if value is None else value for value in given_values]
    assert table.values_FN[0].tolist() == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    missing = sum(math.isnan(value) for value in expected)
    assert table.health()["rewards/given/none_rate"] == (missing, 3.0)
    assert table.health()["rewards/given/error_rate"] == (0.0, 3.0)


@pytest.mark.parametrize("policy", ["raise", "count"])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "returned 2 values"),
        ([1.0] * 4, "returned 4 values"),
        (None, "Does it end without `return`"),
        (1.0, "returned a float"),
        ("abc", "returned a str"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "returned a dict"),
        ([1.0, "2.0", 3.0], r"a str \('2.0'\) for completion 1"),
        ([[1.0], [1.0], [1.0]], "a list"),
        (np.ones((3, 2)), "a list"),
        ([1.0, 2j, 3.0], "a complex"),
    ],
)
def test_malformed_values_name_the_function(returned, message, policy):
    """A wrong length or type is a mistake in the function, whatever the policy on its failures."""
    with pytest.raises(RewardValueError, match=message) as caught:
        score(RewardSuite([length, returns(returned, name="culprit")], on_error=policy))
    assert "'culprit'" in str(caught.value)
    assert "for each of the 3 completions" in str(caught.value)


@pytest.mark.parametrize("infinity", [math.inf, -math.inf, 1e300, 10**400], ids=["inf", "-inf", "1e300", "10**400"])
def test_infinite_value_is_a_failure(infinity):
    returned = [1.0, infinity, 3.0]
    with pytest.raises(RewardError, match="'given' failed: infinite value for completion 1"):
        score(RewardSuite(returns(returned)))
    with pytest.warns(UserWarning, match="1 of 3"):
        table = score(RewardSuite(returns(returned), on_error="count"))
    assert table.values_FN[0].tolist() == pytest.approx([1.0, NAN, 3.0], nan_ok=True)
    assert table.health()["rewards/given/error_rate"] == (1.0, 3.0)


# ---- Functions that fail, hang, or are late ----


@pytest.mark.parametrize("limit", [None, 5.0], ids=["here", "in a thread"])
@pytest.mark.parametrize("function", [broken, async_broken])
def test_failing_function(function, limit):
    with pytest.raises(RewardError, match=rf"'{function.__name__}' failed: ZeroDivisionError: one over") as caught:
        score(RewardSuite([length, function], time_limits=limit))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)

    table = score(RewardSuite([function, length], time_limits=limit, on_error="count"))
    assert table.values_FN[1].tolist() == [3, 5, 5]
    assert table.values_FN[0].isnan().all()
    assert table.failed_counts == [3, 0]
    assert table.errors == {function.__name__: "ZeroDivisionError: one over nothing"}


class Hanging:
    """Functions that hang until the test lets them go."""

    def __init__(self):
        self.release = threading.Event()

    def in_thread(self, completions, **kwargs):
        self.release.wait(60)
        return [0.0] * 3

    async def waiting(self, completions, **kwargs):
        await asyncio.sleep(60)

    async def blocking(self, completions, **kwargs):
        self.release.wait(60)


@pytest.fixture
def hanging():
    functions = Hanging()
    yield functions
    functions.release.set()


@pytest.mark.parametrize("kind", ["in_thread", "waiting", "blocking"])
def test_hanging_function(hanging, kind):
    """Its time limit ends the wait; the others' values are there; the policy decides what then."""
    function = getattr(hanging, kind)
    start = time.monotonic()
    with pytest.raises(
        RewardError, match=rf"'{kind}' failed: RewardTimeoutError: no answer within its time limit of 0.2"
    ):
        score(RewardSuite([function, length], time_limits=[0.2, None]))
    suite = RewardSuite([function, length], time_limits=[0.2, None], on_error="count")
    table = score(suite)
    assert time.monotonic() - start < 20
    assert table.values_FN[1].tolist() == [3, 5, 5]
    assert table.values_FN[0].isnan().all()
    assert 0.2 <= table.latencies_s[0] < 20


def test_blocked_loop_is_replaced():
    """An asynchronous function that blocks costs its own batch, and that of those in the same loop, but no later one."""
    release = threading.Event()

    async def blocks_once(completions, **kwargs):
        if not release.is_set():
            release.wait(60)
        return [1.0] * 3

    suite = RewardSuite([blocks_once, async_length], time_limits=0.3, on_error="count")
    with pytest.warns(UserWarning, match="3 of 3"):
        assert score(suite).failed_counts == [3, 3]
    release.set()
    for source in suite._sources:
        source.limit_s = 20.0
    assert values(suite) == [[1, 1, 1], [3, 5, 5]]


def test_threads_of_a_hanging_function_are_few(hanging):
    """A function that hangs for ever is left alone after some calls, and asked again once one has come back."""
    suite = RewardSuite(hanging.in_thread, time_limits=0.05, on_error="count")
    with pytest.warns(UserWarning, match="No reward function gave a value"):
        tables = [score(suite) for _ in range(calls.MAX_ABANDONED + 3)]
    threads = [thread for thread in threading.enumerate() if thread.name == "trl-reward-in_thread"]
    assert len(threads) == calls.MAX_ABANDONED
    assert "earlier calls of it are still running" in tables[-1].errors["in_thread"]
    hanging.release.set()
    for thread in threads:
        thread.join(10)
    suite._sources[0].limit_s = 10.0
    assert values(suite) == [[0, 0, 0]]


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("policy", ["raise", "count"])
def test_late_answer(kind, policy):
    """An answer after the limit is none, and does not turn up in a later batch."""
    batch = iter(range(100))

    def late(completions, **kwargs):
        number = next(batch)
        time.sleep(0.5 if number == 0 else 0)
        return [float(number)] * 3

    async def async_late(completions, **kwargs):
        number = next(batch)
        await asyncio.sleep(0.5 if number == 0 else 0)
        return [float(number)] * 3

    suite = RewardSuite([late if kind == "sync" else async_late, length], time_limits=[0.2, None], on_error=policy)
    if policy == "raise":
        with pytest.raises(RewardError, match="no answer within"):
            score(suite)
    else:
        assert score(suite).values_FN[0].isnan().all()
    time.sleep(0.5)
    suite._sources[0].limit_s = 10.0
    assert values(suite)[0] == [1.0, 1.0, 1.0]


def test_function_that_hands_out_a_coroutine():
    """Not declared asynchronous, and yet it is: a lambda, a decorated function."""
    assert values(RewardSuite(lambda **kwargs: async_length(**kwargs))) == [[3, 5, 5]]
    suite = RewardSuite(lambda **kwargs: asyncio.sleep(60), time_limits=0.2)
    with pytest.raises(RewardError, match="no answer within"):
        score(suite)


def test_side_by_side():
    """Asynchronous functions and those with a time limit wait at the same time, not one after the other."""
    together = threading.Barrier(3, timeout=30)

    def in_thread(completions, **kwargs):
        together.wait()
        return [1.0] * 3

    def here(completions, **kwargs):
        together.wait()
        return [2.0] * 3

    async def in_loop(completions, **kwargs):
        await asyncio.get_running_loop().run_in_executor(None, together.wait)
        return [3.0] * 3

    suite = RewardSuite([in_thread, here, in_loop], time_limits=[30.0, None, 30.0])
    assert values(suite) == [[1] * 3, [2] * 3, [3] * 3]


def test_function_without_limit_runs_in_the_calling_thread():
    """Signals, CUDA streams and the like work there only."""
    seen = []

    def where(completions, **kwargs):
        seen.append(threading.current_thread())
        return [0.0] * 3

    score(RewardSuite(where))
    score(RewardSuite(where, time_limits=10.0))
    assert seen[0] is threading.current_thread()
    assert seen[1] is not threading.current_thread()


def test_one_loop_for_all_batches():
    """A client that an asynchronous function keeps belongs to a loop; it is the same in every batch."""
    loops = []

    async def client(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0.0] * 3

    suite = RewardSuite([client, client])
    suite.score(PROMPTS, COMPLETIONS, IDS)
    score(suite)
    assert len(set(loops)) == 1
    assert len(loops) == 4


def test_slow_function_is_named_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(calls, "PATIENCE_S", 0.05)
    warned = []
    monkeypatch.setattr(calls.logger, "warning", warned.append)

    def slow(completions, **kwargs):
        time.sleep(0.3)
        return [0.0] * 3

    async def async_slow(completions, **kwargs):
        await asyncio.sleep(0.6)
        return [0.0] * 3

    score(RewardSuite([slow, async_slow]))
    assert any("'slow' has not answered for 0.05 s. It has no time limit." in message for message in warned)
    assert any("'async_slow' has not answered" in message for message in warned)


KINDS = {
    "fine": ([1.0, 2.0, 3.0], 0),
    "none": ([None, 2.0, None], 0),
    "nan": ([NAN, NAN, 3.0], 0),
    "raises": ([None] * 3, 3),
    "late": ([None] * 3, 3),
}


@given(st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.booleans()), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_any_mix_of_functions(kinds):
    """Whatever the others do, and in whatever order they stand, each function's values are in its own row."""

    def make(kind, is_async):
        def reward(**kwargs):
            if kind == "raises":
                raise KeyError("x")
            if kind == "late":
                time.sleep(0.15)
            return KINDS[kind][0]

        async def async_reward(**kwargs):
            await asyncio.sleep(0.15 if kind == "late" else 0)
            return reward() if kind != "late" else KINDS[kind][0]

        return async_reward if is_async else reward

    suite = RewardSuite(
        [make(*kind) for kind in kinds],
        time_limits=[0.05 if kind == "late" else 20.0 for kind, _ in kinds],
        on_error="count",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = score(suite)
    for row, failed, (kind, _) in zip(table.values_FN.tolist(), table.failed_counts, kinds, strict=True):
        expected = [NAN if value is None else value for value in KINDS[kind][0]]
        assert row == pytest.approx(expected, nan_ok=True)
        assert failed == KINDS[kind][1]


# ---- Environments ----


class Maze:
    def __init__(self, value):
        self.value = value

    def get_reward(self):
        return self.value


class SubMaze(Maze):
    pass


class Web(Maze):
    async def get_reward(self):
        await asyncio.sleep(0.01)
        return self.value


def test_environments_are_sources_of_their_own():
    """Each class has a column with its name and weight 1, for the rollouts of exactly that class."""
    suite = RewardSuite(length, weights=[0.5], environment_classes=[Maze, Web])
    assert suite.names == ["length", "Maze", "Web"]
    assert suite.weights_F.tolist() == [0.5, 1.0, 1.0]
    table = score(suite, environments=[Maze(7.0), Web(8.0), SubMaze(9.0)])
    assert table.values_FN[1].tolist() == pytest.approx([7.0, NAN, NAN], nan_ok=True)
    assert table.values_FN[2].tolist() == pytest.approx([NAN, 8.0, NAN], nan_ok=True)
    with pytest.warns(UserWarning, match="1 of 3"):
        assert score(
            RewardSuite(None, environment_classes=[Maze, Web]), environments=[Maze(7.0), Web(8.0), SubMaze(9.0)]
        ).totals_N().tolist() == pytest.approx([7.0, 8.0, NAN], nan_ok=True)


# ---- Reward models ----


@pytest.fixture(scope="module")
def classifier_path(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=1
    )
    path = tmp_path_factory.mktemp("models") / "tiny-reward"
    LlamaForSequenceClassification(config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("conversational", [False, True], ids=["text", "messages"])
def test_reward_model(classifier_path, tokenizer, conversational, batch_size):
    """The value is the first logit at the end of prompt and completion, the same alone and padded in a batch."""
    suite = RewardSuite([classifier_path, length], weights=[2.0, 1.0], model_batch_size=batch_size, time_limits=10.0)
    assert suite.names == ["tiny-reward", "length"]
    model = suite.models[0]
    assert not model.training
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id
    prompts = [f"what is {text}?" for text in PROMPTS]
    texts = [prompt + completion for prompt, completion in zip(prompts, COMPLETIONS, strict=True)]
    completions = COMPLETIONS
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        completions = [[{"role": "assistant", "content": completion}] for completion in COMPLETIONS]
        whole = [p + c for p, c in zip(prompts, completions, strict=True)]
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in whole]
    masks = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    table = suite.score(prompts, completions, IDS)
    hook.remove()
    assert [len(mask) for mask in masks] == ([3] if batch_size is None else [2, 1])
    assert masks[0][:, 0].all() and not masks[0][:, -1].all()  # padded, on the right
    for text, value in zip(texts, table.values_FN[0].tolist(), strict=True):
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            assert value == pytest.approx(model(ids).logits[0, 0].item(), abs=1e-5)


def test_reward_model_object_with_its_tokenizer(classifier_path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(classifier_path).eval()
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    suite = RewardSuite([model, length], processing_classes=[tokenizer, None])
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    prepared = []
    suite.prepare_models(lambda model: prepared.append(model) or model.double())
    assert prepared == [model]
    assert score(suite).values_FN.shape == (2, 3)


def test_reward_model_without_a_tokenizer(classifier_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(classifier_path)
    config._name_or_path = ""
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(
        ValueError, match="has no name to find a tokenizer by. Pass one in `reward_processing_classes`"
    ):
        RewardSuite(model)
    assert RewardSuite(model, processing_classes=build_tokenizer()).names == ["LlamaForSequenceClassification"]


def test_no_completions():
    table = RewardSuite([length, async_length]).score([], [], [])
    assert table.values_FN.shape == (2, 0)
    assert table.totals_N().shape == (0,)


def test_reward_model_has_no_limit_and_no_policy(classifier_path, monkeypatch):
    """All processes call a model together, so one must not go on without the others."""
    with pytest.raises(ValueError, match="is a model, and a model has no time limit"):
        RewardSuite([classifier_path, length], time_limits=[1.0, None])
    suite = RewardSuite(classifier_path, on_error="count")
    monkeypatch.setattr(suite.models[0], "forward", broken)
    with pytest.raises(RewardError, match="'tiny-reward' failed"):
        score(suite)
