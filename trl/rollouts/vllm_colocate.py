"""
Sampling with vLLM in the training process: fast kernels and continuous batching, and a second copy of the weights.

Each process has an engine, or each group of `tensor_parallel_size` processes has one together. The engine is built from
the model's config alone; it gets its weights from the trainer, before the first generation as after every optimizer
step, and has to prove that it has them. Random numbers come from torch's global generator, one seed for a generation,
so that a resumed run samples what it would have sampled.
"""

from __future__ import annotations

import atexit
import copy
import logging
import os
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import PreTrainedConfig

from ..data.template_rendering import ProcessingClass
from ..distributed import ensure_master_addr_port
from ..models.weight_export import base_model_of, has_tied_head, iter_weights
from . import vllm_adapter
from .transformers_engine import context_length, cut_after_eos, room_for_completion
from .types import Prompt, Rollout, SamplingParams, as_prompts, is_truncated
from .vllm_sampling import draw_seed, is_greedy, logps_mode, request_seeds, request_settings, shaping_settings
from .weight_probe import VerifyLevel, make_probe, verify_weights

WHERE = "The vLLM engine in this process"


class VLLMColocateEngine:
    """
    A [`~trl.rollouts.types.RolloutEngine`] on vLLM in the trainer's process.

    Args:
        model: the model as the trainer holds it.
        accelerator: the trainer's accelerator.
        processing_class: tokenizer or processor.
        sampling: how completions are sampled in training; decides which log-probs vLLM is asked for.
        pad_token_id: of the tokenizer.
        eos_token_ids: tokens that end a completion; the token itself is kept.
        dtype: that the engine computes in. Default: the trainer's, autocast included.
        tensor_parallel_size: processes that an engine is cut over, neighbours by rank.
        gpu_memory_utilization: share of the device's memory for weights, activations and cache of the engine.
        max_model_length: most tokens of prompt and completion. Default: the model's context.
        max_num_seqs: most completions at a time. Default: vLLM's.
        enable_sleep_mode: give back the engine's memory between generations; the weights are loaded again after it.
        model_impl: model code, `vllm` or `transformers`.
        structured_outputs_regex: regular expression that completions match.
        verify: how to check the weights after an update: `off`, `probe`, or `full`, layer by layer.
        trust_remote_code: run code that was published with the model.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the number of processes, a quantization or sampling settings that the engine cannot do.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        processing_class: ProcessingClass,
        *,
        sampling: SamplingParams,
        pad_token_id: int,
        eos_token_ids: Iterable[int],
        dtype: torch.dtype | None = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.3,
        max_model_length: int | None = None,
        max_num_seqs: int | None = None,
        enable_sleep_mode: bool = False,
        model_impl: str = "vllm",
        structured_outputs_regex: str | None = None,
        verify: VerifyLevel = "probe",
        trust_remote_code: bool = False,
    ):
        vllm_adapter.require_vllm()
        _end_abandoned()
        self.model = model
        self.accelerator = accelerator
        self.pad_token_id = pad_token_id
        self.eos_token_ids = list(dict.fromkeys(eos_token_ids))
        self.structured_outputs_regex = structured_outputs_regex
        self.tensor_parallel_size = tensor_parallel_size
        self.enable_sleep_mode = enable_sleep_mode and _can_sleep(accelerator)
        self.verify = verify
        self._image_token_id = getattr(processing_class, "image_token_id", None)
        inner = base_model_of(accelerator.unwrap_model(model))
        _check_quantization(inner)
        self.dtype = dtype or compute_dtype(inner, accelerator)
        self.max_model_length = max_model_length or context_length(inner)
        self._group, self._place = self._make_group()
        self._is_asleep = False

        mode = logps_mode(self._request(sampling, 1))
        was_initialized = torch.distributed.is_initialized()
        self._folder = tempfile.TemporaryDirectory(prefix="trl-vllm-")
        _save_description(inner, processing_class, self._folder.name)
        if accelerator.num_processes > 1:
            _set_launch_environment(accelerator)
        on_cpu = accelerator.device.type == "cpu"
        with vllm_adapter.process_settings_kept():
            self.llm = vllm_adapter.make_engine(
                inner,
                model=self._folder.name,
                load_format="dummy",  # the trainer's weights follow
                dtype=str(self.dtype).split(".")[-1],
                tensor_parallel_size=tensor_parallel_size,
                distributed_executor_backend="external_launcher" if accelerator.num_processes > 1 else None,
                gpu_memory_utilization=gpu_memory_utilization,
                max_model_len=max_model_length,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max(4096, max_num_seqs or 0),
                enable_sleep_mode=self.enable_sleep_mode,
                enforce_eager=True if on_cpu else None,
                # Prompts share whole blocks; vLLM's for a CPU are longer than most prompts.
                block_size=32 if on_cpu else None,
                model_impl=model_impl,
                logprobs_mode=mode,
                seed=accelerator.process_index // tensor_parallel_size,
                trust_remote_code=trust_remote_code or None,
            )
        if not was_initialized:
            logging.getLogger("transformers.training_args").addFilter(_is_not_about_the_process_group)
        _open_engines.add(self)
        self._end = weakref.finalize(self, _abandoned.append, (self.llm, not was_initialized))
        self._end.atexit = False
        self._scale, self._tells_logps = self._prepare_logps(sampling, mode)
        special = [] if self._image_token_id is None else [self._image_token_id]
        self._probe = make_probe(
            inner, [compute_dtype(inner, accelerator), self.dtype], special, 1 / self._scale, self.max_model_length
        )

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
        """
        asked, outputs, own = self._run(prompts, sampling)
        with vllm_adapter.process_settings_kept():
            answers = [self._completions(*pair, sampling) for pair in zip(asked, outputs, strict=True)]
        return [self._rollout(prompt, *answer) for prompt, answer in _by_row(prompts, sampling.n, answers[own])]

    def completion_outputs(self, prompts: Sequence[Prompt | Sequence[int]], sampling: SamplingParams) -> list[Any]:
        """vLLM's own `CompletionOutput`s, in the order of `generate`: for what a rollout does not hold."""
        _, outputs, own = self._run(prompts, sampling)
        completions = [output.outputs for output in outputs[own]]
        return [completion for _, completion in _by_row(prompts, sampling.n, completions)]

    def update_weights(self, model: nn.Module) -> None:
        """From now on sample with the weights of `model`; raises a RuntimeError where they do not arrive."""
        self.model = model
        self._load()
        if self.verify != "off":
            verify_weights(
                model,
                self.accelerator,
                self._probe,
                self._score,
                self._load,
                WHERE,
                self._fingerprints if self.verify == "full" else None,
            )

    def sleep(self) -> None:
        """Give the engine's memory back, if it was told to. Its weights are lost until `wake` loads them."""
        if self.enable_sleep_mode and not self._is_asleep:
            vllm_adapter.sleep(self.llm)
            clear_device_cache()
            self._is_asleep = True

    def wake(self) -> None:
        """Take the memory again, and the weights of the model last given."""
        if self._is_asleep:
            self.update_weights(self.model)

    def close(self) -> None:
        """End the engine."""
        if self.llm is not None:
            _open_engines.discard(self)
            _, _, (ended,), _ = self._end.detach()
            vllm_adapter.close(*ended)
            self.llm = None
            self._folder.cleanup()

    # ---- Weights ----

    def _load(self) -> None:
        if self._is_asleep:
            vllm_adapter.wake_for_weights(self.llm)
        if self.accelerator.num_processes > 1:
            self.accelerator.wait_for_everyone()  # nobody still generates with an engine that is cut over processes
        with vllm_adapter.process_settings_kept():
            vllm_adapter.update_weights(self.llm, iter_weights(self.model, self.accelerator))
        if self._is_asleep:
            vllm_adapter.wake_for_generation(self.llm)
            self._is_asleep = False

    def _score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        with vllm_adapter.process_settings_kept():
            return vllm_adapter.prompt_logps(self.llm, sequences)

    def _fingerprints(self) -> dict[str, tuple[float, float]]:
        return self.llm.collective_rpc(vllm_adapter.fingerprint_layers)[0]

    def _prepare_logps(self, sampling: SamplingParams, mode: str) -> tuple[float, bool]:
        """
        What logits are multiplied by before vLLM sees them, and whether the log-probs it tells are those the loss wants.

        Raw log-probs are at temperature 1. Where the loss wants another one, it is put in front of everything else, and
        vLLM samples at 1.
        """
        if mode == "processed_logprobs" or sampling.temperature in (0, 1):
            return 1.0, True
        shaping = shaping_settings(self._request(sampling, 1))
        # (The bias against placeholders is as good as infinite, at any temperature.)
        own = shaping_settings(sampling.generation_kwargs)
        added_to_logits = {"presence_penalty", "frequency_penalty", "logit_bias"} & set(own)
        if not added_to_logits and vllm_adapter.scale_logits(self.llm, 1 / sampling.temperature):
            return 1 / sampling.temperature, True
        if sampling.with_logps and self.accelerator.is_main_process:
            warnings.warn(
                f"Tokens are sampled at temperature {sampling.temperature:g} with {', '.join(shaping)}. vLLM cannot tell "
                "what their log-probs over the whole vocabulary are at that temperature, so there is no correction for "
                "the engine's differences, and no measure of them. Sample at temperature 1, or without these settings."
            )
        return 1.0, False

    # ---- Requests ----

    def _request(self, sampling: SamplingParams, max_tokens: int) -> dict[str, Any]:
        return request_settings(
            sampling,
            max_tokens=max_tokens,
            stop_token_ids=self.eos_token_ids,
            structured_outputs_regex=self.structured_outputs_regex,
            never=[] if self._image_token_id is None else [self._image_token_id],
        )

    def _requests(
        self, prompts: list[Prompt], sampling: SamplingParams, seed: int
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Prompts and settings for vLLM; neighbouring rows with one prompt are one request for several completions."""
        runs = [list(run) for _, run in groupby(prompts, key=_identity)]
        seeds = request_seeds(seed + self.accelerator.process_index, len(runs))
        requests = []
        for run, own_seed in zip(runs, seeds, strict=True):
            prompt = run[0]
            self._check_room(len(prompt.ids))
            settings = self._request(sampling, room_for_completion(len(prompt.ids), sampling, self.max_model_length))
            settings["temperature"] = settings["temperature"] * self._scale
            # vLLM refuses several greedy completions, which would all be the same.
            settings.update(n=1 if is_greedy(settings) else len(run) * sampling.n, seed=own_seed)
            requests.append((self._prompt(prompt), settings))
        return requests

    def _check_room(self, prompt_length: int) -> None:
        if self.max_model_length and prompt_length >= self.max_model_length:
            raise ValueError(
                f"A prompt of {prompt_length} tokens leaves no room for a completion in the {self.max_model_length} "
                "tokens that the vLLM engine takes (`vllm_max_model_length`). Prompts are never cut: filter the dataset "
                "by prompt length, or raise that limit up to the model's context."
            )

    def _run(
        self, prompts: Sequence[Prompt | Sequence[int]], sampling: SamplingParams
    ) -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], list[Any], slice]:
        """Requests and vLLM's outputs, of all processes that share the engine, and which of them are this one's."""
        self.wake()
        seed = draw_seed() if sampling.seed is None else sampling.seed
        everyone = self._gather(self._requests(as_prompts(prompts), sampling, seed))
        asked = [request for part in everyone for request in part]
        with vllm_adapter.process_settings_kept():
            outputs = vllm_adapter.generate(
                self.llm, [prompt for prompt, _ in asked], [settings for _, settings in asked]
            )
        first = sum(map(len, everyone[: self._place]))
        return asked, outputs, slice(first, first + len(everyone[self._place]))

    def _completions(
        self, request: tuple[dict[str, Any], dict[str, Any]], output: Any, sampling: SamplingParams
    ) -> list[tuple[list[int], list[float | None] | None]]:
        """Tokens and log-probs of a request's completions, up to their first stop token."""
        tokens = [cut_after_eos(list(completion.token_ids), self.eos_token_ids) for completion in output.outputs]
        if not sampling.with_logps or not self._tells_logps:
            return [(ids, None) for ids in tokens]
        if request[1].get("structured_outputs") is None:
            logps = map(vllm_adapter.sampled_logps, output.outputs)
            return [(ids, told[: len(ids)]) for ids, told in zip(tokens, logps, strict=True)]
        if "multi_modal_data" in request[0]:
            return [(ids, None) for ids in tokens]
        # What a grammar forbids is gone before vLLM takes even raw log-probs, so the completions are scored as prompts.
        longest = (self.max_model_length or sys.maxsize) - 1
        prompt_ids = output.prompt_token_ids
        told = vllm_adapter.prompt_logps(self.llm, [[*prompt_ids, *ids][:longest] for ids in tokens])
        found = [logps[len(prompt_ids) - 1 :] for logps in told]
        return [(ids, [*logps, *[None] * (len(ids) - len(logps))]) for ids, logps in zip(tokens, found, strict=True)]

    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        if not prompt.images:
            return {"prompt_token_ids": prompt.ids}
        # vLLM writes out an image's placeholder itself, as many tokens as the image has patches.
        ids = [
            token
            for token, run in groupby(prompt.ids)
            for token in ([token] if token == self._image_token_id else run)
        ]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": list(prompt.images)}}

    def _rollout(self, prompt: Prompt, ids: list[int], logps: list[float | None] | None) -> Rollout:
        return Rollout(
            prompt.ids,
            list(ids),
            sampled_logps=logps,
            images=prompt.images,
            is_truncated=is_truncated(ids, [*self.eos_token_ids, self.pad_token_id]),
        )

    # ---- Tensor parallelism ----

    def _make_group(self) -> tuple[Any, int]:
        """The processes that share this one's engine, and its place among them."""
        size, count = self.tensor_parallel_size, self.accelerator.num_processes
        if count % size:
            raise ValueError(
                f"`vllm_tensor_parallel_size={size}` must divide the number of processes, {count}: in `colocate` mode "
                'each engine is cut over neighbouring processes. Change one of them, or use `vllm_mode="server"`.'
            )
        if size == 1:
            return None, 0
        blocks = [list(range(first, first + size)) for first in range(0, count, size)]
        groups = [torch.distributed.new_group(block) for block in blocks]  # every process makes all of them
        index = self.accelerator.process_index
        return groups[index // size], index % size

    def _gather(self, requests: list) -> list[list]:
        """The requests of all processes of the engine: each of them runs all requests, in the same order."""
        if self._group is None:
            return [requests]
        everyone: list = [None] * self.tensor_parallel_size
        torch.distributed.all_gather_object(everyone, requests, group=self._group)
        return everyone


# ---------------------------------------------------------------------------------------------------------------------
# What an engine is built from
# ---------------------------------------------------------------------------------------------------------------------


_open_engines: weakref.WeakSet[VLLMColocateEngine] = weakref.WeakSet()
# vLLM's part of engines that were dropped with their trainers, and whether vLLM made the process group. They are not ended
# in a destructor, which may run anywhere, in the middle of a collective operation too.
_abandoned: list[tuple[Any, bool]] = []


def _end_abandoned() -> None:
    while _abandoned and not _open_engines:  # ending one takes the groups of all
        vllm_adapter.close(*_abandoned.pop())


@atexit.register
def _end_all() -> None:
    for engine in list(_open_engines):
        engine.close()
    _end_abandoned()


def _is_not_about_the_process_group(record: logging.LogRecord) -> bool:
    """Transformers takes vLLM's process group, of this process alone, for a launch that went wrong."""
    return "torch.distributed process group is initialized" not in record.getMessage()


def _identity(prompt: Prompt) -> tuple[Any, ...]:
    """Rows with one prompt have its images in common, as objects."""
    return prompt.ids, [id(image) for image in prompt.images or ()]


def _by_row(prompts: Sequence[Prompt | Sequence[int]], n: int, answers: list[list[Any]]) -> list[tuple[Prompt, Any]]:
    """Each row's prompt with its answer, of the answers to runs of equal prompts; a greedy one is that of all rows."""
    rows = [prompt for prompt in as_prompts(prompts) for _ in range(n)]
    counts = [len(list(run)) for _, run in groupby(rows, key=_identity)]
    found = [run[index % len(run)] for run, count in zip(answers, counts, strict=True) for index in range(count)]
    return list(zip(rows, found, strict=True))


def compute_dtype(model: nn.Module, accelerator: Accelerator) -> torch.dtype:
    """What the trainer computes in: that of mixed precision, or of the model's weights."""
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return mixed or next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _check_quantization(model: nn.Module) -> None:
    if getattr(model, "is_loaded_in_8bit", False):
        raise ValueError(
            "The model is quantized to 8 bits by bitsandbytes, which vLLM does not run in the training process. "
            "Quantize to 4 bits (`load_in_4bit=True`; the engine gets the weights in the computing dtype), or set "
            "`use_vllm=False`."
        )


def _can_sleep(accelerator: Accelerator) -> bool:
    if accelerator.device.type != "cpu":
        return True
    warnings.warn("`vllm_enable_sleep_mode=True` has no effect on a CPU: vLLM keeps its memory.")
    return False


def _save_description(model: nn.Module, processing_class: ProcessingClass, folder: str) -> None:
    """What vLLM builds a model from, as the trainer has it now: resized, untied by an adapter, not quantized."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.tie_word_embeddings = has_tied_head(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # FSDP2 makes a class of its own of a model's.
    config.architectures = config.architectures or [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    processing_class.save_pretrained(folder)


def _set_launch_environment(accelerator: Accelerator) -> None:
    """What vLLM reads about the processes that a launcher started."""
    ensure_master_addr_port()
    for name, value in {
        "RANK": accelerator.process_index,
        "LOCAL_RANK": accelerator.local_process_index,
        "WORLD_SIZE": accelerator.num_processes,
    }.items():
        os.environ.setdefault(name, str(value))
