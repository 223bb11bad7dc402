"""Watch a tiny model learn: from random weights by imitation (SFT), then from its own attempts (GRPO), on a laptop.

    python examples/demo/demo.py            # or: make demo

The model has under a million weights and the tasks are generated (sort, reverse, count, add: see tasks.py), so nothing
is downloaded. Every second demonstration has a mistake in it, as people's have. Fine-tuning imitates the mistakes, too.
Then the model answers for itself and is only told whether an answer is right, by a check and not by an example: it drops
the mistakes. Everything else is what you would do with a real model: datasets in chat form, an `SFTTrainer`, a
`GRPOTrainer` with a reward function, and saved folders that plain Transformers loads.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import defaultdict
from pathlib import Path

# On a busy machine, a thread that waits for another should leave the core to whoever has work. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from datasets import Dataset
from picture import draw_accuracy
from tasks import MAKERS, is_correct, make_dataset
from tiny_model import build_model, build_tokenizer, generate_replies
from transformers import PrinterCallback, TrainerCallback

from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, pass_at_k_metric


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="folder for models and pictures")
    parser.add_argument("--train_rows", type=int, default=20_000, help="different questions to learn from")
    parser.add_argument("--held_out_rows", type=int, default=400, help="questions kept for testing")
    parser.add_argument("--careless", type=float, default=0.5, help="share of demonstrations with a mistake")
    parser.add_argument("--sft_steps", type=int, default=800, help="optimizer steps, of 32 demonstrations each")
    parser.add_argument(
        "--grpo_steps", type=int, default=120, help="optimizer steps, of 32 questions, 8 attempts each"
    )
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(argv)


# ---- The two trainers ----


def make_sft_trainer(model, tokenizer, train_rows: Dataset, held_out_rows: Dataset, args, curve) -> SFTTrainer:
    config = SFTConfig(
        **common_settings(args, "sft", args.sft_steps),
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        max_length=64,
    )
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=train_rows,
        eval_dataset=held_out_rows,
        processing_class=tokenizer,
        callbacks=[curve],
    )


def answered_right(completions, answer, **columns) -> list[float]:
    """The reward: 1 for a right reply, 0 for any other."""
    return [
        float(is_correct(messages[0]["content"], right)) for messages, right in zip(completions, answer, strict=True)
    ]


def make_grpo_trainer(model, tokenizer, train_rows: Dataset, held_out_rows: Dataset, args, curve) -> GRPOTrainer:
    config = GRPOConfig(
        **common_settings(args, "grpo", args.grpo_steps),
        num_generations=8,
        per_device_train_batch_size=32 * 8,
        per_device_eval_batch_size=128,
        max_completion_length=16,
        eval_temperature=0.0,  # always the most probable token
        learning_rate=1e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=answered_right,
        args=config,
        train_dataset=train_rows.remove_columns("completion"),
        eval_dataset=held_out_rows.remove_columns("completion"),
        processing_class=tokenizer,
        callbacks=[curve],
        compute_metrics=pass_at_k_metric(answered_right),
    )


def common_settings(args: argparse.Namespace, phase: str, steps: int) -> dict:
    return {
        "output_dir": str(args.output_dir / phase),
        "max_steps": steps,
        "adam_beta2": 0.98,
        "bf16": False,
        "gradient_checkpointing": False,  # it saves memory, of which this model needs none
        "logging_steps": max(steps // 20, 1),
        "eval_strategy": "steps",
        "eval_steps": max(steps // 10, 1),
        "save_strategy": "no",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "seed": args.seed,
    }


# ---- Watching them ----


def measure_accuracy(model, tokenizer, rows: Dataset) -> tuple[dict[str, float], list[str]]:
    """Share of exactly right replies, by kind of task and over `all`; and the replies."""
    replies = generate_replies(model, tokenizer, list(rows["prompt"]))
    right = defaultdict(list)
    for row, reply in zip(rows, replies, strict=True):
        for name in (row["kind"], "all"):
            right[name].append(is_correct(reply, row["answer"]))
    return {name: sum(values) / len(values) for name, values in right.items()}, replies


class AccuracyCurve(TrainerCallback):
    """Notes the accuracy on held-out questions at each evaluation, and prints a line: how far, how well, how long."""

    def __init__(self, phase: str, rows: Dataset, start: float):
        self.phase, self.rows = phase, rows
        self.points = [(0, start)]  # answers learned from, accuracy

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()
        print(f"\n{self.phase:<9} {'train ' + self._learned_by():>12} {'held-out accuracy':>19} {'seconds':>9}")

    def on_evaluate(self, args, state, control, metrics, model=None, processing_class=None, **kwargs):
        accuracy = metrics.get("eval_pass@1")
        if accuracy is None:  # fine-tuning looks at given answers only; here the model has to give its own
            accuracy = measure_accuracy(model, processing_class, self.rows)[0]["all"]
        self.points.append((state.global_step * args.train_batch_size, accuracy))
        key = self._learned_by()
        value = next((entry[key] for entry in reversed(state.log_history) if key in entry), float("nan"))
        seconds = time.monotonic() - self.started
        step = f"{state.global_step}/{state.max_steps}"
        print(f"{step:>9} {value:>12.3f} {accuracy:>19.1%} {seconds:>9.0f}", flush=True)

    def _learned_by(self) -> str:
        return "reward" if self.phase == "GRPO" else "loss"


def show(rows: Dataset, accuracies: dict[str, dict[str, float]], replies: dict[str, list[str]]) -> None:
    print(f"\n{'Questions the model has never seen':<48} {'after SFT':<16} {'after GRPO':<16}")
    for kind in MAKERS:
        for index in [index for index, row in enumerate(rows) if row["kind"] == kind][:2]:
            question, answer = rows[index]["prompt"][-1]["content"], rows[index]["answer"]
            said = [mark(replies[phase][index], answer) for phase in ("SFT", "GRPO")]
            print(f"  {question:<46} {said[0]:<16} {said[1]}".rstrip())
    print(f"\n{'Accuracy on held-out questions':<30}" + "".join(f"{name:>12}" for name in accuracies))
    for name in (*MAKERS, "all"):
        if name in accuracies["GRPO"]:
            print(f"  {name:<28}" + "".join(f"{accuracy[name]:>12.1%}" for accuracy in accuracies.values()))


def mark(reply: str, answer: str) -> str:
    """What was said, cut to its column: + where it is right, - where it is wrong."""
    return ("+ " if is_correct(reply, answer) else "- ") + reply.strip()[:14]


# ---- The whole ----


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    args = parse_args(argv)
    started = time.monotonic()

    train_rows = make_dataset(args.train_rows, seed=args.seed, careless=args.careless)
    held_out_rows = make_dataset(args.held_out_rows, held_out=True, seed=args.seed)
    sample = train_rows.select(range(min(2000, args.train_rows)))
    tokenizer = build_tokenizer(message["content"] for row in sample for message in row["prompt"] + row["completion"])
    model = build_model(tokenizer, seed=args.seed)
    print(
        f"A Llama of {model.num_parameters():,} random weights, {len(tokenizer)} tokens in its vocabulary, "
        f"{len(train_rows):,} questions to learn from and {len(held_out_rows)} others to test it on."
    )

    accuracies, replies, curves = {}, {}, {}
    accuracies["untrained"], _ = measure_accuracy(model, tokenizer, held_out_rows)
    latest = "untrained"
    for phase, make_trainer in (("SFT", make_sft_trainer), ("GRPO", make_grpo_trainer)):
        curve = AccuracyCurve(phase, held_out_rows, start=accuracies[latest]["all"])
        trainer = make_trainer(model, tokenizer, train_rows, held_out_rows, args, curve)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        accuracies[phase], replies[phase] = measure_accuracy(model, tokenizer, held_out_rows)
        curves[phase], latest = curve.points, phase

    show(held_out_rows, accuracies, replies)
    picture = draw_accuracy(curves, args.output_dir / "accuracy.png")
    print(f"\nPicture      {picture or 'not drawn: pip install matplotlib'}")
    print(f'Checkpoints  {args.output_dir}/sft, {args.output_dir}/grpo  (AutoModelForCausalLM.from_pretrained("..."))')
    print(f"Time         {time.monotonic() - started:.0f} s")
    return accuracies


if __name__ == "__main__":
    main()
