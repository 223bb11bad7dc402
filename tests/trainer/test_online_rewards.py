"""Rewards as slow, failing, untrusted code: what stops a run and names it, what is counted, and what is logged."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time

import pandas
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.rollouts.helpers import ScriptedEngine, build_tool_tokenizer, tool_call
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import RewardError, RewardValueError, event_loop

from ..conftest import build_model, build_tokenizer
from .online_helpers import (
    GROUP,
    PROMPTS,
    QUIET,
    SAMPLES,
    SETTINGS,
    dataset,
    fixed_rollouts,
    low_ids,
    make_fixed_trainer,
    make_online_trainer,
    nothing,
    trained_weights,
)

METHODS = ("grpo", "rloo")
BATCH = 3 * GROUP  # two steps over the prompts
LONG = 30.0
SHORT = 0.2  # a limit that is run into


def make_trainer(output_dir, reward_funcs, method="grpo", **settings):
    """Two steps over the fixed completions."""
    return make_fixed_trainer(method, output_dir, reward_funcs, per_device_train_batch_size=BATCH, **settings)


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def means(values, step, size=BATCH):
    """Mean over the completions of a step, in the order of the prompts."""
    chosen = [value for value in values[step * size : (step + 1) * size] if value is not None]
    return sum(chosen) / len(chosen)


LOW_IDS = low_ids([list(sample.completion_ids) for sample in SAMPLES.values()])


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Final weights of the run with `low_ids` alone, by method."""
    weights = {}
    for method in METHODS:
        trainer = make_trainer(tmp_path_factory.mktemp(method), low_ids, method)
        trainer.train()
        weights[method] = trained_weights(trainer.model)
    return weights


def assert_same_weights(trainer, weights):
    for name, weight in trained_weights(trainer.model).items():
        torch.testing.assert_close(weight, weights[name], atol=0, rtol=0, msg=name)


# ---- Functions that fail ----


@pytest.fixture
def released(monkeypatch):
    """Set when the test is over, for functions that hang until then."""
    monkeypatch.setattr(event_loop, "RESPONSE_LIMIT_S", 0.1)
    event = threading.Event()
    yield event
    event.set()


def hangs(released):
    def hangs(completions, **kwargs):
        released.wait(LONG)
        return [0.0] * len(completions)

    return hangs


def hangs_async(released):
    async def hangs_async(completions, **kwargs):
        await asyncio.sleep(LONG)

    return hangs_async


def blocks_the_loop(released):
    async def blocks_the_loop(completions, **kwargs):
        released.wait(LONG)

    return blocks_the_loop


def raises(released):
    def raises(completions, **kwargs):
        raise ConnectionError("no route to the judge")

    return raises


def raises_async(released):
    async def raises_async(completions, **kwargs):
        raise ConnectionError("no route to the judge")

    return raises_async


def is_cancelled(released):
    async def is_cancelled(completions, **kwargs):
        task = asyncio.ensure_future(asyncio.sleep(LONG))
        task.cancel()
        await task

    return is_cancelled


def exits(released):
    def exits(completions, **kwargs):
        sys.exit("no licence")

    return exits


def exits_async(released):
    async def exits_async(completions, **kwargs):
        sys.exit("no licence")

    return exits_async


def returns_infinity(released):
    def returns_infinity(completions, **kwargs):
        return [math.inf] * len(completions)

    return returns_infinity


FAILURES = {
    hangs: "RewardTimeoutError: no answer within its time limit of 0.2 s",
    hangs_async: "RewardTimeoutError: no answer within its time limit of 0.2 s",
    blocks_the_loop: "RewardTimeoutError: no answer within its time limit of 0.2 s",
    raises: "ConnectionError: no route to the judge",
    raises_async: "ConnectionError: no route to the judge",
    is_cancelled: "CancelledError",
    exits: "SystemExit: no licence",
    exits_async: "SystemExit: no licence",
    returns_infinity: "infinite value for completion 0 and 11 more",
}


