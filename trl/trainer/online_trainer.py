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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..data.samplers import WholeStream, repeat_iterable_dataset
from ..data.template_rendering import inner_tokenizer
from ..extras.profiling import profiling_context, profiling_decorator
from ..losses.advantages import Advantages
from ..losses.engine_correction import engine_differences
from ..losses.policy import PolicyLoss, PolicyLossTerm, count_units
from ..losses.policy_metrics import engine_agreement, policy_metrics
from ..ops.scoring import TokenScores, score_tokens
from ..rewards.suite import RewardTable
from ..rollouts.transformers_engine import evaluation_mode, forked_generators
from ..rollouts.types import Rollout
from .base_trainer import AnyDataset
from .online_data import columns_of
from .online_metrics import (
    CompletionFigures,
    add_completions,
    add_metrics,
    add_reward_metrics,
    completion_metrics,
    gather_figures,
    warn_of_broken,
)
from .online_sampling import Row, check_not_empty, sampling_params
from .online_setup import OnlineSetup
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
from .text_evaluation import TextEvalCollector, evaluate_text

logger = logging.get_logger(__name__)

ResultT = TypeVar("ResultT")


class OnlineTrainer(OnlineSetup):
    """Base of the methods that learn from rewards of their own completions (GRPO, RLOO)."""

    __doc__ += OnlineSetup.__doc__[OnlineSetup.__doc__.index("\n    Args:") :]

    # ---- What a method says ----

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

    def _forget_rollouts(self) -> None:
        self.buffer = RolloutBuffer()
        self._step = 0  # micro-steps so far, of this process
        self._row_batches: list[list[Row]] = []
        self._micro_batches: deque[RolloutBatch] = deque()
        self._evaluation: TextEvalCollector | None = None
        self._eval_batches, self._eval_rows_left = 0, None

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

    def _together(self, what: str, action: Callable[[], ResultT]) -> ResultT:
        """Do this process's part; what fails on one process ends all, rather than leaving the others waiting."""
        if self.accelerator.num_processes == 1:
            return action()
        failure, result = None, None
        try:
            result = action()
        except Exception as error:
            failure = error
        problems = gather_object([failure and f"{type(failure).__name__}: {failure}"])
        if failure is not None:
            raise failure
        for index, problem in enumerate(problems):
            if problem:
                raise RuntimeError(f"{what} failed on process {index}. {problem}")
        return result

    @profiling_decorator
    def _generate(self, model: nn.Module, rows: Sequence[Row]) -> list[Rollout]:
        seed = None
        if self.mode == "eval":
            seed = hash((self.args.seed, self.accelerator.process_index, self._eval_batches)) % 2**31
            self._eval_batches += 1
        sampling = sampling_params(self.args, evaluation_seed=seed)
        rollouts = self._together("Sampling", lambda: self.rollouts.generate(model, rows, sampling))
        check_not_empty(rollouts, self.accelerator)
        return rollouts

    @profiling_decorator
    def _score(self, rollouts: Sequence[Rollout], rows: Sequence[Row]) -> RewardTable:
        """Rewards of this process's completions."""

        def score() -> RewardTable:
            # A function that draws numbers, or even sets the seed, leaves those of sampling alone.
            with forked_generators(self.model):
                return self.rewards.score(
                    [rollout.prompt for rollout in rollouts],
                    [rollout.completion for rollout in rollouts],
                    [rollout.completion_ids for rollout in rollouts],
                    columns_of(rows, rollouts),
                    trainer_state=self.state,
                    environments=None if self.environments is None else [rollout.environment for rollout in rollouts],
                )

        table = self._together("Scoring", score)
        for index, rollout in enumerate(rollouts):
            if rollout.error is not None:  # it counts neither for its group nor in the mean
                table.values_FN[:, index] = torch.nan
        warn_of_broken(rollouts)
        for name, seconds in zip(table.names, table.latencies_s, strict=True):
            profiling_context(self, name).report(seconds)
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
        if self.mode == "eval":  # the last rows may only fill the batch up
            batch["is_real"] = first + torch.arange(len(rollouts), device=self.accelerator.device) < real
            batch["train_mask"][~batch["is_real"]] = 0
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
                self.buffer.micro_batches = []  # not two generations in memory
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
        if "rollout_logps" in inputs and not self.loss_options.corrects_engine:  # else told at the time of sampling
            logps = inputs.get("old_logps", scores.logps.detach())
            add_metrics(
                self.reducer,
                self.mode,
                engine_agreement(*engine_differences(logps, inputs["rollout_logps"], inputs["train_mask"])),
            )
        total = torch.zeros((), device=scores.logps.device)
        for term in terms:
            part = term.weight * self.normalize(
                term.total, term.unit, {term.unit: term.count}, over_step=num_items_in_batch is not None
            )
            total = total + part
            if self.mode == "eval":
                count = _count_of_real_rows(term, inputs.get("is_real"))
                self.reducer.add("eval", "loss", term.weight * term.total, count, part=term.name)
            if len(terms) > 1 and term.name == "policy":
                is_training = self.mode == "train"
                pair = (part.detach(), 1 / self._accumulation) if is_training else (term.total, term.count)
                self.reducer.add(self.mode, "policy_loss", *pair)
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
            eval_dataset = WholeStream(eval_dataset) if self.accelerator.num_processes > 1 else eval_dataset
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

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        passes, batches = super()._init_training_state(*args, **kwargs)
        ahead = (batches - self._step) % self._micro_steps_per_generation
        if ahead:
            logger.warning(
                "The data does not go on where the checkpoint's generation was left: `ignore_data_skip`, or the number "
                "of processes, the batch size or `num_iterations` are not what they were. Completions are sampled anew."
            )
            self._step += ahead
            self.buffer.micro_batches = []
        return passes, batches

    def _run_epoch(self, *args: Any, epoch: int, train_dataloader: DataLoader, **kwargs: Any) -> None:
        # Where a resumed run on several processes skips batches, the base class does not find the sampler.
        batch_sampler = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(batch_sampler, "batch_sampler"):
            batch_sampler = batch_sampler.batch_sampler
        sampler = getattr(batch_sampler, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, train_dataloader=train_dataloader, **kwargs)

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
        if not all(gather_object([len(self.buffer)])):  # one process would sample anew, and wait for the others
            self.buffer.micro_batches = []


def _count_of_real_rows(term: PolicyLossTerm, is_real_B: Tensor | None) -> Tensor:
    """What a term is a sum over, without rows that fill a batch up: they have no tokens, yet are completions."""
    if is_real_B is None or term.unit in ("tokens", "trained_tokens"):
        return term.count
    return term.count * (is_real_B.any() if term.unit == "batches" else is_real_B.float().mean())
