"""A tiny policy that vLLM's CPU kernels take, and trainers on it that sample with vLLM."""

from __future__ import annotations

from peft import LoraConfig

from trl import RLOOConfig, RLOOTrainer

from ..conftest import build_model, build_tokenizer
from .grpo_helpers import PROMPTS, make_args, make_trainer, vowels

# The CPU kernels want heads of 32.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
LORA = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": "gaussian"}
SHORT_RUN = {
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "max_completion_length": 12,
    "learning_rate": 1e-2,
    "vllm_max_model_length": 256,
}


def build_policy(**settings):
    tokenizer = build_tokenizer()
    model = build_model(vocab_size=len(tokenizer), **SIZES, **settings)
    model.config.architectures = [type(model).__name__]
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def make_vllm_trainer(tmp_path, *, method="grpo", tied=True, lora=False, rewards=vowels, **settings):
    """GRPO or RLOO on the tiny policy; `use_vllm=False` among the settings samples with Transformers."""
    settings = {"use_vllm": True, **SHORT_RUN, **settings}
    model = settings.pop("model", None) or build_policy(tie_word_embeddings=tied)
    if lora:
        settings["peft_config"] = LoraConfig(**LORA)
    if method == "grpo":
        return make_trainer(tmp_path, rewards, model=model, **settings)
    options = {name: settings.pop(name) for name in ("peft_config", "train_dataset") if name in settings}
    args = RLOOConfig(**{**_given(make_args(tmp_path)), "output_dir": str(tmp_path), **settings})
    options.setdefault("train_dataset", PROMPTS)
    return RLOOTrainer(model, rewards, args, processing_class=build_tokenizer(), **options)


def _given(args) -> dict:
    names = ("use_cpu", "bf16", "report_to", "save_strategy", "disable_tqdm", "max_steps", "logging_steps")
    return {name: getattr(args, name) for name in names}


def logged(trainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]
