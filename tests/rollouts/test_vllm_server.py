"""
A real rollout server: `trl vllm-serve` of a tiny model in float32, held against Transformers.

What is refused leaves the server alive and its weights as they were, to the last bit of a prompt's log-probs.
"""

import contextlib
import json
import os
import socket
import struct
import threading
import time

import pytest
import torch

pytest.importorskip("vllm")

from safetensors.torch import save

from .rollout_server import (
    PROMPT,
    RolloutServer,
    build_served_model,
    declare,
    exported,
    reference_logps,
    save_served_model,
)
from .server_fuzz import Fuzzer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """With a tied head and a key."""
    folder = tmp_path_factory.mktemp("server")
    with RolloutServer(save_served_model(folder / "model"), folder) as server:
        yield server


@pytest.fixture
def unchanged(server):
    """The server, whose weights a test must not change."""
    before, version = server.score(), server.info()["weights"]
    yield server
    assert server.is_alive, server.show_log()
    assert server.info()["weights"] == version
    assert server.info()["healthy_weights"]
    assert server.score() == before


def assert_close(found: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)


# ---- Updates ----


def test_info(server):
    info = server.info()
    assert info["protocol"] == 1
    assert info["weights"] == f"{info['instance']}:0"
    assert info["owner"] is None
    assert info["transports"] == ["http"]
    assert (info["model"], info["dtype"], info["logprobs_mode"]) == (server.model, "float32", "processed_logprobs")
    assert (info["max_model_len"], info["vocab_size"], info["world_size"]) == (256, 512, 1)
    import vllm

    assert info["vllm_version"] == vllm.__version__
    assert server.request("GET", "/v1/models")[1]["data"][0]["id"] == server.model
    assert server.request("GET", "/get_world_size")[1] == {"world_size": 1}


def test_updates_are_what_is_answered_with(server):
    """Tied head included; and what the prefix cache held of the old weights is forgotten."""
    versions = [server.info()["weights"]]
    assert_close(server.score(), reference_logps(build_served_model()))
    for seed in (1, 2, 1):
        model = build_served_model(seed=seed)
        versions.append(server.push(model))
        assert_close(server.score(versions[-1]), reference_logps(model))
    assert [version.rpartition(":")[2] for version in versions] == ["0", "1", "2", "3"]
    assert server.info()["owner"] == "tests"


def test_requests_for_old_weights_are_refused(server):
    old = server.info()["weights"]
    new = server.push(build_served_model(seed=3))
    for path, body in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the sky"}]}),
        ("/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": {"max_tokens": 1}}),
    ):
        body = {"model": server.model, "max_tokens": 1, **body}
        status, reply, _ = server.request("POST", path, body, {"trl-weights": old})
        assert (status, reply["weights"], reply["owner"]) == (412, new, "tests")
        status, reply, headers = server.request("POST", path, body, {"trl-weights": new})
        assert (status, headers["trl-weights"]) == (200, new), reply


def test_weights_in_other_dtypes(server):
    model = build_served_model(seed=4)
    for tensor in model.parameters():
        tensor.data = tensor.data.bfloat16()
    server.push(model)
    assert_close(server.score(), reference_logps(model.float()))


def test_every_reply_is_of_one_version(server):
    """Requests that go on through ten updates: each answer is that of the weights that it names."""
    models = [build_served_model(seed=seed) for seed in range(10)]
    expected, answers, failures, stop = {}, [], [], threading.Event()

    def ask():
        generator = torch.Generator().manual_seed(threading.get_ident())
        while not stop.is_set():
            ids = torch.randint(4, 400, (8,), generator=generator).tolist()
            body = {"model": server.model, "prompt": ids, "max_tokens": 5, "prompt_logprobs": 0, "temperature": 0}
            status, reply, headers = server.request("POST", "/v1/completions", body)
            if status != 200:
                failures.append(reply)
                return
            positions = reply["choices"][0]["prompt_logprobs"][1:]
            scores = [position[str(token)]["logprob"] for token, position in zip(ids[1:], positions, strict=True)]
            answers.append((headers["trl-weights"], ids, scores))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for model in models:
            expected[server.push(model)] = model
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures
    checked = [answer for answer in answers if answer[0] in expected]
    assert len({version for version, _, _ in checked}) >= 3
    for version, ids, scores in checked:
        assert_close(scores, reference_logps(expected[version], ids))


