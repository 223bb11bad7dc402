"""
What every trainer shares, on top of `transformers.Trainer`.

Metrics as sums with counts, evaluation without labels or logits, whole checkpoints, the pre-flight report, activation
offloading, and the model card. What a method computes is in its own file; what happens before the first step (loading,
special tokens, adapters) is in `setup.py`.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import is_peft_available, logging

from ..data.dataset_report import DatasetReport
from ..extras.profiling import profiling_decorator
from ..models.activation_offloading import get_act_offloading_ctx_manager
from ..models.selective_activation_checkpointing import enable_selective_activation_checkpointing
from ..ops.layouts import is_packed, prepare_packed
from ..ops.scoring import find_causal_lm
from ..reports.doctor import install_doctor
from ..reports.model_card import generate_model_card
from ..reports.plots import plot_training_curves
from ..reports.tracking import get_comet_experiment_url, get_trackio_space_url, get_wandb_run_url
from .base_config import _BaseConfig
from .checkpointing import AtomicCheckpointMixin
from .hub import HubPushMixin
from .reducer import Reducer

if is_peft_available():
    from peft import PeftModel

logger = logging.get_logger(__name__)

AnyDataset = Dataset | IterableDataset
EvalDatasets = AnyDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset]


def check_dataset_type(dataset: Any, name: str) -> None:
    """Refuse what is not a `datasets` data set, and say how to make one."""
    if isinstance(dataset, (Dataset, IterableDataset)):
        return
    hint = "Wrap rows with `datasets.Dataset.from_list(rows)`."
    if isinstance(dataset, Mapping):
        hint = f"Choose one of its splits, e.g. dataset[{next(iter(dataset), 'train')!r}]."
    raise TypeError(f"`{name}` is a datasets.Dataset or IterableDataset, found {type(dataset).__name__}. {hint}")


def _has_stream(dataset: Any) -> bool:
    """Whether a dataset, or one of several, is a stream."""
    if isinstance(dataset, Mapping):
        return any(map(_has_stream, dataset.values()))
    return isinstance(dataset, IterableDataset)


def is_peft_model(model: nn.Module) -> bool:
    return is_peft_available() and isinstance(model, PeftModel)


class _BaseTrainer(AtomicCheckpointMixin, HubPushMixin, Trainer):
    """Base of all trainers. A method sets the class attributes, prepares its data, and computes its loss."""

    _name = "Base"
    _tag_names: list[str] = []
    _template_file: str | None = None
    paper_id: str | None = None
    paper_title: str | None = None
    citation: str | None = None

    args: _BaseConfig
    # Where a batch holds what `compute_metrics` gets as labels.
    _label_key = "labels"

    def __init__(self, *args: Any, **kwargs: Any):
        config: _BaseConfig = kwargs["args"]
        if any(map(_has_stream, (kwargs.get("train_dataset"), kwargs.get("eval_dataset")))):
            self._use_local_batches(config)
        if config.device.type == "cpu":
            config.dataloader_pin_memory = False  # there is no device to copy to, only a warning
        self._preflight_reports: list[DatasetReport] = getattr(self, "_preflight_reports", [])
        super().__init__(*args, **kwargs)
        self.doctor = install_doctor(self.callback_handler)
        self.reducer = Reducer(self.accelerator, replicas=self.get_tp_size())
        offload = getattr(self.args, "activation_offloading", False)
        self.maybe_activation_offload_context = (
            get_act_offloading_ctx_manager(model=self.model) if offload else contextlib.nullcontext()
        )
        self._enable_selective_checkpointing()
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    # ---- Construction ----

    @staticmethod
    def _use_local_batches(config: _BaseConfig) -> None:
        """Rows of a stream differ in length, so each process reads its own instead of receiving slices of one batch."""
        if config.accelerator_config.dispatch_batches:
            warnings.warn(
                "`dispatch_batches=True` cannot be used with an iterable dataset whose rows differ in length. It is set "
                "to False: each process reads its own rows."
            )
        config.accelerator_config.dispatch_batches = False

    def _enable_selective_checkpointing(self) -> None:
        """`gradient_checkpointing_kwargs={"selective": True}`: keep attention outputs, recompute the rest."""
        kwargs = self.args.gradient_checkpointing_kwargs or {}
        if "selective" not in kwargs:
            return
        kwargs = dict(kwargs)
        selective = kwargs.pop("selective")
        self.args.gradient_checkpointing_kwargs = kwargs or None
        if not selective:
            return
        problem = None
        if not self.args.gradient_checkpointing:
            problem = "it needs `gradient_checkpointing=True`"
        elif kwargs.get("use_reentrant"):
            problem = "it needs non-reentrant checkpointing; remove `use_reentrant=True`"
        elif is_peft_model(self.model) and self.is_deepspeed_enabled and self._zero_stage() == 3:
            problem = "an adapter under DeepSpeed ZeRO-3 needs re-entrant checkpointing, which excludes it"
        if problem:
            raise ValueError(f"Selective activation checkpointing was asked for, but {problem}.")
        enable_selective_activation_checkpointing(self.model)

    def _zero_stage(self) -> int:
        plugin = self.accelerator.state.deepspeed_plugin
        return plugin.zero_stage if plugin is not None else 0

    # ---- Data ----

    def prepare_dataset(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Turn a user's dataset into what the collator takes. `name` is for messages ("train", "eval", ...)."""
        return dataset

    def prepare_datasets(self, dataset: EvalDatasets, name: str) -> EvalDatasets:
        """`prepare_dataset`, of every split where there are several."""
        if isinstance(dataset, Mapping):
            return {key: self.prepare_datasets(split, f"{name}[{key}]") for key, split in dataset.items()}
        check_dataset_type(dataset, f"{name}_dataset")
        return self.prepare_dataset(dataset, name)

    def evaluate(
        self,
        eval_dataset: EvalDatasets | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Evaluate, and return the metrics.

        Args:
            eval_dataset: a new dataset (prepared here), several by name, or the name of one given at construction.
                By default the one(s) given at construction.
            ignore_keys: outputs of the model to leave out of the predictions.
            metric_key_prefix: first part of each metric's key; a dataset's name follows it where there are several.

        Returns:
            Metrics by key. `<prefix>_loss` is the mean over all items of the dataset, however it was cut into batches.
        """
        if isinstance(eval_dataset, Mapping):
            metrics = {}
            for name, split in eval_dataset.items():
                metrics.update(self.evaluate(split, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.prepare_datasets(eval_dataset, metric_key_prefix)
            if _has_stream(eval_dataset):
                self.accelerator.dataloader_config.dispatch_batches = False
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def get_eval_dataloader(self, eval_dataset: AnyDataset | str | None = None) -> DataLoader:
        """
        The evaluation batches. Processes take equal numbers of rows, so a short last batch is filled up: with rows
        that train nothing, rather than with rows that were seen already and would count twice.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        fillable = (
            isinstance(dataset, Dataset)
            and self.accelerator.num_processes > 1
            and self.compute_metrics is None
            and not self.args.dataloader_persistent_workers
        )
        per_step = self.args.eval_batch_size * self.accelerator.num_processes
        missing = -len(dataset) % per_step if fillable else 0
        row = self._uncounted_row(dataset[0]) if missing else None
        if row is None:
            return super().get_eval_dataloader(eval_dataset)
        filler = Dataset.from_list([row], features=dataset.features)
        return super().get_eval_dataloader(concatenate_datasets([dataset, *[filler] * missing]))

    def _uncounted_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """A prepared row like `row` that neither the loss nor a metric counts; None where there is none."""
        return {**row, "labels": [-100] * len(row["labels"])} if "labels" in row else None

    # ---- Training ----

    def train(self, *args: Any, **kwargs: Any):
        if self.is_world_process_zero():
            for report in self._preflight_reports:
                print(report.render(), flush=True)
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.maybe_activation_offload_context:
            loss = super().training_step(*args, **kwargs)
        # The logged loss is the mean over optimizer steps, each the sum of its micro-batches.
        self.reducer.add("train", "loss", loss.detach(), 1 / self.current_gradient_accumulation_steps)
        return loss

    _layout_announced = False

    def _announce_layout(self) -> None:
        """Say once which layout the batches get, and why."""
        if self._layout_announced:
            return
        self._layout_announced = True
        try:
            choice = getattr(find_causal_lm(self.accelerator.unwrap_model(self.model)), "_layout_choice", None)
        except ValueError:  # a model without a head for tokens has no layouts
            return
        if choice is not None:
            self.accelerator.print(f"Layout of the first batch: {choice.name} ({choice.reason}).")

    @profiling_decorator
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs(inputs)

    @property
    def mode(self) -> str:
        """`"train"` or `"eval"`: where a metric computed now belongs."""
        return "train" if self.model.training else "eval"

    # ---- Evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        cp_context, inputs = self._prepare_context_parallel_inputs(model, inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), cp_context():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            labels = inputs.get(self._label_key)
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        ignored = {"loss", *(ignore_keys or getattr(self.model.config, "keys_to_ignore_at_inference", []))}
        values = tuple(value for key, value in outputs.items() if key not in ignored)
        return loss.detach(), values[0] if len(values) == 1 else values, labels

    def _full_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """The model's own outputs for a batch, logits included: what `compute_metrics` gets, at its price."""
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        if is_packed(inputs):
            inputs, _ = prepare_packed(self.accelerator.unwrap_model(model), inputs)
        return model(**{**inputs, "use_cache": False})

    def outputs_with_logits(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """What `return_outputs=True` asks for; warns while training, where nobody should."""
        if self.model.training:
            warnings.warn(
                "`return_outputs=True` is deprecated: the trainer never holds the logits, so a second forward pass "
                "computes them.",
                FutureWarning,
            )
        with torch.no_grad():
            return self._full_outputs(model, inputs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self.reducer.clear("eval")
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if not (self.is_in_train or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            # Prepared for evaluation alone; training would take it as it is, without gradient synchronisation.
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        # The base class averages batch means; these are means over items, `loss` among them.
        for name, value in self.reducer.reduce("eval").items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`; a training log gets the metrics collected since the last one. A collective call."""
        if "loss" in logs or "train_runtime" in logs:
            metrics = self.reducer.reduce("train")
            if "loss" not in logs:  # the summary at the end
                metrics.pop("loss", None)
            logs.update(metrics)
        super().log(logs, start_time)

    # ---- Checkpoints ----

    def _extra_state(self) -> dict[str, Any]:
        return {**super()._extra_state(), "metrics": self.reducer.state()}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        super()._load_extra_state(state)
        self.reducer.load_state(state["metrics"])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        hub_model_id = self.args.hub_model_id
        self.create_model_card(
            model_name=hub_model_id.split("/")[-1] if hub_model_id else Path(self.args.output_dir).name
        )
        super()._save_checkpoint(model, trial)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Write `README.md` with the base model, the arguments, the curves, versions and citation into `output_dir`.

        Args:
            model_name: what the card calls the model.
            dataset_name: the dataset's name on the Hub.
            tags: more tags for the card.
        """
        if not self.is_world_process_zero():
            return
        output_dir = Path(self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        base_model = getattr(self.model.config, "_name_or_path", None) if hasattr(self.model, "config") else None
        if not base_model or os.path.isdir(base_model):
            base_model = None
        tags = {tags} if isinstance(tags, str) else set(tags or [])
        trackio_url = get_trackio_space_url()
        card_tags = {*tags, *self._tag_names, "generated_from_trainer"}
        if hasattr(self.model.config, "unsloth_version"):
            card_tags.add("unsloth")
        if "JOB_ID" in os.environ:
            card_tags.add("hf_jobs")
        if trackio_url:
            card_tags.add(f"trackio:{trackio_url}")
        card = generate_model_card(
            base_model=base_model,
            model_name=model_name,
            hub_model_id=self.hub_model_id or model_name,
            dataset_name=dataset_name,
            tags=sorted(card_tags),
            wandb_url=get_wandb_run_url(),
            trackio_url=trackio_url,
            comet_url=get_comet_experiment_url(),
            trainer_name=self._name,
            trainer_citation=self.citation,
            template_file=self._template_file,
            paper_title=self.paper_title,
            paper_id=self.paper_id,
            arguments=self.args,
            curves=plot_training_curves(self.state.log_history, output_dir / "training_curves.png"),
        )
        card.save(output_dir / "README.md")
