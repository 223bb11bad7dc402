"""
Where an online trainer's completions come from: which engine its config asks for, how it samples, and for which rows.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from torch import nn
from transformers.utils import logging

from ..data.template_rendering import ProcessingClass, inner_tokenizer
from ..models.fused_head import cast_head_to_fp32
from ..ops.scoring import find_causal_lm
from ..rollouts.continuous_batching_engine import ContinuousBatchingEngine
from ..rollouts.conversation import Conversations
from ..rollouts.environments import EnvironmentPool
from ..rollouts.transformers_engine import TransformersEngine, context_length
from ..rollouts.types import Rollout, RolloutEngine, SamplingParams
from ..rollouts.user_rollouts import rollouts_of_user_function
from ..rollouts.vllm_adapter import require_vllm
from ..rollouts.vllm_colocate import VLLMColocateEngine
from ..rollouts.vllm_http import server_url
from ..rollouts.vllm_server_engine import VLLMServerEngine
from .online_config import _OnlineConfig

logger = logging.get_logger(__name__)

Row: TypeAlias = "dict[str, Any]"
RolloutFunc: TypeAlias = "Callable[[list[Any], Any], dict[str, Any]]"


def check_engine(args: _OnlineConfig) -> None:
    """
    Raises:
        ImportError: the config asks for vLLM, which is not installed.
        ValueError: the config asks for two engines, or for one that cannot be spread over its processes.
    """
    if not args.use_vllm:
        return
    if args.use_transformers_continuous_batching:
        raise ValueError(
            "`use_vllm=True` and `use_transformers_continuous_batching=True` are two ways to sample. Turn one off."
        )
    if args.vllm_mode == "server":
        return  # vLLM is needed where the server is
    require_vllm()
    if args.world_size % args.vllm_tensor_parallel_size:
        raise ValueError(
            f"`vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}` must divide the number of processes, "
            f'{args.world_size}: with `vllm_mode="colocate"` an engine is cut over neighbouring processes.'
        )


def make_engine(
    model: nn.Module,
    args: _OnlineConfig,
    accelerator: Accelerator,
    processing_class: ProcessingClass,
    eos_token_ids: Sequence[int],
    with_images: bool,
) -> RolloutEngine:
    """
    The engine that a config asks for.

    Args:
        model: the policy.
        args: the config.
        accelerator: of the trainer.
        processing_class: tokenizer or processor.
        eos_token_ids: tokens that end a completion.
        with_images: whether prompts have images.

    Raises:
        ValueError: the engine cannot do what is asked for.
    """
    longest = context_length(model)
    if args.max_completion_length and longest and args.max_completion_length >= longest:
        logger.warning(
            f"`max_completion_length={args.max_completion_length}`, but the model's context has {longest} tokens for prompt "
            "and completion together. Lower it, or set it to None for what there is room for."
        )
    settings = {"pad_token_id": inner_tokenizer(processing_class).pad_token_id, "eos_token_ids": eos_token_ids}
    if args.use_vllm:
        return _make_vllm_engine(model, args, accelerator, processing_class, with_images, **settings)
    settings["gather_deepspeed3_params"] = args.ds3_gather_for_generation
    if args.use_transformers_continuous_batching:
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        keeps_head = getattr(args, "cast_lm_head_to_fp32", False)
        return ContinuousBatchingEngine(
            model,
            accelerator,
            config=args.transformers_continuous_batching_config,
            dtype=dtype,
            keep_in_fp32=[find_causal_lm(model).get_output_embeddings()] if keeps_head else (),
            is_vision_model=with_images,
            **settings,
        )
    image_token_id = getattr(processing_class, "image_token_id", None)
    return TransformersEngine(
        model,
        accelerator,
        cache_implementation=args.cache_implementation,
        # The policy must not write a placeholder for an image that is not there.
        suppress_tokens=[image_token_id] if image_token_id is not None else (),
        **settings,
    )


def _make_vllm_engine(
    model: nn.Module,
    args: _OnlineConfig,
    accelerator: Accelerator,
    processing_class: ProcessingClass,
    with_images: bool,
    **settings: Any,
) -> RolloutEngine:
    settings.update(verify=args.vllm_verify, structured_outputs_regex=args.vllm_structured_outputs_regex)
    if args.vllm_mode == "server":
        given = args.vllm_server_base_url or server_url(None, args.vllm_server_host, args.vllm_server_port)
        urls = [url.strip() for url in given.split(",") if url.strip()]
        return VLLMServerEngine(
            accelerator,
            urls=urls,
            timeout=args.vllm_server_timeout,
            request_timeout=args.vllm_request_timeout,
            group_port=args.vllm_group_port,
            max_model_length=args.vllm_max_model_length,
            processing_class=processing_class,
            with_images=with_images,
            **settings,
        )
    return VLLMColocateEngine(
        model,
        accelerator,
        processing_class,
        sampling=sampling_params(args),
        dtype=getattr(torch, args.vllm_dtype) if args.vllm_dtype else None,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=args.vllm_max_model_length,
        max_num_seqs=args.per_device_train_batch_size * args.vllm_tensor_parallel_size * args.steps_per_generation,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        model_impl=args.vllm_model_impl,
        trust_remote_code=bool((args.model_init_kwargs or {}).get("trust_remote_code")),
        **settings,
    )


def cast_head(model: nn.Module) -> None:
    """`cast_lm_head_to_fp32`: the output head in float32."""
    cast_head_to_fp32(find_causal_lm(model))


def sampling_params(args: _OnlineConfig, evaluation_seed: int | None = None) -> SamplingParams:
    """
    How completions are sampled.

    Args:
        args: the config.
        evaluation_seed: sample for an evaluation, with random numbers of its own: two evaluations differ by the policy
            alone, and training goes on as if there had been none.
    """
    temperature = args.temperature
    if evaluation_seed is not None and args.eval_temperature is not None:
        temperature = args.eval_temperature
    return SamplingParams(
        max_completion_length=args.max_completion_length,
        temperature=temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=evaluation_seed,
        # Transformers samples with the trained model itself: there is nothing to compare.
        with_logps=args.use_vllm and temperature == args.temperature,
        generation_kwargs=args.generation_kwargs or {},
    )


def make_environments(environment_factory: Any) -> EnvironmentPool | None:
    """The environments, with a warning that their interface may change."""
    if environment_factory is None:
        return None
    warn_experimental("environment_factory")
    return EnvironmentPool(environment_factory)


def warn_experimental(name: str) -> None:
    """Warn that an argument's interface may change, unless `TRL_EXPERIMENTAL_SILENCE` is set."""
    if not os.environ.get("TRL_EXPERIMENTAL_SILENCE"):
        warnings.warn(
            f"`{name}` is experimental: its interface may change in any release. TRL_EXPERIMENTAL_SILENCE=1 silences "
            "this warning.",
            UserWarning,
            stacklevel=3,
        )


