from __future__ import annotations

import asyncio
import threading
import time

import pytest

from trl.rollouts import tools as tools_module
from trl.rollouts.tools import ToolRequest, ToolRunner, tools_by_name


def call(name, arguments=None, **fields):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **fields}


@pytest.fixture
def runner():
    runner = ToolRunner()
    yield runner
    runner.close()


def echo(value=None):
    return value


async def echo_later(value=None):
    await asyncio.sleep(0)
    return value


TOOLS = tools_by_name([echo, echo_later])


@pytest.mark.parametrize("name", ["echo", "echo_later"])
@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("text", "text"),
        (3.5, "3.5"),
        (None, "None"),
        ({"a": 1}, "{'a': 1}"),
        ([1, 2], "[1, 2]"),
        ([], "[]"),
        ([{"type": "text", "text": "hi"}], [{"type": "text", "text": "hi"}]),
    ],
)
def test_what_a_tool_returns_becomes_content(runner, name, value, content):
    [[result]] = runner.run([ToolRequest([call(name, {"value": value})], TOOLS)])
    assert result.content == content
    assert not result.failed
    assert result.to_message() == {"role": "tool", "name": name, "content": content}


@pytest.mark.parametrize("arguments", [None, {}, "{}", ""])
def test_no_arguments(runner, arguments):
    [[result]] = runner.run([ToolRequest([call("echo", arguments)], TOOLS)])
    assert (result.content, result.failed) == ("None", False)


def test_arguments_as_json_text(runner):
    [[result]] = runner.run([ToolRequest([call("echo", '{"value": [7]}')], TOOLS)])
    assert result.content == "[7]"


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (call("echo", "{broken"), "must be an object"),
        (call("echo", [1]), "must be an object"),
        (call("nothing", {}), "no tool 'nothing'"),
        (call(None, {}), "no tool 'None'"),
        ({"type": "retrieval"}, "Only calls of functions"),
        (call("echo", {}, type="retrieval"), "'retrieval'"),
        ("echo()", "Only calls of functions"),
        (call("echo_later", {"wrong": 1}), "TypeError"),
    ],
)
def test_a_call_that_cannot_be_run_is_a_failure(runner, raw, complaint):
    [[result]] = runner.run([ToolRequest([raw], TOOLS)])
    assert result.failed
    assert complaint in result.content


def test_a_result_that_cannot_be_written_is_a_failure(runner):
    class Unwritable:
        def __str__(self):
            raise ValueError("no text")

    [[result]] = runner.run([ToolRequest([call("give")], {"give": Unwritable})])
    assert result.failed
    assert "no text" in result.content


def test_an_id_goes_with_its_result(runner):
    [[result]] = runner.run([ToolRequest([call("echo", {"value": 1}, id="abc123def")], TOOLS)])
    assert result.to_message()["tool_call_id"] == "abc123def"


def test_the_end_of_the_program_is_not_a_failure_of_a_tool(runner):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run([ToolRequest([call("interrupt")], {"interrupt": interrupt})])


def test_a_tool_that_blocks_the_event_loop_is_named(monkeypatch):
    monkeypatch.setattr(tools_module, "GRACE", 0.1)

    async def block():
        time.sleep(1.0)

    runner = ToolRunner(timeout=0.1)
    runner.loop
    with pytest.raises(TimeoutError, match="tools block were called: one of them blocks it"):
        runner.run([ToolRequest([call("block")], {"block": block})])
    runner.close()


def test_sync_tools_stay_on_the_callers_thread(runner):
    threads = []
    runner.run([ToolRequest([call("note")], {"note": lambda: threads.append(threading.current_thread())})])
    assert threads == [threading.current_thread()]


def test_one_thread_for_all_and_none_after_closing():
    runner = ToolRunner()
    before = threading.active_count()
    for _ in range(3):
        runner.run([ToolRequest([call("echo_later", {"value": 1})] * 4, TOOLS)])
    assert threading.active_count() == before + 1
    runner.close()
    assert threading.active_count() == before
    runner.close()


def test_another_ones_loop_is_left_running():
    owner = ToolRunner()
    guest = ToolRunner(loop=owner.loop)
    [[result]] = guest.run([ToolRequest([call("echo_later", {"value": 1})], TOOLS)])
    assert result.content == "1"
    guest.close()
    assert owner.loop.is_running()
    owner.close()


def test_waiting_has_a_limit_and_names_what_for():
    runner = ToolRunner(timeout=0.05)
    with pytest.raises(TimeoutError, match="the moon did not return within 0.05 s"):
        runner.wait_for(asyncio.sleep(5), "the moon")
    assert runner.wait_for(echo_later("here"), "an echo") == "here"
    runner.close()
