"""
Who may ask a rollout server what, and how long each may keep the others waiting.

Pure ASGI, knowing nothing of weights or vLLM: the key, the paths that are open, bodies of bounded size, error replies,
and the gate that keeps generation and a change of weights apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

BODY_SECONDS = 60.0
"""A body that stands still for this long is given up."""
_DRAIN_SECONDS = 5.0


class RequestError(Exception):
    """
    A request that is refused.

    Args:
        status: HTTP status.
        message: what was found, and what is needed.
        kind: short name of the reason, for programs.
        headers: further headers of the reply.
        details: further values beside the error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
        details: dict[str, Any] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.headers, self.details = headers or {}, details or {}


class Disconnected(Exception):
    """Whoever asked is gone."""


@dataclass(frozen=True)
class ServerLimits:
    """
    What the server takes and how long it waits.

    Args:
        body_bytes: largest JSON body.
        wait_seconds: how long a change of weights waits for running generation, and new generation for a change of
            weights.
        staging_folder: where the files of an update are kept; default the system's folder for temporary files.
    """

    body_bytes: int = 64 * 1024**2
    wait_seconds: float = 300.0
    staging_folder: str | None = None

    @classmethod
    def from_environment(cls) -> ServerLimits:
        """
        Read TRL_SERVER_MAX_BODY_MIB, TRL_SERVER_WAIT_SECONDS and TRL_SERVER_STAGING_DIR.

        Raises:
            ValueError: one of them is no positive number.
        """
        return cls(
            body_bytes=int(_positive("TRL_SERVER_MAX_BODY_MIB", 64) * 1024**2),
            wait_seconds=_positive("TRL_SERVER_WAIT_SECONDS", 300),
            staging_folder=os.environ.get("TRL_SERVER_STAGING_DIR") or None,
        )


def _positive(name: str, default: float) -> float:
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} has to be a positive number, found {text!r}.")
    return value


def is_loopback(host: str | None) -> bool:
    """Whether a server that listens on `host` can be reached from this machine alone."""
    if host is None or not host:
        return False  # every address
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Who
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AccessRules:
    """
    Who may use the server.

    Args:
        keys: one of them is needed on every path. Without any, only programs on this machine may ask: not a web page
            that is open in its browser, nor a name of somebody else's that leads here.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)

    def check(self, scope: Scope) -> None:
        """
        Let a request pass, or not.

        Args:
            scope: of the request.

        Raises:
            RequestError: it may not pass.
        """
        headers = scope["headers"]
        if self.keys:
            given = [value for name, value in headers if name == b"authorization"]
            if len(given) != 1 or not self._knows(given[0]):
                raise RequestError(
                    401,
                    "This server wants its key: set VLLM_API_KEY to the same value here as where the server was "
                    "started (sent as `Authorization: Bearer KEY`).",
                    "authentication_error",
                    {"www-authenticate": "Bearer"},
                )
            return
        origins = [value.decode("latin-1") for name, value in headers if name == b"origin"]
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if not all(_is_local_name(host, any_address=True) for host in hosts) or not all(
            _is_local_name(origin.partition("://")[2], any_address=False) for origin in origins
        ):
            raise RequestError(
                403,
                "A server without a key answers only requests that name it by address or as localhost, and none from "
                "web pages of other sites. Start it with VLLM_API_KEY set to use it by another name.",
                "permission_error",
            )

    def _knows(self, header: bytes) -> bool:
        scheme, _, given = header.partition(b" ")
        digest = hashlib.sha256(given).digest()  # equal lengths, whatever was sent
        known = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in self.keys]
        return any(known) and scheme.lower() == b"bearer"


def _is_local_name(host: str, any_address: bool) -> bool:
    """`host` as in a Host header. An address cannot be made to lead elsewhere, as a name can."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return any_address or address.is_loopback


# ---------------------------------------------------------------------------------------------------------------------
# Bodies and replies
# ---------------------------------------------------------------------------------------------------------------------


class RequestBody:
    """
    A request's body, read piece by piece with limits.

    Args:
        scope: of the request.
        receive: of the request.
    """

    def __init__(self, scope: Scope, receive: Receive):
        headers = scope["headers"]
        lengths = [value for name, value in headers if name == b"content-length"]
        self.is_chunked = any(name == b"transfer-encoding" for name, _ in headers)
        self.length: int | None = None
        if len(lengths) == 1 and lengths[0].isdigit() and len(lengths[0]) < 20 and not self.is_chunked:
            self.length = int(lengths[0])
        self.is_read = not lengths and not self.is_chunked
        # The sender waits to be asked for the body; asking is the first `receive`.
        self._is_held_back = any(name == b"expect" for name, _ in headers)
        self._receive = receive

    async def pieces(self) -> AsyncIterator[bytes]:
        """
        The body's bytes as they come.

        Raises:
            RequestError: nothing came for `BODY_SECONDS`.
            Disconnected: the sender went before the end.
        """
        while not self.is_read:
            self._is_held_back = False
            try:
                message = await asyncio.wait_for(self._receive(), BODY_SECONDS)
            except asyncio.TimeoutError:
                raise RequestError(
                    408, f"The request's body stood still for {BODY_SECONDS:.0f} s; it was given up.", "timeout_error"
                ) from None
            if message["type"] == "http.disconnect":
                self.is_read = True
                raise Disconnected
            self.is_read = not message.get("more_body", False)
            yield message.get("body", b"")

    async def read(self, limit: int) -> bytes:
        """
        The whole body.

        Args:
            limit: most bytes that it may have.

        Raises:
            RequestError: it has more.
        """
        body = bytearray()
        if self.length is not None and self.length > limit:
            raise self._too_large(limit)
        async for piece in self.pieces():
            body += piece
            if len(body) > limit:
                raise self._too_large(limit)
        return bytes(body)

    async def read_json(self, limit: int) -> dict[str, Any]:
        """
        The whole body as a JSON object.

        Args:
            limit: most bytes that it may have.

        Raises:
            RequestError: it has more, or is no JSON object.
        """
        body = await self.read(limit)
        try:
            value = await asyncio.to_thread(json.loads, body)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"The body is not JSON: {str(error)[:200]}.") from None
        if not isinstance(value, dict):
            raise RequestError(400, "The body is not a JSON object.")
        return value

    async def drain(self, limit: int) -> None:
        """
        Read what is left and forget it, so that a sender who is still at it gets to see the reply.

        Args:
            limit: most bytes that are read.
        """

        if self._is_held_back:
            return

        async def read_on() -> None:
            count = 0
            async for piece in self.pieces():
                count += len(piece)
                if count > limit:
                    return

        with contextlib.suppress(asyncio.TimeoutError, RequestError, Disconnected):
            await asyncio.wait_for(read_on(), _DRAIN_SECONDS)

    def _too_large(self, limit: int) -> RequestError:
        return RequestError(
            413,
            f"The body is larger than the {limit / 1024**2:.0f} MiB that this server takes. Send less at a time, or "
            "start the server with a larger TRL_SERVER_MAX_BODY_MIB.",
            "too_large",
        )