class RolloutMaker:
    """
    Turns rows of the dataset into rollouts of the policy as it is now.

    Args:
        conversations: engine, tools and environments.
        rollout_func: a function of the user's in their place.
        trainer: what that function is called with.
    """

    def __init__(self, conversations: Conversations, rollout_func: RolloutFunc | None, trainer: Any):
        self.conversations = conversations
        self.rollout_func = rollout_func
        self._trainer = trainer
        self._loaded: tuple[int, int] | None = None

    @property
    def engine(self) -> RolloutEngine:
        return self.conversations.engine

    def generate(self, model: nn.Module, rows: Sequence[Row], sampling: SamplingParams) -> list[Rollout]:
        """
        A rollout for each row.

        Args:
            model: the policy as it is trained.
            rows: of the dataset, not changed.
            sampling: how.
        """
        # The weights change with the optimizer's steps; between them the engine has them already.
        newest = (self._trainer.state.global_step, id(model))
        if newest != self._loaded:
            self.engine.update_weights(model)
            self._loaded = newest
        self.engine.wake()
        rollouts = self._generate(rows, sampling)
        self.engine.sleep()
        return rollouts

    def _generate(self, rows: Sequence[Row], sampling: SamplingParams) -> list[Rollout]:
        if self.rollout_func is None:
            return self.conversations.generate(rows, sampling)
        prompts = [row.get("prompt") for row in rows]
        return rollouts_of_user_function(
            self.rollout_func(prompts, self._trainer),
            prompts,
            self.conversations.processing_class,
            self.conversations.eos_token_ids,
        )

    def close(self) -> None:
        """End the engine and the tools' threads."""
        self.conversations.close()
        self.engine.close()


def check_not_empty(rollouts: Sequence[Rollout], accelerator: Accelerator) -> None:
    """
    Refuse a generation in which there is nothing to learn from. All processes call this together.

    Raises:
        RuntimeError: no process got a single token.
    """
    tokens = torch.tensor(sum(len(rollout.completion_ids) for rollout in rollouts), device=accelerator.device)
    if not accelerator.reduce(tokens, reduction="sum"):
        errors = [rollout.error for rollout in rollouts if rollout.error]
        raise RuntimeError(
            "All completions are empty, so there is nothing to learn from. "
            + (f"The first sample says: {errors[0]}." if errors else "Check the engine and the stop tokens.")
        )
