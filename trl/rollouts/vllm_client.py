"""
A client of one vLLM server: `trl vllm-serve`, or, to generate, any `vllm serve`.

Token ids go in and come out; nothing is decoded and tokenized again on the way. [`VLLMClient`] is for scripts that talk to
a server themselves. The trainers' engine, `vllm_server_engine`, has the same connection, transports and parsing beneath it.
"""

from __future__ import annotations

import atexit
import contextlib
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn
from transformers.utils import get_json_schema, logging

from ..models.weight_export import WeightInfo
from .vllm_http import BUSY, ServerConnection, ServerError, ServerLost, in_parallel, server_url
from .vllm_transport import (
    NcclTransport,
    Transport,
    WeightSpool,
    choose_transport,
    cuda_device,
    new_owner,
    read_info,
)
from .vllm_wire import (
    RENDER_PATH,
    features_request,
    generated,
    parse_logprobs,
    pil_to_base64,
    render_images,
    scored_place,
    structured_outputs,
    to_openai_messages,
)

__all__ = ["VLLMClient", "parse_logprobs", "pil_to_base64", "to_openai_messages"]

logger = logging.get_logger(__name__)

REQUEST_SECONDS = 1800.0
ATTEMPTS = 5


class VLLMClient:
    """
    Talks to a vLLM server: generates, scores, and replaces the weights.

    The key in the environment variable VLLM_API_KEY, if there is one, goes with every request. A request is repeated up to
    4 times where the connection breaks, and while the server is busy.

    Args:
        base_url (`str`, *optional*):
            The server's address, such as `http://10.0.0.5:8000`. It wins over `host` and `server_port`.
        host (`str`, defaults to `"0.0.0.0"`):
            The server's machine; 0.0.0.0 is this one.
        server_port (`int`, defaults to `8000`):
            The server's port.
        group_port (`int`, defaults to `51216`):
            Port of this machine that an NCCL group for weights meets at.
        connection_timeout (`float`, defaults to `0.0`):
            Seconds to wait for the server to be up.

    Raises:
        ConnectionError: the server is not up in time.
    """

    def __init__(
        self,
        base_url: str | None = None,
        host: str = "0.0.0.0",
        server_port: int = 8000,
        group_port: int = 51216,
        connection_timeout: float = 0.0,
    ):
        self.base_url = server_url(base_url, host, server_port)
        parts = urlsplit(self.base_url)
        self.host = parts.hostname
        self.server_port = parts.port or (443 if parts.scheme == "https" else 80)
        self.group_port = group_port
        self.connection = ServerConnection(self.base_url)
        self.session = self.connection.session
        self.owner = new_owner()
        self._transport: Transport | None = None
        self._spool: WeightSpool | None = None
        self.check_server(connection_timeout)
        self.model = self._served_model()

    # ---- The server ----

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0):
        """
        Wait for the server to be up.

        Args:
            total_timeout: seconds; 0 asks once.
            retry_interval: seconds between two questions.

        Raises:
            ConnectionError: it is not up in time.
        """
        answer = self.connection.wait_until_healthy(total_timeout, retry_interval)
        self.host = answer.headers.get("X-Forwarded-For") or self.host
        logger.info(f"The vLLM server at {self.base_url} is up.")

    def get_world_size(self) -> int:
        """Number of the server's workers, over all of its data-parallel replicas."""
        try:
            return self.connection.get("/get_world_size")["world_size"]
        except ServerError as error:
            if error.status not in (403, 404):
                raise
            return read_info(self.connection).world_size

    def get_server_info(self) -> dict:
        """
        vLLM's own configuration.

        Raises:
            RuntimeError: the server does not tell.
        """
        try:
            return self.connection.get("/server_info?config_format=json")
        except ServerError as error:
            if error.status not in (403, 404):
                raise
            raise RuntimeError(
                f"{self.base_url} does not tell its configuration: it runs without vLLM's development routes "
                "(VLLM_SERVER_DEV_MODE=1). Its main values are at /trl/info where it was started by `trl vllm-serve`."
            ) from error

    def reset_prefix_cache(self):
        """Make the server forget the keys and values of earlier prompts, which belong to earlier weights."""
        self._ask("POST", "/reset_prefix_cache")

    # ---- Generation ----

    def generate(
        self,
        prompts: list[str] | list[list[int]],
        features: list[dict | None] | None = None,
        n: int = 1,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_tokens: int = 16,
        logprobs: int | None = 0,
        structured_outputs_regex: str | None = None,
        generation_kwargs: dict | None = None,
    ) -> dict[str, list[list[int]]]:
        """
        Completions of prompts.

        Args:
            prompts: texts, or token ids.
            features: per prompt what [`~VLLMClient.image_features`] made of its images, with placeholders at their
                places in the prompt; the prompts are token ids then.
            n: completions per prompt.
            repetition_penalty: 1.0 changes nothing.
            temperature: divides the logits; 0 is greedy.
            top_p: smallest set of tokens with this probability; 1.0 keeps all.
            top_k: this many most probable tokens; 0 keeps all.
            min_p: least probability, as a share of the largest.
            max_tokens: most tokens of a completion.
            logprobs: how many of the most probable tokens are told besides the sampled one; 0: the sampled one alone;
                `None`: none.
            structured_outputs_regex: regular expression that completions match.
            generation_kwargs: further settings in vLLM's words; they win.

        Returns:
            `prompt_ids` per prompt; and, per completion, those of one prompt side by side, `completion_ids`, `logprobs`
            and `logprob_token_ids` (per token those told, most probable first; `None` where nothing was told).
        """
        settings = {
            "n": n,
            "repetition_penalty": repetition_penalty,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            **structured_outputs(structured_outputs_regex),
            **(generation_kwargs or {}),
        }
        if features is not None and any(feature is not None for feature in features):
            return self._generate_with_features(prompts, features, settings)
        body = {
            "model": self.model,
            "prompt": prompts,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **settings,
        }
        choices = self._ask("POST", "/v1/completions", body)["choices"]
        per_prompt = max(len(choices) // max(len(prompts), 1), 1)
        return generated([choice["prompt_token_ids"] for choice in choices[::per_prompt]], choices)

    def chat(
        self,
        messages: list[list[dict]],
        n: int = 1,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_tokens: int = 16,
        logprobs: int | None = 0,
        structured_outputs_regex: str | None = None,
        generation_kwargs: dict | None = None,
        chat_template_kwargs: dict | None = None,
        tools: list | None = None,
        chat_template: str | None = None,
        max_concurrent_requests: int = 64,
    ) -> dict[str, list[list[int]]]:
        """
        Completions of conversations, which the server renders.

        Args:
            messages: conversations; images in them are sent along.
            chat_template_kwargs: further values for the chat template.
            tools: functions, or their JSON schemas, that the template shows. The model's calls are not parsed.
            chat_template: another template than the model's own.
            max_concurrent_requests: one request per conversation, this many at the same time.
            n, repetition_penalty, temperature, top_p, top_k, min_p, max_tokens, logprobs, structured_outputs_regex,
                generation_kwargs: as for [`~VLLMClient.generate`].

        Returns:
            As [`~VLLMClient.generate`].
        """
        shared = {
            "model": self.model,
            "n": n,
            "repetition_penalty": repetition_penalty,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "max_tokens": max_tokens,
            "logprobs": logprobs is not None,
            "top_logprobs": logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **structured_outputs(structured_outputs_regex),
        }
        if tools:
            shared["tools"] = [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]
            shared["tool_choice"] = "none"
        if chat_template is not None:
            shared["chat_template"] = chat_template
        if chat_template_kwargs:
            shared["chat_template_kwargs"] = chat_template_kwargs
        shared.update(generation_kwargs or {})

        def complete(conversation: list[dict]) -> dict:
            body = {**shared, "messages": to_openai_messages(conversation)}
            return self._ask("POST", "/v1/chat/completions", body)

        answers = in_parallel(complete, messages, max_concurrent_requests)
        choices = [choice for answer in answers for choice in answer["choices"]]
        return generated([answer["prompt_token_ids"] for answer in answers], choices)

    def image_features(self, images: list[list | None], max_concurrent_requests: int = 64) -> list[dict | None]:
        """
        What the server's own image processor makes of images.

        Args:
            images: per prompt its images, or `None`.
            max_concurrent_requests: one request per prompt, this many at the same time.

        Returns:
            Per prompt the features, `None` without images. Their placeholders are those of a prompt of nothing but the
            images: move them before [`~VLLMClient.generate`], see [`~trl.rollouts.vllm_wire.place_features`].

        Raises:
            RuntimeError: the server does not offer this.
        """
        return in_parallel(self._render, images, max_concurrent_requests)

    # ---- Scoring ----

    def get_sequence_logprobs(
        self,
        sequences: list[list[int]],
        prompt_lengths: list[int],
        top_logprobs: int = 100,
        temperature: float = 1.0,
        chunk_size: int = 0,
        max_concurrent_requests: int = 4,
    ) -> dict[str, list]:
        """
        Log-probabilities of the tokens of given sequences, and of the most probable ones at their places.

        Args:
            sequences: token ids, prompt and completion.
            prompt_lengths: per sequence how many tokens at its beginning are not scored.
            top_logprobs: number of most probable tokens per place.
            temperature: above 0. vLLM computes these log-probs at temperature 1, whatever is asked for.
            chunk_size: sequences per request; 0: all in one.
            max_concurrent_requests: requests at the same time.

        Returns:
            Per sequence and scored token: `logprobs` and `logprob_token_ids`, `top_logprobs` values each, most probable
            first (-inf and id 0 where the server tells fewer), `actual_logprobs` and `actual_token_ids`, one value each.

        Raises:
            ValueError: `temperature` is not above 0, or there is another number of lengths than of sequences.
        """
        if temperature <= 0:
            raise ValueError(f"`temperature` must be above 0 to score tokens; found {temperature}.")
        if len(sequences) != len(prompt_lengths):
            raise ValueError(f"{len(sequences)} sequences, but {len(prompt_lengths)} prompt lengths.")
        if temperature != 1.0:
            logger.warning_once(
                f"Scored at temperature {temperature}, but vLLM tells the log-probs of given tokens at temperature 1."
            )
        size = chunk_size if chunk_size > 0 else max(len(sequences), 1)
        chunks = [sequences[start : start + size] for start in range(0, len(sequences), size)]

        def ask(chunk: list[list[int]]) -> list[list[dict | None]]:
            body = {
                "model": self.model,
                "prompt": chunk,
                "max_tokens": 1,
                "temperature": temperature,
                "prompt_logprobs": top_logprobs,
            }
            return [choice["prompt_logprobs"] for choice in self._ask("POST", "/v1/completions", body)["choices"]]

        found = [places for chunk in in_parallel(ask, chunks, max_concurrent_requests) for places in chunk]
        result: dict[str, list] = {
            "logprobs": [], "logprob_token_ids": [], "actual_logprobs": [], "actual_token_ids": [],
        }  # fmt: skip
        for ids, places, start in zip(sequences, found, prompt_lengths, strict=True):
            rows = [scored_place(places[at], ids[at], top_logprobs) for at in range(start, len(ids))]
            for name, column in zip(result, zip(*rows, strict=True) if rows else [()] * 4, strict=True):
                result[name].append(list(column))
        return result

    # ---- Weights ----

    def init_communicator(self, device: torch.device | str | int = 0):
        """
        Agree with the server on how weights get to it: NCCL where both sides have CUDA, else over HTTP.

        Args:
            device: sends from this one, where it is NCCL.

        Raises:
            NotImplementedError: the server takes weights over NCCL only, and there is no CUDA device here.
            RuntimeError: the server takes no weights.
        """
        self.close_communicator()
        transport = choose_transport(self.connection, read_info(self.connection), self.owner, self.group_port)
        if isinstance(transport, NcclTransport):
            transport = NcclTransport(
                self.connection, transport.info, self.owner, self.group_port, cuda_device(device)
            )
            transport.connect()
        self._transport = transport
        atexit.register(self.close_communicator)

    @contextlib.contextmanager
    def weight_update(self) -> Iterator[None]:
        """
        All weights given inside the block are one update, made at its end; after an error in the block there is none. A
        server takes only whole updates: every weight of its model.
        """
        if self._spool is not None:
            yield
            return
        self._spool = WeightSpool()
        try:
            yield
            try:
                self._pushing().push(self._spool.manifest, self._spool.weights())
            except ServerError as error:
                if error.status != 422:
                    raise
                raise ServerError(
                    error.url,
                    error.status,
                    f"{error.text} This server takes whole updates only: give it every weight of the model within one "
                    "`with client.weight_update():`.",
                    error.kind,
                    error.details,
                ) from error
        finally:
            self._spool.close()
            self._spool = None

    def update_named_param(self, name: str, weights: Tensor):
        """
        Give the server one weight; a part of an update, see [`~VLLMClient.weight_update`].

        Args:
            name: as the model is published with.
            weights: the whole tensor.
        """
        with self.weight_update():
            self._spool.add([(name, weights)])

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named_params: Iterator[tuple[str, Tensor]]
    ):
        """
        Give the server weights as they come.

        Args:
            metadata: per weight its name, dtype and shape, in the order of `named_params`.
            named_params: names and whole tensors. Outside of [`~VLLMClient.weight_update`] they go to the server one
                after the other, without being kept.
        """
        if self._spool is not None:
            self._spool.add(named_params)
            return
        manifest = [WeightInfo(name, str(dtype).split(".")[-1], tuple(shape)) for name, dtype, shape in metadata]
        self._pushing().push(manifest, named_params)

    def update_model_params(self, model: nn.Module):
        """
        Give the server all weights of a model; adapters are merged into copies.

        Args:
            model: a model in one process, whole.
        """
        from accelerate import Accelerator

        from ..models.weight_export import iter_weights, weight_manifest

        accelerator = Accelerator()
        metadata = [(info.name, info.dtype, list(info.shape)) for info in weight_manifest(model, accelerator)]
        self.update_named_params(metadata, iter_weights(model, accelerator))

    def close_communicator(self):
        """Leave the group that weights went through. Done at the program's end too."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()
            atexit.unregister(self.close_communicator)

    # ---- Inside ----

    def _pushing(self) -> Transport:
        if self._transport is None:
            raise RuntimeError(
                "Call `init_communicator()` before weights are pushed: it agrees with the server on how."
            )
        return self._transport

    def _ask(self, method: str, path: str, body: dict | None = None) -> Any:
        # Generation has no effect on the server, so it may be asked for again.
        busy = (*BUSY, 500)
        for attempt in range(ATTEMPTS):
            try:
                answer = self.connection.request(
                    method, path, seconds=REQUEST_SECONDS, body=body, busy=busy, busy_attempts=3
                )
                return answer.json() if answer.body else None
            except ServerLost as error:
                if attempt == ATTEMPTS - 1:
                    raise
                self.connection.say_once("lost", f"{error} Asking again, {ATTEMPTS - 1} times at most.")
                time.sleep(2**attempt)

    def _served_model(self) -> str:
        models = self.connection.get("/v1/models")["data"]
        if not models:
            raise RuntimeError(f"{self.base_url} serves no model.")
        return models[0]["id"]

    def _generate_with_features(self, prompts: list, features: list[dict | None], settings: dict) -> dict:
        if len(features) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but features for {len(features)}.")

        def complete(pair: tuple[list[int], dict | None]) -> dict:
            return self._ask("POST", "/inference/v1/generate", features_request(self.model, *pair, settings))

        answers = in_parallel(complete, list(zip(prompts, features, strict=True)), 64)
        return generated(list(prompts), [choice for answer in answers for choice in answer["choices"]])

    def _render(self, images: list | None) -> dict | None:
        return render_images(lambda body: self._ask("POST", RENDER_PATH, body), self.base_url, self.model, images)
