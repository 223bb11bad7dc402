"""
Letting a reference model follow the policy slowly.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled


class SyncRefModelCallback(TrainerCallback):
    """
    Every `args.ref_model_sync_steps` steps, mix the policy's weights into the reference's.

    The new reference is (1 - α) · reference + α · policy with α = `args.ref_model_mixup_alpha`, as in TR-DPO
    (https://huggingface.co/papers/2404.09656).

    Args:
        ref_model: the reference.
        accelerator: unwraps the policy; None for a policy that is not wrapped.
    """

    def __init__(self, ref_model: PreTrainedModel | nn.Module, accelerator: Accelerator | None):
        self.ref_model = ref_model
        self.accelerator = accelerator

    @staticmethod
    @torch.no_grad()
    def _mix(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        pairs = zip(target_model.parameters(), model.parameters(), strict=True)
        for target, source in pairs:
            target.data.mul_(1 - alpha).add_(source.data.to(target.device, target.dtype), alpha=alpha)

    @staticmethod
    def sync_target_model(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        """
        Mix `model`'s weights into `target_model`'s; `alpha` is the share of the former.

        Under ZeRO-3 the weights are gathered, the first process writes, and DeepSpeed spreads the result.
        """
        if not is_deepspeed_zero3_enabled():
            for module in (*model.modules(), *target_model.modules()):
                if isinstance(module, FSDPModule):
                    module.reshard()  # after a forward without backward, FSDP2 leaves some weights whole
            SyncRefModelCallback._mix(model, target_model, alpha)
            return
        import deepspeed

        parameters = [*model.parameters(), *target_model.parameters()]
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            if deepspeed.comm.get_rank() == 0:
                SyncRefModelCallback._mix(model, target_model, alpha)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        model = kwargs["model"]
        if self.ref_model is None or state.global_step % args.ref_model_sync_steps != 0:
            return
        target = self.ref_model
        if self.accelerator is not None:
            model, target = self.accelerator.unwrap_model(model), self.accelerator.unwrap_model(target)
        self.sync_target_model(model, target, args.ref_model_mixup_alpha)
