"""Random requests for a rollout server: nothing, something and nearly the right thing, at random and repeatably."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import random
import socket
import string
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .rollout_server import PROMPT, RolloutServer, declare

METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "G\u00cbT", "post", ""]
PATHS = [
    *["/trl/info", "/trl/weights", "/trl/weights/version", "/trl/weights/TOKEN", "/trl/weights/TOKEN/commit"],
    *["/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/completions/render", "/inference/v1/generate"],
    *["/tokenize", "/detokenize", "/collective_rpc", "/update_weights", "/start_weight_update", "/sleep", "/pause"],
    *["/server_info", "/version", "/docs", "/openapi.json", "/v1/load_lora_adapter", "/invocations", "/ping", "/"],
    *["/trl", "/trl/weights/", "/trl//weights", "/trl/weights/../info", "//health", "/trl/weights/TOKEN/commit/x"],
    *["/scale_elastic_ep", "/reset_mm_cache", "/v1/responses", "/v1/messages", "/abort_requests", "/load"],
]
VALUES: list[Any] = [
    *[
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63,
        2**70,
        -(2**70),
        0.5,
        -1.5,
        1e308,
        "",
        "x",
        "\u0000",
        "\ud800",
        "a" * 999,
    ],
    *[[], {}, [[]], [None], {"a": {}}, [0] * 300, [-1], [2**40], ["x", 1], "float32", [1, 2], [[1, 2], [3]]],
]


@dataclass
class Fuzzer:
    """
    Sends requests and counts the answers by status. One weight is never sent, so that no update can be whole.

    Args:
        server: it runs.
        weights: those of its model.
        seed: of the requests.
    """

    server: RolloutServer
    weights: dict[str, Any]
    seed: int
    answers: Counter = field(default_factory=Counter)
    token: str = "none"

    def __post_init__(self) -> None:
        from safetensors.torch import save

        self.random = random.Random(self.seed)
        withheld, *self._sent = list(self.weights)
        self._files = [save({name: self.weights[name]}) for name in self._sent[:6]]
        self._files.append(save({name: self.weights[name] for name in self._sent}))
        assert withheld not in self._sent

    def run(self, count: int) -> None:
        """Send `count` requests; an answer that is neither 2xx nor 4xx fails."""
        connection = self.server.connect()
        for number in range(count):
            if number % 100 == 0:
                self.server.request("DELETE", f"/trl/weights/{self.token}")  # whoever began it
                self.token = self.server.begin(self.weights)
            if self.random.random() < 0.15:
                self._raw()
                continue
            method, path, body, headers = self._request()
            try:
                connection.request(method, path, body, headers)
                reply = connection.getresponse()
                text = reply.read()
            except (http.client.HTTPException, ValueError, ConnectionError) as error:
                # What this library will not send, or a connection that the server ended after its last answer.
                self.answers[type(error).__name__] += 1
                connection.close()
                continue
            self._count(reply.status, f"{number}: {method} {path} {str(body)[:300]} {headers}: {text[:300]}")
            if reply.status == 201:  # an update that was begun in the place of the last one
                self.token = json.loads(text)["update"]
            if reply.getheader("connection") == "close":
                connection.close()
        connection.close()

    def _count(self, status: int, told: str) -> None:
        self.answers[status] += 1
        assert 200 <= status < 300 or 400 <= status < 500, f"{status} for request {told}"

    # ---- Whole requests ----

    def _request(self) -> tuple[str, str, bytes | None, dict[str, str]]:
        kind = self.random.choice(["any", "begin", "file", "file", "generate", "commit", "version", "tokens"])
        if kind == "any":
            body = self.random.choice([None, self._bytes(200), self._json(self._anything())])
            return self._pick(METHODS), self._path(), body, self._headers()
        if kind == "begin":
            declared = {"owner": "tests", "parameters": declare(self.weights)}
            return "POST", "/trl/weights", self._json(self._changed(declared)), self._headers()
        if kind == "file":
            return "PUT", f"/trl/weights/{self.token}", self._changed_file(), self._headers()
        if kind == "commit":
            token = self._pick([self.token, "x", "%00", "..", self.token[::-1], self.token + "\u00e9".encode().hex()])
            return "POST", f"/trl/weights/{token}/commit", None, self._headers()
        if kind == "version":
            return "POST", "/trl/weights/version", self._json(self._changed({"owner": "tests"})), self._headers()
        if kind == "tokens":
            body = {"model": self.server.model, "prompt": "the sky", "tokens": [5, 6]}
            return "POST", self._pick(["/tokenize", "/detokenize"]), self._json(self._changed(body)), self._headers()
        body = {"model": self.server.model, "prompt": PROMPT[:3], "max_tokens": 1, "temperature": 1.0, "n": 1}
        body |= {"logprobs": 0, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "return_token_ids": True}
        body |= {"stop_token_ids": [7], "prompt_logprobs": 0, "repetition_penalty": 1.1, "stream": False}
        body |= {"structured_outputs": None, "stop": ["x"], "request_id": "r", "user": "u"}
        if self.random.random() < 0.3:
            body["messages"] = [{"role": "user", "content": "the sky"}]
            return "POST", "/v1/chat/completions", self._json(self._changed(body)), self._headers()
        headers = self._headers()
        if self.random.random() < 0.3:
            headers["trl-weights"] = self._pick(["x", "", "a:1", ":" * 99, "\u00e9"])
        return "POST", "/v1/completions", self._json(self._changed(body)), headers

    def _raw(self) -> None:
        """A request that a library would not send: broken lines, lengths that lie, ends in the middle."""
        body = self._changed_file()
        length = self._pick([len(body), len(body) + 50, max(len(body) - 50, 0), -1, 2**63, "abc", "1, 2", "", "0x10"])
        key = f"Authorization: Bearer {self.server.key}"
        lines = [
            f"{self._pick(METHODS)} {self._path()} {self._pick(['HTTP/1.1', 'HTTP/1.1', 'HTTP/1.0', 'HTTP/9', ''])}",
            *self._pick([["Host: localhost"], [], ["Host: a", "Host: b"], ["Host"], ["\x00: \x01"]]),
            self._pick([key, key, "Authorization: Bearer", f"{key}x"]),
            *self._pick(
                [[f"Content-Length: {length}"], ["Transfer-Encoding: chunked"], [], ["Content-Length: 5"] * 2]
            ),
            *self._pick([[], [], ["Expect: 100-continue"], ["Upgrade: websocket", "Connection: Upgrade"]]),
        ]
        data = (
            "\r\n".join(lines).encode("utf-8", "replace")
            + b"\r\n\r\n"
            + self._pick([body, b"", body[:40], b"5\r\nab"])
        )
        if self.random.random() < 0.1:
            data = self._bytes(400)
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=20) as peer:
            answer = b""
            with contextlib.suppress(OSError):  # it may have answered and gone
                peer.sendall(data)
                peer.shutdown(socket.SHUT_WR)
                while piece := peer.recv(65536):
                    answer += piece
        answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not answer:
            self.answers["no answer"] += 1
            return
        status = answer.split(b" ", 2)[1]
        assert status.isdigit(), answer[:200]
        self._count(int(status), f"{data[:300]}: {answer[:300]}")

    # ---- Parts ----

    def _pick(self, options: list) -> Any:
        return self.random.choice(options)

    def _bytes(self, most: int) -> bytes:
        return self.random.randbytes(self.random.randrange(most))

    def _path(self) -> str:
        path = self._pick(PATHS).replace("TOKEN", self._pick([self.token, "x", "a%2fb"]))
        if self.random.random() < 0.2:
            at = self.random.randrange(len(path) + 1)
            path = path[:at] + self._pick([*string.ascii_lowercase, "/", "%", "%00", "?", "#", "..", ";"]) + path[at:]
        return path

    def _headers(self) -> dict[str, str]:
        chance = self.random.random()
        headers = {} if chance < 0.05 else {"Authorization": f"Bearer {self.server.key if chance < 0.9 else 'no'}"}
        if self.random.random() < 0.7:
            headers["Content-Type"] = self._pick(["application/json"] * 5 + ["text/plain", "multipart/form-data", "x"])
        if self.random.random() < 0.1:
            headers[self._pick(["X", "Origin", "Content-Encoding", "Range"])] = self._pick(
                ["gzip", "x" * 5000, "*", "0"]
            )
        return headers

    def _anything(self) -> Any:
        return {self._pick(["owner", "parameters", "prompt", "x"]): self._pick(VALUES) for _ in range(3)}

    def _json(self, value: Any) -> bytes:
        text = json.dumps(value).encode()
        chance = self.random.random()
        if chance < 0.1:
            return text[: self.random.randrange(len(text) + 1)]
        if chance < 0.15:
            return b"[" * 5000 + text
        if chance < 0.2:
            return text.replace(b"1", self._pick([b"NaN", b"1e999", b"9" * 5000, b"-Infinity"]))
        return text

    def _changed(self, value: Any) -> Any:
        """The value with a few of its parts replaced, removed or doubled."""
        value = json.loads(json.dumps(value))
        for _ in range(self.random.randrange(4)):
            parent = value
            while True:
                keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
                if not keys:
                    break
                key = self._pick(keys)
                if isinstance(parent[key], dict | list) and self.random.random() < 0.7:
                    parent = parent[key]
                    continue
                if isinstance(parent, list) and self.random.random() < 0.3:
                    parent.append(copy.deepcopy(parent[key]))
                elif self.random.random() < 0.2:
                    del parent[key]
                else:
                    parent[key] = copy.deepcopy(self._pick(VALUES))
                break
        return value

    def _changed_file(self) -> bytes:
        """A safetensors file with a changed header, changed bytes, or another length."""
        data = self._pick(self._files)
        chance = self.random.random()
        if chance < 0.4:
            size = int.from_bytes(data[:8], "little")
            header = json.dumps(self._changed(json.loads(data[8 : 8 + size]))).encode()
            stated = self._pick([len(header)] * 6 + [0, 1, 2**63, len(header) + 1, 2**24 + 1])
            return stated.to_bytes(8, "little") + header + data[8 + size :]
        if chance < 0.6:
            return data[: self.random.randrange(len(data))]
        if chance < 0.8:
            return data + self._bytes(50)
        changed = bytearray(data)
        for _ in range(5):
            changed[self.random.randrange(min(300, len(data)))] = self.random.randrange(256)
        return bytes(changed)
