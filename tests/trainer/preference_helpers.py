"""Tiny preference data, and trainers on it."""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.ops.scoring import TokenScores

from ..conftest import build_model, build_tokenizer

TEXT_PAIRS = [
    {"prompt": "what is 12 plus 30?", "chosen": " the answer is 42.", "rejected": " the sky is blue"},
    {"prompt": "sort the list 3, 1, 2:", "chosen": " 1, 2, 3", "rejected": " 3, 2, 1, hello"},
    {"prompt": "the sky is", "chosen": " blue", "rejected": " ugly and the sea is deep"},
    {"prompt": "hello", "chosen": " world, how are you today?", "rejected": " user"},
    {"prompt": "beautiful is", "chosen": " better than ugly;", "rejected": " explicit"},
]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
QUIET = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def make_pairs(count: int, seed: int = 0, vocab_size: int = 400) -> list[dict[str, list[int]]]:
    """Tokenized pairs of uneven length."""
    rng = random.Random(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        return [rng.randrange(4, vocab_size) for _ in range(rng.randint(shortest, longest))]

    return [{"prompt_ids": ids(2, 14), "chosen_ids": ids(1, 9), "rejected_ids": ids(1, 9)} for _ in range(count)]


def make_unpaired(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Tokenized completions, two desirable ones, then an undesirable one, and so on."""
    return [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair["chosen_ids"], "label": i % 3 != 2}
        for i, pair in enumerate(make_pairs(count, seed))
    ]


def make_dpo_trainer(output_dir: Any, rows: list[dict] = TEXT_PAIRS, **settings: Any) -> DPOTrainer:
    return _make_trainer(DPOTrainer, DPOConfig, output_dir, rows, settings)


def make_kto_trainer(output_dir: Any, rows: list[dict] = TEXT_PAIRS, **settings: Any) -> KTOTrainer:
    settings = {"per_device_train_batch_size": 2, **settings}
    return _make_trainer(KTOTrainer, KTOConfig, output_dir, rows, settings)


def _make_trainer(trainer_class, config_class, output_dir, rows, settings):
    settings = {**QUIET, "output_dir": str(output_dir), **settings}
    arguments = {
        name: settings.pop(name)
        for name in ("model", "ref_model", "peft_config", "callbacks", "eval_dataset", "compute_metrics")
        if name in settings
    }
    arguments.setdefault("model", build_model())
    tokenizer = settings.pop("processing_class", None) or build_tokenizer()
    return trainer_class(
        args=config_class(**settings),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=tokenizer,
        **arguments,
    )


def build_lora_model(seed: int = 11, **config: Any):
    """A tiny model with a LoRA whose both factors are random, so that it differs from its base."""
    from peft import get_peft_model

    model = get_peft_model(build_model(**config), LoraConfig(**LORA))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def recorded_scores(case: dict[str, Any], prefix: str = "", mask: str = "completion_mask") -> TokenScores:
    """The per-token values that a recorded case was computed from."""
    dtype = getattr(torch, case["dtype"])
    values = {
        "logps": f"{prefix}per_token_logps",
        "entropies": "per_token_entropy",
        "mean_logits": "per_token_mean_logits",
        "is_top1": "is_top1",
        "log_sum_sq_probs": "log_sum_sq_probs",
    }
    inputs = case["inputs"]
    tensors = {name: torch.tensor(inputs[key], dtype=dtype) for name, key in values.items() if key in inputs}
    return TokenScores(**tensors, mask=torch.tensor(inputs[mask])[:, 1:].bool())
