"""
The event loop of asynchronous reward functions, which may block it: then it is left behind, and a new one takes over.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import weakref
from collections.abc import Coroutine
from typing import Any

from ..extras.plain import shutdown_event_loop_in_daemon, start_event_loop_in_daemon

# A loop that does not take a call within this time is held up by something that blocks.
RESPONSE_LIMIT_S = 1.0


class EventLoopThread:
    """
    An event loop that runs in a daemon thread, from the first coroutine until `close()`, or the end of the program.

    The same loop runs all coroutines, so a client or session that one of them keeps can be used by the next.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None
        self.ready: threading.Event | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop; None before the first coroutine, and after `close`."""
        return self._loop

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future:
        """Start a coroutine; its result comes in the future, and cancelling the future cancels it."""
        if self._loop is None:
            self.thread, self._loop, self.ready = start_event_loop_in_daemon("trl-rewards")
            self._shut_down = weakref.finalize(
                self, shutdown_event_loop_in_daemon, self.thread, self._loop, timeout=RESPONSE_LIMIT_S
            )
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def replace_if_blocked(self) -> bool:
        """Leave a loop that does not respond; the next coroutine gets a new one. Returns whether it was so."""
        if self._loop is None:
            return False
        responded = threading.Event()
        self._loop.call_soon_threadsafe(responded.set)
        if responded.wait(RESPONSE_LIMIT_S):
            return False
        self._loop.call_soon_threadsafe(self._loop.stop)  # once it gets to it
        self._shut_down.detach()
        self._loop = None
        return True

    def close(self) -> None:
        """Stop the loop; what still runs in it is cancelled."""
        if self._loop is not None:
            self._shut_down()
            self._loop = None
