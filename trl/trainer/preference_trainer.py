"""
What the methods that learn from preferences share: losses that are means over pairs or rows of a whole optimizer step,
and, for those that hold the policy against a reference, how both are built, kept and asked.

`PreferenceTrainer` is the base of the reward model, DPO and KTO; `ReferencePolicyTrainer` adds the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging

from ..callbacks.reference_sync import SyncRefModelCallback
from ..models.reference import ReferencePolicy, disable_dropout_in_model
from ..ops.scoring import TokenScores, score_tokens
from .base_config import _BaseConfig
from .base_trainer import AnyDataset, EvalDatasets, _BaseTrainer, check_dataset_type, is_peft_model
from .policy_setup import ReferenceMixin, check_reference_sync, prepare_policy, reference_loader
from .reference_logps import add_reference_logps
from .setup import check_single_device_per_process, resolve_args
from .step_counts import StepCountsMixin

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import BitsAndBytesConfig

logger = logging.get_logger(__name__)


class PreferenceTrainer(StepCountsMixin, _BaseTrainer):
    """
    Base of methods whose loss is a sum over pairs, rows or tokens, divided by their number in the whole step.

    A method says how many of each a batch has (`count_items`), and divides with `normalize`.
    """

    # `compute_loss` leaves the division by the accumulated micro-batches to the base class; `normalize` knows.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # says the same to Transformers before 5.19

    def count_items(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What the loss of a collated batch is divided by, as scalar tensors by unit, e.g. `{"pairs": ...}`."""
        raise NotImplementedError

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """Count the units of an optimizer step, over its micro-batches and all processes; returns the first kind."""
        counts = self.count_step(map(self.count_items, batch_samples), device)
        if not counts:
            return None
        first = next(iter(counts.values()))
        if self.model.training and self.is_in_train and not first:
            raise ValueError(
                f"Step {self.state.global_step + 1} has nothing to learn from: its rows have no completion token. "
                "Check the completions and `max_length`."
            )
        return first

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._announce_layout()
        return loss


