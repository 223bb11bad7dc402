"""
Sampling with vLLM servers of their own: the policy's copy is on other devices, and the trainer only talks to it.

The main process alone talks. Prompts of all processes are gathered to it, neighbours with one prompt are one request, and
each process gets its part back. Every reply names the version of the weights that it was made with, so nothing sampled
from other weights is ever taken for the policy's. A server that goes away in the middle is waited for, gets its weights
again where it was restarted, and is asked only for what is missing; every wait has a limit.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from packaging.version import InvalidVersion, Version
from torch import nn
from transformers.utils import logging

from ..models.weight_export import base_model_of, iter_weights, weight_manifest
from .transformers_engine import cut_after_eos
from .types import Prompt, Rollout, SamplingParams, as_prompts, is_truncated
from .vllm_adapter import TESTED_VERSIONS
from .vllm_colocate import compute_dtype
from .vllm_http import ServerError, ServerLost, in_parallel, server_url
from .vllm_requests import CompletionRequest, Server, StaleWeights, plan_requests
from .vllm_sampling import LEAST_BIAS, draw_seed, is_greedy, logps_mode, request_settings
from .vllm_transport import new_owner
from .weight_probe import VERIFY_LEVELS, VerifyLevel, make_probe, verify_weights

logger = logging.get_logger(__name__)

REQUESTS_IN_FLIGHT = 64
REQUEST_ATTEMPTS = 4
RESTARTS = 3
PUSHES = 3


class ServerRestarted(RuntimeError):
    """A server is there again, without the policy's weights."""


