"""
Frozen models under DeepSpeed and FSDP, and calling a wrapped model's other methods through its wrapper.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils.other import is_compiled_module
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers.integrations import is_deepspeed_zero3_enabled

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


# ---- DeepSpeed ----


def _inference_config(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The training run's DeepSpeed config, for a model that only runs forward."""
    config = copy.deepcopy(config)
    for key in ("optimizer", "scheduler"):
        config.pop(key, None)
    zero = config.setdefault("zero_optimization", {})
    zero.pop("offload_optimizer", None)  # there is no optimizer
    if zero.get("stage") != 3:
        # The lower stages shard gradients and optimizer states only.
        zero["stage"] = 0
        return config
    text_config = model.config.get_text_config() if hasattr(model, "config") else None
    sizes = getattr(text_config, "hidden_sizes", None)
    hidden = max(sizes) if sizes else getattr(text_config, "hidden_size", None)
    if hidden is not None:
        # Buckets that fit a layer; what DeepSpeed calls "auto" was worked out for the policy.
        zero["reduce_bucket_size"] = hidden * hidden
        zero["stage3_param_persistence_threshold"] = 10 * hidden
        zero["stage3_prefetch_bucket_size"] = 0
    return config


def prepare_deepspeed(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """
    Put a frozen model (a reference, a reward model) under the run's DeepSpeed.

    Args:
        model: the model.
        accelerator: the trainer's accelerator, with a DeepSpeed plugin.

    Returns:
        The DeepSpeed engine in evaluation mode: sharded under ZeRO-3, whole on every process otherwise.
    """
    import deepspeed

    config = _inference_config(accelerator.state.deepspeed_plugin.deepspeed_config, model)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def get_all_parameters(sub_module: nn.Module, recurse: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters of a module, with those DeepSpeed registered for it from elsewhere."""
    external = sub_module.ds_external_parameters() if hasattr(sub_module, "ds_external_parameters") else ()
    return itertools.chain(sub_module.named_parameters(recurse=recurse), external)


def iter_params(module: nn.Module, recurse: bool = False) -> list[nn.Parameter]:
    """The parameters of `get_all_parameters`, without their names."""
    return [parameter for _, parameter in get_all_parameters(module, recurse)]


def _zero3_offload(engine: DeepSpeedEngine) -> Any | None:
    """The part of a ZeRO-3 engine that gathers parameters by hooks on the modules."""
    optimizer = getattr(engine, "optimizer", None)
    # A training engine's optimizer holds it; an inference engine's optimizer is it.
    return getattr(optimizer, "parameter_offload", optimizer)


def remove_hooks(model: DeepSpeedEngine) -> None:
    """Take ZeRO-3's gathering hooks off, for as long as all parameters are gathered by hand."""
    offload = _zero3_offload(model)
    if offload is None:
        return
    for parameter in iter_params(model.module, recurse=True):
        parameter.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks = []
    offload.backward_hooks = []


def add_hooks(model: DeepSpeedEngine) -> None:
    """Put ZeRO-3's gathering hooks back after `remove_hooks`."""
    offload = _zero3_offload(model)
    if offload is not None:
        offload._register_deepspeed_module(offload.module)


# ---- FSDP ----


def prepare_fsdp(model: nn.Module, accelerator: Accelerator) -> FullyShardedDataParallel | FSDPModule:
    """
    Shard a frozen model (a reference, a reward model) as the run's FSDP plugin says.

    Args:
        model: the model.
        accelerator: the trainer's accelerator, with an FSDP plugin.

    Returns:
        The sharded model in evaluation mode.

    Raises:
        ValueError: the plugin's version is neither 1 nor 2.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        model = fsdp2_prepare_model(accelerator, model)
    elif plugin.fsdp_version == 1:
        model = _wrap_fsdp1(model, accelerator)
    else:
        raise ValueError(f"FSDP has versions 1 and 2, but the plugin's `fsdp_version` is {plugin.fsdp_version!r}.")
    model.eval()
    return model


def _wrap_fsdp1(model: nn.Module, accelerator: Accelerator) -> FullyShardedDataParallel:
    from torch.distributed.fsdp import FullyShardedDataParallel

    inner = model._orig_mod if is_compiled_module(model) else model
    if isinstance(inner, FullyShardedDataParallel):
        return model
    plugin = accelerator.state.fsdp_plugin
    plugin.set_auto_wrap_policy(model)
    ignored = plugin.ignored_modules
    if isinstance(ignored, str):
        pattern = re.compile(ignored)
        ignored = [module for name, module in model.named_modules() if pattern.fullmatch(name)]
        for module in ignored:  # FSDP leaves them where they are
            module.to(accelerator.device)
    return FullyShardedDataParallel(
        model,
        sharding_strategy=plugin.sharding_strategy or plugin.reshard_after_forward,
        cpu_offload=plugin.cpu_offload,
        auto_wrap_policy=plugin.auto_wrap_policy,
        mixed_precision=plugin.mixed_precision_policy,
        sync_module_states=plugin.sync_module_states,
        backward_prefetch=plugin.backward_prefetch,
        forward_prefetch=plugin.forward_prefetch,
        use_orig_params=plugin.use_orig_params,
        param_init_fn=plugin.param_init_fn,
        ignored_modules=ignored,
        limit_all_gathers=plugin.limit_all_gathers,
        device_id=accelerator.device,
    )


# ---- Weights of a model that may be sharded ----


def load_full_state_dict(model: nn.Module, folder: str) -> None:
    """
    Read the weights that `save_pretrained` wrote into a model, each process its part where the model is sharded.

    Args:
        model: the model without its wrapper: whole, or sharded by FSDP2 or ZeRO-3. All processes call this.
        folder: holds `*.safetensors`.
    """
    state: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        state.update(load_file(file))
    if is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            if deepspeed.comm.get_rank() == 0:
                model.load_state_dict(state, strict=False)  # tied weights are saved once
        return
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))


# ---- Other methods than forward, through the wrapper ----


class _ForwardRedirection:
    """
    Call any method of a wrapped model through the wrapper's forward.

    DDP and FSDP do their work (gathering weights, setting up gradient reduction) in their own forward, so a method
    called on the inner module would miss it. For one call, the inner forward is replaced by the method.
    """

    def __call__(
        self, wrapper_module: nn.Module, original_module: nn.Module, method: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        """
        Run `method(*args, **kwargs)` inside `wrapper_module`'s forward, and return what it returns.

        Args:
            wrapper_module: what wraps the model, or the model itself.
            original_module: the model whose forward the wrapper calls.
            method: the function to run there, e.g. a bound method of the model.
            *args: its arguments, which pass through the wrapper.
            **kwargs: likewise.
        """
        original_forward = original_module.forward

        def redirected(*args: Any, **kwargs: Any) -> Any:
            original_module.forward = original_forward  # the method itself may call forward
            output = method(*args, **kwargs)
            self.on_after_inner_forward(wrapper_module, original_module)
            return output

        original_module.forward = redirected
        try:
            output = wrapper_module(*args, **kwargs)
        finally:
            original_module.forward = original_forward
        self.on_after_outer_forward(wrapper_module, original_module)
        return output

    def on_after_inner_forward(self, wrapper_module: nn.Module, original_module: nn.Module) -> None:
        """Called when the method has run, inside the wrapper's forward."""

    def on_after_outer_forward(self, wrapper_module: nn.Module, original_module: nn.Module) -> None:
        """Called when the wrapper's forward has returned."""
