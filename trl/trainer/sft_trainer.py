"""Supervised fine-tuning: learn to predict the tokens of given texts, all of them or the answers only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from datasets import Dataset, IterableDataset
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from ..data.chat_templates import has_generation_markers
from ..data.collators import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling
from ..data.formats import is_conversational
from ..data.preparation import (
    LanguageModelingOptions,
    check_unprepared_columns,
    prepare_language_modeling_dataset,
)
from ..data.template_checks import is_chat_template_stop_token_trained
from ..data.template_rendering import inner_tokenizer
from ..data.training_templates import get_training_chat_template
from ..losses.language_modeling import LANGUAGE_MODELING_LOSSES
from ..models.adapters import prepare_peft_model
from ..models.fused_head import install_scoring
from ..models.moe import resolve_router_aux_loss
from ..ops.layouts import check_packable
from ..ops.scoring import TokenScores, score_tokens
from ..ops.tensors import selective_log_softmax
from .base_trainer import AnyDataset, EvalDatasets, _BaseTrainer, check_dataset_type, is_peft_model
from .setup import (
    apply_chat_template_path,
    check_is_processor,
    check_single_device_per_process,
    expect_unused_parameters,
    resolve_args,
    resolve_model,
    resolve_processing_class,
    set_eos_token,
    set_pad_token,
    train_added_tokens,
)
from .sft_config import SFTConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import BitsAndBytesConfig

logger = logging.get_logger(__name__)

__all__ = [
    "FLASH_ATTENTION_VARIANTS",
    "DataCollatorForLanguageModeling",
    "DataCollatorForVisionLanguageModeling",
    "SFTTrainer",
    "dft_loss",
]

# Attention implementations that take documents packed into one row as they are.
FLASH_ATTENTION_VARIANTS = {
    "flash_attention_2",
    "flash_attention_3",
    "kernels-community/flash-attn2",
    "kernels-community/flash-attn3",
    "kernels-community/vllm-flash-attn3",
}


def dft_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """
    Dynamic Fine-Tuning's loss of full logits, in the form of a `compute_loss_func`
    (https://huggingface.co/papers/2508.05629). `loss_type="dft"` gives the same without holding the logits.

    Args:
        outputs: the model's outputs, with `logits` of shape [B, T, V].
        labels: [B, T], -100 where a token is not trained.
        num_items_in_batch: trained tokens to divide by; by default those of this batch.
    """
    targets_BT = labels[:, 1:]
    trained_BT = targets_BT != -100
    logps_BT = selective_log_softmax(outputs.logits[:, :-1], targets_BT.clamp(min=0))
    losses_BT = -logps_BT.detach().exp() * logps_BT
    count = trained_BT.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return (losses_BT * trained_BT).sum() / count


class SFTTrainer(_BaseTrainer):
    """
    Supervised fine-tuning of a causal language model.

    The loss of an optimizer step is the sum of its tokens' losses over the number of trained tokens in all its
    micro-batches and processes, so it does not depend on how the step was cut.

    Args:
        model: name or path of a model, the model, or a PEFT model.
        args: an [`SFTConfig`] (or plain `TrainingArguments`). By default an `SFTConfig` with output folder
            `<model>-SFT`.
        data_collator: makes a batch of rows. By default [`DataCollatorForLanguageModeling`], or its vision kin when
            the dataset has images.
        train_dataset: rows in one of the formats of language modeling or prompt and completion, plain or
            conversational, or tokenized. Required.
        eval_dataset: the same for evaluation; several by name in a dictionary.
        processing_class: tokenizer or processor. By default the one published with the model.
        compute_loss_func: deprecated. Gets full logits, the labels and the number of trained tokens of the step.
        compute_metrics: makes metrics of the predictions of an evaluation. Needs full logits, so costs memory.
        callbacks: more trainer callbacks.
        optimizers: an optimizer and a scheduler of your own.
        optimizer_cls_and_kwargs: an optimizer's class and arguments.
        preprocess_logits_for_metrics: reduces logits before they are collected for `compute_metrics`.
        quantization_config: quantize the model while it is loaded (QLoRA). Only with a name or path.
        peft_config: train an adapter of this kind instead of all weights.
        formatting_func: makes a text of a row.

    Raises:
        ValueError: no training dataset, options that exclude each other, or data that has nothing to train on.
        TypeError: a dataset, tokenizer or adapter config of a wrong type.
    """

    _name = "SFT"
    _tag_names = ["trl", "sft"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDatasets | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
    ):
        if train_dataset is None:
            raise ValueError(
                "SFTTrainer needs a `train_dataset`. To evaluate only, pass the evaluation data as `train_dataset` too "
                "and call `evaluate()`."
            )
        check_dataset_type(train_dataset, "train_dataset")
        args = resolve_args(args, SFTConfig, model, self._name)
        check_single_device_per_process(args, type(self).__name__)
        example = next(iter(train_dataset), {})
        self._is_vision_dataset = "image" in example or "images" in example
        self._check_options(args, example, data_collator, compute_loss_func, formatting_func)

        model = resolve_model(model, args, quantization_config)
        processing_class = resolve_processing_class(processing_class, model, args)
        if self._is_vision_dataset:
            check_is_processor(processing_class)
        model, processing_class = self._set_special_tokens(args, model, processing_class, peft_config, data_collator)
        if peft_config is not None or is_peft_model(model):
            model = prepare_peft_model(model, peft_config, args)
        model.config.use_cache = False
        install_scoring(model)

        # What the collator and the preparation need to know.
        has_completions = formatting_func is None and {"prompt", "completion"} <= example.keys()
        self.completion_only_loss = has_completions if args.completion_only_loss is None else args.completion_only_loss
        self.chat_template = self._training_chat_template(args, processing_class)
        # One collator serves both datasets; rows without neighbours are laid out padding-free as well.
        packs_whole_documents = (args.packing or args.eval_packing) and args.packing_strategy != "wrapped"
        self.padding_free = bool(args.padding_free or packs_whole_documents)
        if self.padding_free:
            check_packable(install_scoring(model))
        if data_collator is None:
            data_collator = self._default_collator(args, processing_class)
        self._formatting_func = formatting_func
        self._preflight_reports = []
        self.args, self.processing_class = args, processing_class  # the preparation below reads them
        train_dataset = self.prepare_datasets(train_dataset, "train")
        if eval_dataset is not None:
            eval_dataset = self.prepare_datasets(eval_dataset, "eval")
        self.router_aux_loss_coef, self.aux_loss_enabled = resolve_router_aux_loss(model, args.router_aux_loss_coef)
        if self._is_vision_dataset:
            expect_unused_parameters(args)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    # ---- Construction ----

    def _check_options(
        self,
        args: SFTConfig,
        example: dict[str, Any],
        data_collator: Callable | None,
        compute_loss_func: Callable | None,
        formatting_func: Callable | None,
    ) -> None:
        """Refuse combinations that cannot work, before anything is loaded."""
        if args.packing and args.max_length is None:
            raise ValueError(
                "When packing is enabled, `max_length` can't be `None`: it is the length of a packed row. Set it, e.g. "
                "to the model's context length."
            )
        if args.padding_free and data_collator is not None:
            raise ValueError(
                "A custom `data_collator` cannot be used with `padding_free=True`, which is a layout that the default "
                "collator makes. Drop one of them."
            )
        if args.padding_free and not args.packing and args.max_length is not None:
            raise ValueError(
                "When `padding_free=True` without packing, `max_length` is not applied to a batch as a whole. Set "
                "`max_length=None`, or use `packing=True`, which fills rows of `max_length` tokens."
            )
        if args.padding_free and args.packing and args.packing_strategy == "wrapped":
            warnings.warn(
                "`padding_free=True` with `packing_strategy='wrapped'`: wrapped rows are full, so there is no padding "
                "to save. Use `bfd` to keep documents apart."
            )
        if args.padding_free and not args.packing and args.per_device_train_batch_size == 1:
            warnings.warn(
                "`padding_free=True` with a batch of one row saves nothing: one row has no padding. Raise "
                "`per_device_train_batch_size`."
            )
        if args.completion_only_loss and formatting_func is not None:
            raise ValueError(
                "`formatting_func` makes one text of a row, so `completion_only_loss=True` could not tell the completion "
                "from the prompt. Drop one of them, or give the dataset `prompt` and `completion` columns."
            )
        if compute_loss_func is not None:
            if args.loss_type == "dft":
                raise ValueError("`loss_type='dft'` is a loss of its own: it excludes `compute_loss_func`.")
            warnings.warn(
                "`compute_loss_func` is deprecated and will be removed in version 2.0: it needs full logits, which the "
                "trainer otherwise never holds. Subclass SFTTrainer and override `compute_loss`.",
                FutureWarning,
            )
        if args.label_smoothing_factor > 0 and args.loss_type == "nll":
            warnings.warn(
                "`label_smoothing_factor` is deprecated in SFTTrainer and will be removed in version 2.0: it needs full "
                "logits, which the trainer otherwise never holds.",
                FutureWarning,
            )
        self._check_parallelism(args, compute_loss_func)
        if self._is_vision_dataset:
            self._check_vision_options(args)

    @staticmethod
    def _check_parallelism(args: SFTConfig, compute_loss_func: Callable | None) -> None:
        parallelism = args.parallelism_config
        if parallelism is None:
            return
        if parallelism.cp_enabled and args.packing:
            raise ValueError(
                "Context parallelism cuts a row over devices and knows causal masks only, so packed documents would "
                "see each other. Turn `packing` off."
            )
        if parallelism.sp_enabled and parallelism.sp_backend == "deepspeed":
            unsupported = {
                "loss_type='dft'": args.loss_type == "dft",
                "compute_loss_func": compute_loss_func is not None,
                "label_smoothing_factor": args.label_smoothing_factor > 0,
            }
            found = [name for name, used in unsupported.items() if used]
            if found:
                raise ValueError(f"DeepSpeed sequence parallelism computes the plain nll only; remove {found[0]}.")

    @staticmethod
    def _check_vision_options(args: SFTConfig) -> None:
        reason = None
        if args.packing:
            reason = "`packing`: images cannot be packed. Set `packing=False`"
        elif args.padding_free:
            reason = "`padding_free`. Set it to False"
        elif args.max_length is not None and args.truncation_mode == "keep_end":
            reason = (
                "`truncation_mode='keep_end'`, which would cut image tokens. Use `keep_start` or `max_length=None`"
            )
        elif args.assistant_only_loss and Version(transformers.__version__) < Version("5.18"):
            reason = f"`assistant_only_loss` on transformers {transformers.__version__}. It needs 5.18 or newer"
        if reason:
            raise ValueError(f"A dataset with images does not go with {reason}.")

    def _set_special_tokens(
        self,
        args: SFTConfig,
        model: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        peft_config: PeftConfig | None,
        data_collator: Callable | None,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
        """Chat template, end-of-sequence and pad token, as configured."""
        if args.chat_template_path is not None:
            model, processing_class, added = apply_chat_template_path(args.chat_template_path, model, processing_class)
            if peft_config is not None:
                train_added_tokens(peft_config, added)
        if args.eos_token is not None:
            set_eos_token(processing_class, model, args.eos_token)
        if data_collator is None:
            set_pad_token(processing_class, model, args.pad_token)
        return model, processing_class

    @staticmethod
    def _training_chat_template(
        args: SFTConfig, processing_class: PreTrainedTokenizerBase | ProcessorMixin
    ) -> str | None:
        """A template that marks the assistant's words, where the tokenizer's own does not and they alone are trained."""
        if not args.assistant_only_loss or not processing_class.chat_template:
            return None
        template = None
        if not has_generation_markers(processing_class.chat_template):
            try:
                template = get_training_chat_template(processing_class)
            except ValueError:
                return None  # the masks come from rendering growing prefixes of each conversation
        if not is_chat_template_stop_token_trained(processing_class, template):
            warnings.warn(
                "`assistant_only_loss=True`, but the chat template's end-of-turn token is outside the assistant mask: "
                "the model does not learn to stop. Move it inside the template's generation block."
            )
        return template

    def _default_collator(
        self, args: SFTConfig, processing_class: PreTrainedTokenizerBase | ProcessorMixin
    ) -> DataCollatorForLanguageModeling | DataCollatorForVisionLanguageModeling:
        if self._is_vision_dataset:
            return DataCollatorForVisionLanguageModeling(
                processor=processing_class,
                max_length=args.max_length,
                completion_only_loss=self.completion_only_loss,
                assistant_only_loss=args.assistant_only_loss,
                chat_template=self.chat_template,
                pad_to_multiple_of=args.pad_to_multiple_of,
                dataset_text_field=args.dataset_text_field,
            )
        parallelism = args.parallelism_config
        return DataCollatorForLanguageModeling(
            pad_token_id=inner_tokenizer(processing_class).pad_token_id,
            padding_free=self.padding_free,
            return_position_ids=parallelism is not None and parallelism.sp_enabled,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = (
                ["messages", "prompt", "completion", "image", "images", self.args.dataset_text_field]
                if self._is_vision_dataset
                else ["input_ids", "labels", "seq_lengths"]
            )

    # ---- Data ----

    def prepare_dataset(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Tokenize, label, truncate or pack, unless the dataset is used as it is (asked for, or images)."""
        args = self.args
        if self._is_vision_dataset:  # the collator reads messages and images as they are
            return dataset
        example = next(iter(dataset), {})
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset", False):
            check_unprepared_columns(list(example), name)
            return dataset
        conversational = "input_ids" in example or "conversations" in example or is_conversational(example)
        if args.assistant_only_loss and not conversational:
            raise ValueError(
                "You set `assistant_only_loss=True`, but the dataset is not conversational: it has the columns "
                f"{', '.join(example) or '(none)'}. Without turns nobody is the assistant. Use `messages` (or "
                "conversational `prompt` and `completion`), or turn the option off."
            )
        options = LanguageModelingOptions.of(args, completion_only_loss=self.completion_only_loss)
        if not name.startswith("train"):
            packing = args.packing if args.eval_packing is None else args.eval_packing
            options = replace(options, packing=packing)
        dataset, report = prepare_language_modeling_dataset(
            dataset, self.processing_class, options, formatting_func=self._formatting_func, name=name
        )
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
        The loss of a micro-batch: its tokens' losses over the trained tokens of the whole step.

        Args:
            model: the model, wrapped as it is trained.
            inputs: a collated batch.
            return_outputs: also return the model's outputs. Deprecated: costs a second forward pass and full logits.
            num_items_in_batch: trained tokens of the step, over micro-batches and processes. By default those of
                this micro-batch.
        """
        from_logits = self.compute_loss_func is not None or self.label_smoother is not None
        if from_logits:
            loss = self._loss_from_logits(model, inputs, num_items_in_batch)
            with torch.no_grad():  # for the metrics alone
                scores = self._score(model, inputs)
            count = scores.mask.sum()
        else:
            scores = self._score(model, inputs)
            count = scores.mask.sum()
            loss = self._normalize(scores.loss_sum, count, num_items_in_batch)
        self._add_metrics(inputs, scores, loss if from_logits else None, count)
        if self.aux_loss_enabled:
            micro_batches = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * scores.aux_loss / micro_batches
        return (loss, self.outputs_with_logits(model, inputs)) if return_outputs else loss

    def _score(self, model: nn.Module, inputs: dict[str, Any]) -> TokenScores:
        return score_tokens(
            model,
            inputs,
            outputs=("entropy", "is_top1"),
            objective=LANGUAGE_MODELING_LOSSES[self.args.loss_type],
        )

    def _normalize(self, loss_sum: Tensor, count: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and parallelism.sp_enabled and parallelism.sp_backend == "deepspeed":
            # Each process of the group holds a part of the same rows.
            group = self.accelerator.torch_device_mesh["sp"].get_group()
            loss_sum = torch.distributed.nn.functional.all_reduce(loss_sum, group=group)
            torch.distributed.all_reduce(count, group=group)
        if num_items_in_batch is None:
            return loss_sum / count.clamp(min=1)
        loss = loss_sum / num_items_in_batch
        if self.args.average_tokens_across_devices:
            # The count is over all processes, whose gradients are then averaged.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _loss_from_logits(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        outputs = self._full_outputs(model, inputs)
        labels = inputs["labels"]
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        else:
            loss = self.label_smoother(outputs, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _add_metrics(self, inputs: dict[str, Any], scores: TokenScores, loss: Tensor | None, count: Tensor) -> None:
        mode = self.mode
        self.reducer.add(mode, "entropy", scores.entropies.sum(), count)
        self.reducer.add(mode, "mean_token_accuracy", scores.is_top1.sum(), count)
        if self.aux_loss_enabled:
            self.reducer.add(mode, "aux_loss", scores.aux_loss)
        if mode == "eval":
            self.reducer.add(mode, "loss", scores.loss_sum if loss is None else loss * count, count)
            return
        if "attention_mask" in inputs:
            tokens = inputs["attention_mask"].sum()
        else:
            tokens = inputs["position_ids"].numel() if "position_ids" in inputs else inputs["input_ids"].numel()
        self.reducer.add_total("num_tokens", tokens)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        count = super()._get_num_items_in_batch(batch_samples, device)
        if self.model.training and count is not None and self.is_in_train and not int(count):
            tokenizer = inner_tokenizer(self.processing_class)
            rows = [row for batch in batch_samples for row in batch["input_ids"].tolist()]
            shown = "; ".join(f"row {i}: {tokenizer.decode(row[:16])!r}..." for i, row in enumerate(rows[:4]))
            raise ValueError(
                f"No token of step {self.state.global_step + 1} is trained: every label of its {len(rows)} rows is "
                f"-100. The rows begin with: {shown}. Check the labels (prompt longer than `max_length`? a mask "
                "without any 1?)."
            )
        return count
