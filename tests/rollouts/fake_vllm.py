"""A server that speaks vLLM's and our routes, samples what can be foretold, and fails as a test tells it to."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import safetensors.torch

EOS = 2


def wait(seconds: float) -> None:
    """Also where a test has shortened `time.sleep`."""
    threading.Event().wait(seconds)


def completion_of(prompt: list[int], seed: int, index: int, most: int) -> list[int]:
    """What the server samples: up to 4 tokens that name prompt, seed and completion, then the stop token."""
    return [10 + sum(prompt) % 40, 60 + len(prompt), 100 + (seed + index) % 97, 200 + index, EOS][:most]


class FakeVLLM:
    """
    Args:
        key: wanted with every request but /health.
        stock: without the routes of `trl vllm-serve`.
        info: values that differ in /trl/info.
    """

    def __init__(self, key: str | None = None, stock: bool = False, **info):
        self.key, self.stock = key, stock
        self.info = {
            "protocol": 1, "healthy_weights": True, "vllm_version": "0.30.0", "trl_version": "1", "model": "tiny",
            "max_model_len": 64, "dtype": "float32", "logprobs_mode": "processed_logprobs", "vocab_size": 512,
            "world_size": 1, "transports": ["http"], "max_body_bytes": 1 << 30, **info,
        }  # fmt: skip
        self.instance, self.updates, self.owner = "first", 0, None
        self.weights: dict = {}
        self.updating: dict | None = None
        self.calls: list[tuple[str, str, dict]] = []
        self.headers: list[dict] = []
        self.body_sizes: list[int] = []
        self.failures: dict[str, list] = defaultdict(list)
        self.running = self.most_running = 0
        self.seconds = 0.0
        self.lock = threading.Lock()
        self._http = None
        self.port = 0
        self.is_down = False

    # ---- Life ----

    def __enter__(self) -> FakeVLLM:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        fake = self

        class Handler(_Handler):
            server_state = fake

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def go_away(self) -> None:
        """Answer nothing more from now on. May be called while answering."""
        self.is_down = True
        threading.Thread(target=self.stop, daemon=True).start()

    def restart_after(self, seconds: float) -> None:
        """Go away now, and come back as another instance with the weights from disk."""

        def restart() -> None:
            self.stop()
            wait(seconds)
            self.instance, self.updates, self.owner, self.weights = "second", 0, None, {}
            self.is_down = False
            self.start()

        self.is_down = True  # at once, whenever the thread gets its turn
        threading.Thread(target=restart, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def version(self) -> str:
        return f"{self.instance}:{self.updates}"

    def fail(self, path: str, *failures) -> None:
        """The next requests of this path (its beginning) end so: `cut`, `reset`, `garbage`, `hang`, or a status."""
        self.failures[path].extend(failures)

    def paths(self, beginning: str = "") -> list[str]:
        return [f"{method} {path}" for method, path, _ in self.calls if path.startswith(beginning)]

    # ---- Answers ----

    def answer(self, method: str, path: str, body: bytes, headers) -> tuple[int, object, dict]:
        if path == "/health":
            return 200, None, {}
        if path.startswith("/v1/models"):
            return 200, {"data": [{"id": "tiny", "max_model_len": self.info["max_model_len"]}]}, {}
        if path == "/trl/info" and not self.stock:
            said = {**self.info, "instance": self.instance, "weights": self.version, "owner": self.owner}
            return 200, said, {}
        if path.startswith("/trl/weights") and not self.stock:
            return self._update(method, path, body)
        if path == "/v1/completions":
            return self._complete(json.loads(body), headers)
        if path == "/reset_prefix_cache":
            return 200, None, {}
        return 404, {"detail": "Not Found"}, {}

    def _complete(self, body: dict, headers) -> tuple[int, object, dict]:
        if not self.stock and headers.get("trl-weights") not in (None, self.version):
            error = {"error": {"message": "other weights", "type": "other_weights"}}
            return 412, {**error, "weights": self.version, "owner": self.owner}, {}
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        choices = []
        for prompt in prompts:
            for index in range(body.get("n", 1)):
                ids = completion_of(prompt, body.get("seed") or 0, index, body["max_tokens"])
                choice = {"index": len(choices), "token_ids": ids, "prompt_token_ids": prompt, "logprobs": None}
                if body.get("logprobs") is not None:
                    choice["logprobs"] = {
                        "tokens": [f"token_id:{token}" for token in ids],
                        "token_logprobs": [-token / 100 for token in ids],
                        "top_logprobs": [{f"token_id:{token}": -token / 100} for token in ids],
                    }
                if body.get("prompt_logprobs") is not None:
                    places = [None] + [{str(token): {"logprob": -token / 1000, "rank": 1}} for token in prompt[1:]]
                    choice["prompt_logprobs"] = places
                choices.append(choice)
        return 200, {"choices": choices}, {} if self.stock else {"trl-weights": self.version}

    def _update(self, method: str, path: str, body: bytes) -> tuple[int, object, dict]:
        if method == "POST" and path == "/trl/weights":
            said = json.loads(body)
            self.updating = {"owner": said["owner"], "declared": said["parameters"], "tensors": {}}
            return 201, {"update": "token", "weights": self.version}, {}
        if self.updating is None:
            return 404, {"error": {"message": "unknown update", "type": "not_found"}}, {}
        if method == "PUT":
            self.body_sizes.append(len(body))
            self.updating["tensors"].update(safetensors.torch.load(body))
            return 200, {"received": len(self.updating["tensors"]), "missing": 0}, {}
        if method == "DELETE":
            self.updating = None
            return 200, {"weights": self.version}, {}
        declared = [(name, dtype, tuple(shape)) for name, dtype, shape in self.updating["declared"]]
        received = [
            (name, str(tensor.dtype).split(".")[-1], tuple(tensor.shape))
            for name, tensor in self.updating["tensors"].items()
        ]
        if sorted(declared) != sorted(received):
            return 409, {"error": {"message": "weights are missing", "type": "weights_error"}}, {}
        self.weights, self.owner = self.updating["tensors"], self.updating["owner"]
        self.updates, self.updating = self.updates + 1, None
        return 200, {"weights": self.version}, {}


class _Handler(BaseHTTPRequestHandler):
    server_state: FakeVLLM
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        fake = self.server_state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        is_json = body[:1] == b"{"
        with fake.lock:
            fake.calls.append((self.command, path, json.loads(body) if is_json else {}))
            fake.headers.append(dict(self.headers))
            queue = next((queue for start, queue in fake.failures.items() if queue and path.startswith(start)), None)
            failure = queue.pop(0) if queue else None
            fake.running += 1
            fake.most_running = max(fake.most_running, fake.running)
        try:
            wait(fake.seconds)
            self._reply(fake, path, body, failure)
        finally:
            with fake.lock:
                fake.running -= 1

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _reply(self, fake: FakeVLLM, path: str, body: bytes, failure) -> None:
        if callable(failure):
            failure = failure()
        if failure == "reset" or fake.is_down:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if failure == "hang":
            wait(20)
        if failure == "redirect":
            self._send(302, b"", {"Location": "http://127.0.0.1:1/elsewhere"})
            return
        if isinstance(failure, int):
            said = {"error": {"message": f"told to say {failure}", "type": "test"}}
            self._send(failure, json.dumps(said).encode(), {})
            return
        wanted = None if fake.key is None or path == "/health" else f"Bearer {fake.key}"
        if wanted is not None and self.headers.get("Authorization") != wanted:
            self._send(401, b'{"error": "Unauthorized"}', {})
            return
        with fake.lock:
            status, value, headers = fake.answer(self.command, path, body, self.headers)
        data = b"" if value is None else json.dumps(value).encode()
        if failure == "garbage":
            data = b"<html>not what was asked for"
        self._send(status, data, headers, cut=failure == "cut")

    def _send(self, status: int, data: bytes, headers: dict, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut or self.close_connection
