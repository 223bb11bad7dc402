"""The middleware of a rollout server before a stand-in for vLLM: what it lets through, and how weights come in."""

import asyncio
import json
import struct

import pytest
from safetensors import safe_open
from safetensors.torch import save

from tests.conftest import build_model
from trl.rollouts import nccl_routes, served_weights, vllm_adapter, vllm_server
from trl.rollouts.served_weights import expected_weights
from trl.rollouts.vllm_server import WeightRoutes

from .asgi import KEY, FakeApp, FakeEngine, application, ask
from .rollout_server import declare, exported

MODEL = build_model(seed=1)
MODEL.config.architectures = [type(MODEL).__name__]  # as in a saved config
WEIGHTS = exported(MODEL)
BEGIN = json.dumps({"owner": "me", "parameters": declare(WEIGHTS)}).encode()
FILE = save(WEIGHTS)


@pytest.fixture
def engine():
    return FakeEngine(MODEL.config)


@pytest.fixture
def server(engine, tmp_path, monkeypatch):
    """`server(method, path, ...)` asks it; the parts are its attributes."""
    monkeypatch.setenv("TRL_SERVER_STAGING_DIR", str(tmp_path))
    monkeypatch.setenv("TRL_SERVER_WAIT_SECONDS", "0.3")
    return Server(engine)


class Server:
    def __init__(self, engine: FakeEngine, **args):
        self.engine, self.app = engine, FakeApp()
        self.middleware = WeightRoutes(self.app)
        self.outer = application(engine, **args)
        self.loop = asyncio.new_event_loop()

    async def ask(self, *args, **kwargs):
        return await ask(self.middleware, *args, app=self.outer, **kwargs)

    def __call__(self, *args, **kwargs):
        return self.loop.run_until_complete(self.ask(*args, **kwargs))

    def run(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    @property
    def weights(self):
        return self.middleware._server._weights

    def begin(self) -> str:
        reply = self("POST", "/trl/weights", BEGIN)
        assert reply.status == 201, reply.body
        return reply.json["update"]

    def send(self) -> str:
        token = self.begin()
        assert self("PUT", f"/trl/weights/{token}", FILE).status == 200
        return token

    def push(self) -> str:
        reply = self("POST", f"/trl/weights/{self.send()}/commit")
        assert reply.status == 200, reply.body
        return reply.json["weights"]


# ---- Ways ----

OPEN = {
    "GET": ["/v1/models", "/version", "/metrics", "/server_info"],
    "POST": [*vllm_server.GENERATION_PATHS, "/v1/chat/completions/render", "/tokenize", "/detokenize"],
}
SHUT = [
    *["/collective_rpc", "/sleep", "/wake_up", "/reset_mm_cache", "/docs", "/openapi.json", "/invocations", "/ping"],
    *["/v1/load_lora_adapter", "/scale_elastic_ep", "/v1/responses", "/abort_requests", "/weight_checker", "/", ""],
    *["/v1/completions/", "/v1//completions", "/V1/completions", "/trl", "/trl/", "/trl/weights/a/b/c", "//health"],
    *[*nccl_routes.NCCL_PATHS, "/v1/models/../../collective_rpc", "/health/x", "/trl/info/"],
]


@pytest.mark.parametrize(("method", "path"), [(method, path) for method, paths in OPEN.items() for path in paths])
def test_open_paths_want_the_key_and_lead_to_vllm(server, method, path):
    for key in (None, "wrong"):
        reply = server(method, path, b"{}", key=key)
        assert (reply.status, reply.json["error"]["type"]) == (401, "authentication_error")
    assert server.app.reached == []
    reply = server(method, path, b'{"a": 1}')
    assert (reply.status, reply.body, reply.headers["x-inside"]) == (200, b'{"a": 1}', "yes")
    assert server("DELETE", path).status == 405


@pytest.mark.parametrize("path", SHUT)
def test_all_other_paths_are_shut(server, path):
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "X"):
        assert server(method, path, b"{}").status in (404, 405)
    assert server.app.reached == []


def test_health_needs_no_key(server):
    assert server("GET", "/health", key=None).status == 200
    assert server("POST", "/health", key=None).status == 401


def test_a_path_under_a_proxys_prefix(server):
    assert server("GET", "/proxy/v1/models", root_path="/proxy").status == 200
    assert server("GET", "/proxy/collective_rpc", root_path="/proxy").status == 404