def test_a_commit_waits_for_a_stream(server):
    """A reply that is being streamed goes on to its end with the weights it began with."""
    model = build_served_model(seed=5)
    old, token = server.info()["weights"], server.begin(exported(model))
    server.put(token, save(exported(model)))
    connection = server.connect()
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 200, "stream": True, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    reply = connection.getresponse()
    first, ended = reply.readline(), []
    commit = threading.Thread(target=lambda: ended.append((server.commit(token), time.monotonic())))
    commit.start()
    rest = reply.read()
    stream_ended = time.monotonic()
    commit.join(60)
    (status, _), commit_ended = ended[0]
    assert (reply.headers["trl-weights"], status) == (old, 200)
    assert first.startswith(b"data: ")
    assert rest.rstrip().endswith(b"[DONE]")
    assert commit_ended > stream_ended - 0.05


def test_an_aborted_request_does_not_hold_a_commit_up(server):
    body = json.dumps(
        {"model": server.model, "prompt": PROMPT, "max_tokens": 230, "n": 50, "ignore_eos": True, "stream": True}
    )
    connection = server.connect()
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", body, headers)
    connection.getresponse().readline()
    connection.close()
    model = build_served_model(seed=6)
    start = time.monotonic()
    server.push(model)
    assert time.monotonic() - start < 30
    assert_close(server.score(), reference_logps(model))


def test_weights_that_could_not_be_loaded(server):
    """Nothing is generated until an update succeeds."""
    model = build_served_model(seed=7)
    token = server.begin(exported(model))
    server.put(token, save(exported(model)))
    (path,) = server.staging.glob("*/*/*.safetensors")
    path.unlink()
    status, reply = server.commit(token)
    assert status == 500
    assert "no weights in" in reply["error"]["message"]
    assert not server.info()["healthy_weights"]
    status, reply, _ = server.request("POST", "/v1/completions", {"model": server.model, "prompt": PROMPT})
    assert (status, reply["error"]["type"]) == (503, "broken_weights")
    server.push(model)
    assert_close(server.score(), reference_logps(model))


def test_fingerprints_follow_the_weights(server):
    def fingerprints() -> list:
        status, reply, _ = server.request("GET", "/trl/weights/fingerprints")
        assert status == 200, reply
        return reply["workers"]

    server.push(build_served_model(seed=1))
    first = fingerprints()
    server.push(build_served_model(seed=2))
    assert fingerprints() != first
    server.push(build_served_model(seed=1))
    assert fingerprints() == first


# ---- What is refused ----

PATHS = [
    *[("GET", path) for path in ("/trl/info", "/v1/models", "/version", "/metrics", "/trl/weights/fingerprints")],
    *[("POST", path) for path in ("/trl/weights", "/v1/completions", "/tokenize", "/reset_prefix_cache")],
    *[("POST", "/trl/weights/x/commit"), ("PUT", "/trl/weights/x"), ("DELETE", "/trl/weights/x"), ("OPTIONS", "/x")],
]


def test_nothing_is_answered_without_the_key(unchanged):
    for method, path in PATHS:
        for key in (None, "", "wrong", f"{unchanged.key}x"):
            assert unchanged.request(method, path, b"{}", key=key)[0] == 401
    assert unchanged.request("GET", "/health", key=None)[0] == 200


def test_routes_for_developers_are_shut(unchanged):
    for path in ("/collective_rpc", "/sleep", "/update_weights", "/start_weight_update", "/docs", "/openapi.json"):
        for method in ("GET", "POST"):
            assert unchanged.request(method, path, {"method": "reload_weights"})[0] == 404
    assert unchanged.request("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/"})[0] == 404
    assert unchanged.request("POST", "/invocations", {"model": unchanged.model, "prompt": "x"})[0] == 404


def changed(change) -> list:
    parameters = declare(exported(build_served_model()))
    change(parameters)
    return parameters


