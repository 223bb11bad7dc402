"""
Calling a reward function that may be slow, may fail and may never answer: on the spot, in a thread, or in the event
loop; and what a call left behind.

A thread cannot be stopped from outside. One whose time is up is abandoned: it is a daemon, its result is dropped, and
a function that has left `MAX_ABANDONED` such threads is not called again until one of them comes back.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import inspect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging

from .event_loop import EventLoopThread

logger = logging.get_logger(__name__)

MAX_ABANDONED = 4
# An asynchronous function without a limit of its own: it is waited for, and every wait has an end.
ASYNC_TIME_LIMIT_S = 1800.0
# After this long without an answer, the log says who is waited for.
PATIENCE_S = 60.0


class RewardTimeoutError(TimeoutError):
    """A reward function did not answer in its time."""


@dataclass
class CallResult:
    """What a call came to: a value or an error."""

    value: Any = None
    error: BaseException | None = None


@dataclass
class Collected:
    """What a function reported with `log_extra` and `log_metric` during one call."""

    extras: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, name: str, values: list) -> None:
        """A column of the completions table: a value for each completion."""
        self.extras[name] = list(values)

    def log_metric(self, name: str, value: float) -> None:
        """A figure of this step; several calls are averaged."""
        self.metrics.setdefault(name, []).append(float(value))


class RewardCall:
    """
    A call under way.

    Args:
        name: of the function, for messages.
        function: the reward function.
        kwargs: what it is called with.
        limit_s: how long it is waited for; `None` for as long as it takes.
        loop: runs what turns out to be asynchronous.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        kwargs: dict[str, Any],
        limit_s: float | None,
        loop: EventLoopThread,
    ):
        self.name, self.function, self.kwargs, self.limit_s, self.loop = name, function, kwargs, limit_s, loop
        self.done = threading.Event()
        self._result = CallResult()
        self._future: concurrent.futures.Future | None = None
        self._start = time.monotonic()
        self.seconds = 0.0  # until its answer, or until it was given up

    def run_here(self) -> None:
        """Call a synchronous function in this thread; the log tells when that takes long."""
        reminder = threading.Timer(PATIENCE_S, self._remind)
        reminder.daemon = True
        self._start = time.monotonic()
        reminder.start()
        try:
            self._run()
        finally:
            reminder.cancel()

    def start_thread(self) -> None:
        """Call a synchronous function in a thread."""
        context = contextvars.copy_context()
        target = (self._run, BaseException)  # nobody else would see that it called `sys.exit`
        thread = threading.Thread(target=context.run, args=target, name=f"trl-reward-{self.name}", daemon=True)
        thread.start()

    def _run(self, caught: type[BaseException] = Exception) -> None:
        result = CallResult()
        try:
            result.value = self.function(**self.kwargs)
            if inspect.isawaitable(result.value):  # a function that hands out a coroutine of another
                result.value = self._run_in_loop(result.value)
        except (caught, asyncio.CancelledError) as error:  # the latter of something that the function waited for
            result.error = error
        self._finish(result)

    def _run_in_loop(self, awaitable: Any) -> Any:
        future = self.loop.submit(_wait_for(awaitable))
        limit_s = ASYNC_TIME_LIMIT_S if self.limit_s is None else self.limit_s
        try:
            return future.result(limit_s)
        except concurrent.futures.TimeoutError as error:
            if not future.cancel():  # it has just ended, with a timeout of its own
                raise
            raise RewardTimeoutError(f"no answer within its time limit of {limit_s:g} s") from error

    def start_coroutine(self) -> None:
        """Call an asynchronous function in the event loop."""
        if self.limit_s is None:
            self.limit_s = ASYNC_TIME_LIMIT_S
        self._future = self.loop.submit(self._run_async())

    async def _run_async(self) -> None:
        result = CallResult()
        try:
            result.value = await self.function(**self.kwargs)
        except BaseException as error:  # also `sys.exit`, which would end the loop
            result.error = error
        self._finish(result)

    def _finish(self, result: CallResult) -> None:
        self.seconds = time.monotonic() - self._start
        self._result = result
        self.done.set()

    def _remind(self) -> None:
        limit = "has no time limit" if self.limit_s is None else f"may take {self.limit_s:g} s"
        logger.warning(f"The reward function {self.name!r} has not answered for {PATIENCE_S:g} s. It {limit}.")

    def wait(self) -> CallResult:
        """The result; an error where none came in time."""
        deadline = None if self.limit_s is None else self._start + self.limit_s
        patience = self._start + PATIENCE_S
        is_long = deadline is None or deadline > patience
        if is_long and not self.done.wait(max(patience - time.monotonic(), 0)):
            self._remind()
        if not self.done.wait(None if deadline is None else max(deadline - time.monotonic(), 0)):
            self.cancel()
            self.seconds = time.monotonic() - self._start
            return CallResult(error=RewardTimeoutError(f"no answer within its time limit of {self.limit_s:g} s"))
        return self._result

    def cancel(self) -> None:
        """Give up on a call. A coroutine is cancelled, a thread only abandoned."""
        if self._future is not None and not self.done.is_set():
            self._future.cancel()


async def _wait_for(awaitable: Any) -> Any:
    try:
        return await awaitable
    except SystemExit as error:  # it would end the loop
        raise RuntimeError(f"SystemExit: {error}") from error
