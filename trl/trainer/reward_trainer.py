"""Reward modeling: learn a score from pairs of answers, so that the better one of a pair scores higher."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.utils import is_peft_available

from ..data.preference_preparation import PreferenceOptions, prepare_reward_dataset
from ..data.reward_collator import DataCollatorForPreference
from ..data.template_rendering import inner_tokenizer
from ..losses.reward import bradley_terry_loss, centering_penalty
from ..models.adapters import prepare_peft_model
from ..models.reference import disable_dropout_in_model
from .base_trainer import AnyDataset, EvalDatasets, check_dataset_type, is_peft_model
from .preference_trainer import PreferenceTrainer
from .reward_config import RewardConfig
from .setup import (
    apply_chat_template_path,
    check_single_device_per_process,
    resolve_args,
    resolve_model,
    resolve_processing_class,
    set_eos_token,
    set_pad_token,
    train_added_tokens,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import BitsAndBytesConfig

__all__ = ["DataCollatorForPreference", "RewardTrainer", "suppress_seqcls_warning"]


# ---- A language model becomes a reward model ----

_EXPECTED_WHEN_LOADING = {("score.weight", "MISSING"), ("lm_head.weight", "UNEXPECTED")}
_LOAD_REPORT_ROW = re.compile(r"^(\S+) *\|.*?\b(MISSING|UNEXPECTED|MISMATCH|CONVERSION)\b", re.MULTILINE)
_TERMINAL_STYLE = re.compile(r"\x1b\[[0-9;]*m")


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Whether a log record is anything but a load report that names only the head that was swapped."""
    rows = _LOAD_REPORT_ROW.findall(_TERMINAL_STYLE.sub("", record.getMessage()))
    return not rows or not set(rows) <= _EXPECTED_WHEN_LOADING


@contextlib.contextmanager
def suppress_seqcls_warning() -> Iterator[None]:
    """
    Silence what Transformers reports when a language model is loaded as a classifier: `lm_head.weight` is not used,
    `score.weight` is new. A report that names any other weight is shown whole.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_worth_reading)
    try:
        yield
    finally:
        logger.removeFilter(_is_worth_reading)


class _AutoRewardModel(AutoModelForSequenceClassification):
    """Loads any checkpoint as a classifier with one label: its score."""

    @classmethod
    def from_pretrained(cls, model_id: str, *args: Any, config: Any, **kwargs: Any) -> PreTrainedModel:
        saved_as = (config.architectures or [""])[0]
        is_classifier = saved_as.endswith("ForSequenceClassification")
        if is_classifier and config.num_labels != 1 and not kwargs.get("ignore_mismatched_sizes"):
            raise ValueError(
                f"{model_id!r} is a classifier with {config.num_labels} labels, and a reward model has one: the score. "
                "Start from the language model it was made from, or drop its head with "
                '`model_init_kwargs={"ignore_mismatched_sizes": True}`.'
            )
        config.num_labels = 1
        with suppress_seqcls_warning():
            return super().from_pretrained(model_id, *args, config=config, **kwargs)


def _check_one_label(model: nn.Module) -> None:
    if model.config.num_labels != 1:
        raise ValueError(
            f"A reward model gives one number, so its `num_labels` is 1. This {type(model).__name__} has "
            f"{model.config.num_labels}. Load it with "
            "`AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)`, or pass its name or path."
        )


def _for_classification(peft_config: PeftConfig | None) -> PeftConfig | None:
    """The adapter's config with the task type under which PEFT trains and saves the new head along with it."""
    if peft_config is None or not is_peft_available():
        return peft_config
    from peft import PeftConfig, TaskType

    if not isinstance(peft_config, PeftConfig) or peft_config.task_type == TaskType.SEQ_CLS:
        return peft_config
    if peft_config.task_type is not None:
        warnings.warn(
            f"`task_type={str(peft_config.task_type)!r}` in `peft_config` would leave the reward model's new head "
            "random and frozen. It is set to 'SEQ_CLS'."
        )
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = TaskType.SEQ_CLS
    return peft_config


