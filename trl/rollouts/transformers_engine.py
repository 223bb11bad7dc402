"""
Sampling with the model that is being trained, by Transformers' own `generate`.

No second copy of the weights and nothing to keep in step: what the optimizer wrote last is what samples next. Prompts
are padded on the left, so that all rows go on from the same column; one that several rows have goes through the model
once. `continuous_batching_engine` is the other way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from ..distributed import DistributedBackend
from ..models.generation import unwrap_model_for_generation
from .image_prompts import collate_model_inputs
from .sampled_logps import SampledLogps
from .shared_prefill import shared_prefill
from .types import Prompt, Rollout, SamplingParams, as_prompts, is_truncated

# Settings of a model's own generation config that change what is sampled. Only what the user asked for may: the loss
# takes the policy for the distribution that was drawn from.
NEUTRAL_GENERATION = {
    "do_sample": None,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "typical_p": None,
    "epsilon_cutoff": None,
    "eta_cutoff": None,
    "repetition_penalty": None,
    "no_repeat_ngram_size": None,
    "max_length": None,
    "max_new_tokens": None,
    "min_length": None,
    "min_new_tokens": None,
    "num_beams": None,
    "num_return_sequences": None,
}


class TransformersEngine:
    """
    A [`~trl.rollouts.types.RolloutEngine`] on `model.generate`.

    The model samples in evaluation mode, without gradient checkpointing and with its key/value cache; afterwards every
    module is in the mode it was in. Random numbers come from torch's global generator, so equal generator states give
    equal completions.

    Args:
        model: the model as the trainer holds it (wrapped or not, with adapters or not).
        accelerator: the trainer's accelerator.
        pad_token_id: fills prompts up on the left.
        eos_token_ids: tokens that end a completion; the token itself is kept.
        gather_deepspeed3_params: under ZeRO-3, gather all parameters once instead of for every token; needs room for
            the whole model on each device.
        max_batch_rows: most rows that are generated at once, prompts of like length together. Default: all.
        suppress_tokens: tokens that are never sampled, such as an image placeholder.
        cache_implementation: kind of key/value cache, see `GenerationConfig`.
        max_model_length: most tokens of prompt and completion. Default: the model's `max_position_embeddings`.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        pad_token_id: int,
        eos_token_ids: Iterable[int],
        gather_deepspeed3_params: bool = True,
        max_batch_rows: int | None = None,
        suppress_tokens: Iterable[int] = (),
        cache_implementation: str | None = None,
        max_model_length: int | None = None,
    ):
        self.model = model
        self.accelerator = accelerator
        self.pad_token_id = pad_token_id
        self.eos_token_ids = list(dict.fromkeys(eos_token_ids))
        self.gather_deepspeed3_params = gather_deepspeed3_params
        self.max_batch_rows = max_batch_rows
        self.suppress_tokens = list(suppress_tokens)
        self.cache_implementation = cache_implementation
        self.max_model_length = max_model_length or context_length(accelerator.unwrap_model(model))
        self._backend = DistributedBackend(accelerator)

    # ---- The protocol ----

    def generate(self, prompts: Sequence[Prompt | Sequence[int]], sampling: SamplingParams) -> list[Rollout]:
        """
        Sample completions.

        Args:
            prompts: token ids, or [`~trl.rollouts.types.Prompt`] objects.
            sampling: how.

        Returns:
            `sampling.n` rollouts per prompt, those of one prompt side by side.
        """
        rows = [prompt for prompt in as_prompts(prompts) for _ in range(sampling.n)]
        rollouts: dict[int, Rollout] = {}
        # The precision of training, for adapters too, whose `generate` goes past the forward that training wraps; and one
        # autocast around all tokens casts the weights once, rather than for each token anew.
        with self._ready_model() as model, seeded(sampling.seed, model), self.accelerator.autocast():
            for indices in self._batches(rows):
                batch = [rows[index] for index in indices]
                rollouts.update(zip(indices, self._generate_batch(model, batch, sampling), strict=True))
        return [rollouts[index] for index in range(len(rows))]

    def update_weights(self, model: nn.Module) -> None:
        """Sample with `model` from now on; its weights are read where they are."""
        self.model = model

    def sleep(self) -> None:
        """Nothing is held between two calls."""

    def wake(self) -> None:
        """Always ready."""

    def close(self) -> None:
        """Nothing to end."""

    # ---- Inside ----

    @contextlib.contextmanager
    def _ready_model(self) -> Iterator[nn.Module]:
        with (
            unwrap_model_for_generation(
                self.model, self.accelerator, self.gather_deepspeed3_params, NEUTRAL_GENERATION
            ) as model,
            self._backend.summon_full_params(self.model, recurse=False),
            evaluation_mode(model),
            torch.no_grad(),
        ):
            yield model

    @property
    def _forwards_together(self) -> bool:
        """Whether a forward needs all processes: parameters are sharded, and not gathered as a whole."""
        if self.accelerator.num_processes == 1:
            return False
        return self._backend.is_fsdp or (self._backend.is_zero3 and not self.gather_deepspeed3_params)

    def _batches(self, rows: list[Prompt]) -> list[list[int]]:
        """Which rows go together. Where forwards need all processes, each has one batch, whatever its number of rows."""
        if self._forwards_together or self.max_batch_rows is None or len(rows) <= self.max_batch_rows:
            return [list(range(len(rows)))] if rows or self._forwards_together else []
        by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        return [by_length[start : start + self.max_batch_rows] for start in range(0, len(rows), self.max_batch_rows)]

    def _generate_batch(self, model: nn.Module, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        # A process without rows takes part in the others' forwards with a row of its own that nobody reads.
        inputs = self._inputs(prompts or [Prompt([self.pad_token_id])], model.device)
        config = self._generation_config(inputs["input_ids"].shape[1], sampling)
        logps = SampledLogps()
        if sampling.with_logps:
            config.update(return_dict_in_generate=True, output_scores=True)
        if not (self._forwards_together or self.cache_implementation):
            own = [*sampling.generation_kwargs]
            cache = shared_prefill(model, inputs, [prompt.ids for prompt in prompts], own)
            inputs.update({"past_key_values": cache} if cache is not None else {})
        output = model.generate(
            **inputs,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([logps] if sampling.with_logps else []),
            synced_gpus=self._forwards_together,
        )
        sequences = output.sequences if sampling.with_logps else output
        completions = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        logps_per_row = logps.stacked().tolist() if sampling.with_logps else [None] * len(completions)
        return [
            self._rollout(prompt, completion, row_logps)
            for prompt, completion, row_logps in zip(prompts, completions, logps_per_row, strict=False)
        ]

    def _inputs(self, prompts: list[Prompt], device: torch.device) -> dict[str, Tensor]:
        width = max(len(prompt.ids) for prompt in prompts)
        ids = [[self.pad_token_id] * (width - len(prompt.ids)) + prompt.ids for prompt in prompts]
        mask = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        inputs.update(
            collate_model_inputs([prompt.model_inputs for prompt in prompts], [len(prompt.ids) for prompt in prompts])
        )
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def _generation_config(self, prompt_length: int, sampling: SamplingParams) -> GenerationConfig:
        return make_generation_config(
            sampling,
            max_new_tokens=room_for_completion(prompt_length, sampling, self.max_model_length),
            pad_token_id=self.pad_token_id,
            eos_token_id=self.eos_token_ids,
            suppress_tokens=self.suppress_tokens or None,
            cache_implementation=self.cache_implementation,
        )

    def _rollout(self, prompt: Prompt, completion: list[int], logps: list[float] | None) -> Rollout:
        completion = cut_after_eos(completion, self.eos_token_ids)
        return Rollout(
            prompt.ids,
            completion,
            sampled_logps=logps[: len(completion)] if logps is not None else None,
            images=prompt.images,
            is_truncated=is_truncated(completion, [*self.eos_token_ids, self.pad_token_id]),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that both engines on Transformers use
# ---------------------------------------------------------------------------------------------------------------------


def make_generation_config(sampling: SamplingParams, **settings: Any) -> GenerationConfig:
    """Sampling parameters in Transformers' words; the user's `generation_kwargs` win."""
    if sampling.temperature == 0:
        drawing: dict[str, Any] = {"do_sample": False}
    else:
        drawing = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
        }
    values = {**drawing, "repetition_penalty": sampling.repetition_penalty, "disable_compile": True, **settings}
    return GenerationConfig(**{**values, **sampling.generation_kwargs})


def room_for_completion(prompt_length: int, sampling: SamplingParams, max_model_length: int | None) -> int:
    """
    How many tokens may be generated after a prompt.

    Raises:
        ValueError: no length is asked for and the context's is not known, or the prompt fills it.
    """
    if sampling.max_completion_length is not None:
        return sampling.max_completion_length
    if max_model_length is None:
        raise ValueError(
            "`max_completion_length=None` generates up to the end of the model's context, but the model's config does "
            "not say how long that is (`max_position_embeddings`). Set `max_completion_length`."
        )
    if prompt_length >= max_model_length:
        raise ValueError(
            f"A prompt of {prompt_length} tokens leaves no room for a completion in a context of {max_model_length} "
            "tokens. Prompts are never cut: filter the dataset by prompt length."
        )
    return max_model_length - prompt_length


def cut_after_eos(ids: list[int], eos_token_ids: Iterable[int]) -> list[int]:
    """Everything up to the first end-of-sequence token, which is kept: it is trained too."""
    stops = set(eos_token_ids)
    for index, token in enumerate(ids):
        if token in stops:
            return ids[: index + 1]
    return ids


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion: those of the model's generation config, and the tokenizer's, in front if it is new."""
    config = getattr(model, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    ids = [] if given is None else [given] if isinstance(given, int) else list(given)
    own = tokenizer.eos_token_id
    return ids if own is None or own in ids else [own, *ids]


def context_length(model: nn.Module) -> int | None:
    """Most positions the model has, by its config; `None` where the config does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "max_position_embeddings", None)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def seeded(seed: int | None, model: nn.Module) -> Iterator[None]:
    """Inside the block torch's generators start from `seed`, if there is one; afterwards they go on as if not."""
    if seed is None:
        yield
        return
    with forked_generators(model):
        torch.manual_seed(seed)
        yield


def forked_generators(model: nn.Module) -> contextlib.AbstractContextManager:
    """Whatever the block does to torch's generators, of the processor and of the model's device, is undone after it."""
    return torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else [])
