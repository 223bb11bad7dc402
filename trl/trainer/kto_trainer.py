"""Kahneman-Tversky optimization: learn from single completions that are marked as desirable or not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import pad

from ..data.preference_collators import DataCollatorForUnpairedPreference, DataCollatorForVisionUnpairedPreference
from ..data.preference_preparation import PreferenceOptions, prepare_unpaired_dataset
from ..data.template_rendering import inner_tokenizer
from ..losses.unpaired import unpaired_loss
from ..ops.scoring import TokenScores
from .base_trainer import AnyDataset
from .kto_config import KTOConfig
from .preference_trainer import ReferencePolicyTrainer

__all__ = ["DataCollatorForUnpairedPreference", "DataCollatorForVisionUnpairedPreference", "KTOTrainer"]

_TEXT_KEYS = ("input_ids", "attention_mask", "completion_mask")


class KTOTrainer(ReferencePolicyTrainer):
    """
    Kahneman-Tversky Optimization (https://huggingface.co/papers/2402.01306).

    Each row has one completion and a label: desirable or not. A desirable completion is to become more probable than
    the reference finds it, by more than the policy's general drift from the reference, an undesirable one less. The
    drift is estimated with each prompt of an optimizer step and the completion of the row before it in that step,
    without gradients, over all micro-batches and processes: like the loss, it does not depend on how the step was cut.
    """

    __doc__ += ReferencePolicyTrainer.__doc__[ReferencePolicyTrainer.__doc__.index("\n    Args:") :]

    _name = "KTO"
    _tag_names = ["trl", "kto"]
    paper_id = "2402.01306"
    paper_title = "KTO: Model Alignment as Prospect Theoretic Optimization"
    citation = """\
@article{ethayarajh2024kto,
    title        = {{KTO: Model Alignment as Prospect Theoretic Optimization}},
    author       = {Kawin Ethayarajh and Winnie Xu and Niklas Muennighoff and Dan Jurafsky and Douwe Kiela},
    year         = 2024,
    eprint       = {arXiv:2402.01306},
}"""

    config_class = KTOConfig
    args: KTOConfig
    signature_columns = ("prompt_ids", "completion_ids", "KL_completion_ids", "label")
    reference_columns = ("ref_logps", "ref_KL_logps")
    vision_columns = ("prompt", "completion", "image", "images", "label", "tools", "chat_template_kwargs")

    # ---- Construction ----

    def check_options(self, args: KTOConfig, example: dict[str, Any]) -> None:
        if self._is_vision_dataset and "chosen" in example:
            raise ValueError(
                "A dataset with images has to be unpaired: rows of `prompt`, `completion` and `label`. Found `chosen`; "
                "`trl.unpair_preference_dataset(dataset)` makes two rows of each pair."
            )
        if args.loss_type != "kto":
            return
        if args.per_device_train_batch_size <= 1:
            raise ValueError(
                "The `kto` loss pairs a prompt with the completion of another row of its batch, so "
                f"`per_device_train_batch_size` has to be above 1. Found {args.per_device_train_batch_size}. Raise it, "
                "or use `loss_type='apo_zero_unpaired'`, which needs no such pairs."
            )
        if args.train_sampling_strategy != "sequential":
            raise ValueError(
                "The `kto` loss pairs the rows of a step ahead, so their order has to stay: "
                f"`train_sampling_strategy='sequential'`. Found {args.train_sampling_strategy!r}. To mix the rows, "
                "shuffle the dataset before (`dataset.shuffle(seed=...)`)."
            )

    def setup_method(self, args: KTOConfig) -> None:
        self.loss_type = args.loss_type
        self.beta = args.beta
        self.desirable_weight = args.desirable_weight
        self.undesirable_weight = args.undesirable_weight
        self.layout = args.layout
        self.calculate_KL = args.loss_type == "kto"
        self._step_kl: Tensor | None = None
        self._batches_of_step: list[dict[str, Any]] = []
        if not self.calculate_KL:
            self.reference_columns = ("ref_logps",)

    def make_collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        options = {"max_length": self.args.max_length, "pad_to_multiple_of": self.args.pad_to_multiple_of}
        if self._is_vision_dataset:
            return DataCollatorForVisionUnpairedPreference(
                processor=self.processing_class, calculate_kl=self.calculate_KL, **options
            )
        return DataCollatorForUnpairedPreference(
            pad_token_id=inner_tokenizer(self.processing_class).pad_token_id, **options
        )

    def tokenize_dataset(self, dataset: AnyDataset, name: str) -> tuple[AnyDataset, Any]:
        args = self.args
        block_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        options = PreferenceOptions.of(
            args, truncation_mode="keep_start", kl_block_size=block_size if self.calculate_KL else None
        )
        dataset, report = prepare_unpaired_dataset(dataset, self.processing_class, options, name=name)
        if isinstance(dataset, Dataset) and name.startswith("train"):
            self._check_weights(np.asarray(dataset.with_format("numpy")["label"][:], dtype=bool))
        return dataset, report

    def _check_weights(self, labels: np.ndarray) -> None:
        """Warn where the weights do not make up for classes of unequal size, as the paper's section 4.2 advises."""
        desirable, undesirable = int(labels.sum()), int((~labels).sum())
        if desirable == undesirable or not desirable or not undesirable:
            return
        # Total weight of the desirable rows over that of the undesirable: 1 to 4/3.
        low = undesirable * self.undesirable_weight / desirable
        high = desirable * self.desirable_weight / undesirable
        if low <= self.desirable_weight <= low * 1.33 or high / 1.33 <= self.undesirable_weight <= high:
            return
        warnings.warn(
            f"The dataset has {desirable:,} desirable and {undesirable:,} undesirable rows, and the weights do not make "
            f"up for it. Set `desirable_weight` between {low:.2f} and {low * 1.33:.2f}, or `undesirable_weight` between "
            f"{high / 1.33:.2f} and {high:.2f} (not both)."
        )

    def _uncounted_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        empty = {column: [] for column in ("completion_ids", "KL_completion_ids") if column in row}
        return {**row, **empty} if empty else None

    # ---- The drift from the reference ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches_of_step = batches if self.calculate_KL else []
        return batches, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self._batches_of_step:  # not any earlier: a resumed run has its random numbers back only now
            self._step_kl = self._estimate_step_kl(model, self._batches_of_step)
            self._batches_of_step = []
        return super().training_step(model, inputs, *args, **kwargs)

    def _estimate_step_kl(self, model: nn.Module, batches: list[dict[str, Any]]) -> Tensor:
        """The estimate of a whole step; leaves the reference's log-probs in the batches, for the loss."""
        model.train()
        totals = torch.zeros(2, device=self.accelerator.device)
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            with self.compute_loss_context_manager():
                if "ref_logps" not in inputs:
                    batch["ref_logps"], inputs["ref_KL_logps"] = self.compute_ref_log_probs(model, inputs)
                totals += self._kl_total_and_count(model, inputs)
        return self._kl_of(totals)

    @torch.no_grad()
    def _kl_total_and_count(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        scores = self.score(model, _mismatched(inputs))
        logratios_B = scores.logps.sum(dim=1) - inputs["ref_KL_logps"]
        counted_B = scores.mask.any(dim=1)
        return torch.stack([logratios_B[counted_B].sum(), counted_B.sum().to(logratios_B.dtype)])

    def _kl_of(self, totals: Tensor) -> Tensor:
        total, count = self.accelerator.reduce(totals, reduction="sum")
        return (total / count.clamp(min=1)).clamp(min=0)

    # ---- Loss ----

    def count_items(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        return {"rows": inputs["completion_mask"][:, 1:].any(dim=1).sum()}  # a row's first token is never predicted

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """
        The loss of a micro-batch.

        Args:
            model: the policy, wrapped as it is trained.
            inputs: a collated batch of B rows.
            return_outputs: also return the model's outputs. Deprecated: costs a second forward pass and full logits.
            num_items_in_batch: rows of the whole optimizer step. By default the loss is the mean over this batch, and
                the drift is estimated from it.
        """
        labels_B = inputs["label"].bool()
        if len(labels_B) != len(inputs["input_ids"]):
            raise ValueError(
                f"The batch has {len(labels_B)} labels for {len(inputs['input_ids'])} completions. Each row needs one; "
                "check the data collator."
            )
        if "ref_logps" not in inputs:
            references = self.compute_ref_log_probs(model, inputs)
            inputs = {**inputs, **dict(zip(("ref_logps", "ref_KL_logps"), references, strict=False))}
        over_step = num_items_in_batch is not None
        kl = None
        if self.calculate_KL:
            kl = self._step_kl if over_step else self._kl_of(self._kl_total_and_count(model, inputs))

        rows = _rows(inputs)
        scores = self.score(model, rows, ("entropy", "mean_logits"))
        logps_B = scores.logps.sum(dim=1)
        logratios_B = logps_B - inputs["ref_logps"]
        losses_B = unpaired_loss(
            logratios_B,
            labels_B,
            kl,
            loss_type=self.loss_type,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        counted_B = scores.mask.any(dim=1)
        total = losses_B.masked_fill(~counted_B, 0).sum()
        counts = {"rows": counted_B.sum()}
        loss = self.normalize(total, "rows", counts, over_step)
        self._add_metrics(inputs, scores, labels_B, self.beta * logratios_B, kl)
        if self.mode == "eval":
            self.reducer.add("eval", "loss", total, counts["rows"])
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * scores.aux_loss
        if not return_outputs:
            return loss
        rows.pop("completion_mask")
        return loss, self.outputs_with_logits(model, rows)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """
        Log-probs that the reference gives the completions of a batch.

        Args:
            model: the policy, which may be the reference's base.
            inputs: a collated batch of B rows.

        Returns:
            Those of the rows' completions, and where the loss needs them of the mismatched ones, summed over tokens,
            in nats, [B] each.
        """
        rows = _rows(inputs)
        if not self.calculate_KL:
            return (self.score(model, rows, reference=True).logps.sum(dim=1),)
        mismatched = _mismatched(inputs)
        if set(rows) != set(_TEXT_KEYS):  # images: each batch has its own
            batches = (rows, mismatched)
            return tuple(self.score(model, batch, reference=True).logps.sum(dim=1) for batch in batches)
        count = len(rows["input_ids"])
        groups = torch.arange(2 * count, device=rows["input_ids"].device) % count  # both have the row's prompt
        scores = self.score(model, _stacked(rows, mismatched), groups=groups, reference=True)
        return scores.logps.sum(dim=1).chunk(2)

    @torch.no_grad()
    def _add_metrics(
        self,
        inputs: dict[str, Any],
        scores: TokenScores,
        labels_B: Tensor,
        rewards_B: Tensor,
        kl: Tensor | None,
    ) -> None:
        mode, add = self.mode, self.reducer.add
        logps_B, tokens_B = scores.logps.sum(dim=1), scores.mask.sum(dim=1)
        add(mode, "entropy", scores.entropies.sum(), scores.mask.sum())
        for name, of_class_B in (("chosen", labels_B), ("rejected", ~labels_B)):
            of_class_B = of_class_B & (tokens_B > 0)
            count, rewards = of_class_B.sum(), rewards_B[of_class_B].sum()
            add(mode, f"rewards/{name}", rewards, count)
            add(mode, f"logps/{name}", logps_B[of_class_B].sum(), count)
            add(mode, f"logits/{name}", scores.mean_logits[of_class_B].sum(), tokens_B[of_class_B].sum())
            # The difference of the two means; left out where there is but one.
            add(mode, "rewards/margins", rewards if name == "chosen" else -rewards, count, part=name)
        add(mode, "kl", 0.0 if kl is None else kl)
        if self.aux_loss_enabled:
            add(mode, "aux_loss", scores.aux_loss)
        if mode == "train":
            self.reducer.add_total("num_tokens", inputs["attention_mask"].sum())


def _rows(inputs: dict[str, Any]) -> dict[str, Any]:
    """The rows themselves, as inputs of the model with `completion_mask`."""
    others = ("label", "ref_logps", "ref_KL_logps")
    return {name: value for name, value in inputs.items() if not name.startswith("KL_") and name not in others}


def _mismatched(inputs: dict[str, Any]) -> dict[str, Any]:
    """The rows' prompts with other rows' completions."""
    return {name.removeprefix("KL_"): value for name, value in inputs.items() if name.startswith("KL_")}


def _stacked(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two batches of right-padded rows as one."""
    width = max(first["input_ids"].shape[1], second["input_ids"].shape[1])
    return {
        name: torch.cat([pad(batch[name], (0, width - batch[name].shape[1])) for batch in (first, second)])
        for name in first
    }
