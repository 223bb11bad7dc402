"""
One server as an engine sees it, and the requests of one generation. All of this is on the main process alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..models.weight_export import WeightInfo
from .vllm_http import BROKEN_WEIGHTS, Answer, ServerConnection, ServerError, ServerLost
from .vllm_sampling import is_greedy, request_seeds
from .vllm_transport import (
    ServerInfo,
    Transport,
    another_trainer,
    choose_transport,
    read_info,
)
from .vllm_wire import RENDER_PATH, features_request, place_features, render_images, sampled_logps

VERSION_HEADER = "trl-weights"
SCORE_SECONDS = 600.0
FINGERPRINT_SECONDS = 900.0
# Completions of one request: a server takes no more than it runs at a time, 128 at the least by default.
MOST_COMPLETIONS = 64

Completion = tuple[list[int], list[float] | None]


class StaleWeights(RuntimeError):
    """A server refused since it has other weights than the request was for."""


# ---------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class CompletionRequest:
    """
    Several completions of one prompt.

    Args:
        prompt_ids: the prompt.
        images: in it.
        count: number of completions that are wanted.
        body_settings: sampling settings in vLLM's words.
        server: index of the one that is asked.
        rescore: take log-probs from a second look at what was sampled, before any sampling step.
        answers: per completion its tokens and log-probs, once they are there.
        attempts: how often it was asked.
    """

    prompt_ids: list[int]
    images: list | None
    count: int
    body_settings: dict[str, Any]
    server: int
    rescore: bool = False
    answers: list[Completion] | None = None
    attempts: int = 0


def plan_requests(
    runs: Sequence[tuple[tuple[list[int], list | None], int]],
    settings: dict[str, Any],
    *,
    n: int,
    seed: int,
    max_model_length: int | None,
    rescore: bool,
    shares: Sequence[int],
) -> list[CompletionRequest]:
    """
    Requests for runs of equal prompts, in their order.

    Args:
        runs: prompt and images, and how many rows in a row have them.
        settings: sampling settings in vLLM's words, shared by all.
        n: completions per row.
        seed: of the whole generation; each request gets one of its own, whichever server it goes to.
        max_model_length: most tokens of prompt and completion.
        rescore: see [`CompletionRequest`].
        shares: per server its share of the requests, in proportion.

    Raises:
        ValueError: a prompt leaves no room for a completion, or nothing says how long one may be.
    """
    parts = [
        (ids, images, min(MOST_COMPLETIONS, count * n - start))
        for (ids, images), count in runs
        for start in range(0, count * n, MOST_COMPLETIONS)
    ]
    requests = []
    load = [0] * len(shares)
    for (ids, images, count), own_seed in zip(parts, request_seeds(seed, len(parts)), strict=True):
        server = min(range(len(shares)), key=lambda index: load[index] / max(shares[index], 1))
        load[server] += count
        own = {
            **settings,
            "max_tokens": _most_tokens(len(ids), settings["max_tokens"], max_model_length, rescore),
            # Greedy completions of one prompt are all the same, and vLLM refuses to make more than one.
            "n": 1 if is_greedy(settings) else count,
            "seed": own_seed,
        }
        requests.append(CompletionRequest(ids, images, count, own, server, rescore))
    return requests


def _most_tokens(prompt_length: int, wanted: int | None, max_model_length: int | None, rescore: bool) -> int:
    if max_model_length is None:
        if wanted is None:
            raise ValueError(
                "`max_completion_length=None` generates up to the end of the model's context, but the server does not "
                "say how long that is. Set `max_completion_length`."
            )
        return wanted
    room = max_model_length - prompt_length - (1 if rescore else 0)  # scoring generates one token, too
    if room < 1:
        raise ValueError(
            f"A prompt of {prompt_length} tokens leaves no room for a completion in the {max_model_length} tokens that "
            "the vLLM server takes. Prompts are never cut: filter the dataset by prompt length, or start the server "
            "with a larger --max-model-len."
        )
    return room if wanted is None else min(wanted, room)


# ---------------------------------------------------------------------------------------------------------------------
# Who is asked
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """
    One server, the version of its weights, and how they get there.

    Args:
        url: its address.
        owner: who pushes weights from here.
        group_port: port of this machine for an NCCL group.
        request_timeout: seconds that one request may take.
        image_token_id: placeholder of images in prompts.

    Attributes:
        info: what it said of itself last.
        version: of its weights that requests are for; `None` at a stock server.
        is_stale: it lacks the policy's weights.
        has_pushed: whether weights got there from here.
    """

    url: str
    owner: str
    group_port: int
    request_timeout: float
    image_token_id: int | None = None
    connection: ServerConnection = field(init=False)
    info: ServerInfo = field(init=False)
    version: str | None = field(init=False, default=None)
    is_stale: bool = field(init=False, default=False)
    has_pushed: bool = field(init=False, default=False)
    _transport: Transport | None = field(init=False, default=None)

    def __post_init__(self):
        self.connection = ServerConnection(self.url)

    # ---- Weights ----

    def ready(self, seconds: float) -> ServerInfo:
        """
        Wait for it to be up, and ask what it is.

        Args:
            seconds: limit.

        Raises:
            ConnectionError: it was not up in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            left = max(deadline - time.monotonic(), 0)
            self.connection.wait_until_healthy(left)
            try:
                return self.refresh()
            except ServerLost as error:  # gone again
                if not left:
                    raise
                self.connection.say_once("info", str(error))
                time.sleep(0.5)

    def refresh(self) -> ServerInfo:
        """Ask what it is now; requests are for the weights that it has now."""
        before, self.info = getattr(self, "info", None), read_info(self.connection)
        self.version = self.info.weights
        if before is not None and (self.info.is_stock or self.info.instance != before.instance):
            self._drop_transport()
        return self.info

    def push(self, manifest: list[WeightInfo], weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace its weights."""
        if self._transport is None:
            self._transport = choose_transport(self.connection, self.info, self.owner, self.group_port)
        try:
            self.version = self._transport.push(manifest, weights)
        except Exception:
            self._drop_transport()
            raise
        self.is_stale, self.has_pushed = False, True

    def another_trainer(self) -> RuntimeError:
        """The error for a server that somebody else uses."""
        return another_trainer(self.url, self.info.owner)

    def fingerprints(self) -> dict[str, tuple[float, float]]:
        """Numbers of its layers; none where they are cut over devices, or the server is a stock one."""
        if self.info.is_stock:
            return {}
        workers = self.connection.get("/trl/weights/fingerprints", seconds=FINGERPRINT_SECONDS)["workers"]
        return {name: tuple(values) for name, values in workers[0].items()} if len(workers) == 1 else {}

    def close(self) -> None:
        """Leave its group, and close the connections."""
        self._drop_transport()
        self.connection.close()

    def _drop_transport(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    # ---- Completions and scores ----

    def complete(self, request: CompletionRequest) -> list[Completion]:
        """
        The completions of a request.

        Raises:
            ServerLost: they did not come, or not whole.
            StaleWeights: the server has other weights.
            ServerError: it refused.
        """
        if request.images:
            completions = self._complete_with_images(request)
        else:
            body = {
                "model": self.info.model,
                "prompt": request.prompt_ids,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                **request.body_settings,
            }
            completions = _completions(self._ask("/v1/completions", body), request)
        completions *= request.count // len(completions)
        if request.rescore and completions:
            completions = self._rescored(request.prompt_ids, completions)
        return completions

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of the tokens of sequences, each from the second on, before any sampling step."""
        body = {
            "model": self.info.model,
            "prompt": [list(ids) for ids in sequences],
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
        }
        answer = self._ask("/v1/completions", body, SCORE_SECONDS)
        try:
            return [
                [place[str(token)]["logprob"] for token, place in zip(ids[1:], places[1:], strict=True)]
                for ids, places in zip(
                    sequences, [choice["prompt_logprobs"] for choice in answer.json()["choices"]], strict=True
                )
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerLost(f"{self.url} scored tokens with an answer of another form ({error!r}).") from error

    def _rescored(self, prompt_ids: list[int], completions: list[Completion]) -> list[Completion]:
        scores = self.score([prompt_ids + ids for ids, _ in completions])
        return [
            (ids, row[len(row) - len(ids) :] if ids else []) for (ids, _), row in zip(completions, scores, strict=True)
        ]

    def _complete_with_images(self, request: CompletionRequest) -> list[Completion]:
        def post(body: dict) -> dict:
            return self.connection.post(RENDER_PATH, body, seconds=self.request_timeout)

        features = render_images(post, self.url, self.info.model, request.images)
        features = place_features(features, request.prompt_ids, self.image_token_id)
        body = features_request(self.info.model, request.prompt_ids, features, request.body_settings)
        return _completions(self._ask("/inference/v1/generate", body), request)

    def _ask(self, path: str, body: dict, seconds: float | None = None) -> Answer:
        """An answer made with the weights that `version` names."""
        headers = {VERSION_HEADER: self.version} if self.version is not None else {}
        try:
            answer = self.connection.request(
                "POST", path, seconds=seconds or self.request_timeout, body=body, headers=headers
            )
        except ServerError as error:
            if error.status == 412 or error.kind == BROKEN_WEIGHTS:
                raise StaleWeights(str(error)) from error
            if error.status == 500:  # the engine died, or this request did
                raise ServerLost(str(error)) from error
            raise
        if self.version is not None and answer.headers.get(VERSION_HEADER) != self.version:
            raise StaleWeights(
                f"{self.url} answered with the weights {answer.headers.get(VERSION_HEADER)!r} instead of {self.version!r}."
            )
        return answer


def _completions(answer: Answer, request: CompletionRequest) -> list[Completion]:
    """Tokens and log-probs of an answer's choices; one of another form counts as cut short."""
    said = answer.json()
    try:
        choices = sorted(said["choices"], key=lambda choice: choice["index"])
        found = [([int(token) for token in one["token_ids"]], sampled_logps(one.get("logprobs"))) for one in choices]
    except (KeyError, TypeError, ValueError) as error:
        raise ServerLost(f"{answer.url} answered in another form than vLLM's ({error!r}).") from error
    wanted = request.body_settings["n"]
    if len(found) != wanted:
        raise ServerLost(f"{answer.url} answered with {len(found)} completions instead of {wanted}.")
    if request.body_settings.get("logprobs") is None:
        return [(ids, None) for ids, _ in found]
    if any(logps is None or len(logps) != len(ids) for ids, logps in found):
        raise ServerLost(f"{answer.url} answered with another number of log-probs than of tokens.")
    return found