class VLLMServerEngine:
    """
    A [`~trl.rollouts.types.RolloutEngine`] on one or more servers, each started by `trl vllm-serve`.

    Args:
        accelerator: the trainer's accelerator.
        urls: the servers' addresses. Requests are spread over them in proportion to their number of workers.
        timeout: seconds that a server may take to be up, at the beginning and after it went away.
        group_port: port of this machine where an NCCL group for weights meets; further servers take the next ones.
        eos_token_ids: tokens that end a completion; the token itself is kept.
        pad_token_id: of the tokenizer.
        max_model_length: most tokens of prompt and completion. Default: what the servers take.
        structured_outputs_regex: regular expression that completions match.
        request_timeout: seconds that one request may take, repetitions at a busy server included.
        verify: how to check the weights after an update: `off`, `probe`, or `full`, layer by layer.
        with_images: whether prompts may have images.
        processing_class: the processor, where they may.

    Raises:
        ConnectionError: a server is not up in time.
        RuntimeError: a server refuses, such as for a missing key, or serves another model than the others.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        urls: list[str],
        timeout: float,
        group_port: int,
        eos_token_ids: Iterable[int],
        pad_token_id: int | None,
        max_model_length: int | None = None,
        structured_outputs_regex: str | None = None,
        request_timeout: float,
        verify: VerifyLevel = "probe",
        with_images: bool = False,
        processing_class: Any = None,
    ):
        if not urls:
            raise ValueError("A server engine needs the address of at least one server.")
        if verify not in VERIFY_LEVELS:
            raise ValueError(f"`verify` must be one of {', '.join(VERIFY_LEVELS)}; found {verify!r}.")
        self.accelerator = accelerator
        self.timeout = timeout
        self.request_timeout = request_timeout
        self.eos_token_ids = list(dict.fromkeys(eos_token_ids))
        self.pad_token_id = pad_token_id
        self.structured_outputs_regex = structured_outputs_regex
        self.verify = verify
        self.image_token_id = getattr(processing_class, "image_token_id", None) if with_images else None
        if with_images and self.image_token_id is None:
            raise ValueError(
                f"Prompts may have images, but {type(processing_class).__name__} names no `image_token_id`."
            )
        self.model: nn.Module | None = None
        self.owner = new_owner()
        self._servers = [
            Server(server_url(url, "", 0), self.owner, group_port + index, request_timeout, self.image_token_id)
            for index, url in enumerate(urls)
        ]
        self.max_model_length = self._on_main(lambda: self._connect(max_model_length))

    @property
    def urls(self) -> list[str]:
        """The servers' addresses."""
        return [server.url for server in self._servers]

    # ---- RolloutEngine ----

    def generate(self, prompts: Sequence[Prompt | Sequence[int]], sampling: SamplingParams) -> list[Rollout]:
        """
        Sample completions.

        Args:
            prompts: token ids, or [`~trl.rollouts.types.Prompt`] objects.
            sampling: how.

        Returns:
            `sampling.n` rollouts per prompt, those of one prompt side by side.

        Raises:
            ValueError: a prompt leaves no room for a completion.
            ConnectionError: a server went away and was not back in time.
            RuntimeError: a server refused, belongs to another trainer, or broke again and again.
        """
        own = as_prompts(prompts)
        gathered = gather_object([[(prompt.ids, prompt.images) for prompt in own]])
        requests: list[CompletionRequest] = []
        self._on_main(lambda: requests.extend(self._plan(list(chain(*gathered)), sampling)))
        for _ in range(RESTARTS):
            try:
                self._on_main(lambda: self._complete(requests))
                break
            except ServerRestarted:
                for index in self._on_main(self._stale_servers):
                    self._push(index)
        else:
            raise RuntimeError(
                f"A vLLM server was restarted {RESTARTS} times during one generation. See its log: it may run out of "
                "memory (fewer or shorter completions at a time, a smaller --gpu-memory-utilization)."
            )
        answers = self._on_main(lambda: [answer for request in requests for answer in request.answers])
        first = sum(len(part) for part in gathered[: self.accelerator.process_index]) * sampling.n
        rows = [prompt for prompt in own for _ in range(sampling.n)]
        return [self._rollout(prompt, *answers[first + index]) for index, prompt in enumerate(rows)]

    def update_weights(self, model: nn.Module) -> None:
        """From now on sample with the weights of `model`; raises a RuntimeError where they do not arrive."""
        self.model = model
        for index in range(len(self._servers)):
            self._push(index)

    def sleep(self) -> None:
        """The servers' memory is their own."""

    def wake(self) -> None:
        """Always ready."""

    def close(self) -> None:
        """Leave the servers' weight groups and close the connections; the servers go on."""
        if self.accelerator.is_main_process:
            for server in self._servers:
                server.close()

    # ---- All processes together ----

    def _on_main(self, function: Callable[[], Any]) -> Any:
        """What a function returns on the main process, on all of them; what it raises there, they all raise."""
        value, error = None, None
        if self.accelerator.is_main_process:
            try:
                value = function()
            except Exception as caught:
                error = caught
        if self.accelerator.num_processes > 1:
            described = (type(error).__name__, str(error)) if error is not None else None
            value, described = broadcast_object_list([value, described])
            if described is not None and error is None:
                name, message = described
                kind = {"ServerLost": ServerLost, "ServerRestarted": ServerRestarted}.get(name, RuntimeError)
                raise kind(f"The main process ended with {name}: {message}")
        if error is not None:
            raise error
        return value

    def _push(self, index: int) -> None:
        """Give a server the weights, and have it prove that it has them; again where it goes away on the way."""
        for attempt in range(1, PUSHES + 1):
            try:
                self._on_main(lambda: self._check_owner(index))
                self._send(index)
                self._check_weights(index)
                return
            except ServerLost as error:
                if attempt == PUSHES:
                    raise RuntimeError(
                        f"The weights did not get to the vLLM server {self._servers[index].url} in {PUSHES} attempts, "
                        f"each after waiting for it to be up (up to {self.timeout:.0f} s). See its log. Last: {error}"
                    ) from error
                if self.accelerator.is_main_process:
                    logger.warning(f"{error} Pushing the weights again once the server is up.")

    def _send(self, index: int) -> None:
        manifest = weight_manifest(self.model, self.accelerator)
        weights = iter_weights(self.model, self.accelerator)
        error = None
        try:
            if self.accelerator.is_main_process:
                self._servers[index].push(manifest, weights)
        except Exception as caught:
            error = caught
        try:
            for _ in weights:  # to the end, also after an error: what is sharded is gathered by all
                pass
        except Exception as caught:
            error = error or caught

        def end() -> None:
            if error is not None:
                raise error

        self._on_main(end)
        end()

    def _check_weights(self, index: int) -> None:
        if self.verify == "off":
            return
        server = self._servers[index]
        inner = base_model_of(self.accelerator.unwrap_model(self.model))
        own = compute_dtype(inner, self.accelerator)
        said = self._on_main(lambda: server.info.dtype)
        special = [] if self.image_token_id is None else [self.image_token_id]
        dtypes = [own, getattr(torch, said or "", torch.bfloat16)]
        verify_weights(
            self.model,
            self.accelerator,
            make_probe(inner, dtypes, special, longest=self.max_model_length),
            lambda sequences: self._on_main(lambda: self._score(server, sequences)),
            lambda: self._send(index),
            f"The vLLM server {server.url}",
            (lambda: self._on_main(server.fingerprints)) if self.verify == "full" else None,
        )

    # ---- On the main process: the servers ----

    def _connect(self, max_model_length: int | None) -> int | None:
        limits = [max_model_length] if max_model_length else []
        for server in self._servers:
            info = server.ready(self.timeout)
            limits += [info.max_model_len] if info.max_model_len else []
            _check_version(server.url, info.vllm_version)
            if info.owner is not None:
                logger.warning(
                    f"{server.url} was used before by {info.owner} (host:process:id). If that trainer still runs, both "
                    "will end with an error: give each a server of its own."
                )
        models = {server.url: server.info.model for server in self._servers}
        if len(set(models.values())) > 1:
            raise RuntimeError(f"The servers do not serve the same model: {models}.")
        return min(limits, default=None)

    def _check_owner(self, index: int) -> None:
        """Before weights are pushed: the server is up, and no other trainer has taken it since the last time."""
        server = self._servers[index]
        known, pushed = server.info, server.has_pushed
        info = server.ready(self.timeout)
        if pushed and info.instance == known.instance and info.owner not in (None, self.owner):
            raise server.another_trainer()

    def _score(self, server: Server, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        try:
            return server.score(sequences)
        except StaleWeights as error:
            self._return(server)
            raise ServerLost(f"{error} It lost the weights while they were checked.") from error

    def _stale_servers(self) -> list[int]:
        return [index for index, server in enumerate(self._servers) if server.is_stale]

    def _return(self, server: Server) -> None:
        """
        Wait for a server that went away, or answered for other weights.

        Raises:
            ServerRestarted: it lacks the policy's weights now.
        """
        start = time.monotonic()
        before = server.version
        info = server.ready(self.timeout)
        waited = time.monotonic() - start
        if not info.is_stock and info.weights == before and info.healthy:
            return
        if info.weights != before and info.owner != self.owner and (before or "").startswith(f"{info.instance}:"):
            raise server.another_trainer()
        if self.model is None:
            return  # nothing was ever pushed: it has what it loaded from disk, as before
        server.is_stale = True
        logger.warning(f"{server.url} is up again after {waited:.0f} s, without this run's weights.")

    # ---- On the main process: generation ----

    def _plan(self, prompts: list[tuple[list[int], list | None]], sampling: SamplingParams) -> list[CompletionRequest]:
        """One request for each run of equal prompts, with its seed and its server."""
        grouped = (list(run) for _, run in groupby(prompts, key=lambda prompt: (prompt[0], id(prompt[1]))))
        runs = [(run[0], len(run)) for run in grouped]
        settings = request_settings(
            sampling,
            stop_token_ids=self.eos_token_ids,
            structured_outputs_regex=self.structured_outputs_regex,
        )
        seed = draw_seed() if sampling.seed is None else sampling.seed
        rescore, tells = self._logps_source(settings, sampling, any(images for (_, images), _ in runs))
        if not tells:
            settings["logprobs"] = None
        if self.image_token_id is not None:  # the policy must not write a placeholder for an image that is not there
            suppressed = {str(self.image_token_id): LEAST_BIAS}
            settings["logit_bias"] = {**(settings.get("logit_bias") or {}), **suppressed}
        return plan_requests(
            runs,
            settings,
            n=sampling.n,
            seed=seed,
            max_model_length=self.max_model_length,
            rescore=rescore,
            shares=[server.info.world_size for server in self._servers],
        )

    def _logps_source(self, settings: dict, sampling: SamplingParams, has_images: bool) -> tuple[bool, bool]:
        """Whether log-probs come from scoring what was sampled, and whether there are any that the loss can use."""
        if not sampling.with_logps or is_greedy(settings):
            return False, True
        wanted = logps_mode(settings)
        modes = {server.info.logprobs_mode or "raw_logprobs" for server in self._servers}
        # What a grammar forbids is gone before vLLM takes even raw log-probs.
        is_told = settings.get("structured_outputs") is None
        if modes == {wanted} and is_told and (wanted == "processed_logprobs" or settings["temperature"] == 1):
            return False, True
        if wanted == "processed_logprobs":
            if settings["temperature"] != 1:
                self._warn(
                    f"The server tells {', '.join(sorted(modes))}: log-probs at temperature 1, while tokens are sampled "
                    f"at {settings['temperature']:g}. A correction by them is biased. Start it by `trl vllm-serve`, or "
                    "with --logprobs-mode processed_logprobs."
                )
            return False, True
        if settings["temperature"] == 1 and not has_images:
            return True, True
        self._warn(
            "Not every token is sampled with its own probability (top-p, top-k, min-p, a penalty, structured outputs or "
            f"the like), at temperature {settings['temperature']:g}. A server cannot tell the log-probs over the whole "
            "vocabulary at that temperature, so there is no correction for the engine's differences, and no measure of "
            "them. Sample text at temperature 1, or without these settings."
        )
        return False, False

    def _warn(self, message: str) -> None:
        warnings.warn(message, stacklevel=2)

    def _complete(self, requests: list[CompletionRequest]) -> None:
        """Have every request answered."""
        while missing := [request for request in requests if request.answers is None]:
            try:
                in_parallel(
                    self._answer,
                    missing,
                    REQUESTS_IN_FLIGHT * len(self._servers),
                    settle_on=(ServerLost, StaleWeights),
                )
            except (ServerLost, StaleWeights) as error:
                logger.warning(f"{error} {sum(request.answers is None for request in requests)} of {len(requests)} "
                               f"requests are missing; waiting for the server for up to {self.timeout:.0f} s.")  # fmt: skip
                self._recover(missing, error)
        for server in self._servers:
            server.connection.forget_causes()

    def _recover(self, missing: list[CompletionRequest], error: Exception) -> None:
        attempts = max(request.attempts for request in missing if request.answers is None)
        if attempts >= REQUEST_ATTEMPTS:
            worst = max((request for request in missing if request.answers is None), key=lambda one: one.attempts)
            raise RuntimeError(
                f"{self._servers[worst.server].url} broke off the same request {attempts} times (a prompt of "
                f"{len(worst.prompt_ids)} tokens, {worst.body_settings['n']} completions of at most "
                f"{worst.body_settings['max_tokens']} tokens). See the server's log. Last: {error}"
            ) from error
        time.sleep(min(2.0 ** (attempts - 1), 8.0))  # a server that is about to end still says that it is healthy
        for index in {request.server for request in missing if request.answers is None}:
            self._return(self._servers[index])
        if self._stale_servers():
            raise ServerRestarted("a server was restarted")

    def _answer(self, request: CompletionRequest) -> None:
        request.attempts += 1
        try:
            request.answers = self._servers[request.server].complete(request)
        except ServerError as error:
            if error.status == 400:
                raise RuntimeError(
                    f"{error} (the prompt has {len(request.prompt_ids)} tokens, the completion may have "
                    f"{request.body_settings['max_tokens']}, the server takes {self.max_model_length} together)"
                ) from error
            raise

    def _rollout(self, prompt: Prompt, completion: list[int], logps: list[float] | None) -> Rollout:
        ids = cut_after_eos(completion, self.eos_token_ids)
        return Rollout(
            prompt.ids,
            ids,
            sampled_logps=logps[: len(ids)] if logps is not None else None,
            images=prompt.images,
            is_truncated=is_truncated(ids, [*self.eos_token_ids, self.pad_token_id]),
        )


def _check_version(url: str, found: str | None) -> None:
    """Warn where a server's vLLM is not one that this client was tested with."""
    try:
        release = Version(found or "").release[:2]
    except InvalidVersion:
        return  # a build of its own
    lowest, highest = (Version(version).release[:2] for version in TESTED_VERSIONS)
    if not lowest <= release <= highest:
        warnings.warn(
            f"{url} runs vLLM {found}; this client is tested with {TESTED_VERSIONS[0]} to {TESTED_VERSIONS[1]}."
        )
