"""Running the calls a model writes: whatever a tool does, the answer is a message and the rollout goes on."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # until Python 3.11 not the built-in one
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema

from ..extras.plain import (
    get_callable_name,
    is_async_callable,
    shutdown_event_loop_in_daemon,
    start_event_loop_in_daemon,
)

ASYNC_TIMEOUT = 600.0
"""Longest wait for asynchronous tools where no limit is set, in seconds: a run must not hang on a lost connection."""
GRACE = 30.0
"""Further seconds for the event loop to report; a tool that blocks it would never let it."""


@dataclass(frozen=True)
class ToolResult:
    """What one call gave: the content of the tool's message."""

    name: str
    content: str | list[dict[str, Any]]
    failed: bool = False
    call_id: str | None = None

    def to_message(self) -> dict[str, Any]:
        message = {"role": "tool", "name": self.name, "content": self.content}
        return message if self.call_id is None else {**message, "tool_call_id": self.call_id}


@dataclass(frozen=True)
class ToolRequest:
    """The calls of one assistant message, and the tools it may call, by name."""

    calls: Sequence[Any]
    tools: Mapping[str, Callable]


def tools_by_name(tools: Sequence[Callable]) -> dict[str, Callable]:
    """
    Tools under the names the model calls them by.

    Raises:
        ValueError: two tools have one name.
    """
    named = {}
    for tool in tools:
        name = get_callable_name(tool)
        if name in named:
            raise ValueError(
                f"Two tools are called {name!r}; the model could not tell them apart. Rename one of them."
            )
        named[name] = tool
    return named


def tool_schema(tool: Callable) -> dict[str, Any]:
    """
    How a tool is described to the model, from its signature, type hints and docstring.

    Raises:
        ValueError: the docstring or a type hint is missing; says what of which tool.
    """
    try:
        return get_json_schema(tool)
    except Exception as error:
        raise ValueError(
            f"The tool {get_callable_name(tool)!r} cannot be described to the model: {error} Give every parameter a "
            "type hint, and the function a docstring with a summary and an `Args:` section that names each parameter."
        ) from error


