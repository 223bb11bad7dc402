import itertools
import math
import threading

import numpy as np
import pytest
import torch
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st

from tests.two_processes import run_on_two_processes
from trl.trainer import text_evaluation
from trl.trainer.text_evaluation import (
    TextEvalCollector,
    TextEvalPrediction,
    check_metrics,
    evaluate_text,
    pass_at_k,
    pass_at_k_metric,
)


def _prediction(completions, num_generations=1, **columns):
    ids = [[index] for index in range(len(completions))]
    prompts = [f"p{index // num_generations}" for index in range(len(completions))]
    return TextEvalPrediction(prompts, completions, ids, columns, {"reward": [0.0] * len(ids)}, num_generations)


# ---- Pass@k ----


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(st.integers(1, n), st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1))
    )
)
def test_pass_at_k_is_the_share_of_choices_with_a_correct_one(case):
    """Against all choices of k samples, written out."""
    k, groups = case
    shares = []
    for group in groups:
        choices = list(itertools.combinations(group, k))
        shares.append(sum(any(choice) for choice in choices) / len(choices))
    flat = [float(value) for group in groups for value in group]
    assert pass_at_k(flat, len(groups[0]), k) == pytest.approx(sum(shares) / len(shares), abs=1e-12)


def test_pass_at_k_numbers():
    """One of four correct: 1/4 for one sample, 1/2 for two, certain for all four; averaged over prompts."""
    one_of_four = [0, 1, 0, 0]
    assert [pass_at_k(one_of_four, 4, k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert pass_at_k(one_of_four + [0] * 4, 4, 2) == 0.25
    assert pass_at_k(torch.tensor([1.0, 0.0]), 2, 1) == 0.5
    assert pass_at_k([True] + [False] * 1999, 2000, 1000) == pytest.approx(0.5)


def test_pass_at_k_of_what_is_not_known():
    """No verdict is no pass; a prompt without any is left out."""
    assert pass_at_k([1, None, 1, 1], 2, 1) == 0.75
    assert pass_at_k([1, 0, None, math.nan], 2, 1) == 0.5
    assert math.isnan(pass_at_k([None, None], 2, 1))
    assert math.isnan(pass_at_k([], 2, 1))


@pytest.mark.parametrize(
    ("values", "n", "k", "message"),
    [
        ([1, 0], 2, 3, r"pass@3 takes 3 completions per prompt, and there are 2.*num_generations_eval"),
        ([1, 0], 2, 0, "pass@0"),
        ([1, 0, 1], 2, 1, "3 completions are no multiple of `num_generations=2`"),
        ([0.3], 1, 1, "Found 0.3; compare it with a threshold"),
    ],
)
def test_pass_at_k_refuses(values, n, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(values, n, k)


# ---- A metric of a reward function ----


@pytest.mark.filterwarnings("ignore:No reward function gave a value for 2 of 6")
def test_metric_of_a_reward_function():
    """It is called with what training calls it with, and judged by the threshold."""
    seen = {}

    def grade(prompts, completions, completion_ids, answer, log_metric, **kwargs):
        seen.update(prompts=prompts, completion_ids=completion_ids, others=set(kwargs))
        log_metric("length", sum(map(len, completions)) / len(completions))
        return [
            None if right is None else 0.7 * (text == right) for text, right in zip(completions, answer, strict=True)
        ]

    metric = pass_at_k_metric(grade, ks=(2, 1), threshold=0.7)
    prediction = _prediction(
        ["a", "b", "cc", "d", "e", "f"], 2, answer=["a", "a", "d", "d", None, None], level=[1] * 6
    )
    assert metric(prediction) == {"length": pytest.approx(7 / 6), "pass@1": 0.5, "pass@2": 1.0}
    assert seen["prompts"] == prediction.prompts
    assert seen["completion_ids"] == prediction.completion_ids
    assert {"level", "trainer_state", "log_extra"} <= seen["others"]
    assert pass_at_k_metric(grade, threshold=0.71)(prediction)["pass@1"] == 0.0


def test_metric_of_an_asynchronous_function_with_a_name():
    async def same(completions, **kwargs):
        return [1.0 if text == "yes" else 0.0 for text in completions]

    metric = pass_at_k_metric(same, name="verifier")
    assert metric(_prediction(["yes", "no", "yes", "yes"])) == {"verifier/pass@1": 0.75}


def test_metric_refuses():
    def grade(completions, **kwargs):
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match="from 1 on. Found \\[0, 2\\]"):
        pass_at_k_metric(grade, ks=(2, 0))
    with pytest.raises(TypeError, match="one reward function. Found a list of 2"):
        pass_at_k_metric([grade, grade])
    with pytest.raises(TypeError, match="reward function is a callable"):
        pass_at_k_metric(3)
    with pytest.raises(ValueError, match="pass@4 takes 4 completions per prompt, and there are 2"):
        pass_at_k_metric(grade, ks=(4,))(_prediction(["a", "b"], 2))


# ---- What the user's function returned ----


def test_metrics_get_the_prefix():
    values = {"accuracy": np.float32(0.5), "eval_done": 1, "loss": torch.tensor(0.25), "ok": True, "nan": math.nan}
    metrics = check_metrics(values, "eval_")
    assert list(metrics) == ["eval_accuracy", "eval_done", "eval_loss", "eval_ok", "eval_nan"]
    assert list(metrics.values())[:4] == [0.5, 1.0, 0.25, 1.0]
    assert math.isnan(metrics["eval_nan"])
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (None, TypeError, r"returns a dict.*Found a NoneType \(None\). Does it end without `return`\?"),
        (0.5, TypeError, r"Found a float \(0.5\)\."),
        ({"accuracy": "high"}, TypeError, r"Found a str \('high'\) for 'accuracy'"),
        ({"accuracy": None}, TypeError, r"Found a NoneType \(None\) for 'accuracy'"),
        ({"accuracy": np.ones(2)}, TypeError, "for 'accuracy'"),
        ({1: 0.5}, TypeError, r"the key a int \(1\)"),
        ({"a": 1, "eval_a": 2}, ValueError, "'eval_a' twice"),
    ],
)
def test_what_is_no_metric_is_named(values, error, message):
    with pytest.raises(error, match=message):
        check_metrics(values, "eval_")