class RewardTrainer(PreferenceTrainer):
    """
    Training of a reward model on pairs of answers, with the Bradley-Terry model of preferences
    (https://huggingface.co/papers/2203.02155).

    The loss of an optimizer step is the mean over all pairs in its micro-batches and processes, so it does not depend on
    how the step was cut.

    Args:
        model: name or path of a model, which gets a new head with one output; a sequence classification model with
            `num_labels=1`; or a PEFT model of one.
        args: a [`RewardConfig`] (or plain `TrainingArguments`). By default a `RewardConfig` with output folder
            `<model>-Reward`.
        data_collator: makes a batch of rows. By default [`DataCollatorForPreference`].
        train_dataset: pairs in the preference format (`chosen`, `rejected`, and `prompt` or a common beginning), plain
            or conversational, or tokenized (`chosen_ids`, `rejected_ids`); optionally a `margin` per row. Required.
        eval_dataset: the same for evaluation; several by name in a dictionary.
        processing_class: tokenizer. By default the one published with the model.
        compute_metrics: makes metrics of the predictions of an evaluation: `predictions` is an array
            [pairs, 2] of the chosen and the rejected answer's rewards, `label_ids` is 0 for every pair (the column of
            the chosen answer).
        callbacks: more trainer callbacks.
        optimizers: an optimizer and a scheduler of your own.
        optimizer_cls_and_kwargs: an optimizer's class and arguments.
        preprocess_logits_for_metrics: changes the rewards [pairs, 2] before they are collected for `compute_metrics`.
        quantization_config: quantize the model while it is loaded (QLoRA). Only with a name or path.
        peft_config: train an adapter of this kind, and the new head, instead of all weights.

    Raises:
        ValueError: no training dataset, a model with more than one label, options that exclude each other, or data that
            has nothing to train on.
        TypeError: a dataset, tokenizer or adapter config of a wrong type.
    """

    _name = "Reward"
    _tag_names = ["trl", "reward-trainer"]
    _template_file = "rm_model_card.md"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDatasets | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        if train_dataset is None:
            raise ValueError(
                "RewardTrainer needs a `train_dataset`. To evaluate only, pass the evaluation data as `train_dataset` "
                "too and call `evaluate()`."
            )
        check_dataset_type(train_dataset, "train_dataset")
        args = resolve_args(args, RewardConfig, model, self._name)
        check_single_device_per_process(args, type(self).__name__)
        self._check_parallelism(args)

        model = resolve_model(model, args, quantization_config, _AutoRewardModel)
        _check_one_label(model)
        processing_class = resolve_processing_class(processing_class, model, args, text_only=True)
        peft_config = _for_classification(peft_config)
        model, processing_class = self._set_special_tokens(args, model, processing_class, peft_config)
        if peft_config is not None or is_peft_model(model):
            model = prepare_peft_model(model, peft_config, args)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        model.config.use_cache = False

        if data_collator is None:
            data_collator = DataCollatorForPreference(
                pad_token_id=inner_tokenizer(processing_class).pad_token_id,
                pad_to_multiple_of=args.pad_to_multiple_of,
            )
        self._preflight_reports = []
        self.args, self.processing_class = args, processing_class  # the preparation below reads them
        train_dataset = self.prepare_datasets(train_dataset, "train")
        if eval_dataset is not None:
            eval_dataset = self.prepare_datasets(eval_dataset, "eval")

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.can_return_loss, self.label_names = True, []  # a pair is its own label

    # ---- Construction ----

    @staticmethod
    def _check_parallelism(args: RewardConfig) -> None:
        parallelism = args.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "RewardTrainer reads the score at the last token of a row, so a row cannot be cut over devices. Turn "
                "context and sequence parallelism off in `parallelism_config`."
            )

    @staticmethod
    def _set_special_tokens(
        args: RewardConfig,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        peft_config: PeftConfig | None,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Chat template, end-of-sequence and pad token, as configured. The model finds a row's end by the pad token."""
        if args.chat_template_path is not None:
            model, processing_class, added = apply_chat_template_path(args.chat_template_path, model, processing_class)
            if peft_config is not None:
                train_added_tokens(peft_config, added, head=None)
        if args.eos_token is not None:
            set_eos_token(processing_class, model, args.eos_token)
        set_pad_token(processing_class, model, args.pad_token)
        return model, processing_class

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["chosen_ids", "rejected_ids", "margin"]

    # ---- Data ----

    def prepare_dataset(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Tokenize both answers of each pair, and leave out pairs that are too long."""
        options = PreferenceOptions.of(self.args)
        dataset, report = prepare_reward_dataset(dataset, self.processing_class, options, name=name)
        self._preflight_reports.append(report)
        report.raise_if_unusable()
        return dataset

    # ---- Loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """
        The loss of a micro-batch: its pairs' losses over the pairs of the whole step.

        Args:
            model: the model, wrapped as it is trained.
            inputs: a collated batch: `input_ids` and `attention_mask` [2B, T], chosen answers first, and `margin` [B]
                where the dataset has it.
            return_outputs: also return the model's outputs, whose `logits` [2B, 1] are the rewards.
            num_items_in_batch: pairs of the step, over micro-batches and processes. By default those of this
                micro-batch.
        """
        margins_B = inputs.get("margin")
        outputs = model(**{name: value for name, value in inputs.items() if name != "margin"})
        rewards_R = outputs.logits.squeeze(-1)
        if rewards_R.dtype in (torch.float16, torch.bfloat16):
            rewards_R = rewards_R.float()
        chosen_B, rejected_B = rewards_R.chunk(2)
        if self.mode == "eval" and self.accelerator.num_processes > 1:  # uncounted rows fill up batches
            real_B = inputs["attention_mask"].any(dim=1).view(2, -1).all(dim=0)
            chosen_B, rejected_B = chosen_B[real_B], rejected_B[real_B]
            margins_B = None if margins_B is None else margins_B[real_B]

        losses_B = bradley_terry_loss(chosen_B, rejected_B, margins_B)
        if self.args.center_rewards_coefficient is not None:
            losses_B = losses_B + self.args.center_rewards_coefficient * centering_penalty(chosen_B, rejected_B)
        self._add_metrics(inputs, losses_B, chosen_B, rejected_B)
        counts = {"pairs": torch.tensor(len(losses_B))}
        loss = self.normalize(losses_B.sum(), "pairs", counts, over_step=num_items_in_batch is not None)
        return (loss, outputs) if return_outputs else loss

    def _add_metrics(self, inputs: dict[str, Any], losses_B: Tensor, chosen_B: Tensor, rejected_B: Tensor) -> None:
        mode, count = self.mode, len(chosen_B)
        if mode == "train":
            self.reducer.add_total("num_tokens", inputs["attention_mask"].sum())
        if not count:
            return
        rewards = torch.cat([chosen_B, rejected_B])
        self.reducer.add(mode, "min_reward", rewards.min())
        self.reducer.add(mode, "mean_reward", rewards.sum(), 2 * count)
        self.reducer.add(mode, "max_reward", rewards.max())
        self.reducer.add(mode, "accuracy", (chosen_B > rejected_B).sum(), count)
        self.reducer.add(mode, "margin", (chosen_B - rejected_B).sum(), count)
        if mode == "eval":
            self.reducer.add(mode, "loss", losses_B.sum(), count)

    def count_items(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        return {"pairs": torch.tensor(len(inputs["input_ids"]) // 2)}

    # ---- Evaluation ----

    def _uncounted_row(self, row: dict[str, Any]) -> dict[str, Any]:
        # One side without a token, which no pair has; the other with one, so that no batch is empty.
        return {**row, "chosen_ids": row["chosen_ids"][:1], "rejected_ids": []}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, rewards [B, 2] of the chosen and the rejected answers, and the column of the chosen one (0) [B]."""
        if prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        rewards_B2 = torch.stack(outputs.logits.squeeze(-1).detach().chunk(2), dim=1)
        return loss.detach(), rewards_B2, torch.zeros(len(rewards_B2), dtype=torch.long, device=rewards_B2.device)