# What a body has to have for `check_values` to read it at all.
_SUSPECT = re.compile(rb"[0-9]{19}|\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\x00|structured_outputs")


def check_values(body: bytes) -> None:
    """
    Refuse values in JSON for vLLM that are of no use there, and that it answers as if it had failed itself: integers of
    more than 64 bits, halves of characters, and structured outputs that are no object.

    Args:
        body: of the request. What is no JSON is left for vLLM to refuse.

    Raises:
        RequestError: it has such a value.
    """
    if _SUSPECT.search(body) is None:
        return
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict) and not isinstance(value.get("structured_outputs"), dict | NoneType):
        raise RequestError(400, "`structured_outputs` has to be an object.")
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise RequestError(400, "The request has an integer of more than 64 bits.")
        elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise RequestError(400, "The request has half a character (an unpaired surrogate) in a text.")


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that yields a body that was read already, and then whatever comes."""
    messages: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await receive()

    return receive_again


async def send_json(
    send: Send, status: int, value: dict[str, Any], headers: Iterable[tuple[str, str]] = (), close: bool = False
) -> None:
    """
    Answer with a JSON object.

    Args:
        send: of the request.
        status: HTTP status.
        value: the object.
        headers: further headers.
        close: end the connection after it.
    """
    body = json.dumps(value).encode()
    raw = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    raw += [(name.encode(), text.encode("latin-1", "replace")) for name, text in headers]
    if close:
        raw.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: RequestError, body: RequestBody, drain_bytes: int) -> None:
    """
    Answer with an error, in the form that vLLM's own have.

    Args:
        send: of the request.
        error: what is wrong.
        body: the request's; what is left of it is read, within limits.
        drain_bytes: at most this much of it.
    """
    close = not body.is_read
    if close:
        await body.drain(drain_bytes)
    value = {"error": {"message": error.message, "type": error.kind, "param": None, "code": error.status}}
    await send_json(send, error.status, {**value, **error.details}, error.headers.items(), close)


# ---------------------------------------------------------------------------------------------------------------------
# Generation and changes of weights apart
# ---------------------------------------------------------------------------------------------------------------------


class GateTimeout(Exception):
    """The gate did not open in time."""


class GenerationGate:
    """
    Many requests may generate at once; a change of weights waits for all of them, and keeps new ones waiting. For one
    event loop.
    """

    def __init__(self) -> None:
        self.running = 0
        self._idle = asyncio.Event()
        self._open = asyncio.Event()
        self._writer = asyncio.Lock()
        self._idle.set()
        self._open.set()

    @contextlib.asynccontextmanager
    async def generation(self, seconds: float) -> AsyncIterator[None]:
        """
        Be one of those who generate.

        Args:
            seconds: longest wait.

        Raises:
            GateTimeout: a change of weights took longer.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        while not self._open.is_set():
            await _within(self._open.wait(), deadline - asyncio.get_running_loop().time())
        self.running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def change(self, seconds: float) -> AsyncIterator[None]:
        """
        Be alone.

        Args:
            seconds: longest wait.

        Raises:
            GateTimeout: another change, or a request that generates, took longer.
        """
        await self.close(seconds)
        try:
            yield
        finally:
            self.reopen()

    async def close(self, seconds: float, wait_for_running: bool = True) -> None:
        """
        Let no more in, until [`reopen`], and wait until all are out.

        Args:
            seconds: longest wait.
            wait_for_running: whether to wait for those inside.

        Raises:
            GateTimeout: it took longer; the gate is open again.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        await _within(self._writer.acquire(), seconds)
        self._open.clear()
        try:
            if wait_for_running:
                await _within(self._idle.wait(), deadline - asyncio.get_running_loop().time())
        except BaseException:
            self.reopen()
            raise

    def reopen(self) -> None:
        """Let the waiting in."""
        self._open.set()
        self._writer.release()


async def _within(awaitable: Awaitable[Any], seconds: float) -> None:
    try:
        await asyncio.wait_for(awaitable, max(seconds, 0.0))
    except asyncio.TimeoutError:
        raise GateTimeout from None
