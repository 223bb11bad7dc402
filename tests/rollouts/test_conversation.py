"""The conversation loop, with an engine that says what the test wrote down for it: nothing here depends on a model."""

from __future__ import annotations

import asyncio
import math
import time

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from tests.conftest import build_model
from tests.rollouts.helpers import ScriptedEngine, build_tool_tokenizer, tool_call
from trl.data.formats import DatasetFormatError
from trl.rollouts.conversation import Conversations
from trl.rollouts.environments import EnvironmentPool
from trl.rollouts.tools import ToolRunner
from trl.rollouts.transformers_engine import TransformersEngine
from trl.rollouts.types import Rollout, RolloutEngine, SamplingParams

SAMPLING = SamplingParams(max_completion_length=400)
QUESTION = [{"role": "user", "content": "what is 12 plus 30?"}]
ROW = {"prompt": QUESTION}


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


async def slow_add(a: int, b: int) -> int:
    """
    Add two numbers, slowly.

    Args:
        a: the first
        b: the second
    """
    await asyncio.sleep(0.2)
    return a + b


def fail(reason: str) -> str:
    """
    Fail.

    Args:
        reason: why
    """
    raise RuntimeError(reason)


@pytest.fixture(scope="module")
def tool_tokenizer():
    return build_tool_tokenizer()


@pytest.fixture
def converse(tool_tokenizer):
    """Conversations over a script; the engine is left on them."""
    made = []

    def make(script, rows=(ROW,), sampling=SAMPLING, max_model_length=None, with_logps=True, **options):
        engine = ScriptedEngine(tool_tokenizer, script, max_model_length, with_logps)
        conversations = Conversations(
            engine, tool_tokenizer, eos_token_ids=[tool_tokenizer.eos_token_id], **{"tools": [add], **options}
        )
        made.append(conversations)
        conversations.rollouts = conversations.generate(rows, sampling)
        return conversations

    yield make
    for conversations in made:
        conversations.close()


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_the_scripted_engine_keeps_the_protocol(tool_tokenizer):
    assert isinstance(ScriptedEngine(tool_tokenizer, []), RolloutEngine)


