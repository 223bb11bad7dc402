"""Kahneman-Tversky Optimization (https://huggingface.co/papers/2402.01306) with nothing hidden, read top to bottom.

    python examples/minimal/kto.py                                    # a tiny stand-in, half a minute on a laptop
    python examples/minimal/kto.py --model Qwen/Qwen3-0.6B --data my_feedback.jsonl --batch_size 8

It learns from single answers that somebody liked or did not, no pairs needed. It gives the losses of `KTOTrainer` step
for step (a test holds it to that). How a row becomes token ids, and what an answer's log-probability is, stands in
`dpo.py`; the two methods differ in the loss.
"""

from __future__ import annotations

import argparse
import copy

import torch
from common import load, make_optimizer, make_parser, make_words, plan_steps, save, split_off, update
from dpo import answer_logps, collate, encode_answers


def make_standin_rows() -> list[dict]:
    """Words repeated in capitals are liked, words spelled backwards are not; the two take turns."""
    return [
        {
            "prompt": [{"role": "user", "content": word}],
            "completion": [{"role": "assistant", "content": word.upper() if number % 2 else word[::-1]}],
            "label": bool(number % 2),
        }
        for number, word in enumerate(make_words(4000))
    ]


def encode(tokenizer, row: dict) -> dict:
    prompt_ids, (answer_ids,) = encode_answers(tokenizer, row["prompt"], [row["completion"]])
    return {"prompt": prompt_ids, "answer": answer_ids, "label": row["label"]}


def mismatch(examples: list[dict], block: int) -> list[dict]:
    """Give each row also the answer of the row before it, within blocks of a step (the first gets the last's)."""
    mismatched = []
    for start in range(0, len(examples), block):
        rows = examples[start : start + block]
        mismatched += [{**row, "other": rows[i - 1]["answer"]} for i, row in enumerate(rows)]
    return mismatched


# ---- Loss ----


def log_ratios(model, reference, sequences, args: argparse.Namespace, pad_token_id: int) -> torch.Tensor:
    """How much likelier than the reference the model makes each answer, in nats. [B]"""
    batch = collate(sequences, args.max_length, pad_token_id, model.device)
    with torch.no_grad():
        reference_logps_B = answer_logps(reference, *batch)
    return answer_logps(model, *batch) - reference_logps_B


@torch.no_grad()
def estimate_kl(model, reference, rows: list[dict], args: argparse.Namespace, pad_token_id: int) -> torch.Tensor:
    """
    How far the policy has moved from the reference at large: the mean log-ratio of answers to other prompts, at
    least 0. It is the zero point of gain and loss, and carries no gradient.
    """
    total = 0.0
    for start in range(0, len(rows), args.batch_size):
        others = [(row["prompt"], row["other"]) for row in rows[start : start + args.batch_size]]
        total += log_ratios(model, reference, others, args, pad_token_id).sum()
    return (total / len(rows)).clamp(min=0)


def loss_sum(model, reference, rows: list[dict], kl: torch.Tensor, args: argparse.Namespace, pad_token_id: int):
    """The loss of a batch, summed over its rows, and their rewards [B]."""
    ratios_B = log_ratios(model, reference, [(row["prompt"], row["answer"]) for row in rows], args, pad_token_id)
    liked_B = torch.tensor([row["label"] for row in rows], device=ratios_B.device)
    gains_B = torch.where(liked_B, ratios_B - kl, kl - ratios_B)
    weights_B = torch.where(liked_B, args.desirable_weight, args.undesirable_weight)
    losses_B = weights_B * (1 - torch.sigmoid(args.beta * gains_B))
    return losses_B.sum(), args.beta * ratios_B.detach()


def margin_of(rewards: torch.Tensor, rows: list[dict]) -> float:
    """Mean reward of liked answers less that of the others; needs both."""
    liked = torch.tensor([row["label"] for row in rows], device=rewards.device)
    return (rewards[liked].mean() - rewards[~liked].mean()).item()


@torch.no_grad()
def evaluate(model, reference, rows: list[dict], args: argparse.Namespace, pad_token_id: int) -> dict[str, float]:
    """Mean loss of a row, and by how much liked answers are rewarded above the others."""
    model.eval()
    loss, rewards = 0.0, []
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start : start + args.batch_size]
        kl = estimate_kl(model, reference, batch, args, pad_token_id)
        batch_loss, batch_rewards = loss_sum(model, reference, batch, kl, args, pad_token_id)
        loss += batch_loss.item()
        rewards.append(batch_rewards)
    return {"eval_loss": loss / len(rows), "eval_margin": margin_of(torch.cat(rewards), rows)}


# ---- Training ----


def train(model, reference, rows: list[dict], args: argparse.Namespace, pad_token_id: int) -> list[float]:
    """Train `model` in place against the frozen `reference`; returns the loss of each optimizer step."""
    steps = plan_steps(len(rows), args, shuffle=False)  # in order: the mismatched answers are those of neighbours
    optimizer, scheduler = make_optimizer(model, args, len(steps))
    losses = []
    model.train()
    for numbers in steps:
        step_loss = 0.0
        kl = estimate_kl(model, reference, [rows[i] for i in numbers], args, pad_token_id)  # of the whole step
        for first in range(0, len(numbers), args.batch_size):
            batch = [rows[i] for i in numbers[first : first + args.batch_size]]
            batch_loss, rewards = loss_sum(model, reference, batch, kl, args, pad_token_id)
            loss = batch_loss / len(numbers)
            loss.backward()
            step_loss += loss.item()
        update(model, optimizer, scheduler, args.max_grad_norm)
        losses.append(step_loss)
        if len(losses) % args.log_every == 0:
            print(f"step {len(losses):4d}/{len(steps)}  loss {step_loss:.4f}  margin {margin_of(rewards, batch):.3f}")
    return losses


def main(argv: list[str] | None = None) -> dict:
    parser = make_parser(__doc__, "`prompt` and `completion`, lists of messages, and `label`", "kto_output")
    parser.add_argument("--beta", type=float, default=0.1, help="how strongly the policy is held to the reference")
    parser.add_argument("--desirable_weight", type=float, default=1.0, help="weight of rows whose label is true")
    parser.add_argument("--undesirable_weight", type=float, default=1.0, help="weight of the other rows")
    args = parser.parse_args(argv)
    args.learning_rate = args.learning_rate or (1e-6 if args.model else 5e-4)
    model, tokenizer, rows = load(args, make_standin_rows)
    reference = copy.deepcopy(model).requires_grad_(False).eval()

    examples = [encode(tokenizer, row) for row in rows]
    examples = [row for row in examples if len(row["prompt"]) < args.max_length]  # else no answer is left
    rows_per_step = args.batch_size * args.accumulation
    examples, held_out = (mismatch(part, rows_per_step) for part in split_off(examples, args.eval_rows))
    liked = sum(row["label"] for row in examples)
    print(f"{len(examples)} rows to train on, {liked} of them liked; {len(held_out)} held out")

    result = {"losses": train(model, reference, examples, args, tokenizer.pad_token_id)}
    if held_out:
        result.update(evaluate(model, reference, held_out, args, tokenizer.pad_token_id))
        print(f"held-out loss {result['eval_loss']:.4f}, reward margin {result['eval_margin']:.3f}")
    save(model, tokenizer, args.output)
    return result


if __name__ == "__main__":
    main()
