"""Prompts, a reward, a trainer, a tool and an environment for the tests of GRPO and RLOO."""

from __future__ import annotations

import inspect

from datasets import Dataset
from peft import LoraConfig

from trl import GRPOConfig, GRPOTrainer

from ..conftest import build_model, build_tokenizer

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights="gaussian")
PROMPTS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"the number {index}"}], "answer": index} for index in range(16)]
)


def vowels(completions, **kwargs):
    """The share of vowels in the text."""
    texts = [messages if isinstance(messages, str) else messages[-1]["content"] for messages in completions]
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in texts]


def make_args(tmp_path, **settings):
    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        **settings,
    }
    return GRPOConfig(str(tmp_path), **settings)


def make_trainer(tmp_path, rewards=vowels, data=PROMPTS, model=None, tokenizer=None, eval_dataset=None, **settings):
    ours = inspect.signature(GRPOTrainer.__init__).parameters
    options = {name: settings.pop(name) for name in list(settings) if name in ours}
    tokenizer = tokenizer or build_tokenizer()
    model = model or build_model(vocab_size=len(tokenizer))
    args = make_args(tmp_path, **settings)
    return GRPOTrainer(model, rewards, args, data, eval_dataset, tokenizer, **options)


def fixed_rollouts(completions, prompt_ids=(5, 6, 7), **columns):
    """A `rollout_func` that gives these completions, over and over."""

    def rollout_func(prompts, trainer):
        ids = [completions[index % len(completions)] for index in range(len(prompts))]
        extra = {name: (values * len(prompts))[: len(prompts)] for name, values in columns.items()}
        return {"prompt_ids": [list(prompt_ids)] * len(prompts), "completion_ids": ids, "logprobs": None, **extra}

    return rollout_func


def look_up(word: str) -> str:
    """
    Looks a word up.

    Args:
        word: The word.
    """
    if word == "bad":
        raise KeyError(word)
    return f"{word} is a word"


class Counter:
    """Counts up to a number."""

    def reset(self, answer, **row):
        self.total, self.wanted = 0, answer
        return f" (count to {answer})"

    def add(self, amount: int) -> str:
        """
        Adds to the total.

        Args:
            amount: How much.
        """
        self.total += amount
        return str(self.total)

    def get_reward(self):
        return float(self.total == self.wanted)
