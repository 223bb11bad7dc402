"""A tiny policy that vLLM's CPU kernels take, and trainers on it that sample with vLLM."""

from __future__ import annotations

from peft import LoraConfig

from trl import RLOOConfig, RLOOTrainer

from ..conftest import build_model, build_tokenizer
from ..rollouts.helpers import build_tool_tokenizer
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


# A tool call, in the only words that vLLM lets the policy say; what it chooses is the argument.
LOOKS_UP = r'<tool_call>\n\{"name": "look_up", "arguments": \{"word": "(sky|sea|bad)"\}\}\n</tool_call>'
COUNTS = r'<tool_call>\n\{"name": "add", "arguments": \{"amount": [1-4]\}\}\n</tool_call>'


def build_policy(tokenizer=None, **settings):
    tokenizer = tokenizer or build_tokenizer()
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


def make_tool_trainer(tmp_path, rewards, **settings):
    """A policy that calls a tool once and then says what it calls the tool with, twice for each prompt."""
    tokenizer = build_tool_tokenizer()
    settings = {
        "model": build_policy(tokenizer, max_position_embeddings=2048), "tokenizer": tokenizer,
        "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 400, "max_steps": 2,
        "vllm_max_model_length": 2048, "max_tool_calling_iterations": 1, **settings,
    }  # fmt: skip
    return make_vllm_trainer(tmp_path, rewards=rewards, **settings)


def logged(trainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]
