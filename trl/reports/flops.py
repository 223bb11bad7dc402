"""
How much of the hardware a training uses: the model's arithmetic per token against the device's peak.

Counting follows PaLM (https://huggingface.co/papers/2204.02311, appendix B): only matrix products of the model count,
each multiply-add is two operations, the backward pass costs twice the forward, and what checkpointing computes again
is no progress.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

# Peak operations per second of the dense matrix units, as the vendors state them. First fit wins, so longer names come
# before the shorter ones they contain.
_T = 1e12
_PEAK_FLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("GB200", {"bfloat16": 2500 * _T, "float16": 2500 * _T, "float32": 80 * _T}),
    ("GB300", {"bfloat16": 2500 * _T, "float16": 2500 * _T, "float32": 80 * _T}),
    ("B300", {"bfloat16": 2250 * _T, "float16": 2250 * _T, "float32": 75 * _T}),
    ("B200", {"bfloat16": 2250 * _T, "float16": 2250 * _T, "float32": 75 * _T}),
    ("B100", {"bfloat16": 1800 * _T, "float16": 1800 * _T, "float32": 60 * _T}),
    ("H200", {"bfloat16": 989.5 * _T, "float16": 989.5 * _T, "float32": 67 * _T}),
    ("GH200", {"bfloat16": 989.5 * _T, "float16": 989.5 * _T, "float32": 67 * _T}),
    ("H100 NVL", {"bfloat16": 835 * _T, "float16": 835 * _T, "float32": 60 * _T}),
    ("H100 PCIe", {"bfloat16": 756 * _T, "float16": 756 * _T, "float32": 51 * _T}),
    ("H100", {"bfloat16": 989.5 * _T, "float16": 989.5 * _T, "float32": 67 * _T}),
    ("H800", {"bfloat16": 989.5 * _T, "float16": 989.5 * _T, "float32": 67 * _T}),
    ("H20", {"bfloat16": 148 * _T, "float16": 148 * _T, "float32": 44 * _T}),
    ("A100", {"bfloat16": 312 * _T, "float16": 312 * _T, "float32": 19.5 * _T}),
    ("A800", {"bfloat16": 312 * _T, "float16": 312 * _T, "float32": 19.5 * _T}),
    ("A10G", {"bfloat16": 70 * _T, "float16": 70 * _T, "float32": 35 * _T}),
    ("A10", {"bfloat16": 125 * _T, "float16": 125 * _T, "float32": 31.2 * _T}),
    ("A40", {"bfloat16": 149.7 * _T, "float16": 149.7 * _T, "float32": 37.4 * _T}),
    ("L40S", {"bfloat16": 362 * _T, "float16": 362 * _T, "float32": 91.6 * _T}),
    ("L40", {"bfloat16": 181 * _T, "float16": 181 * _T, "float32": 90.5 * _T}),
    ("L4", {"bfloat16": 121 * _T, "float16": 121 * _T, "float32": 30.3 * _T}),
    ("RTX 4090", {"bfloat16": 165.2 * _T, "float16": 165.2 * _T, "float32": 82.6 * _T}),
    ("RTX 3090", {"bfloat16": 71 * _T, "float16": 71 * _T, "float32": 35.6 * _T}),
    ("V100", {"float16": 125 * _T, "float32": 15.7 * _T}),
    ("T4", {"float16": 65 * _T, "float32": 8.1 * _T}),
    ("MI355X", {"bfloat16": 2500 * _T, "float16": 2500 * _T, "float32": 157.3 * _T}),
    ("MI325X", {"bfloat16": 1307.4 * _T, "float16": 1307.4 * _T, "float32": 163.4 * _T}),
    ("MI300X", {"bfloat16": 1307.4 * _T, "float16": 1307.4 * _T, "float32": 163.4 * _T}),
    ("MI250X", {"bfloat16": 191.5 * _T, "float16": 191.5 * _T, "float32": 47.9 * _T}),  # one of its two dies
)
_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "no": "float32"}


# ---- The model's side ----


def _matmul_parameters(config: PreTrainedConfig) -> int:
    """Weights that one token is multiplied with: matrices without the embedding tables, and of the experts those used."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]  # positions have one too
    embeddings = {
        id(parameter) for table in (*tables, model.get_input_embeddings()) for parameter in table.parameters()
    }
    head = model.get_output_embeddings()
    tied = head is not None and id(head.weight) in embeddings
    experts = next(
        (
            count
            for name in ("num_local_experts", "num_experts", "n_routed_experts")
            if (count := getattr(config, name, 0))
        ),
        0,
    )
    used_share = (getattr(config, "num_experts_per_tok", experts) or experts) / experts if experts else 1.0
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith("bias") or id(parameter) in embeddings:
            continue
        is_expert = ".experts." in name and "shared" not in name
        total += parameter.numel() * (used_share if is_expert else 1.0)
    if tied:
        total += head.weight.numel()  # one table, used as a matrix at the end
    return round(total)


