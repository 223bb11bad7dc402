"""Supervised fine-tuning with nothing hidden: one file of plain PyTorch and Transformers, read top to bottom.

    python examples/minimal/sft.py                                    # a tiny stand-in, half a minute on a laptop
    python examples/minimal/sft.py --model Qwen/Qwen3-0.6B --data trl-lib/Capybara --batch_size 4 --accumulation 8

It gives the losses of `SFTTrainer` step for step (a test holds it to that). What it leaves out is what the trainer is
for: packing, projecting to the vocabulary in chunks, several devices, mixed precision, adapters, resuming.
"""

from __future__ import annotations

import argparse
import os
import random

import torch
from datasets import Dataset, load_dataset
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    get_scheduler,
    set_seed,
)

IGNORED = -100  # label of a token that is read but not trained

# ---- A stand-in: bytes for tokens, a random Llama, and words to spell backwards ----

STANDIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def build_standin():
    tokenizer = ByT5Tokenizer(extra_ids=0, chat_template=STANDIN_TEMPLATE)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config), tokenizer


def make_standin_rows() -> Dataset:
    rng = random.Random(0)
    words = dict.fromkeys("".join(rng.choices("aeioub", k=rng.randint(3, 6))) for _ in range(6000))  # all different
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": word}],
                "completion": [{"role": "assistant", "content": word[::-1]}],
            }
            for word in words
        ]
    )


# ---- From a row to token ids and labels ----


def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )


def encode(tokenizer, row: dict, max_length: int) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels: the id where the assistant wrote the token, -100 elsewhere."""
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    first_trained = 0 if "messages" in row else len(row["prompt"])
    ids = render(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn < first_trained:
            continue
        # A turn is what it adds to the conversation before it, the header that asks for it left out.
        start = len(render(tokenizer, messages[:turn], add_generation_prompt=True))
        stop = len(render(tokenizer, messages[: turn + 1]))
        labels[start:stop] = ids[start:stop]
    return ids[:max_length], labels[:max_length]


def collate(examples: list[tuple[list[int], list[int]]], pad_token_id: int, device) -> dict[str, torch.Tensor]:
    """One batch of B rows, padded on the right to the longest, T."""
    longest = max(len(ids) for ids, _ in examples)
    padded = [
        (
            ids + [pad_token_id] * (longest - len(ids)),
            labels + [IGNORED] * (longest - len(ids)),
            [1] * len(ids) + [0] * (longest - len(ids)),  # by position: the pad token may also be a real one
        )
        for ids, labels in examples
    ]
    ids_BT, labels_BT, mask_BT = (torch.tensor(rows, device=device) for rows in zip(*padded, strict=True))
    return {"input_ids": ids_BT, "labels": labels_BT, "attention_mask": mask_BT}


# ---- Loss ----


def loss_sum(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Negative log-likelihood of the trained tokens of a batch, summed. Position t predicts token t + 1."""
    logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets_BT = batch["labels"][:, 1:]
    return cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def count_trained(examples: list[tuple[list[int], list[int]]]) -> int:
    return sum(label != IGNORED for _, labels in examples for label in labels[1:])


@torch.no_grad()
def evaluate(model, examples, batch_size: int, pad_token_id: int) -> float:
    """Mean loss per trained token, over all of them at once: rows with longer answers weigh more."""
    model.eval()
    total = 0.0
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_token_id, model.device)
        total += loss_sum(model, batch).item()
    return total / count_trained(examples)


# ---- Training ----


def train(model, examples: list, args: argparse.Namespace, pad_token_id: int) -> list[float]:
    """Fine-tune `model` in place; returns the loss of each optimizer step."""
    rows_per_step = args.batch_size * args.accumulation
    steps_per_epoch = -(-len(examples) // rows_per_step)
    total_steps = steps_per_epoch * args.epochs
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]  # norms and biases: not decayed
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    scheduler = get_scheduler(
        args.schedule, optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=total_steps
    )
    losses = []
    model.train()
    for epoch in range(args.epochs):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
        for start in range(0, len(order), rows_per_step):
            chosen = [examples[i] for i in order[start : start + rows_per_step]]
            # Every token of the step weighs the same, in whichever micro-batch it sits; so count them all beforehand.
            # A mean of the micro-batches' means would weigh a token by how few neighbours it has.
            trained = count_trained(chosen)
            step_loss = 0.0
            for first in range(0, len(chosen), args.batch_size):
                batch = collate(chosen[first : first + args.batch_size], pad_token_id, model.device)
                loss = loss_sum(model, batch) / trained
                loss.backward()
                step_loss += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(step_loss)
            if len(losses) % args.log_every == 0:
                print(
                    f"step {len(losses):4d}/{total_steps}  loss {step_loss:.4f}  rate {scheduler.get_last_lr()[0]:.2e}"
                )
    return losses


# ---- Command line ----


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal model; by default a tiny stand-in")
    parser.add_argument("--data", help="name of a dataset, or a .jsonl file: `messages`, or `prompt` and `completion`")
    parser.add_argument("--split", default="train", help="split of the dataset to train on")
    parser.add_argument("--output", default="sft_output", help="folder for the trained model")
    parser.add_argument("--batch_size", type=int, default=16, help="rows in one forward pass")
    parser.add_argument("--accumulation", type=int, default=1, help="forward passes in one optimizer step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, help="by default 2e-5, and 2e-3 for the stand-in")
    parser.add_argument("--schedule", default="linear", help="of the learning rate: linear, cosine, constant, ...")
    parser.add_argument("--warmup_steps", type=int, default=0)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are scaled down to this norm")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of a row; the rest is cut")
    parser.add_argument("--eval_rows", type=int, default=64, help="rows kept from the end for evaluation")
    parser.add_argument("--log_every", type=int, default=20, help="steps between two lines of output")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    args.learning_rate = args.learning_rate or (2e-5 if args.model else 2e-3)
    set_seed(args.seed)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:
        model, tokenizer = build_standin()
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    if not args.data:
        rows = make_standin_rows()
    elif os.path.isfile(args.data):
        rows = load_dataset("json", data_files=args.data, split="train")
    else:
        rows = load_dataset(args.data, split=args.split)
    examples = [encode(tokenizer, row, args.max_length) for row in rows]
    examples = [example for example in examples if count_trained([example])]  # cut down to a prompt: nothing to learn
    held_out = examples[len(examples) - args.eval_rows :]
    examples = examples[: len(examples) - args.eval_rows]
    print(
        f"{len(examples)} rows to train on, {count_trained(examples)} trained tokens in them; {len(held_out)} held out"
    )

    result = {"losses": train(model, examples, args, pad_token_id)}
    if held_out:
        result["eval_loss"] = evaluate(model, held_out, args.batch_size, pad_token_id)
        print(f"held-out loss {result['eval_loss']:.4f}")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved to {args.output}")
    return result


if __name__ == "__main__":
    main()
