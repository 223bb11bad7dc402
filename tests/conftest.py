"""Fixtures shared by all tests: a small tokenizer and tiny random models, built here, so that nothing is downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

# Before any library reads them: no network, no accelerator telemetry, few threads for tiny tensors.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
# vLLM: in this process, a GiB for its cache, on whatever core is free (its own choice is the same core for all).
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CACHE_ROOT", str(Path(__file__).parent.parent / ".pytest_cache" / "vllm"))

import pytest

REFERENCE_DIR = Path(__file__).parent / "reference"

# ChatML with the assistant's words, end-of-turn token included, between generation markers.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "the sky is blue and the sea is deep",
    "what is 12 plus 30? the answer is 42.",
    "sort the list 3, 1, 2: 1, 2, 3",
    "user assistant system tool hello world, how are you today?",
    "beautiful is better than ugly; explicit is better than implicit",
]


def load_reference(name: str) -> dict[str, dict]:
    """Recorded figures of `tests/reference/<name>.json`, by case name."""
    cases = json.loads((REFERENCE_DIR / f"{name}.json").read_text())["cases"]
    return {case["name"]: case for case in cases}


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE):
    """A byte-level BPE tokenizer of about 400 tokens with ChatML's special tokens; pad, eos and end of turn differ."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>", bos_token=None
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def build_model(vocab_size: int = 512, seed: int = 0, architecture: str = "llama", **config_kwargs):
    """A two-layer random causal model in float32 (hidden 32, 4 heads, 2 key/value heads); `architecture` is a model type."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        **config_kwargs,
    }
    config = AutoConfig.for_model(architecture, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).float()


@pytest.fixture(scope="session")
def _tokenizer():
    return build_tokenizer()


@pytest.fixture
def tokenizer(_tokenizer):
    """The small tokenizer; a copy per test, so a test may change it."""
    import copy

    return copy.deepcopy(_tokenizer)


@pytest.fixture
def tiny_model():
    """A fresh tiny Llama with fixed random weights."""
    return build_model()


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory, _tokenizer) -> str:
    """A folder holding the tiny model and its tokenizer, loadable with `from_pretrained`."""
    path = tmp_path_factory.mktemp("tiny-llama")
    model = build_model()
    model.config.pad_token_id = model.generation_config.pad_token_id = _tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = _tokenizer.eos_token_id
    model.save_pretrained(path)
    _tokenizer.save_pretrained(path)
    return str(path)
