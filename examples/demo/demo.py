"""Watch a tiny model learn: supervised fine-tuning from random weights to right answers, in two minutes on a laptop.

    python examples/demo/demo.py            # or: make demo

The model has under a million weights and the tasks are generated (sort, reverse, count, add: see tasks.py), so nothing
is downloaded. Everything else is what you would do with a real model: a dataset in chat form, an `SFTConfig`, an
`SFTTrainer`, and a saved folder that plain Transformers loads.
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
from tasks import MAKERS, is_correct, make_dataset
from tiny_model import build_model, build_tokenizer, generate_replies
from transformers import PrinterCallback, TrainerCallback

from trl import SFTConfig, SFTTrainer


class ProgressLine(TrainerCallback):
    """One line for each evaluation: how far, how well, how long."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.monotonic()
        print(f"{'step':>11} {'loss':>9} {'held-out loss':>15} {'token accuracy':>16} {'seconds':>9}")

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), float("nan"))
        print(
            f"{state.global_step:>6}/{state.max_steps:<4} {loss:>9.3f} {metrics['eval_loss']:>15.3f} "
            f"{metrics['eval_mean_token_accuracy']:>16.1%} {time.monotonic() - self.started:>9.0f}",
            flush=True,
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="folder for model and pictures")
    parser.add_argument("--train_rows", type=int, default=20_000, help="different questions to learn from")
    parser.add_argument("--held_out_rows", type=int, default=400, help="questions kept for testing")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps, of 32 rows each")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(argv)


def measure_accuracy(model, tokenizer, rows: Dataset) -> tuple[dict[str, float], list[str]]:
    """Share of exactly right replies, by kind of task and over `all`; and the replies."""
    replies = generate_replies(model, tokenizer, list(rows["prompt"]))
    right = defaultdict(list)
    for row, reply in zip(rows, replies, strict=True):
        for name in (row["kind"], "all"):
            right[name].append(is_correct(reply, row["answer"]))
    return {name: sum(values) / len(values) for name, values in right.items()}, replies


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    args = parse_args(argv)
    started = time.monotonic()

    train_rows = make_dataset(args.train_rows, seed=args.seed)
    held_out_rows = make_dataset(args.held_out_rows, held_out=True, seed=args.seed)
    sample = train_rows.select(range(min(2000, args.train_rows)))
    tokenizer = build_tokenizer(message["content"] for row in sample for message in row["prompt"] + row["completion"])
    model = build_model(tokenizer, seed=args.seed)
    print(
        f"A Llama of {model.num_parameters():,} random weights, {len(tokenizer)} tokens in its vocabulary, "
        f"{len(train_rows):,} questions to learn from and {len(held_out_rows)} others to test it on."
    )
    before, _ = measure_accuracy(model, tokenizer, held_out_rows)

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(args.output_dir),
            max_steps=args.steps,
            per_device_train_batch_size=32,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            adam_beta2=0.98,
            max_length=64,
            bf16=False,
            gradient_checkpointing=False,  # it saves memory, of which this model needs none
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=max(args.steps // 10, 1),
            per_device_eval_batch_size=128,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
            seed=args.seed,
        ),
        train_dataset=train_rows,
        eval_dataset=held_out_rows,
        processing_class=tokenizer,
        callbacks=[ProgressLine()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()

    after, replies = measure_accuracy(trainer.model, tokenizer, held_out_rows)
    show(held_out_rows, replies, before, after)
    curves = args.output_dir / "training_curves.png"
    print(f"\nLoss curves  {curves if curves.exists() else 'not drawn: pip install matplotlib'}")
    print(f'Checkpoint   {args.output_dir}  (AutoModelForCausalLM.from_pretrained("{args.output_dir}"))')
    print(f"Time         {time.monotonic() - started:.0f} s")
    return {"before": before, "after": after}


def show(rows: Dataset, replies: list[str], before: dict[str, float], after: dict[str, float]) -> None:
    print("\nQuestions the model has never seen")
    shown = [index for kind in MAKERS for index in [i for i, row in enumerate(rows) if row["kind"] == kind][:2]]
    for index in shown:
        question, answer = rows[index]["prompt"][-1]["content"], rows[index]["answer"]
        verdict = "right" if is_correct(replies[index], answer) else f"wrong, it is {answer}"
        print(f"  {question:<48} {replies[index].strip():<16} {verdict}")
    print("\nAccuracy on held-out questions    before   after")
    for name in (*MAKERS, "all"):
        if name in after:
            print(f"  {name:<31} {before[name]:>7.1%} {after[name]:>7.1%}")


if __name__ == "__main__":
    main()