# ---- Collecting ----


def _add(collector, texts, **options):
    columns = {"answer": [text.upper() for text in texts], "prompt": texts}
    collector.add([f"p {t}" for t in texts], texts, [[len(t), 1] for t in texts], columns, **options)


def test_collects_in_order():
    """Batches one after the other; the filler of the last one is dropped."""
    collector = TextEvalCollector(num_generations=2)
    _add(collector, ["a", "b", "c", "d"], rewards={"r": [1.0, math.nan, None, np.float32(0.5)]})
    _add(collector, ["e", "f", "a", "b"], rewards={"r": [0.0] * 4, "late": torch.ones(4)}, count=2)
    assert len(collector) == 6
    result = collector.result()
    assert result.completions == ["a", "b", "c", "d", "e", "f"]
    assert result.prompts == ["p a", "p b", "p c", "p d", "p e", "p f"]
    assert result.completion_ids == [[1, 1]] * 6
    assert result.columns == {"answer": ["A", "B", "C", "D", "E", "F"]}
    assert result.rewards == {"r": [1.0, None, None, 0.5, 0.0, 0.0], "late": [None] * 4 + [1.0] * 2}
    assert result.num_generations == 2
    assert len(result) == 6
    collector.clear()
    assert len(collector.result()) == 0
    assert len(result) == 6  # an evaluation's result is not taken back


def test_parts_of_different_length():
    with pytest.raises(ValueError, match="`answer` has 1 values for 2 completions"):
        TextEvalCollector().add(["p", "q"], ["a", "b"], [[1], [2]], {"answer": ["x"]})


class FakeProcesses:
    """Two processes as threads: gathers what both bring, in the order of their ranks."""

    def __init__(self):
        self.parts = [None, None]
        self.barrier = threading.Barrier(2)
        self.rank = threading.local()

    def gather(self, part):
        self.parts[self.rank.value] = part
        self.barrier.wait(10)
        gathered = [row for part in self.parts for row in part]
        self.barrier.wait(10)
        return gathered

    def run(self, function):
        results = [None, None]

        def work(rank):
            self.rank.value = rank
            results[rank] = function(rank)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return results


def test_two_processes_give_the_order_of_one(monkeypatch):
    """Each batch is cut into blocks by rank; whatever the cut, the result is the dataset, once."""
    texts = [f"text {index}" for index in range(10)]
    padded = texts + texts[:2]  # 3 batches of 4; the last one is filled up

    def collect(rank, world):
        collector = TextEvalCollector()
        for batch in range(3):
            block = 4 // world
            start = batch * 4 + rank * block
            _add(collector, padded[start : start + block], count=2 if batch == 2 else 4)
        return collector.result()

    alone = collect(0, 1)
    processes = FakeProcesses()
    monkeypatch.setattr(text_evaluation, "gather_object", processes.gather)
    first, second = processes.run(lambda rank: collect(rank, 2))
    assert alone.completions == texts
    assert first == second == alone


# ---- The main process computes ----

TWO_PROCESSES = """
from accelerate import PartialState
from trl.trainer.text_evaluation import TextEvalCollector, evaluate_text
state = PartialState(cpu=True)
collector = TextEvalCollector()
collector.add([f"p{state.process_index}"], [f"c{state.process_index}"], [[state.process_index]], {}, {})
texts = collector.result().completions
calls = []
def measure(prediction):
    calls.append(1)
    return {"rank": state.process_index + 0.5, "count": len(prediction)}
def fail(prediction):
    raise KeyError("no such answer")
metrics = evaluate_text(measure, collector.result(), "eval_")
try:
    evaluate_text(fail, collector.result(), "eval_")
except Exception as error:
    failure = f"{type(error).__name__}: {error}"
print(texts, sorted(metrics.items()), len(calls), failure)
"""


def test_on_two_processes_the_main_one_computes():
    """All get its figures, and its failure is an error on all, not a hang."""
    main, other = run_on_two_processes(TWO_PROCESSES)
    expected = "['c0', 'c1'] [('eval_count', 2.0), ('eval_rank', 0.5)]"
    assert f"{expected} 1 KeyError: 'no such answer'" in main
    failure = "RuntimeError: `compute_metrics` failed on the main process: KeyError: 'no such answer'"
    assert f"{expected} 0 {failure}" in other


def test_on_one_process_the_error_is_the_users():
    PartialState()
    assert evaluate_text(lambda prediction: {"n": len(prediction)}, _prediction(["a"]), "eval_") == {"eval_n": 1.0}
    with pytest.raises(ZeroDivisionError):
        evaluate_text(lambda prediction: {"n": 1 / 0}, _prediction(["a"]), "eval_")
    with pytest.raises(TypeError, match="Found a NoneType"):
        evaluate_text(lambda prediction: None, _prediction(["a"]), "eval_")