class ToolRunner:
    """
    Runs tool calls.

    Synchronous tools run one after the other on the caller's thread, in the order they were called; asynchronous ones
    all at once on one event loop in a daemon thread. An unknown tool, arguments that do not fit, an exception or a
    limit that has run out becomes a result with an error text.

    Args:
        timeout: longest time for one call, in seconds. A synchronous tool then runs in a thread of its own, which is
            left behind when it is late. Default: synchronous tools have no limit, asynchronous ones 600 s.
        loop: running event loop to use; default: one of its own, started when first needed.
    """

    def __init__(self, timeout: float | None = None, loop: asyncio.AbstractEventLoop | None = None):
        self.timeout = timeout
        self._loop = loop
        self._thread: threading.Thread | None = None

    def run(self, requests: Sequence[ToolRequest]) -> list[list[ToolResult]]:
        """
        Run the calls of several messages.

        Args:
            requests: one per message.

        Returns:
            Per request its results: those of synchronous tools first, then those of asynchronous ones.
        """
        results: list[list[ToolResult]] = [[] for _ in requests]
        waiting: list[tuple[int, _Call]] = []
        for index, request in enumerate(requests):
            for raw in request.calls:
                call = _Call.read(raw, request.tools)
                if call.problem is None and is_async_callable(call.tool):
                    waiting.append((index, call))
                else:
                    results[index].append(call.result(self._run_sync(call)))
        outcomes = self._run_async([call for _, call in waiting])
        for (index, call), outcome in zip(waiting, outcomes, strict=True):
            results[index].append(call.result(outcome))
        return results

    def wait_for(self, coroutine: Coroutine, what: str) -> Any:
        """The value of one coroutine, run on the event loop; `what` names it where it is late."""
        limit = self.timeout or ASYNC_TIMEOUT
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, limit), self.loop)
        try:
            return future.result(limit + GRACE)
        except (TimeoutError, asyncio.TimeoutError, FutureTimeoutError) as error:
            raise TimeoutError(f"{what} did not return within {limit:g} s.") from error

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop, started if need be."""
        if self._loop is None:
            self._thread, self._loop, ready = start_event_loop_in_daemon("trl-tools")
            if not ready.wait(GRACE):
                raise RuntimeError(f"The event loop for asynchronous tools did not start within {GRACE:g} s.")
        return self._loop

    def close(self) -> None:
        """Stop the event loop, if it is ours."""
        if self._thread is not None:
            shutdown_event_loop_in_daemon(self._thread, self._loop)
            self._thread = self._loop = None

    def _run_sync(self, call: _Call) -> Any:
        if call.problem is not None:
            return ToolError(call.problem)
        try:
            if self.timeout is None:
                return call.tool(**call.arguments)
            return _call_with_limit(call, self.timeout)
        except Exception as error:
            return error

    def _run_async(self, calls: list[_Call]) -> list[Any]:
        if not calls:
            return []
        limit = self.timeout or ASYNC_TIMEOUT
        future = asyncio.run_coroutine_threadsafe(_run_together(calls, limit), self.loop)
        try:
            return future.result(limit + GRACE)
        except FutureTimeoutError as error:
            names = ", ".join(sorted({call.name for call in calls}))
            raise TimeoutError(
                f"The event loop has not answered {limit + GRACE:g} s after the tools {names} were called: one of them "
                "blocks it. In an `async def` tool, await what takes long; code that cannot be awaited belongs in a "
                "plain function, or in `asyncio.to_thread`."
            ) from error


class ToolError(Exception):
    """A call that cannot be run."""


@dataclass(frozen=True)
class _Call:
    """A call as far as it could be read."""

    name: str
    arguments: dict[str, Any]
    tool: Callable | None
    call_id: str | None
    problem: str | None = None

    @classmethod
    def read(cls, raw: Any, tools: Mapping[str, Callable]) -> _Call:
        function = raw.get("function") if isinstance(raw, Mapping) else None
        if not isinstance(function, Mapping) or raw.get("type", "function") != "function":
            kind = raw.get("type") if isinstance(raw, Mapping) else raw
            return cls("unknown", {}, None, None, f"Only calls of functions can be run; this one is a {kind!r}.")
        name, arguments, call_id = str(function.get("name")), function.get("arguments") or {}, raw.get("id")
        if name not in tools:
            known = ", ".join(tools) or "none"
            return cls(name, {}, None, call_id, f"There is no tool {name!r}. The tools are: {known}.")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
        if not isinstance(arguments, Mapping):
            return cls(name, {}, None, call_id, f"The arguments of {name!r} must be an object with a key for each.")
        return cls(name, dict(arguments), tools[name], call_id)

    def result(self, outcome: Any) -> ToolResult:
        if isinstance(outcome, BaseException):
            return ToolResult(self.name, str({"error": _describe(outcome)}), True, self.call_id)
        if _is_content_blocks(outcome):
            return ToolResult(self.name, outcome, call_id=self.call_id)
        try:
            return ToolResult(self.name, str(outcome), call_id=self.call_id)
        except Exception as error:
            return ToolResult(self.name, str({"error": _describe(error)}), True, self.call_id)


def _describe(error: BaseException) -> str:
    if isinstance(error, ToolError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _is_content_blocks(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "type" in item for item in value)


def _call_with_limit(call: _Call, limit: float) -> Any:
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(call.tool(**call.arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=f"trl-tool-{call.name}", daemon=True).start()
    try:
        return future.result(limit)
    except FutureTimeoutError:
        if future.done():  # the tool itself raised it
            raise
        raise ToolError(f"{call.name!r} did not return within {limit:g} s.") from None


async def _run_together(calls: list[_Call], limit: float) -> list[Any]:
    async def one(call: _Call) -> Any:
        return await call.tool(**call.arguments)

    tasks = [asyncio.ensure_future(one(call)) for call in calls]
    # Not `wait_for`: it waits on for a task that swallows its cancellation.
    await asyncio.wait(tasks, timeout=limit)
    outcomes = []
    for call, task in zip(calls, tasks, strict=True):
        if not task.done():
            task.cancel()
            outcomes.append(ToolError(f"{call.name!r} did not return within {limit:g} s."))
        elif task.cancelled():
            outcomes.append(ToolError(f"{call.name!r} was cancelled."))
        else:
            outcomes.append(task.exception() or task.result())
    return outcomes
