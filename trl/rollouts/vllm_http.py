"""
One vLLM server over HTTP: its address, the key, and requests that end within a limit.

What can happen to a request is told apart here, for those who know what to do about it: no whole answer came
([`ServerLost`]), none came in time ([`ServerTimeout`]), or the server said no ([`ServerError`]). A busy server is asked
again with growing pauses. Nothing is followed to another address, so the key goes nowhere else.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import requests
from requests.adapters import HTTPAdapter
from transformers.utils import logging
from urllib3.connection import HTTPConnection

logger = logging.get_logger(__name__)

KEY_VARIABLE = "VLLM_API_KEY"
CONNECT_SECONDS = 10.0
HEALTH_SECONDS = 10.0
HEALTH_INTERVAL = 2.0
BUSY = (429, 502, 503, 504)
# What a server says with a 503 that no waiting mends: its weights are half an update's.
BROKEN_WEIGHTS = "broken_weights"
LONGEST_PAUSE = 30.0
_QUOTED_CHARACTERS = 500


class ServerError(RuntimeError):
    """
    A server's answer that says no.

    Args:
        url: the server.
        status: of the answer.
        text: what it said.
        kind: the error's type, where the server names one.
        details: further values of the answer.
    """

    def __init__(self, url: str, status: int, text: str, kind: str = "", details: dict | None = None):
        super().__init__(f"{url} answered {status}: {text[:_QUOTED_CHARACTERS]}")
        self.url, self.status, self.text, self.kind, self.details = url, status, text, kind, details or {}


class ServerLost(ConnectionError):
    """No connection, or one that ended before the whole answer was there."""


class ServerTimeout(TimeoutError):
    """The server was there, but the answer did not come in time."""


@dataclass(frozen=True)
class Answer:
    """A whole answer with status 2xx."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str

    def json(self) -> Any:
        """The body as JSON; what cannot be read counts as cut short."""
        try:
            return json.loads(self.body)
        except ValueError:
            start = self.body[:80]
            raise ServerLost(f"{self.url} answered {self.status} with what is not JSON: {start!r}.") from None


