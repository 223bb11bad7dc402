"""
The policy that a method holds the trained one against, and what makes a model deterministic and recognisable.

A reference is a frozen copy, or, where an adapter is trained, the same model seen without it (or with the adapter it
began with). Either way it is asked through `ReferencePolicy.score`.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from packaging.version import Version
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_peft_available

from ..ops.scoring import TokenScores, install_scoring, score_tokens
from .adapters import use_adapter
from .distributed import prepare_deepspeed, prepare_fsdp

if TYPE_CHECKING:
    from peft import PeftModel

# Name of the frozen adapter that stands for the reference beside the one that is trained.
REFERENCE_ADAPTER = "ref"

# Where the layers of common architectures are, as parameter names.
LAYER_PATTERNS = [
    "model.layers.{layer}",
    "model.language_model.layers.{layer}",
    "transformer.h.{layer}",
    "gpt_neox.layers.{layer}",
    "model.decoder.layers.{layer}",
]


def _names_before_layer(model: nn.Module, layer: int, pattern: str | None) -> list[str]:
    """Names of the parameters that come before a layer (the embeddings included), in the model's order."""
    names = [name for name, _ in model.named_parameters()]
    candidates = [pattern] if pattern is not None else LAYER_PATTERNS
    for candidate in candidates:
        prefix = candidate.format(layer=layer) + "."
        for position, name in enumerate(names):
            if name.startswith(prefix) or f".{prefix}" in name:
                return names[:position]
    raise ValueError(
        f"No layer {layer} was found by the name pattern{'s' if pattern is None else ''} "
        f"{', '.join(map(repr, candidates))}. Pass `pattern` with a place for the number, fitting parameter names such "
        f"as {names[len(names) // 2]!r}; `num_shared_layers` is below the number of layers."
    )


def create_reference_model(
    model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None
) -> nn.Module:
    """
    Copy a model as a frozen reference.

    Args:
        model: the policy.
        num_shared_layers: so many first layers (and the embeddings) are one set of parameters for both, frozen in
            `model` too. Default: everything is copied.
        pattern: how the layers' parameters are called, with `{layer}` for the number, e.g. `"model.layers.{layer}"`.
            Default: as in common architectures.

    Returns:
        The copy, in evaluation mode, without gradients.

    Raises:
        ValueError: DeepSpeed ZeRO-3 shards the parameters, or no layer fits the pattern.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "A model sharded by DeepSpeed ZeRO-3 cannot be copied: each process holds a part of every weight. Load the "
            "reference with `from_pretrained`."
        )
    shared = {}
    if num_shared_layers is not None:
        for name in _names_before_layer(model, num_shared_layers, pattern):
            parameter = model.get_parameter(name)
            parameter.requires_grad_(False)
            shared[id(parameter)] = parameter  # deepcopy takes it for copied already
    reference = copy.deepcopy(model, shared)
    reference.requires_grad_(False)
    return reference.eval()


def disable_dropout_in_model(model: nn.Module) -> None:
    """
    Set every dropout probability to 0, so that two forwards of the same input agree: those of dropout layers, and those
    that modules hand to a function themselves, as attention does.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@torch.no_grad()
def hash_module(module: nn.Module, skip: Callable[[str], bool] | None = None) -> str:
    """
    A fingerprint of a module's weights: equal exactly when names, types, shapes and bits of all are equal.

    Args:
        module: any module; its parameters and persistent buffers count.
        skip: names of weights that do not count. Default: all count.

    Returns:
        SHA-256 as hexadecimal text.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.Tensor) or (skip is not None and skip(name)):
            continue
        with _whole(tensor) as whole:
            digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
            digest.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _whole(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """All of a tensor of which FSDP2 or ZeRO-3 may have left this process a part."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.data
    else:
        yield tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ---- The reference of a run ----


def add_reference_adapter(model: PeftModel) -> bool:
    """
    Keep the adapter that a model comes with, frozen, as the reference: a copy of it under the name `"ref"`.

    Args:
        model: a PeftModel about to be trained further.

    Returns:
        False where PEFT cannot do it (0.17 to 0.19 with LoRA on `target_parameters`); a warning says what the
        reference is then.
    """
    import peft

    name = model.active_adapter
    config = model.peft_config[name]
    version = Version(peft.__version__)
    if getattr(config, "target_parameters", None) and Version("0.17") <= version < Version("0.20"):
        warnings.warn(
            f"PEFT {version} cannot hold two adapters on `target_parameters`, so the reference is the base model "
            "without an adapter, not the adapter that the model came with. Update PEFT to 0.20 or newer."
        )
        return False
    model.add_adapter(REFERENCE_ADAPTER, config)
    parameters = dict(model.named_parameters())
    for parameter_name, parameter in parameters.items():
        parts = parameter_name.split(".")
        if REFERENCE_ADAPTER not in parts:
            continue
        source = ".".join(name if part == REFERENCE_ADAPTER else part for part in parts)
        parameter.data.copy_(parameters[source].data)
        parameter.requires_grad_(False)
    return True


