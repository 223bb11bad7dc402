"""Group relative policy optimization: learn from how much better a completion is than the others of its prompt."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitScheduler
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..losses.advantages import Advantages, group_advantages
from ..losses.engine_correction import engine_correction
from ..losses.entropy import EntropyController, entropy_threshold
from ..losses.policy import (
    PolicyLoss,
    PolicyLossInputs,
    PolicyLossTerm,
    aggregate,
    make_step,
    on_policy_mask,
    policy_loss,
    vespo_weights,
)
from ..losses.policy_metrics import engine_metrics
from ..losses.policy_options import PolicyLossOptions
from ..ops.scoring import TokenScores
from ..rollouts.environments import EnvironmentFactory
from ..rollouts.transformers_engine import evaluation_mode
from .base_trainer import EvalDatasets
from .grpo_config import GRPOConfig
from .online_metrics import CompletionFigures, add_metrics
from .online_sampling import RolloutFunc, make_environments, warn_experimental
from .online_trainer import OnlineTrainer
from .rollout_batches import RolloutBatch
from .text_evaluation import TextEvalPrediction

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import BitsAndBytesConfig

__all__ = ["PREFIX_CHECKPOINT_DIR", "EnvironmentFactory", "GRPOTrainer", "RewardFunc", "RolloutFunc"]

RewardFunc: TypeAlias = "str | PreTrainedModel | Callable[..., list[float | None]]"
ENTROPY_STATE_NAME = "entropy_ctrl_state.json"


class GRPOTrainer(OnlineTrainer):
    """
    Group Relative Policy Optimization (https://huggingface.co/papers/2402.03300).

    For each prompt a group of completions is sampled and scored; a completion's advantage is its reward less the
    group's mean, over the group's standard deviation. The policy is moved towards completions with a positive
    advantage and away from the others, by a clipped ratio of new to old probabilities. The variants of the loss are in
    [`~trl.losses.policy`], each with its paper.
    """

    __doc__ += OnlineTrainer.__doc__[OnlineTrainer.__doc__.index("\n    Args:") :].replace(
        "        compute_metrics:",
        """\
        tools: functions that the model may call.
        rollout_func: called with prompts and the trainer, samples in the place of all this.
        environment_factory: makes environments, one for each rollout; or a dict of such by name.
        compute_metrics:""",
    )

    _name = "GRPO"
    _tag_names = ["trl", "grpo"]
    paper_id = "2402.03300"
    paper_title = "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models"
    citation = """\
@article{shao2024deepseekmath,
    title        = {{DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models}},
    author       = {Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Mingchuan Zhang and Y. K. Li and Y. Wu and Daya Guo},
    year         = 2024,
    eprint       = {arXiv:2402.03300},
}"""

    config_class = GRPOConfig
    args: GRPOConfig
    loss_is_scaled_for_ga = True
    mirrored_settings = (
        *OnlineTrainer.mirrored_settings,
        "entropy_coef",
        "importance_sampling_level",
        "loss_type",
        "max_tool_calling_iterations",
        "multi_objective_aggregation",
        "off_policy_mask_threshold",
        "scale_rewards",
        "top_entropy_quantile",
        "use_adaptive_entropy",
        "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
    )

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: EvalDatasets | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
        compute_metrics: Callable[[TextEvalPrediction], Mapping[str, float]] | None = None,
    ):
        if rollout_func is not None:
            warn_experimental("rollout_func")
        environments = make_environments(environment_factory)
        if environments is not None and environments.is_routed and train_dataset is None:
            raise ValueError(
                "`environment_factory` is a dict, so each row of a `train_dataset` has to name its environment in the "
                "column `environment`. Found no `train_dataset`."
            )
        self.tools, self.rollout_func = list(tools or []), rollout_func
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
            tools=tools,
            rollout_func=rollout_func,
            environments=environments,
            compute_metrics=compute_metrics,
        )
        self.entropy_controller = EntropyController.of(self.loss_options)
        self._entropy_threshold: Tensor | None = None
        self._step_entropy = torch.zeros(2)  # sum and count over the tokens of an optimizer step

    @property
    def environment_factories(self) -> dict[str | None, EnvironmentFactory]:
        """What makes environments, by name; a single one is called None."""
        return {} if self.environments is None else self.environments.factories

    @property
    def commit_scheduler(self) -> CommitScheduler | None:
        """Uploads logged completions to the Hub; None without `log_completions_hub_repo`, and beside the main process."""
        return None if self.completions_log is None else self.completions_log.commit_scheduler

    # ---- What GRPO does ----

    def make_loss_options(self, args: GRPOConfig) -> PolicyLossOptions:
        return PolicyLossOptions.of(args)

    def needs_old_logps(self) -> bool:
        if self.loss_options.corrects_engine:
            return True
        return self.mode == "train" and super().needs_old_logps()

    def compute_advantages(self, figures: CompletionFigures) -> Advantages:
        """A completion's reward in comparison with its group; see [`~trl.losses.advantages.group_advantages`]."""
        return group_advantages(
            figures.rewards_FM,
            self.reward_weights,
            self._group_size,
            scale_rewards=self.args.scale_rewards,
            multi_objective_aggregation=self.args.multi_objective_aggregation,
        )

    def add_generation_values(self, batch: RolloutBatch) -> None:
        """How the engine's probabilities differ from the trainer's, which sampling was not quite on policy by."""
        if not self.loss_options.corrects_engine or "rollout_logps" not in batch:
            return
        correction = engine_correction(
            batch["old_logps"], batch["rollout_logps"], batch["train_mask"], self.loss_options
        )
        batch["engine_ratios"] = correction.ratios_BT
        add_metrics(self.reducer, self.mode, engine_metrics(correction))

    def compute_policy_loss(self, batch: RolloutBatch, scores: TokenScores) -> tuple[PolicyLoss, list[PolicyLossTerm]]:
        options = self.loss_options
        inputs = PolicyLossInputs(
            logps_BT=scores.logps,
            advantages_BT=batch["advantages"],
            mask_BT=batch["train_mask"],
            old_logps_BT=batch.get("old_logps"),
            ref_logps_BT=batch.get("ref_logps"),
            rollout_logps_BT=batch.get("rollout_logps"),
            engine_ratios_BT=batch.get("engine_ratios"),
            entropies_BT=scores.entropies,
        )
        loss = policy_loss(inputs, options, self._entropy_threshold)
        if options.use_adaptive_entropy and self.mode == "train":
            counted = [loss.entropies_BT.detach().sum(), loss.step.mask_BT.sum()]
            self._step_entropy = self._step_entropy.to(counted[0].device) + torch.stack([x.float() for x in counted])
        return loss, aggregate(loss, options, self.active_entropy_coef)

    # ---- Entropy ----

    @property
    def active_entropy_coef(self) -> float:
        """Coefficient of the entropy bonus now."""
        return self.entropy_controller.active_coef if self.use_adaptive_entropy else self.entropy_controller.coef

    @torch.no_grad()
    def count_forward_units(self, model: nn.Module, micro_batches: Sequence[RolloutBatch]) -> dict[str, Tensor]:
        """
        With `top_entropy_quantile`: from which entropy on a token is trained, of all tokens of the step and of all
        processes, and how many these are. It takes a forward pass of its own, for the threshold must not depend on how
        the step was cut.
        """
        if not self.loss_options.needs_entropy_threshold:
            return {}
        entropies = []
        with evaluation_mode(model), self.compute_loss_context_manager():
            for batch in micro_batches:
                scores = self.score_completions(model, batch, with_entropy=True)
                entropies.append(scores.entropies[batch["train_mask"].bool()])
        own = torch.cat(entropies).float()
        self._entropy_threshold = self._threshold_over_processes(own, self.top_entropy_quantile)
        return {"trained_tokens": (own >= self._entropy_threshold).sum()}

    def _threshold_over_processes(self, entropies_N: Tensor, share: float) -> Tensor:
        """The entropy from which on a token is among this share of those of all processes."""
        gathered = self.accelerator.gather(self.accelerator.pad_across_processes(entropies_N, pad_index=math.nan))
        return entropy_threshold(gathered[~gathered.isnan()], share)

    def _end_step(self) -> None:
        super()._end_step()
        if not self.loss_options.has_entropy_bonus:
            return
        if self.use_adaptive_entropy:
            total, count = self.accelerator.reduce(self._step_entropy, reduction="sum").tolist()
            self._step_entropy = torch.zeros_like(self._step_entropy)
            self.entropy_controller.update(total / count if count else math.nan)
        self.reducer.add("train", "entropy_coef", self.active_entropy_coef)

    def _save_extra_files(self, folder: str) -> None:
        super()._save_extra_files(folder)
        if self.use_adaptive_entropy and self.args.should_save:
            with open(os.path.join(folder, ENTROPY_STATE_NAME), "w", encoding="utf-8") as file:
                json.dump(self.entropy_controller.state_dict(), file)

    def _load_extra_files(self, checkpoint: str) -> None:
        super()._load_extra_files(checkpoint)
        path = os.path.join(checkpoint, ENTROPY_STATE_NAME)
        if self.use_adaptive_entropy and os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                self.entropy_controller.load_state_dict(json.load(file))

    # ---- Pieces of the loss under the names that subclasses know ----

    @staticmethod
    def get_off_policy_mask(
        advantages: Tensor,
        per_token_logps: Tensor,
        sampling_per_token_logps: Tensor,
        mask: Tensor,
        off_policy_threshold: float,
    ) -> Tensor:
        """Sequences near enough to the policy, 1 or 0; see [`~trl.losses.policy.on_policy_mask`]."""
        inputs = PolicyLossInputs(per_token_logps, advantages, mask, old_logps_BT=sampling_per_token_logps)
        kept = on_policy_mask(inputs, make_step(inputs, PolicyLossOptions()), off_policy_threshold)
        return kept.to(mask.dtype)

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """Tokens of the highest entropy among those of all processes; `threshold` is the quantile, from 0 to 1."""
        limit = self._threshold_over_processes(entropies[mask.bool()].float(), 1 - threshold)
        return (entropies * mask.to(entropies.dtype) >= limit) & mask.bool()

    @staticmethod
    def get_gamma_weights(
        advantages: Tensor,
        log_ratio_per_token: Tensor,
        mask: Tensor,
        importance_sampling_ratio: Tensor | None,
        k_pos: float = 2.0,
        lambda_pos: float = 3.0,
        k_neg: float = 3.0,
        lambda_neg: float = 2.0,
    ) -> Tensor:
        """Weights of sequences in VESPO; see [`~trl.losses.policy.vespo_weights`]."""
        options = PolicyLossOptions(
            loss_type="vespo",
            vespo_k_pos=k_pos,
            vespo_lambda_pos=lambda_pos,
            vespo_k_neg=k_neg,
            vespo_lambda_neg=lambda_neg,
        )
        inputs = PolicyLossInputs(
            log_ratio_per_token,
            advantages,
            mask,
            old_logps_BT=torch.zeros_like(log_ratio_per_token),
            engine_ratios_BT=importance_sampling_ratio,
        )
        return vespo_weights(make_step(inputs, options), options)
