"""
vLLM under the interface that users' rollout functions know: `trainer.vllm_generation`. What it does is an engine's,
[`~trl.rollouts.vllm_colocate.VLLMColocateEngine`] or [`~trl.rollouts.vllm_server_engine.VLLMServerEngine`].
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import nn

from ..data.template_rendering import ProcessingClass, inner_tokenizer
from .transformers_engine import stop_token_ids
from .types import Prompt, Rollout, SamplingParams
from .vllm_client import VLLMClient
from .vllm_colocate import VLLMColocateEngine
from .vllm_server_engine import VLLMServerEngine

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

Logprobs = list[list[list[float | None]]]
TokenIds = list[list[list[int]]]

# A server may take long over one request; there is no setting for it here.
REQUEST_SECONDS = 600.0


class VLLMGeneration:
    """
    Completions by vLLM, and its weights kept up with the model's.

    A trainer with `use_vllm=True` has one around its own engine, as `trainer.vllm_generation`; there the trainer has
    synced the weights before a rollout function is called.

    Args:
        model: the policy.
        accelerator: of the trainer.
        processing_class: tokenizer or processor.
        mode: `colocate`, vLLM in this process, or `server`.
        structured_outputs_regex: regular expression that completions match.
        server_base_url: the server's address; wins over host and port. Several, with commas between, share the work.
        server_host: the server's machine; 0.0.0.0 is this one.
        server_port: the server's port.
        server_timeout: seconds to wait for the server.
        group_port: port of this machine that an NCCL group for weights meets at.
        tensor_parallel_size: processes that an engine in this process is cut over.
        gpu_memory_utilization: share of the device's memory for an engine in this process.
        max_model_length: most tokens of prompt and completion. Default: the model's context.
        max_num_seqs: most completions at a time. Default: vLLM's.
        enable_sleep_mode: give back the memory of an engine in this process between generations.
        model_impl: model code, `auto`, `vllm` or `transformers`.
        trust_remote_code: run code that was published with the model.
        repetition_penalty: 1.0 changes nothing.
        temperature: divides the logits; 0 is greedy.
        top_p: smallest set of tokens with this probability; 1.0 keeps all.
        top_k: this many most probable tokens; 0 keeps all.
        min_p: least probability, as a share of the largest.
        max_completion_length: most tokens of a completion.
        logprobs: how many of the most probable tokens are told besides the sampled one, in `colocate` mode; 0: the
            sampled one alone; `None`: none.
        generation_kwargs: further settings in vLLM's words; they win.

    Attributes:
        engine: what does the work.

    Raises:
        ImportError: vLLM is not installed where it has to be.
        ValueError: an unknown mode, or settings that the engine cannot do.
        ConnectionError: a server is not up in time.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        processing_class: ProcessingClass,
        mode: str = "colocate",
        structured_outputs_regex: str | None = None,
        server_base_url: str | None = None,
        server_host: str = "0.0.0.0",
        server_port: int = 8000,
        server_timeout: float = 240.0,
        group_port: int = 51216,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_length: int | None = None,
        max_num_seqs: int | None = None,
        enable_sleep_mode: bool = False,
        model_impl: str = "auto",
        trust_remote_code: bool = False,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_completion_length: int = 16,
        logprobs: int | None = 0,
        generation_kwargs: dict | None = None,
    ):
        if mode not in ("colocate", "server"):
            raise ValueError(f'`mode` must be "colocate" or "server"; found {mode!r}.')
        sampling = SamplingParams(
            max_completion_length=max_completion_length,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            with_logps=logprobs is not None,
            generation_kwargs=generation_kwargs or {},
        )
        _check_logprobs(mode, logprobs)
        settings = {
            "pad_token_id": inner_tokenizer(processing_class).pad_token_id,
            "eos_token_ids": stop_token_ids(accelerator.unwrap_model(model), inner_tokenizer(processing_class)),
            "structured_outputs_regex": structured_outputs_regex,
            "max_model_length": max_model_length,
        }
        if mode == "server":
            urls = (server_base_url or f"http://{server_host}:{server_port}").split(",")
            engine = VLLMServerEngine(
                accelerator,
                urls=[url.strip() for url in urls if url.strip()],
                timeout=server_timeout,
                group_port=group_port,
                request_timeout=REQUEST_SECONDS,
                with_images=getattr(processing_class, "image_token_id", None) is not None,
                processing_class=processing_class,
                **settings,
            )
        else:
            engine = VLLMColocateEngine(
                model,
                accelerator,
                processing_class,
                sampling=sampling,
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                max_num_seqs=max_num_seqs,
                enable_sleep_mode=enable_sleep_mode,
                model_impl=model_impl,
                trust_remote_code=trust_remote_code,
                **settings,
            )
        self._set(engine, model, sampling, logprobs)

    @classmethod
    def around(
        cls, engine: VLLMColocateEngine | VLLMServerEngine, model: nn.Module, sampling: SamplingParams
    ) -> VLLMGeneration:
        """
        The same interface to an engine that there is already.

        Args:
            engine: of a trainer.
            model: that it samples with.
            sampling: how.
        """
        generation = cls.__new__(cls)
        generation._set(engine, model, sampling, 0 if sampling.with_logps else None)
        return generation

    def _set(self, engine: Any, model: nn.Module, sampling: SamplingParams, logprobs: int | None) -> None:
        self.engine = engine
        self.model = model
        self.accelerator = engine.accelerator
        self.mode = "colocate" if isinstance(engine, VLLMColocateEngine) else "server"
        self.sampling = sampling
        self.logprobs = logprobs
        self.structured_outputs_regex = engine.structured_outputs_regex
        self.temperature, self.repetition_penalty = sampling.temperature, sampling.repetition_penalty
        self.top_p, self.top_k, self.min_p = sampling.top_p, sampling.top_k, sampling.min_p
        self.max_completion_length = sampling.max_completion_length
        self.generation_kwargs = sampling.generation_kwargs
        self._client: VLLMClient | None = None

    @property
    def llm(self) -> LLM:
        """vLLM's engine in this process, to ask it for whatever else it can do."""
        if self.mode != "colocate":
            raise AttributeError(
                'With `vllm_mode="server"` there is no vLLM engine in this process: use `vllm_client`.'
            )
        return self.engine.llm

    @property
    def vllm_client(self) -> VLLMClient:
        """A client of the (first) server, to ask it for whatever else it can do."""
        if self.mode != "server":
            raise AttributeError('With `vllm_mode="colocate"` there is no vLLM server: use `llm`.')
        if self._client is None:
            self._client = VLLMClient(self.engine.urls[0], connection_timeout=self.engine.timeout)
        return self._client

    def sync_weights(self) -> None:
        """Give vLLM the model's weights as they are now. All processes call this together."""
        held = self.engine.model if self.engine.model is not None else self.model
        self.engine.update_weights(held)

    def generate(
        self,
        prompts: list[list[int]],
        images: list[list | None] | None,
        num_generations: int,
        profiler: contextlib.AbstractContextManager | None = None,
    ) -> tuple[list[list[int]], list[list[int]], Logprobs | None, TokenIds | None]:
        """
        A completion for each prompt. All processes call this together.

        Args:
            prompts: token ids. A prompt that is wanted several completions of is there as often.
            images: per prompt its images, or None for none at all.
            num_generations: how often a prompt is repeated, at most. Repetitions are found anyhow.
            profiler: times the call.

        Returns:
            Prompts and completions as token ids; per completion and token the log-probs told, most probable first, and
            the ids of their tokens. Those two are None where nothing was asked for, or vLLM could not tell.
        """
        rows = images if images is not None else [None] * len(prompts)
        asked = [Prompt(list(ids), own) for ids, own in zip(prompts, rows, strict=True)]
        with profiler or contextlib.nullcontext():
            if self.logprobs:
                return self._generate_with_most_probable(asked)
            rollouts = self.engine.generate(asked, self.sampling)
        prompt_ids = [rollout.prompt_ids for rollout in rollouts]
        completion_ids = [rollout.completion_ids for rollout in rollouts]
        return prompt_ids, completion_ids, *_told_of_sampled(rollouts)

    def _generate_with_most_probable(
        self, prompts: list[Prompt]
    ) -> tuple[list[list[int]], list[list[int]], Logprobs | None, TokenIds | None]:
        kwargs = {"logprobs": self.logprobs, **self.sampling.generation_kwargs}
        sampling = replace(self.sampling, generation_kwargs=kwargs)
        completions = self.engine.completion_outputs(prompts, sampling)
        ids = [list(completion.token_ids) for completion in completions]
        return [prompt.ids for prompt in prompts], ids, *_told(completions)