class ReferencePolicy:
    """
    The frozen policy that log-ratios are taken against.

    Args:
        model: a model of its own. None: the policy itself, without its adapter or with the one called `"ref"`.
        under_adapter: `model` is a copy of the policy, and to be seen as the policy would be.

    `ReferencePolicy.of` chooses; `prepare` places it beside the policy; `score` asks it.
    """

    def __init__(self, model: nn.Module | None = None, under_adapter: bool = False):
        self.model = model
        self._under_adapter = under_adapter or model is None
        self._is_prepared = False
        if model is not None:
            model.requires_grad_(False)
            model.config.use_cache = False
            install_scoring(model)
            model.eval()

    @classmethod
    def of(
        cls,
        policy: nn.Module,
        ref_model: nn.Module | None = None,
        *,
        came_with_adapter: bool = False,
        load: Callable[[], nn.Module] | None = None,
    ) -> ReferencePolicy:
        """
        The reference of a run that is about to start.

        Args:
            policy: the model to train, its adapter included.
            ref_model: the user's own reference.
            came_with_adapter: the policy was given with an adapter, which the reference then has too, frozen.
            load: loads the policy's base once more, where it cannot be copied (ZeRO-3, several devices).
        """
        if ref_model is not None:
            return cls(ref_model)
        if _find_peft_model(policy) is None:
            return cls.copy_of(policy, load)
        if came_with_adapter:
            add_reference_adapter(policy)
        return cls()

    @classmethod
    def copy_of(cls, policy: nn.Module, load: Callable[[], nn.Module] | None = None) -> ReferencePolicy:
        """A frozen copy of the policy as it is now, without its adapter; loaded with `load` if it cannot be copied."""
        spread = len(set((getattr(policy, "hf_device_map", None) or {}).values())) > 1
        if load is None or not (spread or is_deepspeed_zero3_enabled()):
            return cls(create_reference_model(policy), under_adapter=True)
        inner = _find_peft_model(policy)
        if inner is not None and REFERENCE_ADAPTER in inner.peft_config:
            raise ValueError(
                "A model that came with an adapter cannot be copied when it is sharded by ZeRO-3 or spread over "
                "devices. Pass a `ref_model`: the same model loaded once more."
            )
        return cls(load())

    @property
    def is_policy(self) -> bool:
        """Whether the reference is the policy itself, under another adapter or none."""
        return self.model is None

    def prepare(self, accelerator: Accelerator) -> None:
        """Place a model of its own as the policy is placed: on the device, or sharded by DeepSpeed or FSDP."""
        if self.model is None or self._is_prepared:
            return
        if accelerator.state.deepspeed_plugin is not None:
            self.model = prepare_deepspeed(self.model, accelerator)
        elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
            self.model = prepare_fsdp(self.model, accelerator)
        else:
            self.model = accelerator.prepare_model(self.model, evaluation_mode=True)
        self._is_prepared = True

    @contextmanager
    def _asked_through(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The model to call, for the time of the block."""
        model = policy if self.model is None else self.model
        inner = _find_peft_model(model) if self._under_adapter else None
        if inner is None:  # a model of its own, or the policy before its first step
            yield model
            return
        with use_adapter(inner, REFERENCE_ADAPTER if REFERENCE_ADAPTER in inner.peft_config else None):
            yield model

    @torch.no_grad()
    def score(self, policy: nn.Module, batch: Mapping[str, Any], **options: Any) -> TokenScores:
        """
        Score a batch without gradients; see `trl.ops.scoring.score_tokens`.

        Args:
            policy: the trained model, wrapped as it is trained.
            batch: inputs of the model with `labels`.
            **options: of `score_tokens`.
        """
        inputs = {name: value for name, value in batch.items() if name != "output_router_logits"}
        with self._asked_through(policy) as model:
            return score_tokens(model, inputs, **options)

    def fingerprint(self, policy: nn.Module) -> str:
        """A hash of the weights that the reference computes with."""
        model = policy if self.model is None else self.model
        inner = _find_peft_model(model) if self._under_adapter else None
        return hash_module(model, skip=None if inner is None else _unused_adapter_weights(inner))


def _find_peft_model(model: nn.Module) -> PeftModel | None:
    if not is_peft_available():
        return None
    from peft import PeftModel

    return next((module for module in model.modules() if isinstance(module, PeftModel)), None)


def _unused_adapter_weights(model: PeftModel) -> Callable[[str], bool]:
    """Which weights the reference does not look at: those of every adapter but the one called `"ref"`."""
    adapters = set(model.peft_config) - {REFERENCE_ADAPTER}
    return lambda name: not adapters.isdisjoint(name.split("."))