class ReferencePolicyTrainer(ReferenceMixin, PreferenceTrainer):
    """
    Base of the methods that compare the policy's log-probs with those of a reference (DPO, KTO).

    Args:
        model: name or path of a model, the model, or a PEFT model.
        ref_model: the reference. By default a frozen copy of `model`; with an adapter, `model` without the new
            adapter, or with a frozen copy of the one that it came with.
        args: the method's config. By default one with output folder `<model>-<method>`.
        data_collator: makes a batch of rows. By default the method's own, or its vision kin for images.
        train_dataset: rows in one of the formats of the method. Required.
        eval_dataset: the same for evaluation; several by name in a dictionary.
        processing_class: tokenizer or processor. By default the one published with the model.
        compute_metrics: makes metrics of the predictions of an evaluation. Needs full logits, so costs memory.
        callbacks: more trainer callbacks.
        optimizers: an optimizer and a scheduler of your own.
        quantization_config: quantize the model while it is loaded (QLoRA). Only with a name or path.
        peft_config: train an adapter of this kind instead of all weights.

    Raises:
        ValueError: no training dataset, options that exclude each other, or data that has nothing to train on.
        TypeError: a dataset, tokenizer or adapter config of a wrong type.
    """

    config_class: ClassVar[type[_BaseConfig]]
    # Columns of the dataset that hold log-probs of the reference, and what a prepared row must keep.
    reference_columns: tuple[str, ...]
    signature_columns: ClassVar[tuple[str, ...]]
    vision_columns: ClassVar[tuple[str, ...]]
    # Whether a quantization config beside a model is an error rather than ignored with a warning.
    refuses_late_quantization: ClassVar[bool] = False
    _label_key = "input_ids"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: _BaseConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDatasets | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        if train_dataset is None:
            raise ValueError(
                f"{type(self).__name__} needs a `train_dataset`. To evaluate only, pass the evaluation data as "
                "`train_dataset` too and call `evaluate()`."
            )
        check_dataset_type(train_dataset, "train_dataset")
        if isinstance(ref_model, str):
            raise TypeError(
                f"`ref_model` is a model, found the name {ref_model!r}. Load it: "
                "`AutoModelForCausalLM.from_pretrained(...)`."
            )
        if ref_model is not None and ref_model is model:
            raise ValueError(
                "`ref_model` is the same object as `model`, so the reference would change with the policy. Leave "
                "`ref_model` out: a frozen copy is the default."
            )
        args = resolve_args(args, self.config_class, model, self._name)
        check_single_device_per_process(args, type(self).__name__)
        example = next(iter(train_dataset), {})
        self._is_vision_dataset = "image" in example or "images" in example
        self._check_reference_options(args, model, train_dataset, peft_config)
        if quantization_config is not None and not isinstance(model, str) and self.refuses_late_quantization:
            raise ValueError(
                "`quantization_config` quantizes a model while it is loaded, but `model` is a model already. Pass its "
                "name or path, or load it quantized."
            )
        self.check_options(args, example)

        policy = prepare_policy(
            model,
            processing_class,
            args,
            with_images=self._is_vision_dataset,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        model, processing_class = policy.model, policy.processing_class
        self.router_aux_loss_coef, self.aux_loss_enabled = policy.router_aux_loss_coef, policy.aux_loss_enabled
        self.precompute_ref_logps = args.precompute_ref_log_probs
        self._ref_model_given, self._columns_given = ref_model is not None, set(example)
        self.load_reference = reference_loader(model, args, quantization_config)
        self.reference = self._make_reference(args, model, ref_model, policy.came_with_adapter)

        self.args, self.processing_class = args, processing_class  # the preparation below reads them
        self.setup_method(args)
        data_collator = data_collator or self.make_collator()
        self._preflight_reports = []
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
        )
        if self.precompute_ref_logps:
            self.train_dataset = self._add_reference_logps(self.train_dataset, "train")
            self.eval_dataset = self._add_reference_logps(self.eval_dataset, "eval")
            self._precomputed_before_training = True
        else:
            self.reference.prepare(self.accelerator)
        self.doctor.starts_at_reference = self._starts_at_reference(peft_config)
        if args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    # ---- What a method says ----

    def check_options(self, args: _BaseConfig, example: dict[str, Any]) -> None:
        """Refuse combinations that cannot work, before anything is loaded."""

    def setup_method(self, args: _BaseConfig) -> None:
        """Read what `compute_loss` needs off the config."""
        raise NotImplementedError

    def make_collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        """The default collator, for text or for images."""
        raise NotImplementedError

    def tokenize_dataset(self, dataset: AnyDataset, name: str) -> tuple[AnyDataset, Any]:
        """A text dataset as token ids, with the report of its preparation."""
        raise NotImplementedError

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor | None, ...]:
        """The reference's summed log-probs of a collated batch, one tensor for each of `reference_columns`."""
        raise NotImplementedError

    # ---- Construction ----

    def _check_reference_options(
        self,
        args: _BaseConfig,
        model: Any,
        train_dataset: AnyDataset,
        peft_config: Any,
    ) -> None:
        if args.sync_ref_model and args.precompute_ref_log_probs:
            raise ValueError(
                "`sync_ref_model=True` changes the reference while training, so its log-probs cannot be computed "
                "before. Turn off `precompute_ref_log_probs`, or `sync_ref_model`."
            )
        check_reference_sync(args, model, peft_config)
        if args.precompute_ref_log_probs:
            problem = None
            if isinstance(train_dataset, IterableDataset):
                problem = "a stream has no rows to keep them with. Use a map-style dataset"
            elif self._is_vision_dataset:
                problem = "images are read while training. Turn it off"
            if problem:
                raise ValueError(
                    f"`precompute_ref_log_probs=True` computes log-probs of every row ahead, but {problem}."
                )

    def _make_reference(
        self,
        args: _BaseConfig,
        model: nn.Module,
        ref_model: nn.Module | None,
        came_with_adapter: bool,
    ) -> ReferencePolicy:
        if ref_model is not None and args.disable_dropout:
            disable_dropout_in_model(ref_model)
        if self.precompute_ref_logps and ref_model is None and not is_peft_model(model):
            return ReferencePolicy()  # the policy before its first step
        return ReferencePolicy.of(model, ref_model, came_with_adapter=came_with_adapter, load=self.load_reference)

    def _starts_at_reference(self, peft_config: PeftConfig | None) -> bool:
        """Whether the policy, before its first step, is the reference: its log-ratios are all 0 then."""
        given = self._ref_model_given or set(self.reference_columns) <= self._columns_given
        # The ways of initialising LoRA in which it changes nothing yet.
        changes_nothing = getattr(peft_config, "init_lora_weights", False) in (True, "gaussian")
        return not given and (peft_config is None or changes_nothing)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference where it is a model of its own; None under an adapter, or with precomputed log-probs."""
        return None if self.precompute_ref_logps else super().ref_model

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(
                self.vision_columns if self._is_vision_dataset else (*self.signature_columns, *self.reference_columns)
            )

    # ---- Data ----

    _precomputed_before_training = False

    def prepare_dataset(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Tokenize, and add the reference's log-probs where they are computed ahead; images are left as they are."""
        if self._is_vision_dataset:  # the collator reads messages and images as they are
            return dataset
        dataset, report = self.tokenize_dataset(dataset, name)
        self._preflight_reports.append(report)
        report.raise_if_unusable()
        if self._precomputed_before_training:  # a dataset given to `evaluate`
            if self.state.global_step > 0 and self.reference.is_policy and not is_peft_model(self.model):
                raise ValueError(
                    "The reference's log-probs of this dataset cannot be computed any more: with "
                    "`precompute_ref_log_probs=True` the reference was the policy before training, which has changed. "
                    "Pass the dataset as `eval_dataset` at construction, or give a `ref_model`."
                )
            dataset = self._add_reference_logps(dataset, name)
        return dataset

    def _add_reference_logps(self, dataset: EvalDatasets | None, name: str) -> EvalDatasets | None:
        if isinstance(dataset, dict):
            return {key: self._add_reference_logps(split, f"{name}[{key}]") for key, split in dataset.items()}
        if dataset is None or set(self.reference_columns) <= set(dataset.column_names or ()):
            return dataset  # nothing to do, or given with the dataset
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"`precompute_ref_log_probs=True`, but the {name} dataset is a stream, which has no rows to keep them "
                "with. Use a map-style dataset."
            )
        return add_reference_logps(self, dataset, name)

    # ---- Scoring ----

    def score(
        self,
        model: nn.Module | None,
        inputs: dict[str, Any],
        outputs: tuple[str, ...] = (),
        groups: Tensor | None = None,
        reference: bool = False,
    ) -> TokenScores:
        """
        Log-probs of the completion tokens of a batch.

        Args:
            model: the policy as it is trained.
            inputs: inputs of the model with `completion_mask`, [B, T].
            outputs: further statistics, see `score_tokens`.
            groups: [B], rows with one number share a prompt.
            reference: ask the reference, without gradients.
        """
        completion_mask = inputs["completion_mask"]
        batch = {name: value for name, value in inputs.items() if name != "completion_mask"}
        batch["labels"] = batch["input_ids"].masked_fill(completion_mask == 0, -100)
        score = self.reference.score if reference else score_tokens
        return score(model, batch, outputs=outputs, layout=self.layout, groups=groups)