@pytest.mark.parametrize("failing", FAILURES, ids=lambda function: function.__name__)
def test_a_failing_function_is_counted(tmp_path, released, healthy, caplog, failing):
    """The run goes on, the log tells of it, and training is that of the other functions."""
    method = METHODS[len(failing.__name__) % 2]
    trainer = make_trainer(
        tmp_path, [low_ids, failing(released)], method,
        reward_on_error="count", reward_time_limits=[LONG, SHORT], log_completions=True,
    )  # fmt: skip
    with caplog.at_level("WARNING"):
        trainer.train()
    name = failing.__name__
    assert trainer.state.global_step == 2
    for step, log in enumerate(logs_of(trainer)):
        assert log[f"rewards/{name}/error_rate"] == log[f"rewards/{name}/none_rate"] == 1.0
        assert log["rewards/low_ids/error_rate"] == log["rewards/low_ids/none_rate"] == 0.0
        assert f"rewards/{name}/mean" not in log
        assert log["reward"] == log["rewards/low_ids/mean"] == pytest.approx(means(LOW_IDS, step))
        waited = log[f"rewards/{name}/latency_s"]
        assert SHORT <= waited < LONG if "no answer" in FAILURES[failing] else waited >= 0
    assert_same_weights(trainer, healthy[method])
    assert f"The reward function '{name}' failed, and its values count as `None`: {FAILURES[failing]}" in caplog.text
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert table[name].isna().all()
    assert table["low_ids"].tolist() == pytest.approx(LOW_IDS[BATCH:])


@pytest.mark.parametrize("failing", FAILURES, ids=lambda function: function.__name__)
def test_a_failing_function_stops_the_run_by_default(tmp_path, released, failing):
    """It is named, with what happened, before anything was learnt from the others."""
    method = METHODS[len(failing.__name__) % 2]
    trainer = make_trainer(tmp_path, [low_ids, failing(released)], method, reward_time_limits=[LONG, SHORT])
    before = trained_weights(trainer.model)
    with pytest.raises(RewardError, match=f"'{failing.__name__}' failed: {FAILURES[failing]}.*'count'"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert_same_weights(trainer, before)


def test_a_late_answer_is_dropped_and_the_next_one_taken(tmp_path, released):
    """Nothing of the call that was given up is left: no value, no report, no extra column."""
    calls = []

    def slow_at_first(completions, log_extra, log_metric, **kwargs):
        calls.append(len(calls))
        if calls[-1] == 0:
            log_metric("answers", 99.0)
            log_extra("note", ["late"] * len(completions))
            released.wait(LONG)
            return [99.0] * len(completions)
        log_metric("answers", 1.0)
        return [0.5] * len(completions)

    trainer = make_trainer(
        tmp_path, [low_ids, slow_at_first], reward_on_error="count", reward_time_limits=[LONG, 1.0],
        log_completions=True,
    )  # fmt: skip
    trainer.train()
    first, second = logs_of(trainer)
    assert (first["rewards/slow_at_first/error_rate"], second["rewards/slow_at_first/error_rate"]) == (1.0, 0.0)
    assert first["reward"] == pytest.approx(means(LOW_IDS, 0))
    assert second["reward"] == pytest.approx(means(LOW_IDS, 1) + 0.5)
    assert "answers" not in first
    assert second["answers"] == 1.0
    assert "note" not in pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")


@pytest.mark.parametrize("method", METHODS)
def test_a_slow_function_without_a_limit_is_waited_for(tmp_path, method):
    def slow(completions, **kwargs):
        time.sleep(SHORT)
        return [1.0] * len(completions)

    async def slow_async(completions, **kwargs):
        await asyncio.sleep(SHORT)
        return [2.0] * len(completions)

    trainer = make_trainer(tmp_path, [slow, slow_async], method, max_steps=1)
    trainer.train()
    (log,) = logs_of(trainer)
    assert log["rewards/slow/mean"] == 1.0
    assert log["rewards/slow_async/mean"] == 2.0
    assert log["rewards/slow/latency_s"] >= SHORT
    assert log["rewards/slow_async/latency_s"] >= SHORT


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "policy"), [(None, "raise"), (2.0, "count"), (2.0, "raise")])
def test_an_answer_after_ten_seconds(tmp_path, limit, policy):
    def judge(completions, **kwargs):
        time.sleep(10)
        return [1.0] * len(completions)

    limits = None if limit is None else [LONG, limit]
    trainer = make_trainer(tmp_path, [low_ids, judge], reward_time_limits=limits, reward_on_error=policy, max_steps=1)
    if limit and policy == "raise":
        with pytest.raises(RewardError, match="'judge' failed: .*time limit of 2 s"):
            trainer.train()
        return
    trainer.train()
    (log,) = logs_of(trainer)
    assert log["rewards/judge/error_rate"] == float(limit is not None)
    assert log["rewards/judge/latency_s"] == pytest.approx(limit or 10, rel=0.5)
    assert log["reward"] == pytest.approx(means(LOW_IDS, 0) + (0 if limit else 1))


