"""
The weights of a model under training, one whole tensor at a time, under the names that they are published with.

For whoever samples with a copy of the policy: an inference engine in this process or behind a server. Nothing here
writes to the model: adapters are merged into copies of single layers, so that the base stays as it was to the last
bit, and shards are gathered piece by piece, so that the model is never whole twice.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import is_peft_available

from ..distributed import DistributedBackend

# What wrappers (FSDP1, activation checkpointing, torch.compile) put between a parameter's name and its parent's.
_WRAPPER_NAMES = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class WeightInfo:
    """A published weight: its name, its dtype in torch's word (`float32`), its whole shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def iter_weights(
    model: nn.Module, accelerator: Accelerator, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """
    Names and whole tensors of all weights. Where a model is sharded, all processes go through it together, to the end.

    Args:
        model: the model as the trainer holds it: wrapped, sharded, quantized, with adapters or without.
        accelerator: the trainer's accelerator.
        dtype: of the matrices; vectors, such as norms and biases, keep their own. Default: as they are.

    Yields:
        The name as `save_pretrained` would write it, and the tensor, on the model's device and without gradient. It may
        share memory with the model: it is not to be written to. A head tied to the embeddings is left out, unless an
        adapter makes it differ from them.

    Raises:
        ValueError: an adapter cannot be merged.
    """
    with torch.no_grad():
        for name, tensor in _published(model, accelerator, whole=True):
            yield name, _as_sent(tensor, dtype)


def weight_manifest(model: nn.Module, accelerator: Accelerator, dtype: torch.dtype | None = None) -> list[WeightInfo]:
    """What `iter_weights` will yield, in its order. Nothing is gathered but FSDP1's flat parameters."""
    with torch.no_grad():
        tensors = ((name, _as_sent(tensor, dtype)) for name, tensor in _published(model, accelerator, whole=False))
        return [WeightInfo(name, str(tensor.dtype).split(".")[-1], tuple(tensor.shape)) for name, tensor in tensors]


def base_model_of(model: nn.Module) -> nn.Module:
    """The model under its adapters, or itself."""
    return model.get_base_model() if _is_peft(model) else model


def has_tied_head(model: nn.Module) -> bool:
    """
    Whether the output head is the input embeddings, adapters included. An adapter on one of them alone makes two of
    them, whatever the config says.

    Args:
        model: the model, not wrapped; with adapters or without.
    """
    base = base_model_of(model)
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    weights = [getattr(module, "weight", None) for module in (head, embeddings)]
    plain = not any(_is_adapted(module) for module in (head, embeddings))
    return plain and weights[0] is not None and weights[0] is weights[1]


