"""
Does a method learn? A real model, from the command line, over several seeds: sums of two small numbers.

    python scripts/learning/sums.py grpo SmolLM2-135M-Instruct

A prompt is "Question: What is 7 + 5?", a new line and "Answer:"; the reward is 1 where the first number of the
completion is the sum. Of the 144 sums of two numbers up to 12, 40 are held out: before, while and after training, the
model answers them with its most probable tokens. SmolLM2-135M-Instruct goes from 25% to about 80 or 90% in 30 steps,
two minutes of one core and 3 GiB for each seed. What is not a flag of this script goes on to `trl`, and wins over the
settings below.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HIGHEST = 12
HELD_OUT = 40
EVALUATE_EVERY = 10
SETTINGS = {
    "max_steps": 30,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "max_completion_length": 6,
    "temperature": 0.7,
    "eval_strategy": "steps",
    "eval_steps": EVALUATE_EVERY,
    "eval_temperature": 0,
    "per_device_eval_batch_size": HELD_OUT,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": "true",
}
SWITCHES = ["--eval_on_start", "--no_gradient_checkpointing"]


def right_sum(completions: list[str], answer: list[int], **columns) -> list[float]:
    """The reward: 1 where the first number of the completion is the sum, else 0."""
    numbers = [re.search(r"\d+", text) for text in completions]
    return [
        float(number is not None and int(number.group()) == wanted)
        for number, wanted in zip(numbers, answer, strict=True)
    ]


def write_dataset(folder: Path) -> None:
    """The splits `train` and `test`, always the same."""
    pairs = [(a, b) for a in range(1, HIGHEST + 1) for b in range(1, HIGHEST + 1)]
    random.Random(0).shuffle(pairs)
    folder.mkdir(parents=True)
    for split, part in (("test", pairs[:HELD_OUT]), ("train", pairs[HELD_OUT:])):
        rows = [{"prompt": f"Question: What is {a} + {b}?\nAnswer:", "answer": a + b} for a, b in part]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(method: str, model: str, seed: int, folder: Path, flags: list[str]) -> list[float]:
    """Train once; the share of held-out sums that are right, at each evaluation."""
    chosen = {name: value for name, value in SETTINGS.items() if f"--{name}" not in flags}
    command = [sys.executable, "-m", "trl.cli", method, "--model_name_or_path", model]
    command += ["--dataset_name", str(folder / "data"), "--reward_funcs", f"{Path(__file__).stem}.right_sum"]
    command += ["--output_dir", str(folder / "model"), "--seed", str(seed), *SWITCHES, *flags]
    command += [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parent,  # where the reward function is found
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    shares, lines = [], []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("{") and "'eval_reward'" in line:
            shares.append(float(ast.literal_eval(line)["eval_reward"]))
            print(f"seed {seed}  evaluation {len(shares)}  {shares[-1]:.1%}", flush=True)
    if process.wait():
        sys.exit("".join(lines[-30:]))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["grpo", "rloo"])
    parser.add_argument("model", help="name or folder of a model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args, flags = parser.parse_known_args()
    model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        write_dataset(Path(temporary) / "data")
        for seed in args.seeds:
            results[seed] = train(args.method, model, seed, Path(temporary), flags)
            shutil.rmtree(Path(temporary) / "model", ignore_errors=True)
    print(f"\nHeld-out sums that are right, every {EVALUATE_EVERY} steps")
    for seed, shares in results.items():
        print(f"seed {seed:<4}" + "".join(f"{share:>8.1%}" for share in shares))


if __name__ == "__main__":
    main()