class TestStream:
    def test_a_call_its_result_and_the_answer(self, converse, tool_tokenizer):
        [rollout] = converse([[tool_call("add", a=12, b=30)], ["the answer is 42."]]).rollouts
        assert [message["role"] for message in rollout.completion] == ["assistant", "tool", "assistant"]
        assert rollout.completion[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 12, "b": 30}}
        assert rollout.completion[1] == {"role": "tool", "name": "add", "content": "42"}
        assert rollout.completion[2] == {"role": "assistant", "content": "the answer is 42."}
        assert (rollout.tool_calls, rollout.tool_failures, rollout.turns) == (1, 0, 2)
        assert not rollout.is_truncated

    def test_the_stream_is_what_the_template_renders(self, converse, tool_tokenizer):
        conversations = converse([[tool_call("add", a=12, b=30)], ["the answer is 42."]])
        [rollout] = conversations.rollouts
        rendered = tool_tokenizer.apply_chat_template(
            [*QUESTION, *rollout.completion], tools=[add], tokenize=False
        ).removesuffix("\n")
        assert decode(tool_tokenizer, rollout.prompt_ids + rollout.completion_ids) == rendered
        assert "Tools: " in rendered

    def test_only_what_was_sampled_is_the_policys(self, converse, tool_tokenizer):
        conversations = converse([[tool_call("add", a=12, b=30)], ["the answer is 42."]])
        [rollout] = conversations.rollouts
        said = [conversations.engine.ids_of(turn[0]) for turn in conversations.engine.script]
        written = [token for token, mine in zip(rollout.completion_ids, rollout.policy_mask, strict=True) if mine]
        assert written == said[0] + said[1]
        expected = [-0.5] * len(said[0]) + [-1.5] * len(said[1])
        logps = [value for value, mine in zip(rollout.sampled_logps, rollout.policy_mask, strict=True) if mine]
        assert logps == expected
        others = [value for value, mine in zip(rollout.sampled_logps, rollout.policy_mask, strict=True) if not mine]
        assert others
        assert set(others) == {0.0}

    def test_sampled_tokens_are_never_tokenized_again(self, converse, tool_tokenizer):
        """A call spelled letter by letter decodes to the same text, and must stay as it was sampled."""
        text = tool_call("add", a=12, b=30)
        letters = [token for letter in text for token in tool_tokenizer(letter)["input_ids"]]
        assert letters != tool_tokenizer(text)["input_ids"]
        call = [*letters, tool_tokenizer.eos_token_id]
        [rollout] = converse([[call], ["42"]]).rollouts
        assert rollout.tool_calls == 1
        assert rollout.completion_ids[: len(call)] == call

    def test_the_engine_sees_the_whole_stream(self, converse):
        conversations = converse([[tool_call("add", a=12, b=30)], ["the answer is 42."]])
        [rollout] = conversations.rollouts
        (first,), _ = conversations.engine.calls[0]
        (second,), _ = conversations.engine.calls[1]
        assert first == rollout.prompt_ids
        assert rollout.prompt_ids + rollout.completion_ids[: len(second) - len(first)] == second

    def test_no_logps_of_the_engine_none_of_the_rollout(self, converse):
        [rollout] = converse([[tool_call("add", a=1, b=2)], ["3"]], with_logps=False).rollouts
        assert rollout.sampled_logps is None

    def test_rows_go_on_by_themselves(self, converse):
        script = [
            [tool_call("add", a=1, b=2), "no tools needed", tool_call("add", a=3, b=4)],
            ["3", None, tool_call("add", a=5, b=6)],
            [None, None, "11"],
        ]
        rows = [{"prompt": [{"role": "user", "content": f"question {index}"}]} for index in range(3)]
        conversations = converse(script, rows)
        assert [rollout.tool_calls for rollout in conversations.rollouts] == [1, 0, 2]
        assert [len(prompts) for prompts, _ in conversations.engine.calls] == [3, 2, 1]
        assert [rollout.completion[-1]["content"] for rollout in conversations.rollouts] == [
            "3",
            "no tools needed",
            "11",
        ]

    def test_several_completions_per_row_are_told_apart(self, converse):
        script = [[tool_call("add", a=1, b=2), tool_call("add", a=3, b=4)], ["3", "7"]]
        conversations = converse(script, sampling=SamplingParams(max_completion_length=400, n=2))
        assert [rollout.completion[1]["content"] for rollout in conversations.rollouts] == ["3", "7"]
        assert all(sampling.n == 1 for _, sampling in conversations.engine.calls)

    def test_the_row_is_not_changed(self, converse):
        row = {"prompt": [{"role": "user", "content": "hello"}]}
        [rollout] = converse([["hello"]], [row]).rollouts
        rollout.prompt[0]["content"] = "changed"
        assert row == {"prompt": [{"role": "user", "content": "hello"}]}


class TestCallsThatGoWrong:
    @pytest.mark.parametrize(
        ("call", "complaint"),
        [
            (tool_call("subtract", a=1, b=2), "no tool 'subtract'. The tools are: add, fail"),
            (tool_call("fail", reason="the disk is full"), "RuntimeError: the disk is full"),
            (tool_call("add", a=1), "TypeError"),
        ],
    )
    def test_the_error_is_told_and_the_rollout_goes_on(self, converse, call, complaint):
        [rollout] = converse([[call], ["sorry"]], tools=[add, fail]).rollouts
        assert complaint in rollout.completion[1]["content"]
        assert rollout.completion[1]["content"].startswith("{'error': ")
        assert rollout.completion[2]["content"] == "sorry"
        assert (rollout.tool_calls, rollout.tool_failures) == (1, 1)
        assert rollout.error is None
        assert rollout.generated_length > 0

    def test_one_failure_does_not_touch_the_other_calls(self, converse):
        both = tool_call("fail", reason="no") + "\n" + tool_call("add", a=1, b=2)
        [rollout] = converse([[both], ["done"]], tools=[add, fail]).rollouts
        assert [message["content"] for message in rollout.completion[1:3]] == ["{'error': 'RuntimeError: no'}", "3"]
        assert (rollout.tool_calls, rollout.tool_failures) == (2, 1)

    def test_a_call_cut_off_is_text(self, converse):
        call = tool_call("add", a=12, b=30)
        [rollout] = converse([[call]], sampling=SamplingParams(max_completion_length=10)).rollouts
        assert rollout.tool_calls == 0
        assert len(rollout.completion_ids) == 10
        assert rollout.is_truncated

    def test_an_engines_error_costs_the_sample(self, converse, tool_tokenizer):
        class Failing(ScriptedEngine):
            def generate(self, prompts, sampling):
                rollouts = super().generate(prompts, sampling)
                return [Rollout(one.prompt_ids, one.completion_ids, error="the server went away") for one in rollouts]

        engine = Failing(tool_tokenizer, [[tool_call("add", a=1, b=2)]])
        conversations = Conversations(engine, tool_tokenizer, eos_token_ids=[tool_tokenizer.eos_token_id], tools=[add])
        [rollout] = conversations.generate([ROW], SAMPLING)
        assert rollout.error == "the server went away"
        assert rollout.generated_length == 0
        assert rollout.tool_calls == 0