def test_an_interrupt_ends_the_run(tmp_path):
    """Ctrl-C within a reward function is not an error of that function."""

    def interrupted(completions, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, interrupted, reward_on_error="count").train()


@pytest.mark.parametrize("policy", ["raise", "count"])
def test_an_evaluation_counts_and_stops_likewise(tmp_path, policy):
    def judge(completions, trainer_state, **kwargs):
        if trainer_state.global_step:  # all is well while training
            raise ConnectionError("no route to the judge")
        return [1.0] * len(completions)

    trainer = make_trainer(
        tmp_path, [low_ids, judge], reward_on_error=policy, max_steps=1, eval_dataset=dataset(PROMPTS[:2]),
        per_device_eval_batch_size=2 * GROUP,
    )  # fmt: skip
    trainer.train()
    if policy == "raise":
        with pytest.raises(RewardError, match="'judge' failed: ConnectionError"):
            trainer.evaluate()
        return
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/judge/error_rate"] == 1.0
    assert (
        metrics["eval_reward"] == metrics["eval_rewards/low_ids/mean"] == pytest.approx(means(LOW_IDS, 0, 2 * GROUP))
    )
    assert logs_of(trainer)[0]["rewards/judge/error_rate"] == 0.0


# ---- Values that are missing or malformed ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", ["raise", "count"])
def test_nan_is_none_and_neither_is_a_failure(tmp_path, method, policy):
    """What does not apply has no part in a mean, and a completion that nothing applies to none in its group."""

    def sometimes(missing):
        def sometimes(completion_ids, **kwargs):
            return [missing if len(ids) % 2 else float(len(ids)) for ids in completion_ids]

        return sometimes

    weights = []
    lengths = [len(sample.completion_ids) for sample in SAMPLES.values()]
    expected = [None if length % 2 else length for length in lengths]
    for missing in (None, math.nan, torch.tensor(math.nan)):
        trainer = make_trainer(tmp_path, sometimes(missing), method, reward_on_error=policy)
        with pytest.warns(UserWarning, match="No reward function gave a value"):
            trainer.train()
        for step, log in enumerate(logs_of(trainer)):
            assert log["rewards/sometimes/error_rate"] == 0.0
            assert log["rewards/sometimes/none_rate"] == pytest.approx(
                expected[step * BATCH : (step + 1) * BATCH].count(None) / BATCH
            )
            assert log["rewards/sometimes/mean"] == pytest.approx(means(expected, step))
        weights.append(trained_weights(trainer.model))
    assert 0 < expected.count(None) < len(expected)
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])
        assert torch.equal(weight, weights[2][name])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_applies_to_anything(tmp_path, method):
    """The run goes on, says so, and learns nothing."""
    trainer = make_trainer(tmp_path, nothing, method)
    before = trained_weights(trainer.model)
    with pytest.warns(UserWarning, match="No reward function gave a value for 12 of 12 completions"):
        trainer.train()
    for log in logs_of(trainer):
        assert log["loss"] == log["grad_norm"] == 0.0
        assert log["rewards/nothing/none_rate"] == 1.0
        assert "reward" not in log
    assert trainer.state.global_step == 2
    assert_same_weights(trainer, before)