def server_url(base_url: str | None, host: str, port: int) -> str:
    """
    The address to connect to. 0.0.0.0 and `::` are where a server listens, not where it is: they mean this machine.

    Args:
        base_url: whole address, such as `http://10.0.0.5:8000`; it wins over host and port.
        host: name or address.
        port: the port.

    Raises:
        ValueError: `base_url` is no http(s) address.
    """
    if base_url is None:
        bare = host.strip("[]")
        base_url = f"http://[{bare}]:{port}" if ":" in bare else f"http://{bare}:{port}"
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"A server's address looks like http://host:8000; found {base_url!r}.")
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(parts.hostname)
    if here:
        parts = parts._replace(netloc=here + (f":{parts.port}" if parts.port else ""))
    return urlunsplit(parts._replace(path=parts.path.rstrip("/"), query="", fragment=""))


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class ServerConnection:
    """
    Requests to one server. Threads may share it.

    Args:
        url: the server's address.
        key: sent with every request. Default: the environment's VLLM_API_KEY, if there is one.
        connections: most connections that are kept open.
    """

    def __init__(self, url: str, key: str | None = None, connections: int = 64):
        self.url = url
        self.key = key if key is not None else os.environ.get(KEY_VARIABLE) or None
        self.session = requests.Session()
        # Neither a proxy for this machine, nor another key out of a .netrc file.
        self.session.trust_env = not is_loopback(url)
        self.session.auth = self._authorize
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, _KeepAliveAdapter(pool_connections=1, pool_maxsize=connections))
        self._said: set[str] = set()

    def request(
        self,
        method: str,
        path: str,
        *,
        seconds: float,
        body: Any = None,
        data: bytes | Callable[[], Any] | None = None,
        headers: dict[str, str] | None = None,
        busy: Collection[int] = BUSY,
        busy_attempts: int | None = None,
    ) -> Answer:
        """
        Ask, and ask a busy server again, within `seconds` in all.

        Args:
            method: GET, POST, ...
            path: behind the server's address.
            seconds: limit for everything, repetitions included.
            body: sent as JSON.
            data: sent as it is; a function gives a new file to read for each attempt.
            headers: further ones.
            busy: statuses after which the same is asked again.
            busy_attempts: how often; default as often as there is time.

        Raises:
            ServerLost: no connection, or not the whole answer.
            ServerTimeout: nothing within `seconds`.
            ServerError: the server said no, or was still busy at the end.
        """
        deadline = time.monotonic() + seconds
        pause = 0.5
        attempts = 0
        while True:
            attempts += 1
            answer = self._attempt(method, path, deadline, seconds, body, data, headers)
            if answer.status < 300:
                return answer
            error = self._refusal(answer)
            pause = max(pause, _retry_after(answer.headers))
            if answer.status not in busy or error.kind == BROKEN_WEIGHTS or attempts > (busy_attempts or attempts):
                raise error
            if time.monotonic() + pause >= deadline:
                raise ServerError(
                    self.url,
                    answer.status,
                    f"{error.text} It was asked again for {seconds:.0f} s. Give it more time, or fewer requests.",
                    error.kind,
                    error.details,
                )
            self.say_once(f"busy {answer.status}", f"{error} Asking again for up to {seconds:.0f} s.")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def get(self, path: str, seconds: float = 60.0) -> Any:
        """What a GET answers, as JSON."""
        return self.request("GET", path, seconds=seconds).json()

    def post(self, path: str, body: Any = None, seconds: float = 60.0, **options: Any) -> Any:
        """What a POST of JSON answers, as JSON."""
        return self.request("POST", path, seconds=seconds, body=body, **options).json()

    def wait_until_healthy(self, seconds: float, interval: float = HEALTH_INTERVAL) -> Answer:
        """
        Wait for the server to be up.

        Args:
            seconds: limit; 0 asks once.
            interval: seconds between two questions.

        Raises:
            ConnectionError: it was not up in time.
        """
        start = time.monotonic()
        while True:
            left = seconds - (time.monotonic() - start)
            limit = min(HEALTH_SECONDS, max(left, 1.0))
            try:
                return self.request("GET", "/health", seconds=limit, busy=())
            except (ServerLost, ServerTimeout, ServerError) as error:
                problem = error
            if time.monotonic() - start + interval > seconds:
                raise ConnectionError(
                    f"No vLLM server was ready at {self.url} within {seconds:.0f} s ({problem}). Start one with "
                    "`trl vllm-serve --model ...`, check the address, or give it more time "
                    "(`vllm_server_timeout`; a large model takes minutes to load)."
                ) from problem
            self.say_once("health", f"Waiting for {self.url} for up to {seconds:.0f} s: {problem}")
            time.sleep(interval)

    def say_once(self, cause: str, message: str) -> None:
        """Log a warning, once per cause until `forget_causes`."""
        if cause not in self._said:
            self._said.add(cause)
            logger.warning(message)

    def forget_causes(self) -> None:
        """All is well again: the next trouble is worth a line."""
        self._said.clear()

    def close(self) -> None:
        """Close the connections."""
        self.session.close()

    # ---- Inside ----

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def _attempt(self, method, path, deadline, seconds, body, data, headers) -> Answer:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            with self.session.request(
                method,
                self.url + path,
                json=body,
                data=data() if callable(data) else data,
                headers=headers,
                timeout=(min(CONNECT_SECONDS, left), left),
                stream=True,
                allow_redirects=False,
            ) as response:
                content = bytearray()
                for piece in response.iter_content(1 << 20):
                    content += piece
                    if time.monotonic() > deadline:
                        raise requests.ReadTimeout("the answer came too slowly")
                return Answer(response.status_code, response.headers, bytes(content), self.url + path)
        except requests.ReadTimeout as error:
            raise ServerTimeout(
                f"{self.url}{path} gave no whole answer within {seconds:.0f} s. The server hangs, or has more to do "
                "than it can within that time: see its log, ask for less at once, or give it more time."
            ) from error
        except (requests.RequestException, OSError) as error:
            # A read limit that expires inside a body comes as a ConnectionError.
            if time.monotonic() >= deadline:
                raise ServerTimeout(f"{self.url}{path} gave no whole answer within {seconds:.0f} s.") from error
            raise ServerLost(f"{self.url}{path}: {_reason(error)}.") from error

    def _refusal(self, answer: Answer) -> ServerError:
        text, kind, details = answer.body.decode("utf-8", "replace").strip(), "", {}
        with contextlib.suppress(ValueError):
            said = json.loads(answer.body)
            details = said if isinstance(said, dict) else {}
            error = details.get("error", details.get("detail"))
            text = error.get("message", text) if isinstance(error, dict) else str(error or text)
            kind = str(error.get("type", "")) if isinstance(error, dict) else ""
        if answer.status == 401:
            text = (
                f"it wants a key, and the one in this process's environment variable {KEY_VARIABLE} is not the "
                f"server's. Set {KEY_VARIABLE} to the key that the server was started with."
                if self.key
                else f"it wants a key. Set {KEY_VARIABLE} to the key that the server was started with."
            )
        elif 300 <= answer.status < 400:
            text = f"it points to {answer.headers.get('Location')!r}; give the address that answers itself."
        return ServerError(self.url, answer.status, text, kind, details)


