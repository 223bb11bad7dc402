"""REINFORCE leave-one-out: learn from how much better a completion is than the mean of the others of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from ..losses.advantages import Advantages, leave_one_out_advantages, trajectory_kl
from ..losses.policy import PolicyLoss, PolicyLossInputs, PolicyLossTerm, aggregate, policy_loss
from ..losses.policy_options import PolicyLossOptions
from ..models.reference import ReferencePolicy, add_reference_adapter
from ..ops.scoring import TokenScores
from .base_trainer import EvalDatasets
from .online_metrics import CompletionFigures
from .online_trainer import OnlineTrainer
from .rloo_config import RLOOConfig
from .rollout_batches import RolloutBatch
from .text_evaluation import TextEvalPrediction

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import BitsAndBytesConfig

__all__ = ["RLOOTrainer", "RewardFunc"]

RewardFunc: TypeAlias = "str | PreTrainedModel | Callable[..., list[float | None]]"


class RLOOTrainer(OnlineTrainer):
    """
    REINFORCE Leave-One-Out (https://huggingface.co/papers/2402.14740).

    For each prompt several completions are sampled and scored; from a reward `beta` times the log-ratio of policy and
    reference is taken, and its advantage is what remains, less the mean of the others of its prompt. A whole completion
    is one action, with one clipped ratio of new to old probabilities.
    """

    __doc__ += OnlineTrainer.__doc__[OnlineTrainer.__doc__.index("\n    Args:") :]

    _name = "RLOO"
    _tag_names = ["trl", "rloo"]
    paper_id = "2402.14740"
    paper_title = "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs"
    citation = """\
@inproceedings{ahmadian2024back,
    title        = {{Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs}},
    author       = {Arash Ahmadian and Chris Cremer and Matthias Gall{\\'{e}} and Marzieh Fadaee and Julia Kreutzer and Olivier Pietquin and Ahmet {\\"{U}}st{\\"{u}}n and Sara Hooker},
    year         = 2024,
    booktitle    = {Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics (ACL)},
}"""

    config_class = RLOOConfig
    args: RLOOConfig
    loss_is_scaled_for_ga = False
    mirrored_settings = (*OnlineTrainer.mirrored_settings, "normalize_advantages", "reward_clip_range")

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: RLOOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDatasets | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Callable[[TextEvalPrediction], Mapping[str, float]] | None = None,
    ):
        if train_dataset is None:
            raise ValueError("RLOOTrainer needs a `train_dataset` with a column `prompt`.")
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            compute_metrics=compute_metrics,
        )

    def make_loss_options(self, args: RLOOConfig) -> PolicyLossOptions:
        return PolicyLossOptions.of_rloo(args)

    def _make_reference(
        self, args: RLOOConfig, model: nn.Module, came_with_adapter: bool, quantization_config: Any
    ) -> ReferencePolicy | None:
        if not args.beta and came_with_adapter:
            add_reference_adapter(model)  # scripts find it there whatever `beta` is
        return super()._make_reference(args, model, came_with_adapter, quantization_config)

    def needs_old_logps(self) -> bool:
        if self.beta:  # the reward has the log-ratio to the reference
            return True
        return self.mode == "train" and super().needs_old_logps()

    def add_generation_values(self, batch: RolloutBatch) -> None:
        """The log-ratio of policy and reference, of which `beta` times is taken from the reward."""
        if not self.beta:
            return
        mask_BC = batch["train_mask"]
        batch["penalties"] = trajectory_kl(batch["old_logps"], batch["ref_logps"], mask_BC)
        self.reducer.add(self.mode, "kl", batch["penalties"].sum(), mask_BC.sum())

    def compute_advantages(self, figures: CompletionFigures) -> Advantages:
        """A completion's reward less the mean of the others'; see [`~trl.losses.advantages.leave_one_out_advantages`]."""
        return leave_one_out_advantages(
            figures.rewards_FM,
            self.reward_weights,
            self._group_size,
            reward_clip_range=self.args.reward_clip_range,
            kl_N=figures.penalties_M,
            beta=self.beta,
            normalize_advantages=self.args.normalize_advantages,
        )

    def compute_policy_loss(self, batch: RolloutBatch, scores: TokenScores) -> tuple[PolicyLoss, list[PolicyLossTerm]]:
        inputs = PolicyLossInputs(
            logps_BT=scores.logps,
            advantages_BT=batch["advantages"],
            mask_BT=batch["train_mask"],
            old_logps_BT=batch.get("old_logps"),
            entropies_BT=scores.entropies,
        )
        loss = policy_loss(inputs, self.loss_options)
        return loss, aggregate(loss, self.loss_options)