def _check_logprobs(mode: str, logprobs: int | None) -> None:
    if mode == "server" and logprobs:
        raise ValueError(
            f"`logprobs={logprobs}` asks for the most probable tokens besides the sampled one, which are told in "
            "`colocate` mode. With a server, set `logprobs=0` and ask `vllm_client.generate(..., logprobs=...)` for them."
        )


def _told_of_sampled(rollouts: list[Rollout]) -> tuple[Logprobs | None, TokenIds | None]:
    if any(rollout.sampled_logps is None for rollout in rollouts):
        return None, None
    logprobs = [[[None if math.isnan(value) else value] for value in rollout.sampled_logps] for rollout in rollouts]
    return logprobs, [[[token] for token in rollout.completion_ids] for rollout in rollouts]


def _told(completions: list[Any]) -> tuple[Logprobs | None, TokenIds | None]:
    logprobs, token_ids = [], []
    for completion in completions:
        if completion.logprobs is None:
            return None, None
        ranked = [sorted(position.items(), key=_rank) for position in completion.logprobs]
        logprobs.append(
            [[None if math.isnan(told.logprob) else told.logprob for _, told in place] for place in ranked]
        )
        token_ids.append([[token for token, _ in place] for place in ranked])
    return logprobs, token_ids


def _rank(item: tuple[int, Any]) -> float:
    rank = getattr(item[1], "rank", None)
    return math.inf if rank is None else rank


def extract_logprobs(all_outputs: list[RequestOutput]) -> tuple[Logprobs | None, TokenIds | None]:
    """
    What vLLM's outputs tell of log-probs.

    Args:
        all_outputs: of `vllm.LLM.generate`.

    Returns:
        Per completion and token the log-probs told, most probable first, None for one that is not a number; and the ids
        of their tokens. Both None where a completion has none.
    """
    return _told([completion for output in all_outputs for completion in output.outputs])


def empty_cache() -> None:
    """Give back the memory that torch keeps of the device for later."""
    clear_device_cache()
