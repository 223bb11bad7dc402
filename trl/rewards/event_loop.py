"""
One event loop in a thread of its own, for coroutines started from code that is not asynchronous.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import weakref
from collections.abc import Coroutine
from typing import Any

# A loop that does not take a call within this time is held up by something that blocks.
RESPONSE_LIMIT_S = 1.0


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)


class EventLoopThread:
    """
    An event loop that runs in a daemon thread, from the first coroutine until `close()`, or the end of the program.

    The same loop runs all coroutines, so a client or session that one of them keeps can be used by the next.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future:
        """Start a coroutine; its result comes in the future, and cancelling the future cancels it."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._run, args=(self._loop,), name="trl-event-loop", daemon=True).start()
            self._finalizer = weakref.finalize(self, _stop, self._loop)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            loop.close()

    def replace_if_blocked(self) -> bool:
        """Leave a loop that does not respond to itself; the next coroutine gets a new one. Returns whether it was so."""
        if self._loop is None:
            return False
        responded = threading.Event()
        self._loop.call_soon_threadsafe(responded.set)
        if responded.wait(RESPONSE_LIMIT_S):
            return False
        self.close()
        return True

    def close(self) -> None:
        """Stop the loop; what still runs in it is abandoned."""
        if self._loop is not None:
            self._finalizer()
            self._loop = None
