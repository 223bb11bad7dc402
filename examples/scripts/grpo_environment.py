"""
A model learns to act in an environment, with GRPO: to find a treasure on a small map by moving and looking.

    python examples/scripts/grpo_environment.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 4 \
        --max_completion_length 1024 --max_tool_calling_iterations 8 \
        --chat_template_kwargs '{"enable_thinking": false}' \
        --log_completions \
        --output_dir Qwen3-0.6B-treasure

An environment is a class: each rollout has an instance, `reset` begins anew for a row of the dataset, the other public
methods are the tools, and `get_reward` is the reward.
"""

import random

from datasets import Dataset

from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config
from trl.scripts.training import model_init_kwargs, train_and_save
from trl.scripts.utils import ScriptArguments, TrlParser, read_script_arguments

SIZE = 7
DIRECTIONS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


# ---- The environment ----


class TreasureHunt:
    """A map of 7 by 7 fields with a treasure on one of them, and the model in the middle."""

    def reset(self, seed: int = 0, **row) -> str:
        rng = random.Random(seed)
        middle = SIZE // 2
        fields = [(x, y) for x in range(SIZE) for y in range(SIZE) if (x, y) != (middle, middle)]
        self.x = self.y = middle
        self.treasure = rng.choice(fields)
        self.moves = 0
        return f" {self._describe()}"

    def move(self, direction: str, fields: int) -> str:
        """
        Moves over the map.

        Args:
            direction: One of north, south, east and west.
            fields: How many fields, from 1 to 6.
        """
        if direction not in DIRECTIONS:
            raise ValueError(f"direction is one of {', '.join(DIRECTIONS)}")
        if not 1 <= fields < SIZE:
            raise ValueError("fields is a number from 1 to 6")
        self.moves += 1
        step_x, step_y = DIRECTIONS[direction]
        self.x = min(max(self.x + step_x * fields, 0), SIZE - 1)
        self.y = min(max(self.y + step_y * fields, 0), SIZE - 1)
        return self._describe()

    def get_reward(self) -> float:
        """1 for the treasure, less a little for each move beyond the two that are enough."""
        return max(1.0 - 0.1 * max(self.moves - 2, 0), 0.1) if self._is_found() else 0.0

    def _is_found(self) -> bool:
        return (self.x, self.y) == self.treasure

    def _describe(self) -> str:
        if self._is_found():
            return "You found the treasure! Say so, and stop."
        x, y = self.treasure
        signs = [("east", x - self.x), ("west", self.x - x), ("north", y - self.y), ("south", self.y - y)]
        return "A sign says: " + ", ".join(f"{count} to the {way}" for way, count in signs if count > 0) + "."


def make_hunts(count: int, first_seed: int = 0) -> Dataset:
    prompt = [{"role": "user", "content": "Find the treasure with as few moves as you can."}]
    return Dataset.from_list([{"prompt": prompt, "seed": seed} for seed in range(first_seed, first_seed + count)])


def make_parser() -> TrlParser:
    return TrlParser((GRPOConfig, ModelConfig))


def main(training_args: GRPOConfig, model_args: ModelConfig) -> None:
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=make_hunts(2000),
        eval_dataset=make_hunts(100, first_seed=2000) if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        environment_factory=TreasureHunt,
    )
    train_and_save(trainer, ScriptArguments(), training_args)


if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
