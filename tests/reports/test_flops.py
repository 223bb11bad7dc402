import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, MixtralConfig

from tests.conftest import build_model
from trl.reports import flops
from trl.reports.flops import (
    adjusted_mfu,
    compute_flops_per_token,
    compute_mfu,
    get_peak_flops,
    get_peak_flops_per_device,
)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_agrees_with_counting_a_real_step(architecture, tied):
    """torch's counter, on one training step with eager attention (whose products it sees)."""
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2} if architecture == "gpt2" else {}
    model = build_model(architecture=architecture, tie_word_embeddings=tied, attn_implementation="eager", **sizes)
    ids = torch.arange(64)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    counted = counter.get_total_flops() / 64
    expected = compute_flops_per_token(model.config, 64)
    # The first layer's input needs no gradient where the embedding is a lookup; rotary products are tiny.
    assert expected == pytest.approx(counted, rel=0.02)


def _config(**changes):
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **changes}


def test_formula():
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    expected = 6 * (2 * layer + 32 * 100) + 2 * 12 * 32 * 128
    assert compute_flops_per_token(LlamaConfig(**_config()), 128) == expected
    assert isinstance(compute_flops_per_token(LlamaConfig(**_config()), 128), int)


def test_only_the_experts_used_count():
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 2 * 3 * 32 * 64 + 32 * 8  # two experts of eight, and the router
    expected = 6 * (2 * layer + 32 * 100) + 2 * 12 * 32 * 128
    config = MixtralConfig(**_config(num_local_experts=8, num_experts_per_tok=2))
    assert compute_flops_per_token(config, 128) == expected


def test_sliding_windows_bound_attention():
    config = AutoConfig.for_model("qwen2", **_config(sliding_window=16, use_sliding_window=True, max_window_layers=1))
    assert sorted(config.layer_types) == ["full_attention", "sliding_attention"]
    difference = compute_flops_per_token(config, 128) - compute_flops_per_token(config, 64)
    assert difference == 12 * 32 * 64  # the full layer's alone


@pytest.mark.parametrize(
    ("device", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "torch.float16", 835),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla T4", "fp16", 65),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_peak_of_known_devices(device, dtype, tera):
    assert get_peak_flops(device, dtype) == pytest.approx(tera * 1e12)


def test_peak_of_unknown_ones():
    assert get_peak_flops("Abacus 3000", "bf16") is None
    assert get_peak_flops("Tesla T4", "bf16") is None  # it has none
    assert get_peak_flops("NVIDIA H100", "int3") is None
    assert get_peak_flops_per_device(types.SimpleNamespace(device=torch.device("cpu")), "bf16") is None


def test_peak_of_this_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    accelerator = types.SimpleNamespace(device=torch.device("cuda", 0))
    assert get_peak_flops_per_device(accelerator, "bf16") == get_peak_flops("NVIDIA H200", "bf16")


def test_mfu_is_a_percentage():
    assert compute_mfu(1000, 50.0, 2, 100_000.0) == pytest.approx(25.0)


def test_adjusted_mfu_leaves_out_the_masked_half():
    config = LlamaConfig(**_config())
    total = compute_flops_per_token(config, 4096)
    half = flops._attention_flops_per_token(config, 4096) / 2
    assert adjusted_mfu(40.0, config, 4096) == pytest.approx(40.0 * (total - half) / total)
    assert adjusted_mfu(40.0, config, 1) == pytest.approx(40.0, rel=0.01)
