"""Supervised fine-tuning with nothing hidden: plain PyTorch and Transformers, read top to bottom.

    python examples/minimal/sft.py                                    # a tiny stand-in, half a minute on a laptop
    python examples/minimal/sft.py --model Qwen/Qwen3-0.6B --data trl-lib/Capybara --batch_size 4 --accumulation 8

It gives the losses of `SFTTrainer` step for step (a test holds it to that). What it leaves out is what the trainer is
for: packing, projecting to the vocabulary in chunks, several devices, mixed precision, adapters, resuming.
"""

from __future__ import annotations

import argparse

import torch
from common import load, make_optimizer, make_parser, make_words, plan_steps, save, split_off, update
from torch.nn.functional import cross_entropy

IGNORED = -100  # label of a token that is read but not trained


def make_standin_rows() -> list[dict]:
    """Spell a word backwards."""
    return [
        {"prompt": [{"role": "user", "content": word}], "completion": [{"role": "assistant", "content": word[::-1]}]}
        for word in make_words(6000)
    ]


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
    steps = plan_steps(len(examples), args)
    optimizer, scheduler = make_optimizer(model, args, len(steps))
    losses = []
    model.train()
    for numbers in steps:
        chosen = [examples[i] for i in numbers]
        # Every token of the step weighs the same, in whichever micro-batch it sits; so count them all beforehand.
        # A mean of the micro-batches' means would weigh a token by how few neighbours it has.
        trained = count_trained(chosen)
        step_loss = 0.0
        for first in range(0, len(chosen), args.batch_size):
            batch = collate(chosen[first : first + args.batch_size], pad_token_id, model.device)
            loss = loss_sum(model, batch) / trained
            loss.backward()
            step_loss += loss.item()
        update(model, optimizer, scheduler, args.max_grad_norm)
        losses.append(step_loss)
        if len(losses) % args.log_every == 0:
            print(f"step {len(losses):4d}/{len(steps)}  loss {step_loss:.4f}  rate {scheduler.get_last_lr()[0]:.2e}")
    return losses


def main(argv: list[str] | None = None) -> dict:
    args = make_parser(__doc__, "`messages`, or `prompt` and `completion`", "sft_output").parse_args(argv)
    args.learning_rate = args.learning_rate or (2e-5 if args.model else 2e-3)
    model, tokenizer, rows = load(args, make_standin_rows)
    examples = [encode(tokenizer, row, args.max_length) for row in rows]
    examples = [example for example in examples if count_trained([example])]  # cut down to a prompt: nothing to learn
    examples, held_out = split_off(examples, args.eval_rows)
    print(
        f"{len(examples)} rows to train on, {count_trained(examples)} trained tokens in them; {len(held_out)} held out"
    )

    result = {"losses": train(model, examples, args, tokenizer.pad_token_id)}
    if held_out:
        result["eval_loss"] = evaluate(model, held_out, args.batch_size, tokenizer.pad_token_id)
        print(f"held-out loss {result['eval_loss']:.4f}")
    save(model, tokenizer, args.output)
    return result


if __name__ == "__main__":
    main()