@pytest.mark.parametrize("policy", ["raise", "count"])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0] * (BATCH - 1), "returned 11 values"),
        ([], "returned 0 values"),
        (None, "Does it end without `return`"),
        (1.0, "a float"),
        (["good"] * BATCH, r"a str \('good'\) for completion 0"),
    ],
    ids=["too-few", "none-at-all", "no-return", "one-number", "text"],
)
def test_malformed_values_stop_the_run_whatever_the_policy(tmp_path, returned, message, policy):
    """They are a bug, not bad luck."""

    def judge(completions, **kwargs):
        return returned

    trainer = make_trainer(tmp_path, [low_ids, judge], reward_on_error=policy)
    with pytest.raises(RewardValueError, match=f"'judge' .*{message}"):
        trainer.train()


def test_a_column_that_is_not_there_is_named(tmp_path):
    def judge(completions, solution, **kwargs):
        return [1.0] * len(completions)

    trainer = make_trainer(tmp_path, judge)  # its `rollout_func` might have brought the column along
    with pytest.raises(RewardError, match="'judge' needs `solution`"):
        trainer.train()


@pytest.mark.parametrize("lacking", ["train", "eval", "eval 'hard'"])
def test_a_column_that_is_not_there_is_named_before_a_model_is_loaded(tmp_path, lacking):
    """Also one that only an evaluation, hours later, would have asked for."""

    def judge(completions, solution, **kwargs):
        return [1.0] * len(completions)

    whole, without = dataset().add_column("solution", PROMPTS), dataset().add_column("answer", PROMPTS)
    datasets = {
        "train": {"train_dataset": without},
        "eval": {"train_dataset": whole, "eval_dataset": without},
        "eval 'hard'": {"train_dataset": whole, "eval_dataset": {"easy": whole, "hard": without}},
    }[lacking]
    name = lacking.replace("eval", "eval dataset").replace("train", "train dataset")
    message = f"'judge' needs `solution`, and the {name} has no such column.*`completion_ids`, `answer`. Rename"
    with pytest.raises(RewardError, match=message):
        make_online_trainer("rloo", tmp_path, judge, model="no-such-model", num_generations=4, **QUIET, **datasets)


def test_a_function_gets_what_it_names(tmp_path):
    """The check before training takes nothing for missing that is there later."""
    seen = []

    def judge(prompts, completions, completion_ids, solution, trainer_state, log_extra, log_metric):
        seen.extend(solution)
        return [1.0] * len(completions)

    rows = dataset().add_column("solution", PROMPTS)
    settings = {**SETTINGS, "per_device_train_batch_size": BATCH, "max_steps": 1}
    make_online_trainer("rloo", tmp_path, judge, train_dataset=rows, **settings).train()
    assert seen == [prompt for prompt in PROMPTS[:3] for _ in range(GROUP)]


@pytest.mark.parametrize("method", METHODS)
def test_functions_cannot_change_what_is_trained_on(tmp_path, healthy, method):
    """Not even by emptying the lists they are given, and the lists in these."""

    def vandal(prompts, completions, completion_ids, **kwargs):
        for ids in completion_ids:
            ids.clear()
        prompts.clear()
        completions.clear()
        return [0.0] * len(completion_ids)

    trainer = make_trainer(tmp_path, [vandal, low_ids], method, log_completions=True)
    trainer.train()
    assert_same_weights(trainer, healthy[method])
    texts = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")["completion"]
    assert any(texts)


def test_messages_are_copies(tmp_path):
    def vandal(prompts, completions, **kwargs):
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt.extend(completion)
            completion[0]["content"] = "overwritten"
        return [0.0] * len(completions)

    def judge(prompts, completions, **kwargs):
        assert all(len(prompt) == 1 for prompt in prompts)
        assert all(completion[0]["content"] != "overwritten" for completion in completions)
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS])
    trainer = make_online_trainer(
        "grpo", tmp_path, [vandal, judge], train_dataset=rows, log_completions=True,
        **{**SETTINGS, "max_steps": 1, "per_device_train_batch_size": BATCH},
    )  # fmt: skip
    trainer.train()
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert "overwritten" not in set(table["completion"])
    assert set(table["prompt"]) <= {f"user\n{prompt}" for prompt in PROMPTS}