class _KeepAliveAdapter(HTTPAdapter):
    """Lets the system notice within about a minute that the other machine is gone, where no answer is on its way."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        options = [*HTTPConnection.default_socket_options, (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
        super().init_poolmanager(*args, socket_options=options, **kwargs)


def _retry_after(headers: Mapping[str, str]) -> float:
    try:
        return min(max(float(headers.get("retry-after") or 0), 0), LONGEST_PAUSE)
    except ValueError:
        return 0.0


def _reason(error: BaseException) -> str:
    """The innermost cause in few words; urllib3's own texts name pools and objects."""
    while (inner := _inner(error)) is not None:
        error = inner
    text = re.sub(r"^HTTPS?Connection(Pool)?\(.*?\): ", "", str(error)).strip() or type(error).__name__
    return text[:200].rstrip(".")


def _inner(error: BaseException) -> BaseException | None:
    reason = getattr(error, "reason", None)
    if isinstance(reason, BaseException):
        return reason
    return next((argument for argument in error.args if isinstance(argument, BaseException)), None)


def in_parallel(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    threads: int,
    settle_on: tuple[type[BaseException], ...] = (),
) -> list[Any]:
    """
    A function's values for all items, some of them at the same time.

    The first error is raised at once, and the threads take no further item; what they still wait for has its own limit
    and holds up neither the caller nor the interpreter's end.

    Args:
        function: is called with one item.
        items: all of them.
        threads: most calls at the same time.
        settle_on: after an error of these kinds the calls that run are waited for first.
    """
    todo: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    stop = threading.Event()
    results = []
    for index, item in enumerate(items):
        todo.put((index, item))
        results.append(None)

    def work() -> None:
        while not stop.is_set():
            try:
                index, item = todo.get_nowait()
            except queue.Empty:
                break
            try:
                done.put((index, function(item), None))
            except BaseException as error:
                stop.set()
                done.put((index, None, error))
        done.put(None)

    running = min(threads, len(results))
    for _ in range(running):
        threading.Thread(target=work, daemon=True, name="trl-vllm-request").start()
    failure = None
    try:
        while running:
            outcome = done.get()
            if outcome is None:
                running -= 1
                continue
            index, results[index], error = outcome
            if error is None:
                continue
            if not isinstance(error, settle_on):
                raise error
            failure = failure or error
    finally:
        stop.set()
    if failure is not None:
        raise failure
    return results