@pytest.mark.parametrize(
    "change",
    {
        "unknown name": lambda p: p.append(["model.extra", "float32", [1]]),
        "missing name": lambda p: p.pop(),
        "wrong shape": lambda p: p[0].__setitem__(2, [512, 65]),
        "huge shape": lambda p: p[0].__setitem__(2, [2**40, 2**40]),
        "twice": lambda p: p.append(p[0]),
        "unknown dtype": lambda p: p[0].__setitem__(1, "object"),
        "integers": lambda p: p[0].__setitem__(1, "int64"),
        "tied head": lambda p: p.append(["lm_head.weight", "float32", [512, 64]]),
    }.items(),
    ids=lambda item: item[0],
)
def test_updates_for_another_model(unchanged, change):
    status, reply, _ = unchanged.request("POST", "/trl/weights", {"owner": "tests", "parameters": changed(change[1])})
    assert status == 422, reply


def with_header(change) -> bytes:
    """A whole safetensors file with a changed header."""
    data = save(exported(build_served_model(seed=9)))
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    names = [name for name in table if name != "__metadata__"]
    header = change(table, *names[:2])
    header = json.dumps(table).encode() if header is None else header
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


@pytest.mark.parametrize(
    "change",
    {
        "negative offsets": lambda t, a, b: t[a].update(data_offsets=[-8, t[a]["data_offsets"][1]]),
        "overlap": lambda t, a, b: t[a].update(data_offsets=t[b]["data_offsets"], shape=t[b]["shape"]),
        "beyond the end": lambda t, a, b: t[a].update(data_offsets=[2**40, 2**40 + 8]),
        "another dtype": lambda t, a, b: t[a].update(dtype="I32"),
        "another shape": lambda t, a, b: t[a].update(shape=[*t[a]["shape"], 1]),
        "unknown name": lambda t, a, b: t.update(x=t.pop(a)),
        "a hole": lambda t, a, b: t.pop(a) and None,
        "same name twice": lambda t, a, b: json.dumps(t).replace(f'"{b}"', f'"{a}"').encode(),
        "no JSON": lambda t, a, b: b"\x80\x04\x95pickle",
        "deep": lambda t, a, b: b"[" * 100_000,
    }.items(),
    ids=lambda item: item[0],
)
def test_files_with_headers_that_lie(unchanged, change):
    token = unchanged.begin(exported(build_served_model()))
    assert unchanged.put(token, with_header(change[1]))[0] == 400
    assert unchanged.commit(token)[0] == 409


def test_files_that_are_too_large(unchanged):
    weights = exported(build_served_model())
    token = unchanged.begin(weights)
    size = sum(tensor.nbytes for tensor in weights.values())
    assert unchanged.put(token, bytes(size + 2**21))[0] == 413
    giant = struct.pack("<Q", 2**24 + 1) + bytes(1000)
    assert unchanged.put(token, giant)[0] == 400
    assert unchanged.put(token, struct.pack("<Q", 2**63) + bytes(1000))[0] == 400


def test_a_tensor_comes_once(unchanged):
    weights = exported(build_served_model(seed=9))
    token = unchanged.begin(weights)
    body = save({name: weights[name] for name in list(weights)[:2]})
    assert unchanged.put(token, body)[0] == 200
    assert unchanged.put(token, body)[0] == 400


def test_unknown_tokens_and_unfinished_updates(unchanged):
    weights = exported(build_served_model(seed=9))
    token = unchanged.begin(weights)
    body = save({name: weights[name] for name in list(weights)[:5]})
    assert unchanged.put("x" * 32, body)[0] == 404
    assert unchanged.commit("x" * 32)[0] == 404
    assert unchanged.put(token, body)[0] == 200
    assert unchanged.commit(token)[0] == 409
    assert unchanged.request("DELETE", f"/trl/weights/{token}")[0] == 200
    assert unchanged.commit(token)[0] == 404


def test_a_second_trainer_is_kept_out(unchanged):
    weights = exported(build_served_model())
    token = unchanged.begin(weights, "first")
    status, reply, _ = unchanged.request("POST", "/trl/weights", {"owner": "second", "parameters": declare(weights)})
    assert status == 409
    assert "'first'" in reply["error"]["message"]
    unchanged.request("DELETE", f"/trl/weights/{token}")


def exchange(server: RolloutServer, data: bytes, half_close: bool = True) -> bytes:
    """Send bytes as they are; what came back until the server closed."""
    answer = b""
    # The server may end the connection before it has read what it does not want.
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as peer, contextlib.suppress(OSError):
        peer.sendall(data)
        if half_close:
            peer.shutdown(socket.SHUT_WR)
        while half_close and (piece := peer.recv(65536)):
            answer += piece
    return answer


