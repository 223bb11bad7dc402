"""Direct preference optimization: learn from pairs of completions, the better one of which is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data.preference_collators import DataCollatorForPreference, DataCollatorForVisionPreference
from ..data.preference_preparation import PreferenceOptions, prepare_preference_dataset
from ..data.template_rendering import inner_tokenizer
from ..losses.preference import (
    PairLogps,
    PreferenceLossInputs,
    PreferenceLossOptions,
    preference_loss,
    sum_pair_logps,
    wpo_weights,
)
from ..ops.scoring import TokenScores
from .base_trainer import AnyDataset
from .dpo_config import DPOConfig
from .preference_trainer import ReferencePolicyTrainer

__all__ = ["DPOTrainer", "DataCollatorForPreference", "DataCollatorForVisionPreference"]


class DPOTrainer(ReferencePolicyTrainer):
    """
    Direct Preference Optimization (https://huggingface.co/papers/2305.18290).

    The policy learns to find the chosen completion of a pair more probable than the rejected one, compared with what a
    frozen reference finds. There is no reward model. `args.loss_type` names the loss, of which there are many.

    A batch has the chosen completions first, then the rejected ones. The loss of an optimizer step is a mean over all
    its pairs (`sft`: over the chosen tokens), so it does not depend on how the step was cut.
    """

    __doc__ += ReferencePolicyTrainer.__doc__[ReferencePolicyTrainer.__doc__.index("\n    Args:") :]

    _name = "DPO"
    _tag_names = ["trl", "dpo"]
    paper_id = "2305.18290"
    paper_title = "Direct Preference Optimization: Your Language Model is Secretly a Reward Model"
    citation = """\
@inproceedings{rafailov2023direct,
    title        = {{Direct Preference Optimization: Your Language Model is Secretly a Reward Model}},
    author       = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and Stefano Ermon and Chelsea Finn},
    year         = 2023,
    booktitle    = {Advances in Neural Information Processing Systems 36},
}"""

    config_class = DPOConfig
    args: DPOConfig
    signature_columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")
    refuses_late_quantization = True
    vision_columns = ("prompt", "chosen", "rejected", "image", "images", "tools", "chat_template_kwargs")

    # ---- Construction ----

    def check_options(self, args: DPOConfig, example: dict[str, Any]) -> None:
        if self._is_vision_dataset and args.max_length is not None and args.truncation_mode == "keep_end":
            raise ValueError(
                "A dataset with images does not go with `truncation_mode='keep_end'`, which would cut image tokens. "
                "Use `keep_start` or `max_length=None`."
            )

    def setup_method(self, args: DPOConfig) -> None:
        self.loss_options = PreferenceLossOptions.of(args)
        self.loss_types = list(self.loss_options.loss_type)
        self.loss_weights = list(self.loss_options.weights)
        self.beta = args.beta
        self.label_smoothing = args.label_smoothing
        self.f_divergence_type = args.f_divergence_type
        self.f_alpha_divergence_coef = args.f_alpha_divergence_coef
        self.use_weighting = args.use_weighting
        self.ld_alpha = args.ld_alpha
        self.layout = args.layout
        self.padding_free = args.layout == "packed"
        self._outputs = ("entropy", "mean_logits", "is_top1")
        if self.use_weighting:
            self._outputs += ("log_sum_sq_probs",)

    def make_collator(self) -> Callable[[list[Any]], dict[str, Any]]:
        options = {"max_length": self.args.max_length, "pad_to_multiple_of": self.args.pad_to_multiple_of}
        if self._is_vision_dataset:
            return DataCollatorForVisionPreference(processor=self.processing_class, **options)
        return DataCollatorForPreference(
            pad_token_id=inner_tokenizer(self.processing_class).pad_token_id,
            truncation_mode=self.args.truncation_mode,
            **options,
        )

    def tokenize_dataset(self, dataset: AnyDataset, name: str) -> tuple[AnyDataset, Any]:
        return prepare_preference_dataset(dataset, self.processing_class, PreferenceOptions.of(self.args), name=name)

    def _uncounted_row(self, row: dict[str, Any]) -> dict[str, Any] | None:
        return {**row, "chosen_ids": [], "rejected_ids": []} if "chosen_ids" in row else None

    # ---- Loss ----

    def count_items(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        # The first token of a row is never predicted.
        chosen_lengths_B, rejected_lengths_B = inputs["completion_mask"][:, 1:].sum(dim=1).chunk(2)
        return {
            "pairs": ((chosen_lengths_B > 0) | (rejected_lengths_B > 0)).sum(),
            "chosen_tokens": chosen_lengths_B.sum(),
        }

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
            inputs: a collated batch: B chosen rows, then B rejected ones.
            return_outputs: also return the model's outputs. Deprecated: costs a second forward pass and full logits.
            num_items_in_batch: pairs of the whole optimizer step. By default the loss is the mean over this batch.
        """
        inputs = dict(inputs)
        given = [inputs.pop(column, None) for column in self.reference_columns]
        scores = self.score(model, inputs, self._outputs, groups=_pair_groups(inputs))
        reference = given if given[0] is not None else self.compute_ref_log_probs(model, inputs)
        # A row that fills up an evaluation batch has no completion: no loss, no metric.
        kept_B = scores.mask.any(dim=1).view(2, -1).any(dim=0)
        policy = _kept(sum_pair_logps(scores.logps, scores.mask, self.ld_alpha), kept_B)
        reference = _kept(PairLogps(*reference), kept_B)
        chosen_lengths_B, rejected_lengths_B = scores.mask.sum(dim=1).chunk(2)
        weights_B = None
        if self.use_weighting:
            weights_B = wpo_weights(scores.logps, scores.log_sum_sq_probs, scores.mask)[kept_B]
        loss_inputs = PreferenceLossInputs(
            policy=policy,
            reference=reference,
            chosen_lengths_B=chosen_lengths_B[kept_B],
            rejected_lengths_B=rejected_lengths_B[kept_B],
            chosen_nll_B=-scores.logps.chunk(2)[0].sum(dim=1)[kept_B],
            weights_B=weights_B,
        )
        counts = self.count_items(inputs)
        over_step = num_items_in_batch is not None
        loss = 0.0
        for position, term in enumerate(preference_loss(loss_inputs, self.loss_options)):
            loss = loss + term.weight * self.normalize(term.total, term.unit, counts, over_step)
            if self.mode == "eval":
                self.reducer.add("eval", "loss", term.weight * term.total, counts[term.unit], part=str(position))
        self._add_metrics(inputs, scores, policy, reference, counts["pairs"])
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * scores.aux_loss
        return (loss, self.outputs_with_logits(model, _model_inputs(inputs))) if return_outputs else loss

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """
        Log-probs that the reference gives the completions of a batch.

        Args:
            model: the policy, which may be the reference's base.
            inputs: a collated batch of B pairs.

        Returns:
            Those of the chosen and of the rejected completions, summed over tokens, in nats, [B] each.
        """
        inputs = {name: value for name, value in inputs.items() if name not in self.reference_columns}
        scores = self.score(model, inputs, groups=_pair_groups(inputs), reference=True)
        pairs = sum_pair_logps(scores.logps, scores.mask, self.ld_alpha)
        return pairs.chosen_B, pairs.rejected_B

    @torch.no_grad()
    def _add_metrics(
        self,
        inputs: dict[str, Any],
        scores: TokenScores,
        policy: PairLogps,
        reference: PairLogps,
        pairs: Tensor,
    ) -> None:
        mode, add = self.mode, self.reducer.add
        chosen_mask, rejected_mask = scores.mask.chunk(2)
        chosen_logits, rejected_logits = scores.mean_logits.chunk(2)
        add(mode, "entropy", scores.entropies.sum(), scores.mask.sum())
        add(mode, "mean_token_accuracy", scores.is_top1.chunk(2)[0].sum(), chosen_mask.sum())
        add(mode, "logits/chosen", chosen_logits.sum(), chosen_mask.sum())
        add(mode, "logits/rejected", rejected_logits.sum(), rejected_mask.sum())

        chosen_rewards_B = self.beta * (policy.chosen_B - reference.chosen_B)
        rejected_rewards_B = self.beta * (policy.rejected_B - reference.rejected_B)
        add(mode, "rewards/chosen", chosen_rewards_B.sum(), pairs)
        add(mode, "rewards/rejected", rejected_rewards_B.sum(), pairs)
        add(mode, "rewards/accuracies", (chosen_rewards_B > rejected_rewards_B).sum(), pairs)
        add(mode, "rewards/margins", (chosen_rewards_B - rejected_rewards_B).sum(), pairs)
        add(mode, "logps/chosen", policy.chosen_B.sum(), pairs)
        add(mode, "logps/rejected", policy.rejected_B.sum(), pairs)
        if self.aux_loss_enabled:
            add(mode, "aux_loss", scores.aux_loss)
        if mode == "train":
            self.reducer.add_total("num_tokens", inputs["attention_mask"].sum())


def _pair_groups(inputs: dict[str, Any]) -> Tensor:
    """Rows i and B + i have one prompt."""
    rows = len(inputs["input_ids"])
    return torch.arange(rows, device=inputs["input_ids"].device) % (rows // 2)


def _kept(pairs: PairLogps, kept_B: Tensor) -> PairLogps:
    return PairLogps(pairs.chosen_B[kept_B], pairs.rejected_B[kept_B])


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "completion_mask"}
