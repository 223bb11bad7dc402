"""
Bias-corrected exponential moving average of the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

logger = logging.get_logger(__name__)

STATE_NAME = "bema_state.safetensors"


class BEMACallback(TrainerCallback):
    """
    Keep BEMA weights next to the trained ones and save them in `<output_dir>/bema` at the end.

    An average of the weights is steadier than the last ones but lags behind; BEMA adds back the expected lag
    (https://huggingface.co/papers/2508.00180). At step t, with s = `lag` + `multiplier` · t:

        β = max(s^-`ema_power`, `min_ema_multiplier`)        EMA ← (1 - β) · EMA + β · θ
        α = s^-`bias_power`                                  BEMA = EMA + α · (θ - θ₀)

    Only trained parameters are averaged; frozen ones (of an adapter's base, say) are what they are. The average goes
    into each checkpoint and is taken up again on resuming.

    Args:
        update_freq: optimizer steps between updates; default 400.
        ema_power: η above; 0 makes the EMA the current weights.
        bias_power: 0 or more; the larger, the smaller the correction.
        lag: offset of the step count, against a jumpy start.
        update_after: θ₀ and the EMA are the weights at this step, and updates start after it.
        multiplier: scale of the step count.
        min_ema_multiplier: lower bound of β.
        device: where the three copies (θ₀, EMA, BEMA) are kept, in float32.
    """

    def __init__(
        self,
        update_freq: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
        update_after: int = 0,
        multiplier: float = 1.0,
        min_ema_multiplier: float = 0.0,
        device: str = "cpu",
    ):
        self.update_freq = update_freq
        self.ema_power = ema_power
        self.bias_power = bias_power
        self.lag = lag
        self.update_after = update_after
        self.multiplier = multiplier
        self.min_ema_multiplier = min_ema_multiplier
        self.device = device
        # By parameter name; empty until training starts.
        self.theta0_params: dict[str, Tensor] = {}
        self.ema_params: dict[str, Tensor] = {}
        self.bema_params: dict[str, Tensor] = {}
        self._model: nn.Module | None = None

    # ---- The average ----

    @staticmethod
    def _unwrap(model: nn.Module) -> nn.Module:
        return extract_model_from_parallel(model)

    def _snapshot(self, model: nn.Module) -> dict[str, Tensor]:
        """A float32 copy of the trained parameters."""
        return {
            name: parameter.detach().to(self.device, torch.float32, copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def _ema_beta(self, step: int) -> float:
        beta = (self.lag + self.multiplier * step) ** (-self.ema_power)
        return max(beta, self.min_ema_multiplier)

    def _bema_alpha(self, step: int) -> float:
        return (self.lag + self.multiplier * step) ** (-self.bias_power)

    @torch.no_grad()
    def _update(self, model: nn.Module, step: int) -> None:
        beta, alpha = self._ema_beta(step), self._bema_alpha(step)
        for name, parameter in model.named_parameters():
            if name not in self.ema_params:
                continue
            weights = parameter.detach().to(self.device, torch.float32)
            ema = self.ema_params[name].mul_(1 - beta).add_(weights, alpha=beta)
            torch.add(ema, weights - self.theta0_params[name], alpha=alpha, out=self.bema_params[name])

    def bema_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state with BEMA weights in place of the trained ones, in the model's dtypes."""
        state = model.state_dict()
        trained = dict(model.named_parameters(remove_duplicate=False))
        first_name = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
        for name, parameter in trained.items():
            source = self.bema_params.get(first_name[id(parameter)])  # tied weights have several names
            if source is not None and name in state:
                state[name] = source.to(parameter.device, parameter.dtype)
        return state

    # ---- Events ----

    @torch.no_grad()
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ):
        model = self._unwrap(model)
        if is_deepspeed_zero3_enabled() or any(_is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError(
                "BEMACallback needs whole weights on each process, but they are sharded (DeepSpeed ZeRO-3 or FSDP). Use "
                "DDP or ZeRO-2, or leave the callback out."
            )
        self._model = model
        self.theta0_params = self._snapshot(model)
        self.ema_params = {name: weights.clone() for name, weights in self.theta0_params.items()}
        self.bema_params = {name: weights.clone() for name, weights in self.theta0_params.items()}
        if state.global_step > 0:
            self._resume(args, state)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: Any,
    ):
        step = state.global_step
        model = self._unwrap(model)
        if step == self.update_after:
            self.theta0_params = self._snapshot(model)
            self.ema_params = {name: weights.clone() for name, weights in self.theta0_params.items()}
            # Some may have been frozen or unfrozen since the start.
            self.bema_params = {
                name: self.bema_params.get(name, weights.clone()) for name, weights in self.theta0_params.items()
            }
        elif step > self.update_after and (step - self.update_after) % self.update_freq == 0:
            self._update(model, step)
            logger.info(f"Updated the BEMA weights at step {step}.")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        checkpoint = self._checkpoint(args, state)
        if state.is_world_process_zero and checkpoint.is_dir():
            tensors = {
                f"{kind}.{name}": weights.cpu().contiguous()
                for kind, params in self._states().items()
                for name, weights in params.items()
            }
            save_file(tensors, checkpoint / STATE_NAME)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        model = self._unwrap(kwargs["model"]) if kwargs.get("model") is not None else self._model
        if not state.is_world_process_zero or model is None:
            return
        first_update = self.update_after + self.update_freq
        if state.global_step < first_update:
            logger.warning(
                f"The BEMA weights are those that training started from: the run ended at step {state.global_step}, before "
                f"the first update at step {first_update}. Choose a smaller `update_freq` or `update_after`."
            )
        folder = Path(args.output_dir) / "bema"
        model.save_pretrained(folder, state_dict=self.bema_state_dict(model))
        processing_class = kwargs.get("processing_class")
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        logger.info(f"Saved the BEMA weights in {folder}.")

    # ---- Resuming ----

    def _states(self) -> dict[str, dict[str, Tensor]]:
        return {"theta0": self.theta0_params, "ema": self.ema_params, "bema": self.bema_params}

    @staticmethod
    def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        folders = [self._checkpoint(args, state)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        for folder in folders:
            if (folder / STATE_NAME).is_file():
                tensors = load_file(folder / STATE_NAME, device=self.device)
                for kind, params in self._states().items():
                    params.clear()  # what is trained may have changed during the run
                    prefix = f"{kind}."
                    params.update(
                        (key.removeprefix(prefix), weights)
                        for key, weights in tensors.items()
                        if key.startswith(prefix)
                    )
                return
        logger.warning(
            f"No BEMA state was found in {' or '.join(map(str, folders))}: the average starts anew from the weights at "
            f"step {state.global_step}."
        )


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "_is_flat_param") or parameter.numel() == 0