class TestAsyncTools:
    def test_they_run_at_once_and_come_after_the_others(self, converse):
        calls = [tool_call("slow_add", a=index, b=1) for index in range(3)]
        said = "\n".join([calls[0], calls[1], tool_call("add", a=40, b=2), calls[2]])
        start = time.monotonic()
        rollouts = converse([[said, said], ["ok", "ok"]], [ROW, ROW], tools=[add, slow_add]).rollouts
        assert time.monotonic() - start < 1.0  # six times 0.2 s one after the other
        for rollout in rollouts:
            assert [message["content"] for message in rollout.completion[1:5]] == ["42", "1", "2", "3"]

    @pytest.mark.parametrize("name", ["hang", "block"])
    def test_a_tool_that_hangs_is_told_of(self, converse, name):
        async def hang(seconds: int) -> str:
            """
            Wait.

            Args:
                seconds: how long
            """
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                await asyncio.sleep(0.3)  # takes its time

        def block(seconds: int) -> str:
            """
            Wait.

            Args:
                seconds: how long
            """
            time.sleep(min(seconds, 2))

        start = time.monotonic()
        [rollout] = converse(
            [[tool_call(name, seconds=60)], ["too late"]], tools=[hang, block], tool_runner=ToolRunner(timeout=0.1)
        ).rollouts
        assert time.monotonic() - start < 1.5
        assert f"'{name}' did not return within 0.1 s" in rollout.completion[1]["content"]
        assert rollout.tool_failures == 1

    def test_a_tool_that_fails_by_itself_with_a_timeout_is_believed(self):
        def fail_at_once() -> str:
            raise TimeoutError("no answer from the database")

        call = {"type": "function", "function": {"name": "fail_at_once", "arguments": {}}}
        from trl.rollouts.tools import ToolRequest

        [[result]] = ToolRunner(timeout=5).run([ToolRequest([call], {"fail_at_once": fail_at_once})])
        assert "no answer from the database" in result.content


