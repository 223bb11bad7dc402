"""A real rollout server (`trl vllm-serve`) in processes of its own, and what a trainer does with one."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.conftest import build_model, build_tokenizer
from tests.two_processes import free_port
from trl.models.weight_export import iter_weights

REPOSITORY = Path(__file__).parents[2]
# vLLM's attention on a CPU wants heads of 32.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPT = list(range(5, 25))
START_SECONDS = 240
REQUEST_SECONDS = 60


def build_served_model(seed: int = 0, tied: bool = True, **config: Any):
    """A tiny model that vLLM can serve on a CPU."""
    return build_model(seed=seed, tie_word_embeddings=tied, **SIZES, **config)


def save_served_model(folder: Path, tied: bool = True) -> str:
    """Save one with its tokenizer."""
    tokenizer = build_tokenizer()
    model = build_served_model(tied=tied)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class RolloutServer:
    """
    `trl vllm-serve` of a model in float32.

    Args:
        model: its folder.
        folder: for the log and for weights on their way.
        key: what requests have to carry, or None.
        options: further options.
    """

    def __init__(self, model: str, folder: Path, key: str | None = "key-of-the-tests", options: tuple[str, ...] = ()):
        self.model, self.key, self.port = model, key, free_port()
        self.log, self.staging = folder / "server.log", folder / "staging"
        self.staging.mkdir(exist_ok=True)
        self._options = options
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> RolloutServer:
        """Start it, and wait until it is healthy. If that fails its log is shown."""
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
        environment.update({"VLLM_API_KEY": self.key} if self.key else {})
        environment |= {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "TRL_SERVER_STAGING_DIR": str(self.staging),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
        }
        options = ["--model", self.model, "--port", str(self.port), "--dtype", "float32", "--enforce_eager"]
        command = [sys.executable, "-m", "trl.cli", "vllm-serve", *options, "--max_model_len", "256", *self._options]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise
        return self

    def kill(self) -> None:
        """End it and its children, as `kill -9` does."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    def show_log(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    @property
    def is_alive(self) -> bool:
        try:
            return self.request("GET", "/health", key=None)[0] == 200
        except OSError:
            return False

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.is_alive:
            assert self._process.poll() is None, f"the server ended:\n{self.show_log()}"
            assert time.monotonic() < deadline, f"the server did not get healthy:\n{self.show_log()}"
            time.sleep(0.5)

    # ---- Requests ----

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        key: str | None = "own",
        connection: http.client.HTTPConnection | None = None,
    ) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
        """Status, JSON and headers of the answer. A body that is not bytes is sent as JSON."""
        headers = dict(headers or {})
        key = self.key if key == "own" else key
        if key is not None:
            headers.setdefault("Authorization", f"Bearer {key}")
        if body is not None and not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        own = connection or self.connect()
        try:
            own.request(method, path, body, headers)
            reply = own.getresponse()
            text = reply.read()
            return reply.status, _json(text), reply.headers
        finally:
            if connection is None:
                own.close()

    # ---- What a trainer does ----

    def info(self) -> dict[str, Any]:
        return self.request("GET", "/trl/info")[1]

    def begin(self, weights: dict[str, torch.Tensor], owner: str = "tests") -> str:
        """Begin an update; its token."""
        status, reply, _ = self.request("POST", "/trl/weights", {"owner": owner, "parameters": declare(weights)})
        assert status == 201, reply
        return reply["update"]

    def put(self, token: str, body: bytes) -> tuple[int, dict[str, Any]]:
        return self.request("PUT", f"/trl/weights/{token}", body)[:2]

    def commit(self, token: str) -> tuple[int, dict[str, Any]]:
        return self.request("POST", f"/trl/weights/{token}/commit")[:2]

    def push(self, model: torch.nn.Module, owner: str = "tests") -> str:
        """Send a model's weights in two parts; the new version."""
        from safetensors.torch import save

        weights = exported(model)
        token = self.begin(weights, owner)
        names = list(weights)
        for part in (names[:3], names[3:]):
            status, reply = self.put(token, save({name: weights[name] for name in part}))
            assert status == 200, reply
        status, reply = self.commit(token)
        assert status == 200, reply
        return reply["weights"]

    def score(self, version: str | None = None, ids: list[int] | None = None) -> list[float]:
        """Log-probs of a prompt's tokens from the second on, of one version of the weights."""
        ids = PROMPT if ids is None else ids
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        status, reply, headers = self.request(
            "POST", "/v1/completions", body, {"trl-weights": version} if version else None
        )
        assert status == 200, reply
        assert version in (None, headers["trl-weights"])
        positions = reply["choices"][0]["prompt_logprobs"][1:]
        return [position[str(token)]["logprob"] for token, position in zip(ids[1:], positions, strict=True)]


def exported(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    alone = SimpleNamespace(state=SimpleNamespace(), unwrap_model=lambda model, **_: model)
    return {name: tensor.contiguous() for name, tensor in iter_weights(model, alone)}


def declare(weights: dict[str, torch.Tensor]) -> list[list]:
    return [[name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in weights.items()]


def reference_logps(model: torch.nn.Module, ids: list[int] | None = None) -> list[float]:
    """What Transformers computes in float32 for `RolloutServer.score`."""
    ids = PROMPT if ids is None else ids
    with torch.no_grad():
        logps = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return [logps[position, token].item() for position, token in enumerate(ids[1:])]


def _json(text: bytes) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError:
        return {"text": text.decode(errors="replace")}
