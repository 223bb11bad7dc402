"""
What the methods share that sample completions of the policy and learn from their rewards.

A generation batch is sampled, scored and turned into micro-batches by `make_training_batch`; the optimizer's steps then
go through these, `num_iterations` times. A loss is a sum over completions or tokens, divided by their number in the
whole step, so it does not depend on how the step was cut into micro-batches and processes.

What is one method's own, advantages and loss, is in its file (`grpo_trainer.py`, `rloo_trainer.py`). How completions
are sampled is in `trl.rollouts`, how they are scored in `trl.rewards`.

Shapes: N completions of a process's generation batch (M of all processes), B of a micro-batch, C tokens of a completion,
F sources of reward.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..callbacks.reference_sync import SyncRefModelCallback
from ..data.samplers import RepeatSampler, repeat_iterable_dataset
from ..data.template_rendering import inner_tokenizer
from ..extras.profiling import profiling_decorator
from ..losses.advantages import Advantages
from ..losses.policy import PolicyLoss, PolicyLossTerm, count_units
from ..losses.policy_metrics import policy_metrics
from ..losses.policy_options import PolicyLossOptions
from ..models.distributed import prepare_deepspeed
from ..models.reference import ReferencePolicy
from ..ops.scoring import TokenScores, score_tokens
from ..reports.completions_log import CompletionsLog
from ..rewards.suite import RewardError, RewardSuite, RewardTable
from ..rollouts.conversation import IMAGE_COLUMNS, Conversations
from ..rollouts.environments import EnvironmentPool
from ..rollouts.transformers_engine import (
    evaluation_mode,
    forked_generators,
    make_generation_config,
    stop_token_ids,
)
from ..rollouts.types import Rollout
from .base_trainer import AnyDataset, EvalDatasets, _BaseTrainer
from .online_config import _OnlineConfig
from .online_data import check_prompts, columns_of, placeholder_rows, rows_of_batch
from .online_metrics import (
    CompletionFigures,
    add_completions,
    add_metrics,
    add_reward_metrics,
    completion_metrics,
    gather_figures,
    warn_of_broken,
)
from .online_sampling import RolloutFunc, RolloutMaker, Row, cast_head, make_engine, sampling_params
from .policy_setup import ReferenceMixin, check_reference_sync, prepare_policy, reference_loader
from .rollout_batches import (
    RolloutBatch,
    RolloutBuffer,
    balance_rows,
    completion_values,
    inputs_of,
    join_batches,
    rollouts_to_batch,
    select_rows,
    shuffle_groups,
)
from .setup import check_single_device_per_process, resolve_args
from .step_counts import StepCountsMixin
from .text_evaluation import TextEvalCollector, TextEvalPrediction, evaluate_text

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import BitsAndBytesConfig

logger = logging.get_logger(__name__)


class OnlineTrainer(ReferenceMixin, StepCountsMixin, _BaseTrainer):
    """
    Base of the methods that learn from rewards of their own completions (GRPO, RLOO).

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
        tools: functions that the model may call.
        rollout_func: called with prompts and the trainer, samples in the place of all this.
        environment_factory: makes environments, one for each rollout; or a dict of such by name.
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
        self._check_reference_options(args, model, peft_config)
        self.loss_options = self.make_loss_options(args)
        self.args, self._needs_prompt = args, environments is None  # `prepare_dataset` reads them
        train_dataset = self.prepare_datasets(
            placeholder_rows(args) if train_dataset is None else train_dataset, "train"
        )
        if eval_dataset is not None:
            eval_dataset = self.prepare_datasets(eval_dataset, "eval")
        rewards = self._make_rewards(reward_funcs, reward_processing_classes, args, environments)
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
        self.model_accepts_loss_kwargs = False  # says to Transformers before 5.19 what `loss_is_scaled_for_ga` says
        if self.reference is not None:
            self.reference.prepare(self.accelerator)
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))
        self.rewards = rewards
        rewards.prepare_models(self._prepare_reward_model)
        self.eos_token_ids = stop_token_ids(model, inner_tokenizer(processing_class))
        self.environments = environments
        self.rollouts = RolloutMaker(self._make_conversations(has_images, tools, environments), rollout_func, self)
        self._forget_rollouts()
        self.completions_log = self._make_completions_log() if args.log_completions else None
        # What is sampled has to differ between processes; everything before was to be alike.
        set_seed(args.seed, device_specific=True)

    # ---- What a method says ----

    def make_loss_options(self, args: _OnlineConfig) -> PolicyLossOptions:
        """The loss that the config describes."""
        raise NotImplementedError

    def compute_advantages(self, figures: CompletionFigures) -> Advantages:
        """
        How much better than expected each completion was.

        Args:
            figures: of the completions of all processes, those of a group next to each other.
        """
        raise NotImplementedError

    def compute_policy_loss(self, batch: RolloutBatch, scores: TokenScores) -> tuple[PolicyLoss, list[PolicyLossTerm]]:
        """
        The loss of a micro-batch: of each token, and its parts as sums.

        Args:
            batch: the micro-batch.
            scores: `logps` and `entropies` of its completion tokens, [B, C].
        """
        raise NotImplementedError

    def needs_old_logps(self) -> bool:
        """Whether the policy's log-probs at the time of sampling are asked for later, when it may have changed."""
        return self.args.gradient_accumulation_steps % self._micro_steps_per_generation != 0

    def add_generation_values(self, batch: RolloutBatch) -> None:
        """
        Add to a micro-batch what follows from its log-probs at the time of sampling; `penalties`, [B], are taken from
        the rewards before they become advantages.
        """

    def count_forward_units(self, model: nn.Module, micro_batches: Sequence[RolloutBatch]) -> dict[str, Tensor]:
        """Counts of an optimizer step that only a forward pass can tell, by unit."""
        return {}

    # ---- Construction ----

    def _check_reference_options(self, args: _OnlineConfig, model: Any, peft_config: Any) -> None:
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
        self.vllm_generation = None
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
    def reward_processing_classes(self) -> list[Any]:
        """Tokenizers of the reward models; None for a function."""
        return self.rewards.processing_classes

    def _forget_rollouts(self) -> None:
        self.buffer = RolloutBuffer()
        self._step = 0  # micro-steps so far, of this process
        self._row_batches: list[list[Row]] = []
        self._micro_batches: deque[RolloutBatch] = deque()
        self._evaluation: TextEvalCollector | None = None
        self._eval_batches, self._eval_rows_left = 0, None

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
                dataset = dataset.shuffle(seed=args.data_seed if args.data_seed is not None else args.seed)
            dataset = repeat_iterable_dataset(
                dataset,
                mini_repeat_count=self.num_generations,
                batch_size=args.generation_batch_size // self.num_generations,
                repeat_count=self._micro_steps_per_generation,
            )
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

    # ---- A generation ----

    def make_training_batch(self, model: nn.Module, rows: Sequence[Row]) -> list[RolloutBatch]:
        """
        Sample completions, score them, and make micro-batches of them. All processes call this together.

        Args:
            model: the policy as it is trained.
            rows: of the dataset, N, those of a group next to each other.

        Returns:
            The micro-batches of this process; one, in an evaluation.
        """
        real = self._count_real_rows(len(rows))
        rollouts = self._generate(model, rows)
        table = self._score(rollouts, rows)
        batch = self._as_batch(rollouts, real)
        pieces = self._cut(batch)
        micro_batches = [select_rows(batch, piece, self.args.pad_to_multiple_of) for piece in pieces]
        self._score_before_update(model, micro_batches)

        penalties_N = self._uncut("penalties", micro_batches, pieces)
        figures = gather_figures(rollouts, table, penalties_N, self.accelerator, real)
        result = self.compute_advantages(figures)
        advantages_N = self._own_part(result.advantages_N, len(rows)).to(self.accelerator.device)
        for piece, micro_batch in zip(pieces, micro_batches, strict=True):
            micro_batch["advantages"] = advantages_N[piece.to(advantages_N.device)]
        self._report(rollouts, rows, table, figures, result)
        return micro_batches

    def _count_real_rows(self, local: int) -> int:
        """How many rows of the batch, over all processes, are of the dataset; in an evaluation others fill it up."""
        count = local * self.accelerator.num_processes
        if self.mode == "train" or self._eval_rows_left is None:
            return count
        real = min(count, self._eval_rows_left)
        self._eval_rows_left -= real
        return real

    @profiling_decorator
    def _generate(self, model: nn.Module, rows: Sequence[Row]) -> list[Rollout]:
        seed = None
        if self.mode == "eval":
            seed = hash((self.args.seed, self.accelerator.process_index, self._eval_batches)) % 2**31
            self._eval_batches += 1
        return self.rollouts.generate(model, rows, sampling_params(self.args, evaluation_seed=seed))

    @profiling_decorator
    def _score(self, rollouts: Sequence[Rollout], rows: Sequence[Row]) -> RewardTable:
        """Rewards of this process's completions. What fails on one process ends all, rather than leaving them waiting."""
        failure, table = None, None
        try:
            table = self.rewards.score(
                [rollout.prompt for rollout in rollouts],
                [rollout.completion for rollout in rollouts],
                [rollout.completion_ids for rollout in rollouts],
                columns_of(rows, rollouts),
                trainer_state=self.state,
                environments=None if self.environments is None else [rollout.environment for rollout in rollouts],
            )
        except Exception as error:
            failure = error
        if self.accelerator.num_processes > 1:
            problems = gather_object([failure and f"{type(failure).__name__}: {failure}"])
            others = [f"process {index}: {problem}" for index, problem in enumerate(problems) if problem]
            if others and failure is None:
                raise RewardError(f"Scoring failed on another process. {others[0]}")
        if failure is not None:
            raise failure
        for index, rollout in enumerate(rollouts):
            if rollout.error is not None:  # it counts neither for its group nor in the mean
                table.values_FN[:, index] = torch.nan
        warn_of_broken(rollouts)
        return table

    def _as_batch(self, rollouts: Sequence[Rollout], real: int) -> RolloutBatch:
        first = self.accelerator.process_index * len(rollouts)
        batch = rollouts_to_batch(
            rollouts,
            [(first + index) // self._group_size for index in range(len(rollouts))],
            pad_token_id=self._pad_token_id,
            device=self.accelerator.device,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            mask_truncated=self.args.mask_truncated_completions,
        )
        batch["train_mask"][max(real - first, 0) :] = 0  # rows that only fill the batch up
        return batch

    def _cut(self, batch: RolloutBatch) -> list[Tensor]:
        """Which rows make a micro-batch."""
        rows = len(batch["groups"])
        if self.mode == "eval":
            return [torch.arange(rows)]
        size = self.args.per_device_train_batch_size
        # Random numbers that depend on seed, process and progress alone, so that sampling goes on undisturbed.
        seed = hash((self.args.seed, self.accelerator.process_index, self._step)) % 2**63
        return list(shuffle_groups(batch["groups"].cpu(), size, torch.Generator().manual_seed(seed)).split(size))

    @torch.no_grad()
    def _score_before_update(self, model: nn.Module, micro_batches: Sequence[RolloutBatch]) -> None:
        """Log-probs of the policy as it is now and of the reference, where the loss or the reward will ask for them."""
        needs_old = self.needs_old_logps()
        if not needs_old and self.reference is None:
            return
        with evaluation_mode(model), self.compute_loss_context_manager():
            for batch in micro_batches:
                if needs_old:
                    batch["old_logps"] = self.score_completions(model, batch).logps
                if self.reference is not None:
                    batch["ref_logps"] = self.score_completions(model, batch, reference=True).logps
        for batch in micro_batches:
            self.add_generation_values(batch)

    @staticmethod
    def _uncut(name: str, micro_batches: Sequence[RolloutBatch], pieces: Sequence[Tensor]) -> Tensor | None:
        """A value of each row, taken out of the micro-batches, in the order before they were cut."""
        if name not in micro_batches[0]:
            return None
        values = torch.cat([micro_batch.pop(name) for micro_batch in micro_batches])
        uncut = torch.empty_like(values)
        uncut[torch.cat(list(pieces)).to(values.device)] = values
        return uncut

    def _own_part(self, values_M: Tensor, local: int) -> Tensor:
        """Of values of all real rows those of this process's rows; 0 for what fills the batch up."""
        first = self.accelerator.process_index * local
        own = values_M[first : first + local]
        return torch.nn.functional.pad(own, (0, local - len(own)))

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.mode == "train" else self.num_generations_eval

    @property
    def _pad_token_id(self) -> int:
        return inner_tokenizer(self.processing_class).pad_token_id

    # ---- Steps ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        self._row_batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._row_batches, None

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None  # counted when there are completions

    def training_step(
        self, model: nn.Module, inputs: Sequence[Row], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self._row_batches:  # not any earlier: a resumed run has its random numbers back only now
            self._step_began = time.perf_counter()
            self._begin_step(model, self._row_batches)
            self._row_batches = []
        batch = self._micro_batches.popleft()
        self._trained_ids = {"input_ids": batch["input_ids"]}
        loss = super().training_step(model, batch, self._step_counts["tokens"])
        self._step += 1
        self._announce_layout()
        if not self._micro_batches:
            self._end_step()
        return loss

    def _begin_step(self, model: nn.Module, row_batches: Sequence[Sequence[Row]]) -> None:
        """The micro-batches of an optimizer step, and what its loss is divided by."""
        model.train()
        batches = []
        for offset, rows in enumerate(row_batches):
            step = self._step + offset
            if step % self._micro_steps_per_generation == 0 or not len(self.buffer):
                self.buffer.micro_batches = self.make_training_batch(model, rows)
            batches.append(self.buffer.micro_batches[step % len(self.buffer)])
        if self.args.balance_micro_batches and len(batches) > 1:
            joined = join_batches(batches, self._pad_token_id)
            pieces = balance_rows(joined, len(batches), prompts_shared=self.args.layout != "padded")
            batches = [select_rows(joined, piece, self.args.pad_to_multiple_of) for piece in pieces]
        counts = [*map(self.count_items, batches), self.count_forward_units(model, batches)]
        totals = self.count_step(counts, self.accelerator.device)
        if not totals["tokens"] and self.is_world_process_zero():
            logger.warning(
                f"Step {self.state.global_step + 1} has nothing to learn from: none of its {int(totals['rows'])} "
                "completions has a token to train on. They were all cut off at `max_completion_length` "
                "(`mask_truncated_completions=True`), or all samples were broken."
            )
        self._micro_batches = deque(batches)

    def _end_step(self) -> None:
        """After the last micro-batch of an optimizer step."""
        self.reducer.add("train", "step_time", time.perf_counter() - self._step_began)

    def floating_point_ops(self, inputs: Any) -> int:
        return super().floating_point_ops(self._trained_ids)

    # ---- Loss ----

    def score_completions(
        self, model: nn.Module, batch: RolloutBatch, reference: bool = False, with_entropy: bool = False
    ) -> TokenScores:
        """
        Log-probs of the trained completion tokens of a micro-batch, at the temperature of sampling.

        Args:
            model: the policy as it is trained.
            batch: the micro-batch.
            reference: ask the reference, without gradients.
            with_entropy: entropies of the predictions too.

        Returns:
            `logps` and `entropies`, [B, C], 0 elsewhere, and `aux_loss`.
        """
        score = self.reference.score if reference else score_tokens
        scores = score(
            model,
            inputs_of(batch, batch["train_mask"]),
            temperature=self.temperature,
            outputs=("entropy",) if with_entropy else (),
            layout=self.args.layout,
            groups=batch["groups"],
            head_in_fp32=self._head_in_fp32,
        )
        return TokenScores(
            logps=completion_values(scores.logps, batch),
            entropies=completion_values(scores.entropies, batch) if with_entropy else None,
            aux_loss=scores.aux_loss,
        )

    def count_items(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """How much a micro-batch has of what a loss may be divided by."""
        return count_units(batch["train_mask"], self.loss_options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: RolloutBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """
        The loss of a micro-batch.

        Args:
            model: the policy as it is trained.
            inputs: the micro-batch.
            return_outputs: not possible: the trainer never holds the logits.
            num_items_in_batch: trained tokens of the whole optimizer step. By default the loss is the mean over this
                batch.

        Raises:
            ValueError: with `return_outputs`.
        """
        if return_outputs:
            raise ValueError(f"{type(self).__name__} does not return outputs of the model: it never holds the logits.")
        scores = self.score_completions(model, inputs, with_entropy=True)
        loss, terms = self.compute_policy_loss(inputs, scores)
        add_metrics(self.reducer, self.mode, policy_metrics(loss, self.loss_options))
        total = torch.zeros((), device=scores.logps.device)
        for term in terms:
            part = term.weight * self.normalize(
                term.total, term.unit, {term.unit: term.count}, over_step=num_items_in_batch is not None
            )
            total = total + part
            if self.mode == "eval":
                self.reducer.add("eval", "loss", term.weight * term.total, term.count, part=term.name)
            if len(terms) > 1 and term.name == "policy":
                self.reducer.add(self.mode, "policy_loss", part.detach(), 1 / self._accumulation)
        if self.aux_loss_enabled:
            self.reducer.add(self.mode, "aux_loss", scores.aux_loss)
            scale = self._accumulation if self.loss_is_scaled_for_ga else 1
            total = total + self.router_aux_loss_coef * scores.aux_loss / scale
        return total

    @property
    def _accumulation(self) -> int:
        """Micro-batches of the present optimizer step; 1 in an evaluation."""
        return self.current_gradient_accumulation_steps if self.mode == "train" else 1

    # ---- Evaluation ----

    def get_eval_dataloader(self, eval_dataset: AnyDataset | str | None = None) -> DataLoader:
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if isinstance(dataset, IterableDataset):
            eval_dataset = repeat_iterable_dataset(dataset, mini_repeat_count=self.num_generations_eval)
        return super().get_eval_dataloader(eval_dataset)

    def _uncounted_row(self, row: Row) -> None:
        return None  # what fills the last batch up is left out by its place

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Sequence[Row],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        with torch.no_grad():
            (batch,) = self.make_training_batch(model, inputs)
            self.count_forward_units(model, [batch])
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(batch))
        return loss.detach(), None, None

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        per_step = self.args.eval_batch_size * self.accelerator.num_processes
        if per_step % self.num_generations_eval:
            raise ValueError(
                f"An evaluation batch has {per_step} completions over all processes, no multiple of the "
                f"{self.num_generations_eval} for each prompt. Change `per_device_eval_batch_size` or "
                "`num_generations_eval`."
            )
        dataset = dataloader.dataset
        self._eval_batches = 0
        self._eval_rows_left = len(dataset) * self.num_generations_eval if isinstance(dataset, Dataset) else None
        self._evaluation = TextEvalCollector(self.num_generations_eval) if self.compute_metrics is not None else None
        with forked_generators(self.model):  # even a pass over the data draws a number; training is not to notice
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_num_tokens"] = self.state.num_input_tokens_seen
        if self._evaluation is not None:
            prediction, self._evaluation = self._evaluation.result(), None
            output.metrics.update(evaluate_text(self.compute_metrics, prediction, f"{metric_key_prefix}_"))
        return output

    # ---- Reports ----

    def _report(
        self,
        rollouts: Sequence[Rollout],
        rows: Sequence[Row],
        table: RewardTable,
        figures: CompletionFigures,
        result: Advantages,
    ) -> None:
        """What a generation tells, as metrics and as texts. All processes call this together."""
        mode = self.mode
        if mode == "train":
            self.state.num_input_tokens_seen += int(figures.tokens_M.sum())
        add_metrics(self.reducer, mode, completion_metrics(figures, self.rollouts.conversations.has_tools))
        add_reward_metrics(self.reducer, mode, figures, table, result)
        if mode == "eval" and self._evaluation is not None:
            rewards = dict(zip(table.names, table.values_FN.tolist(), strict=True))
            self._evaluation.add(
                [row.get("prompt") for row in rows],
                [rollout.completion for rollout in rollouts],
                [rollout.completion_ids for rollout in rollouts],
                columns_of(rows, rollouts),
                {"reward": table.totals_N().tolist(), **rewards},
                count=figures.rewards_FM.shape[1],
            )
        if self.args.log_completions and mode == "train":
            add_completions(self.completions_log, rollouts, table, figures, result)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["num_tokens"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)
        if self.completions_log is not None and "loss" in logs:
            self.completions_log.write(self.state.global_step)

    # ---- Checkpoints ----

    def train(self, *args: Any, **kwargs: Any):
        self._forget_rollouts()
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.completions_log is not None:
                self.completions_log.close()

    def _extra_state(self) -> dict[str, Any]:
        return {**super()._extra_state(), "micro_steps": self._step}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        super()._load_extra_state(state)
        self._step = state["micro_steps"]

    def _save_extra_files(self, folder: str) -> None:
        super()._save_extra_files(folder)
        if self._step % self._micro_steps_per_generation:  # else the next step samples anew
            self.buffer.save(folder, self.accelerator.process_index)

    def _load_extra_files(self, checkpoint: str) -> None:
        super()._load_extra_files(checkpoint)
        self.buffer.load(checkpoint, self.accelerator.process_index, self.accelerator.device)