class TestLimits:
    def lengths(self, converse):
        """Tokens of call, results and answer in an exchange without limits."""
        conversations = converse([[tool_call("add", a=12, b=30)], ["the answer is 42."]])
        [rollout] = conversations.rollouts
        first, last = (len(conversations.engine.ids_of(turn[0])) for turn in conversations.engine.script)
        return first, len(rollout.completion_ids) - first - last, last, len(rollout.prompt_ids)

    def test_results_that_do_not_fit_are_dropped(self, converse):
        call, result, _, _ = self.lengths(converse)
        script = [[tool_call("add", a=12, b=30)], ["the answer is 42."]]
        conversations = converse(script, sampling=SamplingParams(max_completion_length=call + result - 1))
        [rollout] = conversations.rollouts
        assert [message["role"] for message in rollout.completion] == ["assistant"]
        assert len(rollout.completion_ids) == call
        assert rollout.policy_mask == [1] * call
        assert (rollout.tool_calls, rollout.turns) == (1, 1)
        assert not rollout.is_truncated

    def test_an_empty_turn_adds_no_message(self, converse):
        [rollout] = converse([[tool_call("add", a=12, b=30)], [[]]]).rollouts
        assert [message["role"] for message in rollout.completion] == ["assistant", "tool"]

    def test_results_that_just_fit_leave_nothing_to_say(self, converse):
        call, result, _, _ = self.lengths(converse)
        script = [[tool_call("add", a=12, b=30)], ["the answer is 42."]]
        conversations = converse(script, sampling=SamplingParams(max_completion_length=call + result))
        [rollout] = conversations.rollouts
        assert [message["role"] for message in rollout.completion] == ["assistant", "tool"]
        assert len(rollout.completion_ids) == call + result
        assert rollout.is_truncated
        assert conversations.engine.calls[-1][0] == []

    def test_the_answer_is_cut_to_the_rest(self, converse):
        call, result, answer, _ = self.lengths(converse)
        script = [[tool_call("add", a=12, b=30)], ["the answer is 42."]]
        conversations = converse(script, sampling=SamplingParams(max_completion_length=call + result + answer - 3))
        [rollout] = conversations.rollouts
        assert len(rollout.completion_ids) == call + result + answer - 3
        assert rollout.is_truncated
        assert rollout.completion[-1]["role"] == "assistant"
        assert "the answer is 42.".startswith(rollout.completion[-1]["content"])

    def test_each_row_is_cut_to_its_own_rest(self, converse):
        """One call of the engine serves rows with different room: the longest is asked for."""
        call, result, answer, _ = self.lengths(converse)
        limit = call + result + answer
        long_call = "ok " + tool_call("add", a=12, b=30)
        script = [[tool_call("add", a=12, b=30), long_call], ["the answer is 42."] * 2]
        rows = [ROW, {"prompt": [{"role": "user", "content": "hello"}]}]
        conversations = converse(script, rows, sampling=SamplingParams(max_completion_length=limit))
        first, second = conversations.rollouts
        assert len(first.completion_ids) == limit
        assert not first.is_truncated
        assert len(second.completion_ids) == limit
        assert second.is_truncated
        assert second.completion[-1]["role"] == "assistant"

    def test_results_that_fill_the_context_are_dropped(self, converse):
        call, result, _, prompt = self.lengths(converse)
        script = [[tool_call("add", a=12, b=30)], ["the answer is 42."]]
        [full] = converse(script, max_model_length=prompt + call + result).rollouts
        assert len(full.completion) == 1
        [fits] = converse(script, max_model_length=prompt + call + result + 1).rollouts
        assert len(fits.completion) == 3
        assert len(fits.prompt_ids) + len(fits.completion_ids) == prompt + call + result + 1

    @pytest.mark.parametrize(("most", "expected"), [(0, 0), (1, 1), (2, 2), (None, 4)])
    def test_rounds_are_counted(self, converse, most, expected):
        call = [tool_call("add", a=1, b=1)]
        script = [call, call, call, call, ["done"]]
        conversations = converse(
            script, max_tool_calling_iterations=most, sampling=SamplingParams(max_completion_length=None)
        )
        [rollout] = conversations.rollouts
        assert rollout.tool_calls == expected
        assert rollout.turns == expected + 1
        assert len(conversations.engine.calls) == expected + 1


