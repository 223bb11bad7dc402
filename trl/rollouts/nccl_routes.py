"""
vLLM's own routes for weights over NCCL, kept apart from generation as an update over HTTP is.

A client drives them as it would a stock server's: `/start_weight_update`, `/update_weights` as often as needed,
`/finish_weight_update`. From the first on no request is answered, and the last one counts the update. A client that
stops in between leaves weights that are partly new; nothing is answered with them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import MutableMapping
from typing import Any

from transformers.utils import logging

from .served_weights import ServedWeights
from .server_access import GateTimeout, Receive, Scope, Send, replay
from .weight_staging import ConflictError

logger = logging.get_logger(__name__)

NCCL_PATHS = (
    "/init_weight_transfer_engine",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/shutdown_weight_transfer_engine",
    "/pause",
    "/resume",
)
IDLE_SECONDS = 300.0
"""An update between two of whose requests more time passes is given up."""


class NcclRoutes:
    """
    The routes around vLLM's.

    Args:
        app: the application that has them.
        weights: the server's.
    """

    def __init__(self, app: Any, weights: ServedWeights):
        self._app = app
        self._weights = weights
        self._is_paused = False
        self._is_unclaimed = False
        self._has_failed = False  # part of the update that is under way
        self._watch: asyncio.Task | None = None  # while an update is under way

    async def answer(self, path: str, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """
        Hand a request on to vLLM, and see what it did.

        Args:
            path: one of `NCCL_PATHS`.
            scope: of the request.
            body: of the request.
            receive: of the request.
            send: of the request.

        Raises:
            RequestError: requests that generate took too long, or the update failed.
            ConflictError: no update was started, one is under way, or a part of it failed.
        """
        if path == "/start_weight_update":
            await self._start()
        elif path in ("/update_weights", "/finish_weight_update"):
            if self._watch is None:
                raise ConflictError("No update was started, or it was given up. Ask for /start_weight_update first.")
            self._stop_watching()
        reply = _HeldReply()
        try:
            await self._app(scope, replay(body, receive), reply)
            succeeded = reply.status == 200
        except BaseException:
            self._after(path, False)
            raise
        if path == "/finish_weight_update" and succeeded and self._has_failed:
            self._after(path, False)
            raise ConflictError("A part of this update failed, so its weights are not used. Send them all again.")
        if path == "/finish_weight_update" and succeeded:
            await self._finish()
        else:
            self._after(path, succeeded)
        await reply.release(send)

    def claim(self, owner: str) -> None:
        """
        Say whose the weights are that came last.

        Args:
            owner: who sent them.

        Raises:
            ConflictError: there are none that nobody has claimed.
        """
        if not self._is_unclaimed:
            raise ConflictError("No weights came over NCCL that are not claimed yet.")
        self._is_unclaimed = False
        self._weights.owner = owner

    async def _start(self) -> None:
        if self._watch is not None:
            raise ConflictError("An update is under way: finish it first.")
        try:
            # Requests of a paused engine stand still; whoever paused it wants them to go on with the new weights.
            await self._weights.gate.close(self._weights.limits.wait_seconds, wait_for_running=not self._is_paused)
        except GateTimeout:
            raise self._weights.busy("change its weights") from None
        self._has_failed = False
        self._keep_watch()

    def _after(self, path: str, succeeded: bool) -> None:
        if path in ("/pause", "/resume"):
            if succeeded:
                self._is_paused = path == "/pause"
        elif path == "/start_weight_update" and not succeeded:
            self._end()
        elif path in ("/update_weights", "/finish_weight_update"):
            self._weights.are_whole = False
            self._has_failed |= not succeeded
            if path == "/finish_weight_update":
                self._end()
            else:
                self._keep_watch()

    async def _finish(self) -> None:
        try:
            await self._weights.adopt()
            self._is_unclaimed = True
        finally:
            self._end()

    def _end(self) -> None:
        self._stop_watching()
        self._weights.gate.reopen()

    def _keep_watch(self) -> None:
        self._stop_watching()
        self._watch = asyncio.get_running_loop().create_task(self._give_up())

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    async def _give_up(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(IDLE_SECONDS)
            logger.warning(
                f"An update of the weights over NCCL was given up: nothing came for {IDLE_SECONDS:.0f} s. Nothing is "
                "generated until an update succeeds."
            )
            self._weights.are_whole = False
            self._watch = None
            self._weights.gate.reopen()


class _HeldReply:
    """Takes a reply, and passes it on when its consequences are known."""

    def __init__(self) -> None:
        self.status = 0
        self._messages: list[MutableMapping[str, Any]] = []

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self._messages.append(message)

    async def release(self, send: Send) -> None:
        for message in self._messages:
            await send(message)