def _attention_flops_per_token(config: PreTrainedConfig, seq_len: int) -> int:
    """Scores and weighted values of all layers, forward and backward, with every token attending to `seq_len` others."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_dim = getattr(config, "qk_head_dim", None) or head_dim
    value_dim = getattr(config, "v_head_dim", None) or head_dim
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    total = 0
    for kind in kinds:
        if "attention" not in kind or "linear" in kind:
            continue
        span = min(seq_len, window) if window and kind in ("sliding_attention", "chunked_attention") else seq_len
        total += 3 * 2 * heads * (key_dim + value_dim) * span
    return total


def compute_flops_per_token(config: PreTrainedConfig, seq_len: int) -> int:
    """
    Floating-point operations of training on one token, forward and backward.

    Args:
        config: the model's config; the text part of a model with several.
        seq_len: length of the sequences, in tokens; attention counts all pairs (see `adjusted_mfu`).

    Returns:
        6 per weight that takes part in a matrix product, plus attention's.
    """
    text_config = config.get_text_config()
    return 6 * _matmul_parameters(text_config) + _attention_flops_per_token(text_config, seq_len)


# ---- The device's side ----


def get_peak_flops(device_name: str, dtype: str) -> float | None:
    """
    Peak dense throughput of a device.

    Args:
        device_name: as the driver names it, e.g. "NVIDIA H100 80GB HBM3".
        dtype: `"bfloat16"`, `"float16"` or `"float32"` (or `"bf16"`, `"fp16"`, `"fp32"`).

    Returns:
        Operations per second; None where the device or type is not in the table.
    """
    dtype = dtype.removeprefix("torch.")
    dtype = _DTYPE_NAMES.get(dtype, dtype)
    words = device_name.upper().replace("-", " ")
    for name, peaks in _PEAK_FLOPS:
        if f" {name.upper()} " in f" {words} " or (name[-1] == "X" and name.upper() in words):
            return peaks.get(dtype)
    return None


def get_peak_flops_per_device(accelerator: Accelerator, dtype: str) -> float | None:
    """
    `get_peak_flops` of the device this process runs on; None on a CPU or an unknown device.

    Args:
        accelerator: the trainer's accelerator.
        dtype: type of the matrix products.
    """
    device = accelerator.device
    module = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "get_device_name"):
        return None
    return get_peak_flops(module.get_device_name(device), dtype)


# ---- The quotient ----


def compute_mfu(
    flops_per_token: int, tokens_per_second: float, world_size: int, peak_flops_per_device: float
) -> float:
    """
    Model FLOPs utilisation.

    Args:
        flops_per_token: from `compute_flops_per_token`.
        tokens_per_second: of all processes together.
        world_size: number of devices.
        peak_flops_per_device: from `get_peak_flops`.

    Returns:
        Percent of the peak, 0 to 100.
    """
    return 100.0 * flops_per_token * tokens_per_second / (world_size * peak_flops_per_device)


def adjusted_mfu(mfu: float, config: PreTrainedConfig, seq_len: int) -> float:
    """
    MFU that counts only the pairs causal attention needs, half of them.

    Args:
        mfu: from `compute_mfu`, which counts all pairs.
        config: the model's config.
        seq_len: length of the sequences, in tokens.

    Returns:
        The MFU without attention's masked half, in the unit of `mfu`.
    """
    total = compute_flops_per_token(config, seq_len)
    attention = _attention_flops_per_token(config.get_text_config(), seq_len)
    return mfu * (total - attention / 2) / total