def test_websockets_are_closed(server):
    sent = []

    async def send(message):
        sent.append(message)

    server.run(server.middleware({"type": "websocket", "path": "/v1/realtime", "app": server.outer}, None, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_large_requests_are_refused(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("TRL_SERVER_STAGING_DIR", str(tmp_path))
    monkeypatch.setenv("TRL_SERVER_MAX_BODY_MIB", "0.001")
    server = Server(engine)
    for path in ("/v1/completions", "/tokenize", "/trl/weights", "/trl/weights/version"):
        reply = server("POST", path, b" " * 2000)
        assert (reply.status, reply.headers["connection"]) == (413, "close")
    assert server.app.reached == []


@pytest.mark.parametrize("environment", [{}, {"VLLM_API_KEY": ""}])
def test_no_start_without_a_key_for_other_machines(engine, monkeypatch, environment):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sent = []

    async def start(host):
        async def receive():
            return {"type": "lifespan.startup"}

        async def send(message):
            sent.append(message)

        app = application(engine, host=host, api_key=None)
        await WeightRoutes(FakeApp())({"type": "lifespan", "app": app}, receive, send)

    for host in ("0.0.0.0", None, "machine"):
        asyncio.run(start(host))
        assert sent.pop()["type"] == "lifespan.startup.failed"


def test_the_environments_key_counts(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("TRL_SERVER_STAGING_DIR", str(tmp_path))
    monkeypatch.setenv("VLLM_API_KEY", "other")
    server = Server(engine, api_key=None, host="0.0.0.0")
    assert server("GET", "/get_world_size", key="other").json == {"world_size": 2}
    assert server("GET", "/get_world_size", key=KEY).status == 401


def test_the_servers_end_removes_what_is_on_disk(server, tmp_path):
    async def live():
        server.middleware._app = lambda scope, receive, send: asyncio.sleep(0)
        await server.middleware({"type": "lifespan", "app": server.outer}, None, None)

    server.send()
    assert list(tmp_path.iterdir())
    server.run(live())
    assert list(tmp_path.iterdir()) == []


# ---- Generation ----


def test_replies_name_their_weights(server):
    reply = server("POST", "/v1/completions", b"{}")
    assert reply.headers["trl-weights"] == server.weights.version
    assert server("POST", "/v1/completions", b"{}", {"trl-weights": server.weights.version}).status == 200


def test_requests_for_other_weights_are_refused(server):
    old = server.weights.version if server("GET", "/version").status == 200 else ""
    new = server.push()
    assert new == old.replace(":0", ":1")
    for version in (old, "", "x", f"{new}0"):
        reply = server("POST", "/v1/completions", b"{}", {"trl-weights": version})
        assert (reply.status, reply.json["weights"], reply.json["owner"]) == (412, new, "me")
        assert reply.json["error"]["type"] == "other_weights"
    assert "/v1/completions" not in server.app.reached


def test_a_commit_waits_for_requests_that_run(server):
    async def run():
        server.app.slow_paths.add("/v1/completions")
        running = asyncio.ensure_future(server.ask("POST", "/v1/completions", b"{}"))
        await asyncio.sleep(0.02)
        commit = asyncio.ensure_future(server.ask("POST", f"/trl/weights/{token}/commit"))
        await asyncio.sleep(0.02)
        late = asyncio.ensure_future(server.ask("POST", "/v1/completions", b"{}"))
        await asyncio.sleep(0.02)
        assert not commit.done()
        assert server.app.reached == ["/v1/completions"]
        server.app.release.set()
        return await running, await commit, await late

    token = server.send()
    running, commit, late = server.run(run())
    assert running.headers["trl-weights"].endswith(":0")
    assert commit.json["weights"] == late.headers["trl-weights"]
    assert late.headers["trl-weights"].endswith(":1")


def test_waits_have_a_limit(server):
    async def run():
        server.app.slow_paths.add("/v1/completions")
        running = asyncio.ensure_future(server.ask("POST", "/v1/completions", b"{}"))
        await asyncio.sleep(0.02)
        commit = await server.ask("POST", f"/trl/weights/{token}/commit")
        server.app.release.set()
        await running
        return commit, await server.ask("POST", f"/trl/weights/{token}/commit")

    token = server.send()
    first, second = server.run(run())
    assert (first.status, first.headers["retry-after"]) == (503, "5")
    assert "1 requests are generating" in first.json["error"]["message"]
    assert second.status == 200  # nothing was lost


def test_a_request_waits_for_a_commit_with_a_limit(server, engine):
    async def slow(method, args=()):
        await asyncio.sleep(1)

    async def run():
        commit = asyncio.ensure_future(server.ask("POST", f"/trl/weights/{token}/commit"))
        await asyncio.sleep(0.05)
        others = [
            await server.ask("POST", f"/trl/weights/{token}/commit"),
            await server.ask("POST", "/trl/weights", BEGIN),
        ]
        others.append(await server.ask("DELETE", f"/trl/weights/{token}"))
        others.append(await server.ask("PUT", f"/trl/weights/{token}", FILE))
        reply = await server.ask("POST", "/v1/completions", b"{}")
        return reply, others, await commit

    token = server.send()
    engine.collective_rpc = slow
    reply, others, commit = server.run(run())
    assert (reply.status, reply.headers["retry-after"]) == (503, "5")
    assert [other.status for other in others] == [409] * 4
    assert commit.status == 200


def test_a_slow_sender_keeps_no_commit_waiting(server):
    async def run():
        slow = asyncio.ensure_future(server.ask("POST", "/v1/completions", [b"{", None], {"content-length": "5"}))
        await asyncio.sleep(0.02)
        commit = await server.ask("POST", f"/trl/weights/{token}/commit")
        slow.cancel()
        return commit

    token = server.send()
    assert server.run(run()).status == 200


# ---- Weights ----


def test_workers_are_told_where_the_weights_are(server, engine):
    seen = {}

    async def load(method, args=()):
        for path in sorted(served_weights.Path(args[0]).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                seen.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    engine.collective_rpc = load
    token = server.begin()
    names = list(WEIGHTS)
    for part in (names[:4], names[4:9], names[9:]):
        reply = server("PUT", f"/trl/weights/{token}", save({name: WEIGHTS[name] for name in part}))
    assert reply.json == {"received": len(names), "missing": 0}
    assert server("POST", f"/trl/weights/{token}/commit").status == 200
    assert {name: tensor.tolist() for name, tensor in seen.items()} == {n: t.tolist() for n, t in WEIGHTS.items()}
    assert engine.calls == [("reset_prefix_cache",), ("reset_encoder_cache",)]
    assert not any(server.middleware._server._staging.folder.glob("0*"))


def test_pieces_of_any_size_make_the_file(server, engine, monkeypatch):
    monkeypatch.setattr(vllm_server, "_WRITE_BYTES", 1000)
    for size in (1, 999, 10**6):
        token = server.begin()
        pieces = [FILE[start : start + size] for start in range(0, 3996, size)]
        pieces.append(FILE[sum(map(len, pieces)) :])
        assert server("PUT", f"/trl/weights/{token}", pieces).json["missing"] == 0
        (path,) = server.middleware._server._staging.current.folder.iterdir()
        assert path.read_bytes() == FILE


def test_a_commit_that_is_asked_for_again_is_answered_alike(server, engine):
    token = server.send()
    first, second = (server("POST", f"/trl/weights/{token}/commit").json for _ in range(2))
    assert first == second
    assert [call[0] for call in engine.calls].count("trl_load_weights") == 1


def test_a_failed_load_stops_generation_until_one_succeeds(server, engine):
    engine.fails = True
    token = server.send()
    reply = server("POST", f"/trl/weights/{token}/commit")
    assert reply.status == 500
    assert "out of memory" in reply.json["error"]["message"]
    reply = server("POST", "/v1/completions", b"{}")
    assert (reply.status, reply.json["error"]["type"]) == (503, "broken_weights")
    assert server("POST", f"/trl/weights/{token}/commit").status == 404
    engine.fails = False
    assert server.push().endswith(":1")
    assert server("POST", "/v1/completions", b"{}").status == 200


def test_a_cache_that_is_not_given_up_at_once(server, engine, monkeypatch):
    """Requests that hold it are waited for, then put back; if nothing helps, nothing is answered from it."""
    engine.held_caches = 2
    server.push()
    assert engine.calls[1:-1] == [("reset_prefix_cache",)] * 3
    monkeypatch.setattr(vllm_adapter, "_CACHE_SECONDS", 0.1)
    engine.held_caches = 10**6
    reply = server("POST", f"/trl/weights/{server.send()}/commit")
    assert reply.status == 500
    assert "prefix cache" in reply.json["error"]["message"]
    assert engine.calls[-1] == ("reset_prefix_cache", True)
    assert not server.weights.are_whole


def test_caches_of_several_engines_are_forced_to_go(server, engine):
    engine.vllm_config.parallel_config.data_parallel_size = 2
    server.push()
    assert engine.calls[1:] == [("reset_prefix_cache", True), ("reset_encoder_cache",)]


def test_an_update_can_be_dropped(server):
    token = server.send()
    assert server("DELETE", f"/trl/weights/{token}").status == 200
    assert server("POST", f"/trl/weights/{token}/commit").status == 404


@pytest.mark.parametrize("owner", [None, 1, "", "x" * 201, [], {}])
def test_owners(server, owner):
    body = json.dumps({"owner": owner, "parameters": declare(WEIGHTS)}).encode()
    assert server("POST", "/trl/weights", body).status == 400


def test_another_trainer_is_told(server):
    server.begin()
    reply = server("POST", "/trl/weights", BEGIN.replace(b'"me"', b'"you"'))
    assert reply.status == 409
    assert "'me'" in reply.json["error"]["message"]


HEADER = struct.pack("<Q", 2) + b"{}"
REFUSED_FILES = {
    "nothing": (b"", {}, 411),
    "no length": (FILE, {"transfer-encoding": "chunked"}, 411),
    "no number": (FILE, {"content-length": "x"}, 411),
    "too long": (FILE, {"content-length": str(len(FILE) + 2**21)}, 413),
    "far too long": (FILE, {"content-length": str(2**62)}, 413),
    "shorter than a header": (b"1234567", {}, 400),
    "header too long": (struct.pack("<Q", 2**63) + b"{}", {}, 400),
    "header longer than the file": (struct.pack("<Q", 3) + b"{}", {}, 400),
    "no header": (struct.pack("<Q", 0) + b"{}", {}, 400),
    "no tensors": (HEADER, {}, 400),
    "data too short": (FILE[:-1], {}, 400),
    "data too long": (FILE + b"x", {}, 400),
    "gone": (FILE[:-1], {"content-length": str(len(FILE))}, 0),
    "gone in the header": (FILE[:20], {"content-length": str(len(FILE))}, 0),
}


@pytest.mark.parametrize(("body", "headers", "status"), REFUSED_FILES.values(), ids=REFUSED_FILES.keys())
def test_refused_files_leave_nothing(server, body, headers, status):
    token = server.begin()
    assert server("PUT", f"/trl/weights/{token}", body, headers).status == status
    assert list(server.middleware._server._staging.current.folder.iterdir()) == []
    assert server("POST", f"/trl/weights/{token}/commit").status == 409
    assert server("PUT", f"/trl/weights/{token}", FILE).json["missing"] == 0  # it can be sent again


def test_a_full_disk(server, monkeypatch):
    def write(self, data):
        raise OSError(28, "No space left on device")

    token = server.begin()
    monkeypatch.setattr(vllm_server.IncomingFile, "write", write)
    reply = server("PUT", f"/trl/weights/{token}", FILE)
    assert reply.status == 413
    assert "No space left" in reply.json["error"]["message"]
    monkeypatch.undo()


def test_fingerprints(server, engine):
    assert server("GET", "/trl/weights/fingerprints").json["workers"] == [{"layer": [1.0]}]
    engine.fails = True
    assert server("GET", "/trl/weights/fingerprints").status == 500
    assert server.weights.are_whole


# ---- What is expected ----


@pytest.mark.parametrize("tied", [True, False])
def test_a_models_weights_are_known_without_it(tmp_path, tied):
    """From the class on the meta device, and from the checkpoint where there is no class: the same, as a trainer's."""
    model = build_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    sent = {name: list(tensor.shape) for name, tensor in exported(model).items()}
    assert ("lm_head.weight" in sent) is not tied
    by_class = expected_weights(model.config, "nowhere", None)
    model.config.architectures = ["NotInTransformers"]
    by_checkpoint = expected_weights(model.config, str(tmp_path), None)
    for found in (by_class, by_checkpoint):
        assert {name: list(weight.shape) for name, weight in found.items()} == sent
        assert {weight.dtype for weight in found.values()} == {"float32"}


def test_a_model_whose_weights_nobody_knows(server, tmp_path):
    server.engine.vllm_config.model_config.hf_config = build_model().config
    server.engine.vllm_config.model_config.hf_config.architectures = ["NotInTransformers"]
    server.engine.vllm_config.model_config.model = str(tmp_path)
    reply = server("POST", "/trl/weights", BEGIN)
    assert reply.status == 422
    assert "safetensors" in reply.json["error"]["message"]


# ---- NCCL ----


@pytest.fixture
def nccl_server(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_SERVER_STAGING_DIR", str(tmp_path))
    monkeypatch.setenv("TRL_SERVER_WAIT_SECONDS", "0.3")
    return Server(FakeEngine(MODEL.config, nccl=True))


def test_an_update_over_nccl_is_counted_when_it_is_finished(nccl_server):
    server = nccl_server

    async def run():
        assert (await server.ask("POST", "/init_weight_transfer_engine", b"{}")).status == 200
        assert (await server.ask("POST", "/start_weight_update", b"{}")).status == 200
        busy = await server.ask("POST", "/v1/completions", b"{}")
        for path in ("/update_weights", "/update_weights", "/finish_weight_update"):
            assert (await server.ask("POST", path, b"{}")).status == 200
        return busy, await server.ask("POST", "/v1/completions", b"{}")

    busy, after = server.run(run())
    assert busy.status == 503
    assert after.headers["trl-weights"].endswith(":1")
    assert server.engine.calls == [("trl_refresh_weights",), ("reset_prefix_cache",), ("reset_encoder_cache",)]
    claim = server("POST", "/trl/weights/version", b'{"owner": "me"}')
    assert claim.json["weights"].endswith(":1")
    assert server.weights.owner == "me"
    assert server("POST", "/trl/weights/version", b'{"owner": "you"}').status == 409


@pytest.mark.parametrize("path", ["/update_weights", "/finish_weight_update"])
def test_nccl_updates_begin_with_their_start(nccl_server, path):
    assert nccl_server("POST", path, b"{}").status == 409
    assert nccl_server.app.reached == []


def test_a_start_that_vllm_refuses_keeps_nobody_waiting(nccl_server):
    nccl_server.app.statuses["/start_weight_update"] = 500
    assert nccl_server("POST", "/start_weight_update", b"{}").status == 500
    assert nccl_server("POST", "/v1/completions", b"{}").status == 200
    assert nccl_server("POST", "/update_weights", b"{}").status == 409


@pytest.mark.parametrize("failing", ["/update_weights", "/finish_weight_update"])
def test_an_nccl_update_that_fails_stops_generation(nccl_server, failing):
    server = nccl_server
    server.app.statuses[failing] = 500

    async def run():
        for path in ("/start_weight_update", "/update_weights", "/finish_weight_update"):
            last = await server.ask("POST", path, b"{}")
        return last, await server.ask("POST", "/v1/completions", b"{}")

    finish, reply = server.run(run())
    assert finish.status == (500 if failing == "/finish_weight_update" else 409)
    assert (reply.status, reply.json["error"]["type"]) == (503, "broken_weights")
    server.app.statuses.clear()
    assert server.run(run())[0].status == 200
    assert server("POST", "/v1/completions", b"{}").headers["trl-weights"].endswith(":1")


def test_an_nccl_update_that_nobody_ends_is_given_up(nccl_server, monkeypatch):
    monkeypatch.setattr(nccl_routes, "IDLE_SECONDS", 0.05)
    server = nccl_server

    async def run():
        await server.ask("POST", "/start_weight_update", b"{}")
        await server.ask("POST", "/update_weights", b"{}")
        await asyncio.sleep(0.1)
        return await server.ask("POST", "/v1/completions", b"{}"), await server.ask("POST", "/update_weights", b"{}")

    generation, update = server.run(run())
    assert (generation.status, generation.json["error"]["type"]) == (503, "broken_weights")
    assert update.status == 409
    assert server.push().endswith(":1")


def test_a_paused_engines_requests_are_not_waited_for(nccl_server):
    """Whoever pauses the engine wants the requests inside it to go on with the new weights."""
    server = nccl_server
    server.app.slow_paths.add("/v1/completions")

    async def run():
        running = asyncio.ensure_future(server.ask("POST", "/v1/completions", b"{}"))
        await asyncio.sleep(0.02)
        waited = await server.ask("POST", "/start_weight_update", b"{}")
        await server.ask("POST", "/pause", b"")
        for path in ("/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"):
            assert (await server.ask("POST", path, b"{}")).status == 200
        server.app.release.set()
        return waited, await running

    waited, running = server.run(run())
    assert waited.status == 503
    assert running.headers["trl-weights"].endswith(":0")
    assert ("reset_prefix_cache", True) in server.engine.calls  # what it had computed is of the old weights