class TestWithoutTools:
    def test_text_in_text_out(self, tokenizer):
        engine = ScriptedEngine(tokenizer, [["blue"]])
        conversations = Conversations(engine, tokenizer, eos_token_ids=[tokenizer.eos_token_id])
        [rollout] = conversations.generate([{"prompt": "the sky is "}], SAMPLING)
        assert rollout.prompt_ids == tokenizer("the sky is ")["input_ids"]
        assert (rollout.prompt, rollout.completion) == ("the sky is ", "blue")

    def test_messages_in_messages_out(self, tokenizer):
        engine = ScriptedEngine(tokenizer, [["blue"]])
        conversations = Conversations(engine, tokenizer, eos_token_ids=[tokenizer.eos_token_id])
        [rollout] = conversations.generate([ROW], SAMPLING)
        expected = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
        assert decode(tokenizer, rollout.prompt_ids) == expected
        assert rollout.completion == [{"role": "assistant", "content": "blue"}]

    def test_a_response_template_reads_reasoning(self, tool_tokenizer):
        engine = ScriptedEngine(tool_tokenizer, [["<think>\nhm\n</think>\n\nblue"]])
        conversations = Conversations(engine, tool_tokenizer, eos_token_ids=[tool_tokenizer.eos_token_id])
        [rollout] = conversations.generate([ROW], SAMPLING)
        assert rollout.completion == [{"role": "assistant", "reasoning_content": "hm", "content": "blue"}]

    def test_keys_that_the_dataset_filled_up_do_not_count(self, converse):
        """Arrow gives all messages the same keys; a template that asks whether a key is defined must not see them."""
        messages = [
            {"role": "user", "content": "1 plus 1?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
            {"role": "tool", "name": "add", "content": "2"},
        ]
        rows = Dataset.from_list([{"prompt": messages}])
        assert rows[0]["prompt"][0]["tool_calls"] is None
        filled, plain = converse([["2", "2"]], [rows[0], {"prompt": messages}]).rollouts
        assert filled.prompt_ids == plain.prompt_ids

    def test_template_variables_arrive(self, tokenizer):
        tokenizer.chat_template = "{{ mood }}: {{ messages[0].content }}"
        engine = ScriptedEngine(tokenizer, [["hello"]])
        conversations = Conversations(
            engine, tokenizer, eos_token_ids=[tokenizer.eos_token_id], chat_template_kwargs={"mood": "blue"}
        )
        [rollout] = conversations.generate([ROW], SAMPLING)
        assert decode(tokenizer, rollout.prompt_ids) == "blue: what is 12 plus 30?"

    def test_a_row_without_a_prompt_is_named(self, tokenizer):
        conversations = Conversations(ScriptedEngine(tokenizer, [[]]), tokenizer, eos_token_ids=[1])
        with pytest.raises(DatasetFormatError, match="no `prompt`. Found the columns: question"):
            conversations.generate([{"question": "?"}], SAMPLING)


class TestWhatCannotWork:
    def test_a_template_without_tools(self, tokenizer):
        with pytest.raises(ValueError, match="cannot be used with tools"):
            Conversations(ScriptedEngine(tokenizer, []), tokenizer, eos_token_ids=[1], tools=[add])

    def test_tools_for_a_text_prompt(self, converse):
        with pytest.raises(DatasetFormatError, match="holds text"):
            converse([["hello"]], [{"prompt": "hello"}])

    def test_a_tool_without_docstring(self, tool_tokenizer):
        def undocumented(a: int):
            return a

        with pytest.raises(ValueError, match="The tool 'undocumented' cannot be described"):
            Conversations(ScriptedEngine(tool_tokenizer, []), tool_tokenizer, eos_token_ids=[1], tools=[undocumented])

    def test_two_tools_of_one_name(self, tool_tokenizer):
        with pytest.raises(ValueError, match="Two tools are called 'add'"):
            Conversations(ScriptedEngine(tool_tokenizer, []), tool_tokenizer, eos_token_ids=[1], tools=[add, add])


class Counter:
    """Counts; its state shows whether it was used before."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.value = None
        self.callback = lambda: None

    def reset(self, start: int = 0, **row):
        self.value = start
        self.row = row
        return f" (start at {start})"

    def increment(self, by: int) -> int:
        """
        Count on.

        Args:
            by: how far
        """
        self.value += by
        return self.value

    def get_reward(self) -> float:
        return float(self.value)

    def _hidden(self):
        pass


class TestEnvironments:
    def test_reset_tools_and_state(self, converse):
        pool = EnvironmentPool(Counter)
        rows = [{"prompt": QUESTION, "start": start} for start in (5, 10)]
        script = [[tool_call("increment", by=1), tool_call("increment", by=2)], ["done", "done"]]
        conversations = converse(script, rows, environments=pool, tools=None)
        first, second = conversations.rollouts
        assert [first.completion[1]["content"], second.completion[1]["content"]] == ["6", "12"]
        assert first.prompt[-1]["content"] == "what is 12 plus 30? (start at 5)"
        assert QUESTION[-1]["content"] == "what is 12 plus 30?"
        assert [one.environment.value for one in conversations.rollouts] == [6, 12]
        assert first.environment is pool.environments[0]
        assert first.environment.row == {"prompt": QUESTION}

    def test_a_row_without_a_prompt_begins_with_what_reset_says(self, converse):
        [rollout] = converse([["hello"]], [{"start": 3}], environments=EnvironmentPool(Counter), tools=None).rollouts
        assert rollout.prompt == [{"role": "user", "content": " (start at 3)"}]
        assert rollout.environment.row == {}

    def test_each_rows_prompt_has_its_own_environments_tools(self, converse, tool_tokenizer):
        class Clock:
            def reset(self, **row):
                self.row = row

            def tell_time(self) -> str:
                """Tell the time."""
                return "noon"

        pool = EnvironmentPool({"counter": Counter, "clock": Clock})
        rows = [{"prompt": QUESTION, "environment": name} for name in ("clock", "counter")]
        script = [[tool_call("tell_time"), tool_call("tell_time")], ["noon", "?"]]
        clock, counter = converse(script, rows, environments=pool, tools=[add]).rollouts
        prompts = [decode(tool_tokenizer, one.prompt_ids) for one in (clock, counter)]
        assert ["tell_time" in prompt for prompt in prompts] == [True, False]
        assert ["increment" in prompt for prompt in prompts] == [False, True]
        assert all('"add"' in prompt for prompt in prompts)
        assert clock.completion[1]["content"] == "noon"
        assert "no tool 'tell_time'" in counter.completion[1]["content"]
        assert clock.environment.row == {"prompt": QUESTION}

    def test_a_reset_that_fails_is_named(self, converse):
        class Broken:
            def reset(self, start):
                pass

        with pytest.raises(RuntimeError, match="`reset` of the environment Broken failed: TypeError"):
            converse([["hello"]], environments=EnvironmentPool(Broken), tools=None)

    def test_a_reset_may_be_awaited(self, converse):
        class Remote:
            async def reset(self, **row):
                await asyncio.sleep(0)
                return " now"

        [rollout] = converse([["hello"]], environments=EnvironmentPool(Remote), tools=None).rollouts
        assert rollout.prompt[-1]["content"].endswith("30? now")


def test_all_processes_go_on_as_long_as_one_does(tool_tokenizer, monkeypatch):
    """A process whose rows are done calls its engine along with the others."""
    engine = ScriptedEngine(tool_tokenizer, [["done"], [], []])
    conversations = Conversations(engine, tool_tokenizer, eos_token_ids=[tool_tokenizer.eos_token_id], tools=[add])
    elsewhere = iter([True, True, False])
    monkeypatch.setattr(conversations, "_on_any_process", lambda flag: flag or next(elsewhere))
    [rollout] = conversations.generate([ROW], SAMPLING)
    assert [len(prompts) for prompts, _ in engine.calls] == [1, 0, 0]
    assert rollout.turns == 1


def test_with_a_real_model(tool_tokenizer):
    """The whole way on a tiny model: streams stay consistent, whatever it says."""
    model = build_model(vocab_size=len(tool_tokenizer))
    accelerator = Accelerator(cpu=True)
    eos = [tool_tokenizer.eos_token_id]
    engine = TransformersEngine(model, accelerator, pad_token_id=tool_tokenizer.pad_token_id, eos_token_ids=eos)
    conversations = Conversations(engine, tool_tokenizer, eos_token_ids=eos, tools=[add], accelerator=accelerator)
    torch.manual_seed(0)
    rollouts = conversations.generate([ROW, ROW], SamplingParams(max_completion_length=12, with_logps=True))
    for rollout in rollouts:
        assert rollout.error is None
        assert 0 < len(rollout.completion_ids) <= 12
        assert len(rollout.sampled_logps) == len(rollout.completion_ids)
        assert not any(math.isnan(value) for value in rollout.sampled_logps)
        assert rollout.completion[0]["role"] == "assistant"
