"""Requests to an ASGI application without a server, and a stand-in for vLLM's application and engine."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

KEY = "secret"


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


async def ask(
    asked: Any,
    /,
    method: str,
    path: str,
    body: bytes | list[bytes | None] = b"",
    headers: dict[str, str] | None = None,
    key: str | None = KEY,
    **scope: Any,
) -> Reply:
    """
    One request. A body in pieces is sent as such, None among them is a sender who stops there and waits; pieces that
    end before the announced length are a sender who is gone.
    """
    pieces = [body] if isinstance(body, bytes) else list(body)
    headers = {name.lower(): value for name, value in (headers or {}).items()}
    if key is not None:
        headers.setdefault("authorization", f"Bearer {key}")
    sent = sum(len(piece) for piece in pieces if piece is not None)
    if sent and "transfer-encoding" not in headers:
        headers.setdefault("content-length", str(sent))
    announced = headers.get("content-length", "")
    left = int(announced) if announced.isdigit() else sent
    reply = Reply()

    async def receive() -> dict[str, Any]:
        nonlocal left
        if not pieces:
            return {"type": "http.disconnect"}
        piece = pieces.pop(0)
        if piece is None:
            await asyncio.sleep(3600)
        left -= len(piece)
        return {"type": "http.request", "body": piece, "more_body": left > 0}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            reply.body += message.get("body", b"")

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    full = {"type": "http", "method": method, "path": path, "headers": raw, "root_path": "", **scope}
    await asyncio.wait_for(asked(full, receive, send), 30)
    return reply


class FakeEngine:
    """
    Remembers what it was told.

    Args:
        config: of the model.
        nccl: whether it was started with weight transfer over NCCL.
    """

    def __init__(self, config: Any = None, nccl: bool = False):
        self.calls: list[tuple] = []
        self.fails = False
        self.held_caches = 0  # so many times the prefix cache is not given up
        model_config = SimpleNamespace(hf_config=config, model="model", revision=None)
        transfer = SimpleNamespace(backend="nccl") if nccl else None
        parallel_config = SimpleNamespace(world_size_across_dp=2, world_size=1, data_parallel_size=1)
        self.vllm_config = SimpleNamespace(
            model_config=model_config, weight_transfer_config=transfer, parallel_config=parallel_config
        )

    async def collective_rpc(self, method: str, args: tuple = ()) -> list[Any]:
        self.calls.append((method, *args))
        await asyncio.sleep(0)
        if self.fails:
            raise RuntimeError("out of memory")
        return [{"layer": [1.0]}]

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        self.calls.append(("reset_prefix_cache", *([True] if reset_running_requests else [])))
        self.held_caches -= 1
        return self.held_caches < 0

    async def reset_encoder_cache(self) -> None:
        self.calls.append(("reset_encoder_cache",))


class FakeApp:
    """In vLLM's place: says what reached it, after a while where a path is to take one."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.release = asyncio.Event()
        self.slow_paths: set[str] = set()
        self.statuses: dict[str, int] = {}

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        self.reached.append(scope["path"])
        body = (await receive()).get("body", b"")
        if scope["path"] in self.slow_paths:
            await self.release.wait()
        status = self.statuses.get(scope["path"], 200)
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-inside", b"yes")]})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await send({"type": "http.response.body", "body": body})


def application(engine: FakeEngine, **args: Any) -> Any:
    """What vLLM's application gives a middleware to see, as `scope["app"]`."""
    settings = {"host": "127.0.0.1", "api_key": [KEY], "uds": None, "served_model_name": None, **args}
    return SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(**settings), engine_client=engine))
