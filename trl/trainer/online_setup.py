"""
How the trainers that sample completions are built: their arguments, what is checked before a model is loaded, policy,
reference, rewards and engine, and the order in which prompts come. What they do then is in `online_trainer.py`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate.utils import set_seed
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
)
from transformers.utils import logging

from ..callbacks.reference_sync import SyncRefModelCallback
from ..data.samplers import RepeatSampler, WholeStream, repeat_iterable_dataset
from ..data.template_rendering import inner_tokenizer
from ..losses.policy_options import PolicyLossOptions
from ..models.distributed import prepare_deepspeed
from ..models.reference import ReferencePolicy
from ..reports.completions_log import CompletionsLog
from ..rewards.suite import RewardSuite
from ..rollouts.conversation import IMAGE_COLUMNS, Conversations
from ..rollouts.environments import EnvironmentPool
from ..rollouts.transformers_engine import (
    make_generation_config,
    stop_token_ids,
)
from ..rollouts.vllm_generation import VLLMGeneration
from .base_trainer import AnyDataset, EvalDatasets, _BaseTrainer
from .online_config import _OnlineConfig
from .online_data import check_prompts, check_reward_columns, placeholder_rows, rows_of_batch
from .online_sampling import RolloutFunc, RolloutMaker, cast_head, check_engine, make_engine, sampling_params
from .policy_setup import ReferenceMixin, check_reference_sync, prepare_policy, reference_loader
from .setup import check_single_device_per_process, resolve_args
from .step_counts import StepCountsMixin
from .text_evaluation import TextEvalPrediction

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import BitsAndBytesConfig

logger = logging.get_logger(__name__)


class OnlineSetup(ReferenceMixin, StepCountsMixin, _BaseTrainer):
    """
    Construction of the trainers that learn from rewards of their own completions.

    Args:
        model: name or path of a model, the model, or a PEFT model.
        reward_funcs: what scores completions: functions (see [`trl.rewards.suite.RewardSuite`] for how they are
            called), reward models, names or paths of such, one or a list.
        args: the config.
        train_dataset: rows with a `prompt`, text or messages; other columns go to the reward functions.
        eval_dataset: the same for evaluation, or several by name.
        processing_class: tokenizer or processor. By default the one published with the model.
        reward_processing_classes: tokenizers of the reward models. By default those published with them.
        callbacks: more callbacks.
        optimizers: optimizer and scheduler. By default as the config says.
        quantization_config: quantize the model while it is loaded (QLoRA). Only with a name or path.
        peft_config: train an adapter of this kind instead of all weights.
        compute_metrics: metrics of the texts that an evaluation sampled, apart from the reward: gets a
            [`~trl.trainer.text_evaluation.TextEvalPrediction`], returns a dict of numbers.

    Raises:
        ValueError: nothing scores completions, options exclude each other, or the data cannot fill a generation batch.
        TypeError: a dataset, tokenizer or adapter config of a wrong type.
    """

    config_class: ClassVar[type[_OnlineConfig]]
    args: _OnlineConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: _OnlineConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: EvalDatasets | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        *,
        tools: list[Callable] | None = None,
        rollout_func: RolloutFunc | None = None,
        environments: EnvironmentPool | None = None,
        compute_metrics: Callable[[TextEvalPrediction], Mapping[str, float]] | None = None,
    ):
        args = resolve_args(args, self.config_class, model, self._name)
        check_single_device_per_process(args, type(self).__name__)
        self._check_options(args, model, peft_config)
        self.loss_options = self.make_loss_options(args)
        self.args, self._needs_prompt = args, environments is None  # `prepare_dataset` reads them
        train_dataset = self.prepare_datasets(
            placeholder_rows(args) if train_dataset is None else train_dataset, "train"
        )
        if eval_dataset is not None:
            eval_dataset = self.prepare_datasets(eval_dataset, "eval")
        rewards = self._make_rewards(reward_funcs, reward_processing_classes, args, environments)
        if rollout_func is None:  # it may bring columns along
            remaining = ("prompt", *IMAGE_COLUMNS) if args.remove_unused_columns else None
            check_reward_columns(rewards, train_dataset, eval_dataset, environments is not None, remaining)
        has_images = bool(set(IMAGE_COLUMNS) & set(next(iter(train_dataset), {})))

        policy = prepare_policy(
            model,
            processing_class,
            args,
            with_images=has_images,
            quantization_config=quantization_config,
            peft_config=peft_config,
            padding_side="left",
            truncation_side="left",
        )
        model, processing_class = policy.model, policy.processing_class
        self.router_aux_loss_coef, self.aux_loss_enabled = policy.router_aux_loss_coef, policy.aux_loss_enabled
        self._head_in_fp32 = getattr(args, "cast_lm_head_to_fp32", False)
        if self._head_in_fp32:
            cast_head(model)
        self.reference = self._make_reference(args, model, policy.came_with_adapter, quantization_config)
        self._read_config(args)
        super().__init__(
            model=model,
            args=args,
            data_collator=rows_of_batch,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Says to Transformers before 5.19 what `loss_is_scaled_for_ga` says.
        self.model_accepts_loss_kwargs = False
        if self.loss_is_scaled_for_ga and not hasattr(Trainer, "loss_is_scaled_for_ga"):
            self.compute_loss_func = self.compute_loss
        if self.reference is not None:
            self.reference.prepare(self.accelerator)
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))
        self.rewards = rewards
        rewards.prepare_models(self._prepare_reward_model)
        self.eos_token_ids = stop_token_ids(model, inner_tokenizer(processing_class))
        self.environments = environments
        self.rollouts = RolloutMaker(self._make_conversations(has_images, tools, environments), rollout_func, self)
        # vLLM as rollout functions use it.
        self.vllm_generation: VLLMGeneration | None = None
        if args.use_vllm:
            self.vllm_generation = VLLMGeneration.around(self.rollouts.engine, self.model, sampling_params(args))
        self._forget_rollouts()
        self.completions_log = self._make_completions_log() if args.log_completions else None
        # What is sampled has to differ between processes; everything before was to be alike.
        set_seed(args.seed, device_specific=True)

    def make_loss_options(self, args: _OnlineConfig) -> PolicyLossOptions:
        """The loss that the config describes."""
        raise NotImplementedError

    def _forget_rollouts(self) -> None:
        """Begin without any rollouts."""
        raise NotImplementedError

    # ---- Construction ----

    def _check_options(self, args: _OnlineConfig, model: Any, peft_config: Any) -> None:
        """Refuse, before anything is loaded, what cannot work."""
        check_engine(args)
        if args.sync_ref_model and not args.beta:
            raise ValueError(
                "`sync_ref_model=True` moves the reference, but `beta=0` uses none. Set `beta`, or turn off "
                "`sync_ref_model`."
            )
        check_reference_sync(args, model, peft_config)

    def _make_rewards(
        self, reward_funcs: Any, processing_classes: Any, args: _OnlineConfig, environments: EnvironmentPool | None
    ) -> RewardSuite:
        limits = args.reward_time_limits
        return RewardSuite(
            reward_funcs,
            args.reward_weights,
            processing_classes=processing_classes,
            time_limits=limits[0] if isinstance(limits, list) and len(limits) == 1 else limits,
            on_error=args.reward_on_error,
            model_init_kwargs=args.model_init_kwargs,
            chat_template_kwargs=args.chat_template_kwargs,
            model_batch_size=args.per_device_train_batch_size,
            environment_classes=environments.rewarding_classes if environments is not None else (),
        )

    def _prepare_reward_model(self, model: nn.Module) -> nn.Module:
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True, device_placement=True)

    def _make_reference(
        self, args: _OnlineConfig, model: nn.Module, came_with_adapter: bool, quantization_config: Any
    ) -> ReferencePolicy | None:
        if not args.beta:
            return None
        load = reference_loader(model, args, quantization_config)
        return ReferencePolicy.of(model, came_with_adapter=came_with_adapter, load=load)

    def _make_conversations(
        self, has_images: bool, tools: list[Callable] | None, environments: EnvironmentPool | None
    ) -> Conversations:
        args = self.args
        return Conversations(
            make_engine(self.model, args, self.accelerator, self.processing_class, self.eos_token_ids, has_images),
            self.processing_class,
            eos_token_ids=self.eos_token_ids,
            tools=tools,
            environments=environments,
            chat_template_kwargs=args.chat_template_kwargs,
            max_tool_calling_iterations=getattr(args, "max_tool_calling_iterations", None),
            accelerator=self.accelerator,
        )

    def _make_completions_log(self) -> CompletionsLog | None:
        args = self.args
        if not self.is_world_process_zero():
            return None
        return CompletionsLog(
            args.output_dir,
            maxlen=args.generation_batch_size,
            report_to=args.report_to,
            num_to_print=args.num_completions_to_print,
            unique_prompts=args.log_unique_prompts,
            multimodal=args.log_multimodal,
            hub_repo=getattr(args, "log_completions_hub_repo", None),
            hub_private=args.hub_private_repo,
            hub_token=args.hub_token,
            trainer_name=self._name,
            hub_model_id=args.hub_model_id,
        )

    # Settings that scripts and callbacks read off the trainer.
    mirrored_settings: ClassVar[tuple[str, ...]] = (
        "beta",
        "chat_template_kwargs",
        "generation_kwargs",
        "log_completions",
        "log_multimodal",
        "log_unique_prompts",
        "mask_truncated_completions",
        "max_completion_length",
        "min_p",
        "num_completions_to_print",
        "num_generations",
        "num_iterations",
        "pad_to_multiple_of",
        "repetition_penalty",
        "shuffle_dataset",
        "temperature",
        "top_k",
        "top_p",
        "use_transformers_continuous_batching",
        "use_vllm",
        "vllm_gpu_memory_utilization",
        "vllm_mode",
        "vllm_tensor_parallel_size",
    )

    def _read_config(self, args: _OnlineConfig) -> None:
        for name in self.mirrored_settings:
            setattr(self, name, getattr(args, name))
        self.num_generations_eval = args.num_generations_eval or args.num_generations
        self.epsilon_low, self.epsilon_high = self.loss_options.epsilon, self.loss_options.upper_epsilon
        self.continuous_batching_config = args.transformers_continuous_batching_config
        self._micro_steps_per_generation = args.steps_per_generation * args.num_iterations

    @property
    def generation_config(self) -> GenerationConfig:
        """How completions are sampled, in Transformers' words."""
        return make_generation_config(
            sampling_params(self.args),
            max_new_tokens=self.max_completion_length,
            pad_token_id=self._pad_token_id,
            eos_token_id=self.eos_token_ids,
        )

    @property
    def chat_template(self) -> str | None:
        """Template that prompts are tokenized with; None for the tokenizer's own."""
        return self.rollouts.conversations.chat_template

    @property
    def reward_funcs(self) -> list[Any]:
        """The reward functions and models, in the order of `reward_func_names`."""
        return self.rewards.functions

    @property
    def reward_func_names(self) -> list[str]:
        return self.rewards.names

    @property
    def reward_weights(self) -> Tensor:
        return self.rewards.weights_F

    @property
    def async_loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop of asynchronous reward functions; None before it is needed, as its thread and event."""
        return self.rewards.event_loop.loop

    @property
    def async_loop_thread(self) -> threading.Thread | None:
        return self.rewards.event_loop.thread

    @property
    def async_loop_ready_event(self) -> threading.Event | None:
        return self.rewards.event_loop.ready

    @property
    def reward_processing_classes(self) -> list[Any]:
        """Tokenizers of the reward models; None for a function."""
        return self.rewards.processing_classes

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt", *IMAGE_COLUMNS]

    # ---- Data ----

    def prepare_dataset(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Rows stay as they are; the first one is looked at."""
        check_prompts(dataset, name, self.args, self._needs_prompt)
        return dataset

    def get_train_dataloader(self) -> DataLoader:
        """Batches of rows: the prompts of a generation, each `num_generations` times, once for each of its micro-steps."""
        args, dataset = self.args, self.train_dataset
        if isinstance(dataset, IterableDataset):
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            dataset = repeat_iterable_dataset(
                dataset,
                mini_repeat_count=self.num_generations,
                batch_size=args.generation_batch_size // self.num_generations,
                repeat_count=self._micro_steps_per_generation,
            )
            dataset = WholeStream(dataset) if self.accelerator.num_processes > 1 else dataset
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size * args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        args = self.args
        return RepeatSampler(
            train_dataset if train_dataset is not None else self.train_dataset,
            mini_repeat_count=self.num_generations,
            batch_size=args.generation_batch_size // self.num_generations,
            repeat_count=self._micro_steps_per_generation,
            shuffle=args.shuffle_dataset,
            seed=args.seed,
        )

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return RepeatSampler(eval_dataset, mini_repeat_count=self.num_generations_eval, seed=self.args.seed)
