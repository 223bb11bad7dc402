"""
A stock `vllm serve` as a rollout server: the key on every path, few paths, and weights that are sent over HTTP.

`WeightRoutes` is an ASGI middleware (`vllm serve --middleware trl.rollouts.vllm_server.WeightRoutes`, what
`trl vllm-serve` runs). Routes of its own, all JSON but the weights themselves, errors as vLLM's:

    GET    /trl/info                    what is served, and the version of its weights
    POST   /trl/weights                 begin an update: {"owner", "parameters": [[name, dtype, shape], ...]}
    PUT    /trl/weights/TOKEN           a safetensors file with some of them
    POST   /trl/weights/TOKEN/commit    load them, when no request is being answered
    DELETE /trl/weights/TOKEN           drop the update
    POST   /trl/weights/version         say whose the weights are that vLLM's NCCL routes brought
    GET    /trl/weights/fingerprints    numbers that identify the weights of each layer

A generation request may name the version of the weights that it is for (header `trl-weights`) and is refused under any
other; each reply names the one it was made with. Left out: several API server processes, which would not know of each
other's updates.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from .. import __version__
from . import vllm_adapter
from .nccl_routes import NCCL_PATHS, NcclRoutes
from .served_weights import ServedWeights, expected_weights
from .server_access import (
    AccessRules,
    Disconnected,
    GateTimeout,
    Receive,
    RequestBody,
    RequestError,
    Scope,
    Send,
    ServerLimits,
    check_values,
    is_loopback,
    replay,
    send_error,
    send_json,
)
from .weight_staging import (
    MAX_HEADER_BYTES,
    ConflictError,
    ExpectedWeight,
    IncomingFile,
    WeightsError,
    WeightStaging,
    WeightUpdate,
    check_declaration,
)

PROTOCOL = 1
VERSION_HEADER = "trl-weights"
GENERATION_PATHS = ("/v1/completions", "/v1/chat/completions", "/inference/v1/generate")
READING_PATHS = ("/v1/models", "/version", "/metrics", "/server_info")
WORKING_PATHS = ("/v1/chat/completions/render", "/tokenize", "/detokenize")
MAX_OWNER_CHARACTERS = 200

_WRITE_BYTES = 4 * 1024**2
_DRAIN_BYTES = 1024**3
_STRANGERS_DRAIN_BYTES = 1024**2
_FINGERPRINT_SECONDS = 600.0


class WeightRoutes:
    """
    Middleware around vLLM's server, for requests and for its start and end.

    Args:
        app: the application inside.
    """

    def __init__(self, app: Any):
        self._app = app
        self._server: RolloutServer | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http":
            await self._started(scope).answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})  # no path with websockets is open

    def _started(self, scope: Scope) -> RolloutServer:
        if self._server is None:
            self._server = RolloutServer(self._app, scope["app"].state)
        return self._server

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            server = self._started(scope)
        except (OSError, ValueError) as error:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        try:
            await self._app(scope, receive, send)
        finally:
            server.close()


class RolloutServer:
    """
    What the middleware keeps while its server runs.

    Args:
        app: the application inside.
        state: of vLLM's application: `args`, `engine_client`.

    Raises:
        ValueError: it listens to other machines and has no key, or a setting of the environment cannot be used.
        OSError: there is no place for weights.
    """

    def __init__(self, app: Any, state: Any):
        self._app = app
        self._args = state.args
        self._engine = state.engine_client
        keys = tuple(key for key in (self._args.api_key or [os.environ.get("VLLM_API_KEY")]) if key)
        if not keys and not getattr(self._args, "uds", None) and not is_loopback(self._args.host):
            raise ValueError(
                f"This server would listen on {self._args.host or 'every address'} without a key. Set VLLM_API_KEY, or "
                "listen on 127.0.0.1."
            )
        self._rules = AccessRules(keys)
        self._limits = ServerLimits.from_environment()
        self._weights = ServedWeights(self._engine, self._limits)
        self._nccl = NcclRoutes(app, self._weights) if vllm_adapter.takes_nccl(self._engine) else None
        self._staging = WeightStaging(self._limits.staging_folder)
        self._committed: tuple[str, str] | None = None
        self._expected: dict[str, ExpectedWeight] | None = None

    def close(self) -> None:
        """Remove what is on disk."""
        self._staging.close()

    # ---- Ways ----

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        path = _route_path(scope)
        if path == "/health" and scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        body = RequestBody(scope, receive)
        drain_bytes = _STRANGERS_DRAIN_BYTES
        try:
            self._rules.check(scope)
            drain_bytes = _DRAIN_BYTES
            await self._route(path, scope, body, receive, send)
        except Disconnected:
            return
        except WeightsError as error:
            await send_error(send, RequestError(error.status, str(error), "weights_error"), body, drain_bytes)
        except RequestError as error:
            await send_error(send, error, body, drain_bytes)

    async def _route(self, path: str, scope: Scope, body: RequestBody, receive: Receive, send: Send) -> None:
        method = scope["method"]
        if path in GENERATION_PATHS:
            _want_method(method, "POST")
            await self._generate(scope, body, receive, send)
        elif path in READING_PATHS:
            _want_method(method, "GET", "HEAD")
            await self._app(scope, replay(await body.read(self._limits.body_bytes), receive), send)
        elif path in WORKING_PATHS:
            _want_method(method, "POST")
            await self._app(scope, replay(await self._checked(body), receive), send)
        elif self._nccl is not None and path in NCCL_PATHS:
            _want_method(method, "POST")
            await self._nccl.answer(path, scope, await body.read(self._limits.body_bytes), receive, send)
        else:
            status, value = await self._own_route(path, method, body)
            await send_json(send, status, value, close=not body.is_read)

    async def _own_route(self, path: str, method: str, body: RequestBody) -> tuple[int, dict[str, Any]]:
        match method, *path.split("/")[1:]:
            case "GET", "trl", "info":
                return 200, self._info()
            case "POST", "trl", "weights":
                return 201, await self._begin(body)
            case "POST", "trl", "weights", "version":
                return 200, await self._claim(body)
            case "GET", "trl", "weights", "fingerprints":
                return 200, await self._fingerprints()
            case "PUT", "trl", "weights", token:
                return 200, await self._receive_file(token, body)
            case "DELETE", "trl", "weights", token:
                return 200, self._drop(token)
            case "POST", "trl", "weights", token, "commit":
                return 200, await self._commit(token)
            # Two of vLLM's, which it has in its development mode only.
            case "GET", "get_world_size":
                return 200, {"world_size": vllm_adapter.worker_count(self._engine)}
            case "POST", "reset_prefix_cache":
                return 200, {"success": bool(await self._engine.reset_prefix_cache())}
        raise RequestError(404, f"This rollout server has no {method[:20]} {path[:200]}.", "not_found")

    # ---- Generation ----

    async def _generate(self, scope: Scope, body: RequestBody, receive: Receive, send: Send) -> None:
        wanted = [value.decode("latin-1") for name, value in scope["headers"] if name == VERSION_HEADER.encode()]
        data = await self._checked(body)  # first: a slow sender shall keep nobody waiting
        try:
            async with self._weights.gate.generation(self._limits.wait_seconds):
                for version in wanted or [None]:
                    self._weights.check(version)
                version = (VERSION_HEADER.encode(), self._weights.version.encode())

                async def send_with_version(message: dict[str, Any]) -> None:
                    if message["type"] == "http.response.start":
                        message = {**message, "headers": [*message.get("headers", ()), version]}
                    await send(message)

                await self._app(scope, replay(data, receive), send_with_version)
        except GateTimeout:
            raise self._weights.busy("generate") from None

    async def _checked(self, body: RequestBody) -> bytes:
        data = await body.read(self._limits.body_bytes)
        await asyncio.to_thread(check_values, data)
        return data

    # ---- Weights ----

    def _info(self) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "instance": self._weights.instance,
            "weights": self._weights.version,
            "owner": self._weights.owner,
            "healthy_weights": self._weights.are_whole,
            "transports": ["nccl", "http"] if self._nccl is not None else ["http"],
            "max_body_bytes": self._limits.body_bytes,
            "trl_version": __version__,
            **vllm_adapter.served_facts(self._engine, self._args),
        }

    async def _begin(self, body: RequestBody) -> dict[str, Any]:
        request = await body.read_json(self._limits.body_bytes)
        owner = _read_owner(request)
        if self._expected is None:
            config = self._engine.vllm_config.model_config
            try:
                self._expected = await asyncio.to_thread(
                    expected_weights, config.hf_config, config.model, config.revision
                )
            except (OSError, ValueError) as error:
                raise RequestError(422, f"It cannot be told which weights this model has: {error}") from None
        declared = await asyncio.to_thread(check_declaration, request.get("parameters"), self._expected)
        update = self._staging.begin(owner, declared)
        return {"update": update.token, "weights": self._weights.version}

    async def _receive_file(self, token: str, body: RequestBody) -> dict[str, Any]:
        update = self._staging.find(token)
        if update.is_loading:
            raise ConflictError("This update is being loaded.")
        if body.length is None:
            raise RequestError(411, "Weights are sent with their Content-Length, not chunked.", "length_required")
        most = update.missing_bytes + 1024**2 + 512 * len(update.wanted)  # the header's room
        if body.length > most:
            raise RequestError(
                413,
                f"{body.length} bytes are announced, {update.missing_bytes} bytes of weights are missing.",
                "too_large",
            )
        try:
            await _store(update, body)
        except OSError as error:  # the disk is full, or its folder is gone
            raise RequestError(
                413,
                f"The weights could not be written on the server: {error}. Make room in {self._staging.parent}, or "
                "start the server with TRL_SERVER_STAGING_DIR set to another folder.",
                "too_large",
            ) from None
        received = len(update.declared) - len(update.wanted)
        return {"received": received, "missing": len(update.wanted)}

    async def _commit(self, token: str) -> dict[str, Any]:
        if self._committed == (token, self._weights.version):  # asked again, since the first answer was lost
            return {"weights": self._weights.version}
        update = self._staging.find(token)
        if update.is_loading:
            raise ConflictError("This update is being loaded.")
        if not update.is_complete:
            names = ", ".join(list(update.wanted)[:5]) or "a file that is on its way"
            raise ConflictError(f"{len(update.wanted)} weights are missing: {names}.")
        update.is_loading = True
        try:
            async with self._weights.change():
                try:
                    await self._weights.load(update)
                finally:
                    self._staging.drop()
        finally:
            update.is_loading = False
            update.touch()
        self._committed = (token, self._weights.version)
        return {"weights": self._weights.version}

    def _drop(self, token: str) -> dict[str, Any]:
        if self._staging.find(token).is_loading:
            raise ConflictError("This update is being loaded.")
        self._staging.drop()
        return {"weights": self._weights.version}

    async def _claim(self, body: RequestBody) -> dict[str, Any]:
        request = await body.read_json(self._limits.body_bytes)
        if self._nccl is None:
            raise ConflictError("This server takes no weights over NCCL.")
        self._nccl.claim(_read_owner(request))
        return {"weights": self._weights.version}

    async def _fingerprints(self) -> dict[str, Any]:
        async with self._weights.change():  # of one version
            try:
                work = self._engine.collective_rpc("trl_fingerprints")
                workers = await asyncio.wait_for(work, _FINGERPRINT_SECONDS)
            except Exception as error:  # whatever the engine answers, the server lives on
                reason = str(error)[:500] or type(error).__name__
                raise RequestError(500, f"The engine's weights could not be looked at: {reason}.", "engine") from None
            return {"weights": self._weights.version, "workers": workers}


async def _store(update: WeightUpdate, body: RequestBody) -> None:
    """Check a safetensors file's header, then write the file as it comes."""
    pieces = body.pieces()
    waiting = bytearray()
    incoming: IncomingFile | None = None
    header_bytes = 0
    try:
        async for piece in pieces:
            update.touch()
            waiting += piece
            if not header_bytes and len(waiting) >= 8:
                header_bytes = int.from_bytes(waiting[:8], "little")
                if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, body.length - 8):
                    raise WeightsError(f"The safetensors header would take {header_bytes} bytes.")
            if incoming is None and header_bytes and len(waiting) >= 8 + header_bytes:
                incoming = update.receive(bytes(waiting[8 : 8 + header_bytes]), body.length - 8 - header_bytes)
                del waiting[: 8 + header_bytes]
            if incoming is not None and len(waiting) >= _WRITE_BYTES:
                await asyncio.to_thread(incoming.write, waiting)
                waiting = bytearray()
        if incoming is None:
            raise WeightsError("The safetensors file ends before its header does.")
        await asyncio.to_thread(incoming.write, waiting)
        incoming.finish()
    except BaseException:
        if incoming is not None:
            incoming.abort()
        raise


def _read_owner(request: dict[str, Any]) -> str:
    owner = request.get("owner")
    if not isinstance(owner, str) or not 0 < len(owner) <= MAX_OWNER_CHARACTERS:
        raise RequestError(400, f"`owner` has to be a text of 1 to {MAX_OWNER_CHARACTERS} characters.")
    return owner


def _want_method(method: str, *wanted: str) -> None:
    if method not in wanted:
        raise RequestError(405, f"This path takes {' or '.join(wanted)}.", headers={"allow": ", ".join(wanted)})


def _route_path(scope: Scope) -> str:
    """The path as routes are matched with it: without where a proxy has put the server."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path
