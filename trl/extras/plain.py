"""
Plain Python helpers: names of callables, an event loop in a thread, cleaning rows. Nothing here knows of tensors.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

TListOrMapping = TypeVar("TListOrMapping", list, Mapping)


def identity(x: Any) -> Any:
    """Return `x`; a collator for rows that are batches already."""
    return x


# ---- Callables ----


def get_callable_name(func: Callable) -> str:
    """The name of a function, of what a `partial` wraps, or of a callable object's class."""
    while isinstance(func, functools.partial):
        func = func.func
    return getattr(func, "__name__", None) or type(func).__name__


def is_async_callable(func: Callable) -> bool:
    """Whether calling `func` (a function, a `partial`, an object with `__call__`) gives a coroutine."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


# ---- An event loop beside a program that is not asynchronous ----


def start_event_loop_in_daemon(
    name: str | None = None,
) -> tuple[threading.Thread, asyncio.AbstractEventLoop, threading.Event]:
    """
    Run an event loop in a daemon thread, for `asyncio.run_coroutine_threadsafe`.

    Args:
        name: the thread's name.

    Returns:
        The thread, its loop, and an event that is set once the loop runs.
    """
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.call_soon(ready.set)
        loop.run_forever()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread, loop, ready


async def _cancel_all() -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def shutdown_event_loop_in_daemon(
    thread: threading.Thread | None, loop: asyncio.AbstractEventLoop | None, timeout: float = 5.0
) -> None:
    """
    Stop what `start_event_loop_in_daemon` started: pending tasks are cancelled, the loop is closed.

    Args:
        thread: the thread; None is nothing to do.
        loop: its loop; None is nothing to do.
        timeout: longest wait for tasks to end and for the thread, in seconds each.
    """
    if thread is None or loop is None or loop.is_closed():
        return
    if thread.is_alive():
        pending = asyncio.run_coroutine_threadsafe(_cancel_all(), loop)
        try:
            pending.result(timeout)
        except (
            concurrent.futures.TimeoutError
        ):  # a task that refuses to be cancelled must not hold up the program's end
            pending.cancel()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout)
    if not thread.is_alive():
        loop.close()


# ---- Rows ----


def remove_none_values(example: TListOrMapping) -> TListOrMapping:
    """
    Drop the keys whose value is None, at every depth.

    Arrow gives all rows the same keys and fills what a row lacks with None, which tool schemas and chat templates
    would take for a value. Places in a list are kept, None or not.

    Args:
        example: a list or mapping, nested as you like.

    Returns:
        A copy without those keys.

    Raises:
        TypeError: `example` is neither.
    """
    if isinstance(example, list):
        return [remove_none_values(value) if isinstance(value, (list, Mapping)) else value for value in example]
    if isinstance(example, Mapping):
        return {
            key: remove_none_values(value) if isinstance(value, (list, Mapping)) else value
            for key, value in example.items()
            if value is not None
        }
    raise TypeError(f"`remove_none_values` takes a list or a mapping, found {type(example).__name__}.")
