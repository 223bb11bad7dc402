"""
GRPO that samples with vLLM in the training process: sums of two small numbers, the share of held-out sums that are right,
and how well the two programs agree on what was sampled.

    python examples/scripts/grpo_vllm_colocate.py \
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --output_dir SmolLM2-sums

On GPUs the engine takes a share of each, here half, and with sleep mode gives it back while the model is trained:

    accelerate launch --num_processes 4 examples/scripts/grpo_vllm_colocate.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --vllm_gpu_memory_utilization 0.5 --vllm_enable_sleep_mode \
        --output_dir Qwen3-0.6B-sums

Nothing of this is about vLLM but `use_vllm`: any script of GRPO or RLOO takes the same flags. docs/vllm.md has the rest.
"""

import random
import re

from datasets import Dataset

from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config
from trl.scripts.training import model_init_kwargs, train_and_save
from trl.scripts.utils import ScriptArguments, TrlParser, read_script_arguments

HELD_OUT = 40
DEFAULTS = {
    "use_vllm": True,
    "vllm_max_model_length": 64,
    "max_steps": 30,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 32,
    "max_completion_length": 6,
    "temperature": 0.7,
    "eval_strategy": "steps",
    "eval_steps": 10,
    "eval_on_start": True,
    "eval_temperature": 0.0,
    "per_device_eval_batch_size": HELD_OUT,
    "logging_steps": 1,
}


def make_sums() -> Dataset:
    """Sums of numbers up to 12, in an order that is always the same."""
    pairs = [(a, b) for a in range(1, 13) for b in range(1, 13)]
    random.Random(0).shuffle(pairs)
    return Dataset.from_list([{"prompt": f"Question: What is {a} + {b}?\nAnswer:", "answer": a + b} for a, b in pairs])


def right_sum(completions: list[str], answer: list[int], **columns) -> list[float]:
    """1 where the first number of the completion is the sum."""
    numbers = [re.search(r"\d+", text) for text in completions]
    return [
        float(bool(number) and int(number.group()) == right) for number, right in zip(numbers, answer, strict=True)
    ]


def make_parser() -> TrlParser:
    parser = TrlParser((GRPOConfig, ModelConfig))
    parser.set_defaults(**DEFAULTS)
    return parser


def main(training_args: GRPOConfig, model_args: ModelConfig) -> None:
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    sums = make_sums()
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=right_sum,
        args=training_args,
        train_dataset=sums.select(range(HELD_OUT, len(sums))),
        eval_dataset=sums.select(range(HELD_OUT)) if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    train_and_save(trainer, ScriptArguments(), training_args)

    logs = trainer.state.log_history
    shares = [f"{log['eval_reward']:.0%}" for log in logs if "eval_reward" in log]
    differences = [log["sampling/sampling_logp_difference/max"] for log in logs if "loss" in log]
    trainer.accelerator.print(f"Held-out sums that were right: {', '.join(shares) or 'not asked'}")
    trainer.accelerator.print(f"Largest difference of a sampled token's log-prob: {max(differences):.1e} nats")


if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