def head(server: RolloutServer, token: str, *lines: str) -> bytes:
    first = f"PUT /trl/weights/{token} HTTP/1.1"
    return "\r\n".join([first, "Host: localhost", f"Authorization: Bearer {server.key}", *lines, "", ""]).encode()


def test_bodies_that_are_cut_short(unchanged):
    weights = exported(build_served_model(seed=9))
    token, body = unchanged.begin(weights), save(weights)
    for end in (0, 4, 100, len(body) // 2, len(body) - 1):
        for half_close in (True, False):
            exchange(unchanged, head(unchanged, token, f"Content-Length: {len(body)}") + body[:end], half_close)
    deadline = time.monotonic() + 10
    while list(unchanged.staging.glob("*/*/*")):  # what had come is forgotten
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert unchanged.commit(token)[0] == 409
    assert unchanged.put(token, body)[1] == {"received": len(weights), "missing": 0}
    unchanged.request("DELETE", f"/trl/weights/{token}")


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 100"],  # less than comes: the rest is no request
        ["Content-Length: -5"],
        ["Content-Length: 0x10"],
        ["Content-Length: 10", "Content-Length: 200"],
        ["Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 100"],
        [],
    ],
)
def test_lengths_that_lie(unchanged, lines):
    weights = exported(build_served_model(seed=9))
    token = unchanged.begin(weights)
    answer = exchange(unchanged, head(unchanged, token, *lines) + save(weights))
    assert answer[:10] in (b"HTTP/1.1 4", b""), answer[:200]
    assert unchanged.commit(token)[0] == 409


def test_values_that_vllm_would_fail_on(unchanged):
    for values in ({"top_k": 2**70}, {"stop": "\ud800"}, {"structured_outputs": True}, {"n": -1}, {"prompt": [10**9]}):
        body = {"model": unchanged.model, "prompt": PROMPT, "max_tokens": 1, **values}
        assert unchanged.request("POST", "/v1/completions", body)[0] == 400, values


def fuzz(server: RolloutServer, count: int, seed: int) -> None:
    fuzzer = Fuzzer(server, exported(build_served_model(seed=9)), seed)
    fuzzer.run(count)
    refused = sum(number for status, number in fuzzer.answers.items() if isinstance(status, int) and status >= 400)
    assert refused > count * 0.8, fuzzer.answers
    print(dict(fuzzer.answers))


def test_random_requests(unchanged):
    fuzz(unchanged, 10_000, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_random_requests(unchanged, seed):
    fuzz(unchanged, 50_000, seed)


# ---- Another server ----


@pytest.fixture(scope="module")
def untied_server(tmp_path_factory):
    """With a head of its own, and without a key; a server that was killed has left weights on its disk."""
    folder = tmp_path_factory.mktemp("untied")
    server = RolloutServer(save_served_model(folder / "model", tied=False), folder, key=None)
    left = server.staging / "trl-weights-left"
    left.mkdir()
    (left / "lock").touch()
    (left / "000000.safetensors").write_bytes(bytes(1000))
    with server:
        yield server


def test_updates_of_an_untied_head(untied_server):
    for seed in (1, 2):
        model = build_served_model(seed=seed, tied=False)
        version = untied_server.push(model)
        assert_close(untied_server.score(version), reference_logps(model))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    untied_server.push(model)
    assert_close(untied_server.score(), reference_logps(model))


def test_without_a_key_web_pages_are_kept_out(untied_server):
    assert untied_server.request("GET", "/trl/info", headers={"Origin": "http://evil.example"})[0] == 403
    assert untied_server.request("GET", "/trl/info", headers={"Host": "evil.example"})[0] == 403
    assert untied_server.request("GET", "/trl/info", headers={"Host": "localhost"})[0] == 200


def test_weights_on_disk_are_private_and_do_not_stay(untied_server):
    assert not (untied_server.staging / "trl-weights-left").exists()
    (folder,) = untied_server.staging.iterdir()
    assert os.stat(folder).st_mode & 0o077 == 0
    assert not list(folder.glob("*/*.safetensors"))


def test_it_listens_on_one_address_alone(untied_server):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(5)
        assert probe.connect_ex(("127.0.0.2", untied_server.port)) != 0  # this machine too, but not 127.0.0.1
