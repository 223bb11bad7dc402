"""
A model learns to use a tool, with GRPO: long sums and products that it cannot do in its head, and a calculator.

    python examples/scripts/grpo_tools.py \
        --model_name_or_path Qwen/Qwen3-0.6B \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 4 \
        --max_completion_length 512 --max_tool_calling_iterations 4 \
        --chat_template_kwargs '{"enable_thinking": false}' \
        --log_completions \
        --output_dir Qwen3-0.6B-calculator

The problems are made here. Tools are Python functions; their type hints and docstrings are what the model reads. The
curve to watch, beside the reward, is `tools/call_frequency`: the model should find out that calling pays.
"""

import ast
import operator
import random
import re

from datasets import Dataset

from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config
from trl.scripts.training import model_init_kwargs, train_and_save
from trl.scripts.utils import ScriptArguments, TrlParser, read_script_arguments

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


# ---- The tool ----


def calculate(expression: str) -> str:
    """
    Works out an expression of whole numbers.

    Args:
        expression: Numbers with +, - and *, and parentheses, such as "(12 + 30) * 7".
    """
    return str(work_out(ast.parse(expression, mode="eval").body))


def work_out(node: ast.expr) -> int:
    """Of what the model wrote nothing but this arithmetic is ever run. An error is shown to it as the tool's answer."""
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 10**12:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -work_out(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](work_out(node.left), work_out(node.right))
    raise ValueError("only whole numbers with +, - and * can be worked out")


# ---- The task ----


def make_problems(count: int, seed: int = 0) -> Dataset:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b, c = rng.randint(100, 9999), rng.randint(100, 999), rng.randint(100, 9999)
        sign, value = rng.choice([("plus", a * b + c), ("minus", a * b - c)])
        question = f"What is {a} times {b}, {sign} {c}? End with the number."
        rows.append({"prompt": [{"role": "user", "content": question}], "value": value})
    return Dataset.from_list(rows)


def is_right(completions: list[list[dict]], value: list[int], **kwargs) -> list[float]:
    """1 where the last number of the last message is the value."""
    rewards = []
    for messages, right in zip(completions, value, strict=True):
        text = messages[-1].get("content") or ""
        numbers = re.findall(r"-?\d+", text.replace(",", ""))
        rewards.append(float(bool(numbers) and messages[-1]["role"] == "assistant" and int(numbers[-1]) == right))
    return rewards


def make_parser() -> TrlParser:
    return TrlParser((GRPOConfig, ModelConfig))


def main(training_args: GRPOConfig, model_args: ModelConfig) -> None:
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=is_right,
        args=training_args,
        train_dataset=make_problems(4000),
        eval_dataset=make_problems(100, seed=1) if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        tools=[calculate],
    )
    train_and_save(trainer, ScriptArguments(), training_args)


if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