# ---- What functions are told and tell ----


@pytest.mark.parametrize("method", METHODS)
def test_reports_reach_log_files_and_evaluation(tmp_path, method):
    """Each value of `log_extra` stands by its completion, whoever reported it; `log_metric` is averaged."""

    def judge(completions, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("shouted", [text.upper() for text in completions])
        log_metric("judge/step", trainer_state.global_step)
        log_metric("judge/both", 1.0)
        return [1.0] * len(completions)

    async def critic(completion_ids, log_extra, log_metric, **kwargs):
        await asyncio.sleep(0)
        log_extra("length", [len(ids) for ids in completion_ids])
        log_metric("judge/both", 4.0)
        return [None] * len(completion_ids)

    trainer = make_trainer(
        tmp_path, [judge, critic], method, log_completions=True, num_completions_to_print=1,
        eval_dataset=dataset(PROMPTS[:2]), per_device_eval_batch_size=GROUP,
    )  # fmt: skip
    trainer.train()
    assert [log["judge/step"] for log in logs_of(trainer)] == [0.0, 1.0]
    assert [log["judge/both"] for log in logs_of(trainer)] == [2.5, 2.5]
    metrics = trainer.evaluate()
    assert metrics["eval_judge/step"] == 2.0
    assert metrics["eval_judge/both"] == 2.5
    lengths = [len(sample.completion_ids) for sample in SAMPLES.values()]
    for step in (1, 2):
        table = pandas.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert table["shouted"].tolist() == [text.upper() for text in table["completion"]]
        assert table["length"].tolist() == lengths[(step - 1) * BATCH : step * BATCH]
        assert table["judge"].tolist() == [1.0] * BATCH
        assert table["critic"].isna().all()
        assert (table["step"] == step).all()


def test_a_reward_may_depend_on_progress(tmp_path):
    """`trainer_state` is the run's own: where it is, and how far it will go."""
    seen = []

    def curriculum(completions, trainer_state, **kwargs):
        seen.append((trainer_state.global_step, trainer_state.max_steps))
        return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

    trainer = make_trainer(tmp_path, curriculum)
    trainer.train()
    assert seen == [(0, 2), (1, 2)]
    assert [log["reward"] for log in logs_of(trainer)] == [0.0, 0.5]


# ---- Reward models ----


@pytest.fixture(scope="module")
def classifier_path(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=1
    )
    path = tmp_path_factory.mktemp("models") / "tiny-judge"
    LlamaForSequenceClassification(config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("given_as", ["path", "object"])
def test_reward_models_score_and_are_not_trained(tmp_path, classifier_path, given_as):
    """Beside a function, with a weight of its own; each completion has the value it has when it is scored alone."""
    scored = []

    def spy(prompts, completions, **kwargs):
        scored.append([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
        return [1.0] * len(completions)

    judge, tokenizers = classifier_path, None
    if given_as == "object":
        judge, tokenizers = LlamaForSequenceClassification.from_pretrained(classifier_path), [build_tokenizer(), None]
    args = GRPOConfig(
        str(tmp_path), **{**SETTINGS, "per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 3}, reward_weights=[2.0, 0.5],
        reward_on_error="count",
    )  # fmt: skip
    trainer = GRPOTrainer(
        build_model(), [judge, spy], args, dataset(), processing_class=build_tokenizer(),
        reward_processing_classes=tokenizers, rollout_func=fixed_rollouts,
    )  # fmt: skip
    assert trainer.reward_func_names == ["tiny-judge", "spy"]
    model, tokenizer = trainer.reward_funcs[0], build_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    assert len(logs_of(trainer)) == 2
    for texts, log in zip(scored, logs_of(trainer), strict=True):
        with torch.no_grad():
            values = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits.item() for text in texts]
        mean = sum(values) / len(values)
        assert log["rewards/tiny-judge/mean"] == pytest.approx(mean, abs=1e-5)
        assert log["reward"] == pytest.approx(2 * mean + 0.5, abs=1e-5)
        assert log["rewards/tiny-judge/std"] > 0
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- Environments ----


class Counter:
    """Counts; says itself how it went."""

    def reset(self, **row):
        self.total = 0

    def add(self, amount: int) -> str:
        """
        Adds to the total.

        Args:
            amount: How much.
        """
        self.total += amount
        return str(self.total)

    def get_reward(self):
        return float(self.total)


class Slow(Counter):
    async def get_reward(self):
        await asyncio.sleep(0.01)
        return float(self.total)


class Picky(Counter):
    def get_reward(self):
        return None if self.total == 3 else float(self.total)


class Broken(Counter):
    def get_reward(self):
        raise KeyError("score")


def make_environment_trainer(tmp_path, reward_funcs, environments, rows, **settings):
    """One step of two completions, which count to 3 and 4."""
    tokenizer = build_tool_tokenizer()
    settings = {
        **QUIET, "max_steps": 1, "num_generations": 2, "per_device_train_batch_size": len(rows) * 2,
        "max_completion_length": 400, "shuffle_dataset": False, **settings,
    }  # fmt: skip
    with pytest.warns(UserWarning, match="environment_factory"):
        trainer = GRPOTrainer(
            build_model(vocab_size=len(tokenizer), max_position_embeddings=2048), reward_funcs,
            GRPOConfig(str(tmp_path), **settings), Dataset.from_list(rows), processing_class=tokenizer,
            environment_factory=environments,
        )  # fmt: skip
    calls = [tool_call("add", amount=3), tool_call("add", amount=4)] * len(rows)
    engine = ScriptedEngine(tokenizer, [calls, ["Done."] * len(calls)], with_logps=False)
    trainer.rollouts.conversations.engine = engine
    return trainer


ROW = {"prompt": [{"role": "user", "content": "count"}]}


@pytest.mark.parametrize(
    ("environment", "mean", "none_rate"), [(Counter, 3.5, 0.0), (Slow, 3.5, 0.0), (Picky, 4.0, 0.5)]
)
def test_environments_reward_themselves(tmp_path, environment, mean, none_rate):
    """Beside a function, under the name of their class, with weight 1."""

    def half(environments, **kwargs):
        return [one.total / 2 for one in environments]

    trainer = make_environment_trainer(tmp_path, half, environment, [ROW])
    trainer.train()
    (log,) = logs_of(trainer)
    name = environment.__name__
    assert log[f"rewards/{name}/mean"] == mean
    assert log[f"rewards/{name}/none_rate"] == none_rate
    assert log["rewards/half/mean"] == 1.75
    assert log["reward"] == 1.75 + mean * (1 - none_rate)


def test_environments_by_name_have_rewards_of_their_own(tmp_path):
    rows = [{**ROW, "environment": "fast"}, {**ROW, "environment": "slow"}]
    trainer = make_environment_trainer(tmp_path, None, {"fast": Counter, "slow": Slow}, rows)
    trainer.train()
    (log,) = logs_of(trainer)
    assert log["rewards/Counter/mean"] == log["rewards/Slow/mean"] == log["reward"] == 3.5
    assert log["rewards/Counter/none_rate"] == log["rewards/Slow/none_rate"] == 0.5


@pytest.mark.parametrize("policy", ["raise", "count"])
def test_an_environment_that_fails_to_say(tmp_path, policy):
    def ones(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = make_environment_trainer(tmp_path, ones, Broken, [ROW], reward_on_error=policy)
    if policy == "raise":
        with pytest.raises(RewardError, match="'Broken' failed: KeyError: 'score'"):
            trainer.train()
        return
    trainer.train()
    (log,) = logs_of(trainer)
    assert log["rewards/Broken/error_rate"] == 1.0
    assert log["reward"] == 1.0