def _as_sent(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None and tensor.is_floating_point() and tensor.dim() > 1:
        tensor = tensor.to(dtype)
    return tensor.detach()


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def _published(model: nn.Module, accelerator: Accelerator, whole: bool) -> Iterator[tuple[str, Tensor]]:
    """Weights under published names. Where a model's own names differ, they are renamed (and its stacked experts taken
    apart) by Transformers' rules, a layer at a time."""
    # FSDP1's outermost wrapper holds parameters of its own, so it is gone through like the inner ones.
    is_fsdp1 = DistributedBackend(accelerator).fsdp_version == 1
    root = model if is_fsdp1 else accelerator.unwrap_model(model, keep_torch_compile=False)
    weights = _Walk(accelerator, whole).weights(root)
    inner = root
    while hasattr(inner, "_fsdp_wrapped_module"):
        inner = inner._fsdp_wrapped_module
    inner = base_model_of(inner)
    if not _has_own_names(inner):
        yield from weights
        return
    from transformers.core_model_loading import revert_weight_conversion

    for layer in _by_layer(weights):
        yield from revert_weight_conversion(inner, layer).items()


def _has_own_names(model: nn.Module) -> bool:
    """Whether Transformers keeps this model under other names, or in other pieces, than it is published with."""
    if getattr(model, "_weight_conversions", None):
        return True
    if getattr(model, "config", None) is None:
        return False
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return False
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def _by_layer(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Neighbouring weights of one layer (`...layers.7.`) together, what is in no layer together too."""
    current, layer = {}, None
    for name, tensor in weights:
        found = _LAYER.match(name)
        key = found.group(1) if found else None
        if current and key != layer:
            yield current
            current = {}
        layer = key
        current[name] = tensor
    if current:
        yield current


# ---------------------------------------------------------------------------------------------------------------------
# The walk through the modules
# ---------------------------------------------------------------------------------------------------------------------


class _Walk:
    def __init__(self, accelerator: Accelerator, whole: bool):
        self.backend = DistributedBackend(accelerator)
        self.whole = whole
        self._seen: set[int] = set()

    def weights(self, module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        if _is_adapted(module):
            yield from self._adapted(module, prefix)
            return
        if _is_peft(module):
            yield from self.weights(module.get_base_model(), prefix)
            return
        with self._fsdp1(module):
            with self._gathered(chain(module.parameters(recurse=False), module.buffers(recurse=False))):
                yield from self._own(module, prefix)
            for name, child in module.named_children():
                inside = prefix if name in _WRAPPER_NAMES else f"{prefix}{name}."
                yield from self.weights(child, inside)

    def _own(self, module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """A module's own parameters, and those of its buffers that are saved; each once, however often it is used."""
        saved = (
            (name, buffer)
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        )
        for name, tensor in [*module._parameters.items(), *saved]:
            if tensor is None or id(tensor) in self._seen:
                continue
            self._seen.add(id(tensor))
            if _is_quantized(tensor):
                yield prefix + name, self._dequantized(module)
            elif not _is_part_of_quantization(module, name):
                yield prefix + name, self._materialize(tensor)

    def _adapted(self, module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """
        A module that an adapter changes: what it computes with now, as plain weights.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        if isinstance(module, ModulesToSaveWrapper):
            name = module.active_adapter if not module.disable_adapters else None
            names = [name] if isinstance(name, str) else name or []
            chosen = next((module.modules_to_save[name] for name in names if name in module.modules_to_save), None)
            yield from self.weights(module.original_module if chosen is None else chosen, prefix)
            return
        if not isinstance(module, BaseTunerLayer):  # single tokens of an embedding
            yield from self._adapted(module.token_adapter, prefix)
            return
        if not self.whole:  # merging changes no shape
            yield from self._base(module, prefix)
            return
        base = _innermost(module)
        with self._gathered([*module.parameters(), *module.buffers()]), self._fsdp1(module):
            if any(_is_quantized(parameter) for parameter in base.parameters(recurse=False)):
                yield prefix + "weight", _merged_quantized(module, base)
                rest = ((name, tensor) for name, tensor in base._parameters.items() if name != "weight")
                yield from ((prefix + name, self._materialize(tensor)) for name, tensor in rest if tensor is not None)
            else:
                merged = self._merged_copy(module)
                yield from _Walk(self.backend.accelerator, True).weights(merged, prefix)

    def _base(self, module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        # Weights that an adapter made two of one (a tied head) are sent as two.
        yield from _Walk(self.backend.accelerator, False).weights(_innermost(module), prefix)

    def _merged_copy(self, module: nn.Module) -> nn.Module:
        """A copy of the base layer with its adapters merged, the copy's parameters whole."""
        tensors = chain(module.parameters(), module.buffers())
        whole = {
            id(tensor): nn.Parameter(self._materialize(tensor).clone(), requires_grad=False)
            if isinstance(tensor, nn.Parameter)
            else self._materialize(tensor).clone()
            for tensor in tensors
        }
        layer = copy.deepcopy(module, whole)
        while hasattr(layer, "base_layer"):
            if not layer.disable_adapters:
                layer.merge()
            layer = layer.base_layer
        return layer

    # ---- Whole tensors ----

    def _gathered(self, tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager:
        if not (self.whole and self.backend.is_zero3):
            return contextlib.nullcontext()
        return self.backend.gather_params([tensor for tensor in tensors if isinstance(tensor, nn.Parameter)])

    def _fsdp1(self, module: nn.Module) -> contextlib.AbstractContextManager:
        if self.backend.fsdp_version != 1 or not hasattr(module, "_fsdp_wrapped_module"):
            return contextlib.nullcontext()
        return self.backend.summon_full_params(module, recurse=False, writeback=False)

    def _materialize(self, tensor: Tensor) -> Tensor:
        if not self.whole:
            return torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")
        tensor = tensor.detach()
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def _dequantized(self, module: nn.Module) -> Tensor:
        if not self.whole and module.weight.__class__.__name__ == "Params4bit":
            state = module.weight.quant_state
            dtype = state.original_dtype if _is_packed_for_cpu(state) else state.dtype
            return torch.empty(state.shape, dtype=dtype, device="meta")
        return _dequantized_weight(module)


def _is_peft(model: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _is_adapted(module: nn.Module | None) -> bool:
    if not is_peft_available():
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _innermost(module: nn.Module) -> nn.Module:
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _is_quantized(tensor: Tensor) -> bool:
    return tensor.__class__.__name__ in ("Params4bit", "Int8Params")


def _is_part_of_quantization(module: nn.Module, name: str) -> bool:
    """Scales and the like: said by the dequantized weight already."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and _is_quantized(weight) and name not in ("weight", "bias")


def _dequantized_weight(module: nn.Module) -> Tensor:
    """A quantized weight as the numbers that it stands for, whichever way it is kept now."""
    weight = module.weight
    if weight.__class__.__name__ != "Params4bit":
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(module).detach()
    from bitsandbytes.functional import dequantize_4bit

    data, state = weight.data, weight.quant_state
    if _is_packed_for_cpu(state):
        data, state = _unpacked(data, state)
    return dequantize_4bit(data, state).detach()


def _is_packed_for_cpu(state: Any) -> bool:
    """Whether bitsandbytes has put 4 bits in another order: a CPU with bfloat16 does that in its first evaluation."""
    return getattr(state, "packing_format_for_cpu", False)


def _unpacked(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A copy in the order that `dequantize_4bit` reads, with the scales that the CPU computes with."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    own = copy.copy(state)
    own.original_nested = False  # the scales are not quantized again
    data, own = _convert_weight_packed_for_cpu_inverse(data, own)
    own.absmax = state.absmax.T.reshape(-1).float()
    return data, own


def _merged_quantized(module: nn.Module, base: nn.Module) -> Tensor:
    """A dequantized weight with what the adapters add; their own `merge` would quantize the sum."""
    weight = _dequantized_weight(base).clone()
    if module.disable_adapters:
        return weight
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        if not hasattr(module, "get_delta_weight") or getattr(module, "lora_variant", {}).get(adapter) is not None:
            raise ValueError(
                f"The adapter {adapter!r} ({type(module).__name__}) on a quantized layer cannot be merged for the "
                "engine. Train plain LoRA (no DoRA, no other variants), or do not quantize the base."
            )
        weight += module.get_delta_weight(adapter).to(weight.dtype)
    return weight
