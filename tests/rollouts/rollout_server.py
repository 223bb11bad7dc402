"""Requests to a real rollout server (`trl vllm-serve`), and what a trainer does with one."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.conftest import build_model, build_tokenizer
from tests.rollouts.vllm_server_process import ServerProcess
from trl.models.weight_export import iter_weights

# vLLM's attention on a CPU wants heads of 32.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPT = list(range(5, 25))
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


class RolloutServer(ServerProcess):
    """A server process, asked request by request."""

    def show_log(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    @property
    def is_alive(self) -> bool:
        try:
            return self.request("GET", "/health", key=None)[0] == 200
        except OSError:
            return False

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
