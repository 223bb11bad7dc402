"""
A frozen copy of a policy, and what makes a model deterministic and recognisable.
"""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

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
    """Set the probability of every dropout layer to 0, so that two forwards of the same input agree."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@torch.no_grad()
def hash_module(module: nn.Module) -> str:
    """
    A fingerprint of a module's weights: equal exactly when names, types, shapes and bits of all are equal.

    Args:
        module: any module; its parameters and persistent buffers count.

    Returns:
        SHA-256 as hexadecimal text.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
