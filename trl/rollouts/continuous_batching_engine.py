"""
Sampling with Transformers' continuous batching: paged key/value cache, shared beginnings, and a row that has ended
makes room for the next. Worth it where completions differ much in length; text only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.generation import ContinuousBatchingConfig

from .transformers_engine import TransformersEngine, forked_generators, make_generation_config, room_for_completion
from .types import Prompt, Rollout, SamplingParams, as_prompts

DEFAULT_MEMORY_SHARE = 0.5
"""Of the free memory, for the cache: the optimizer's states and the activations of the learn phase need theirs."""


class ContinuousBatchingEngine(TransformersEngine):
    """
    A [`~trl.rollouts.types.RolloutEngine`] on `model.generate_batch`.

    Args:
        model: see [`~trl.rollouts.transformers_engine.TransformersEngine`]; so are the arguments not listed here.
        accelerator: the trainer's accelerator.
        config: settings of `ContinuousBatchingConfig`. Default: half of the free memory for the cache, and a seed from
            torch's generator, so that equal generator states give equal completions.
        dtype: the weights are in this type while sampling (the paged cache wants one type throughout), and afterwards
            what they were, bit by bit. Default: as they are.
        keep_in_fp32: modules that are left in their type, such as a language-modeling head in float32.
        is_vision_model: whether the model reads images, which continuous batching cannot.

    Raises:
        ValueError: for a model that reads images, or an unknown setting.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        config: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        keep_in_fp32: Iterable[nn.Module] = (),
        is_vision_model: bool = False,
        **options: Any,
    ):
        if is_vision_model:
            raise ValueError(
                "Continuous batching of Transformers generates from text only, and this model reads images. Set "
                "`use_transformers_continuous_batching=False`."
            )
        super().__init__(model, accelerator, **options)
        self.config = {"max_memory_percent": DEFAULT_MEMORY_SHARE, **(config or {})}
        self.dtype = dtype
        self.keep_in_fp32 = list(keep_in_fp32)
        try:
            ContinuousBatchingConfig(**self.config)
        except TypeError as error:
            raise ValueError(
                f"`transformers_continuous_batching_config` has a setting that `ContinuousBatchingConfig` of "
                f"Transformers does not know: {error}. Found {', '.join(self.config)}."
            ) from error

    def generate(self, prompts: Sequence[Prompt | Sequence[int]], sampling: SamplingParams) -> list[Rollout]:
        """See [`~trl.rollouts.transformers_engine.TransformersEngine.generate`]; a request that fails has an `error`."""
        rows = as_prompts(prompts)
        if any(prompt.images or prompt.model_inputs for prompt in rows):
            raise ValueError("Continuous batching of Transformers generates from text only; a prompt has images.")
        rows = [prompt for prompt in rows for _ in range(sampling.n)]
        with self._ready_model() as model, weights_in(model, self.dtype, self.keep_in_fp32):
            if not rows:
                return []
            batching = self._batching_config(sampling)
            # It seeds the process's generator with the seed it is given, which training goes on with.
            with forked_generators(model):
                outputs = model.generate_batch(
                    [prompt.ids for prompt in rows],
                    generation_config=self._batch_generation_config(rows, sampling),
                    continuous_batching_config=batching,
                    progress_bar=False,
                )
        results = list(outputs.values())
        if len(results) != len(rows):
            raise RuntimeError(
                f"Continuous batching returned {len(results)} of {len(rows)} completions: its generation thread ended "
                "early. Its log says why; often the cache does not fit in memory, then set `max_memory_percent` in "
                "`transformers_continuous_batching_config` lower."
            )
        return [self._checked(prompt, result, sampling) for prompt, result in zip(rows, results, strict=True)]

    def _batch_generation_config(self, rows: list[Prompt], sampling: SamplingParams):
        longest = max(len(prompt.ids) for prompt in rows)
        return make_generation_config(
            sampling,
            max_new_tokens=room_for_completion(longest, sampling, self.max_model_length),
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_ids,
        )

    def _batching_config(self, sampling: SamplingParams) -> ContinuousBatchingConfig:
        seed = sampling.seed if sampling.seed is not None else int(torch.randint(2**31, ()).item())
        settings = {"seed": seed, "return_logprobs": sampling.with_logps, **self.config}
        return ContinuousBatchingConfig(**settings)

    def _checked(self, prompt: Prompt, result: Any, sampling: SamplingParams) -> Rollout:
        logps = list(result.logprobs) if sampling.with_logps else None
        rollout = self._rollout(prompt, list(result.generated_tokens), logps)
        if result.error is None:
            return rollout
        return Rollout(prompt.ids, rollout.completion_ids, error=str(result.error), is_truncated=True)


@contextlib.contextmanager
def weights_in(model: nn.Module, dtype: torch.dtype | None, keep: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Weights in `dtype` inside the block, and the very same as before after it; buffers (rotary tables) stay."""
    kept = {id(parameter) for module in keep for parameter in module.parameters()}
    before = []
    try:
        for parameter in model.parameters() if dtype is not None else ():
            if parameter.is_floating_point() and parameter.dtype != dtype and id(parameter) not in kept:
                before.append((parameter, parameter.data))
                parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
