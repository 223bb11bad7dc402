"""A reward model (https://huggingface.co/papers/2203.02155) with nothing hidden, read top to bottom.

    python examples/minimal/reward.py                                 # a tiny stand-in, half a minute on a laptop
    python examples/minimal/reward.py --model Qwen/Qwen3-0.6B --data my_pairs.jsonl --batch_size 4 --accumulation 8

It gives the losses of `RewardTrainer` step for step (a test holds it to that). What it leaves out is what the trainer is
for: margins, centred rewards, several devices, mixed precision, adapters, resuming.
"""

from __future__ import annotations

import argparse
from functools import partial
from types import SimpleNamespace

import torch
from common import build_standin, load, make_optimizer, make_parser, make_words, plan_steps, split_off, update
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

# The language model loses its head, which predicts tokens, and gets a random one with a single output: the score.
REWARD_MODEL = SimpleNamespace(
    from_pretrained=partial(AutoModelForSequenceClassification.from_pretrained, num_labels=1)
)


def make_standin_rows() -> list[dict]:
    """Is there a b in this word? The right answer is better than the wrong one."""
    rows = []
    for word in make_words(3000):
        right, wrong = ("yes", "no") if "b" in word else ("no", "yes")
        answers = {
            "chosen": [{"role": "assistant", "content": right}],
            "rejected": [{"role": "assistant", "content": wrong}],
        }
        rows.append({"prompt": [{"role": "user", "content": word}], **answers})
    return rows


# ---- From a row to token ids ----


def encode(tokenizer, row: dict) -> dict[str, list[int]]:
    """Token ids of the whole conversation with each answer: a score judges the answer to a prompt, so it reads both."""
    return {
        side: tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=True, return_dict=False)
        for side in ("chosen", "rejected")
    }


def collate(sequences: list[list[int]], pad_token_id: int, device) -> dict[str, torch.Tensor]:
    """R rows, padded on the right to the longest, T."""
    longest = max(map(len, sequences))
    ids_RT = [ids + [pad_token_id] * (longest - len(ids)) for ids in sequences]
    mask_RT = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences]
    return {
        "input_ids": torch.tensor(ids_RT, device=device),
        "attention_mask": torch.tensor(mask_RT, device=device),
    }


# ---- Loss ----


def pair_rewards(model, pairs: list[dict], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the chosen and of the rejected answers, [B] each: the head's output at the last token of each row."""
    sequences = [pair[side] for side in ("chosen", "rejected") for pair in pairs]
    scores_R1 = model(**collate(sequences, pad_token_id, model.device), use_cache=False).logits
    return scores_R1.squeeze(-1).float().chunk(2)


def loss_sum(chosen_B: torch.Tensor, rejected_B: torch.Tensor) -> torch.Tensor:
    """
    Negative log-likelihood of the preferences, summed over the pairs. In Bradley and Terry's model the chosen answer wins
    with probability sigmoid(chosen - rejected): only differences count, so the level of the scores means nothing.
    """
    return -logsigmoid(chosen_B - rejected_B).sum()


@torch.no_grad()
def evaluate(model, pairs: list[dict], batch_size: int, pad_token_id: int) -> dict[str, float]:
    """Mean loss of a pair, and in how many the chosen answer scores higher."""
    model.eval()
    loss = wins = 0.0
    for start in range(0, len(pairs), batch_size):
        chosen_B, rejected_B = pair_rewards(model, pairs[start : start + batch_size], pad_token_id)
        loss += loss_sum(chosen_B, rejected_B).item()
        wins += (chosen_B > rejected_B).sum().item()
    return {"eval_loss": loss / len(pairs), "eval_accuracy": wins / len(pairs)}


# ---- Training ----


def train(model, pairs: list[dict], args: argparse.Namespace, pad_token_id: int) -> list[float]:
    """Train `model` in place; returns the loss of each optimizer step."""
    steps = plan_steps(len(pairs), args)
    optimizer, scheduler = make_optimizer(model, args, len(steps))
    losses = []
    model.train()
    for numbers in steps:
        step_loss = wins = 0.0
        for first in range(0, len(numbers), args.batch_size):
            batch = [pairs[i] for i in numbers[first : first + args.batch_size]]
            chosen_B, rejected_B = pair_rewards(model, batch, pad_token_id)
            loss = loss_sum(chosen_B, rejected_B) / len(numbers)  # over the pairs of the step, not of the micro-batch
            loss.backward()
            step_loss += loss.item()
            wins += (chosen_B > rejected_B).sum().item()
        update(model, optimizer, scheduler, args.max_grad_norm)
        losses.append(step_loss)
        if len(losses) % args.log_every == 0:
            print(f"step {len(losses):4d}/{len(steps)}  loss {step_loss:.4f}  accuracy {wins / len(numbers):.3f}")
    return losses


def main(argv: list[str] | None = None) -> dict:
    parser = make_parser(__doc__, "`prompt`, `chosen` and `rejected`, lists of messages", "reward_output")
    args = parser.parse_args(argv)
    args.learning_rate = args.learning_rate or (1e-5 if args.model else 1e-3)
    build = partial(build_standin, LlamaForSequenceClassification, num_labels=1)
    model, tokenizer, rows = load(args, make_standin_rows, build, REWARD_MODEL)
    model.config.pad_token_id = tokenizer.pad_token_id  # by which the model finds the last token of a row

    pairs = [encode(tokenizer, row) for row in rows]
    pairs = [
        pair for pair in pairs if max(map(len, pair.values())) <= args.max_length
    ]  # the score of a part says little
    pairs, held_out = split_off(pairs, args.eval_rows)
    print(f"{len(pairs)} pairs to train on; {len(held_out)} held out")

    result = {"losses": train(model, pairs, args, tokenizer.pad_token_id)}
    if held_out:
        result.update(evaluate(model, held_out, args.batch_size, tokenizer.pad_token_id))
        print(f"held-out loss {result['eval_loss']:.4f}, accuracy {result['eval_accuracy']:.3f}")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved to {args.output}")
    return result


if __name__ == "__main__":
    main()
