"""REINFORCE leave-one-out (https://huggingface.co/papers/2402.14740) with nothing hidden, read top to bottom.

    python examples/minimal/rloo.py                                   # a tiny stand-in, a minute on a laptop
    python examples/minimal/rloo.py --model Qwen/Qwen3-0.6B --data my_questions.jsonl --batch_size 8 --accumulation 8

Given the same completions it gives the losses of `RLOOTrainer` step for step (a test holds it to that). The task, how
completions are sampled, and the clipping stand in `grpo.py`. What differs: the baseline of a completion is the mean
reward of the others in its group, and is divided by nothing; how far the policy has moved from the reference is taken
off the reward, not added to the loss; and a completion is one action, with one ratio.
"""

from __future__ import annotations

import argparse
import copy

import torch
from common import make_optimizer, plan_generations, save, update
from grpo import clipped_loss, completion_logps, evaluate, judge, make_online_parser, prepare, sample


def answer_logps(model, rows: list[dict], completions: list[list[int]], pad_token_id: int) -> torch.Tensor:
    """Log-probability of each completion as a whole, in nats: the sum over its tokens. [B]"""
    logps_BT, mask_BT = completion_logps(model, rows, completions, pad_token_id)
    return (logps_BT * mask_BT).sum(dim=1)


@torch.no_grad()
def answer_logps_in_parts(model, rows, completions, args: argparse.Namespace, pad_token_id: int) -> torch.Tensor:
    """The same without a gradient, `batch_size` at a time."""
    starts = range(0, len(rows), args.batch_size)
    parts = [slice(start, start + args.batch_size) for start in starts]
    return torch.cat([answer_logps(model, rows[part], completions[part], pad_token_id) for part in parts])


def leave_one_out(returns_B: torch.Tensor, num_generations: int) -> torch.Tensor:
    """The return of a completion less the mean of the others in its group. Advantages of a group add up to 0. [B]"""
    returns_PG = returns_B.view(-1, num_generations)
    others_PG = (returns_PG.sum(dim=1, keepdim=True) - returns_PG) / (num_generations - 1)
    return (returns_PG - others_PG).flatten().float()


# ---- Training ----


def train_on(model, optimizer, scheduler, rows, completions, old_logps_B, advantages_B, args, pad_token_id):
    """Take `iterations` optimizer steps on completions; returns their losses."""
    losses = []
    for _ in range(args.iterations):
        step_loss = 0.0
        for first in range(0, len(rows), args.batch_size):
            part = slice(first, first + args.batch_size)
            logps_B = answer_logps(model, rows[part], completions[part], pad_token_id)
            ratios_B = (logps_B - old_logps_B[part]).exp()  # the product over the tokens
            loss = clipped_loss(ratios_B, advantages_B[part], args.epsilon).sum() / len(rows)
            loss.backward()
            step_loss += loss.item()
        update(model, optimizer, scheduler, args.max_grad_norm)
        losses.append(step_loss)
    return losses


def train(model, reference, tokenizer, rows: list[dict], args: argparse.Namespace) -> dict[str, list[float]]:
    """
    Train `model` in place, held to the frozen `reference`.

    Returns:
        The loss of each optimizer step; and for each generation the mean reward, and the KL divergence from the
        reference in nats per completion.
    """
    generations = plan_generations(len(rows), args)
    optimizer, scheduler = make_optimizer(model, args, len(generations) * args.iterations)
    result = {"losses": [], "rewards": [], "kl": []}
    pad = tokenizer.pad_token_id
    model.train()
    for numbers in generations:
        batch = [rows[i] for i in numbers for _ in range(args.num_generations)]
        completions = sample(model, tokenizer, batch, args)
        rewards_B = judge(tokenizer, batch, completions).to(model.device)
        old_logps_B = answer_logps_in_parts(model, batch, completions, args, pad)
        kl_B = old_logps_B - answer_logps_in_parts(reference, batch, completions, args, pad)
        advantages_B = leave_one_out(rewards_B - args.beta * kl_B, args.num_generations)
        result["losses"] += train_on(
            model, optimizer, scheduler, batch, completions, old_logps_B, advantages_B, args, pad
        )
        result["rewards"].append(rewards_B.mean().item())
        result["kl"].append(kl_B.mean().item())
        if len(result["kl"]) % args.log_every == 0:
            done = f"generation {len(result['kl']):4d}/{len(generations)}"
            print(f"{done}  reward {result['rewards'][-1]:.3f}  divergence {result['kl'][-1]:.2f} nats")
    return result


def main(argv: list[str] | None = None) -> dict:
    parser = make_online_parser(__doc__, "rloo_output")
    parser.add_argument(
        "--beta", type=float, help="price of a nat of divergence; by default 0.05, less for the stand-in"
    )
    args = parser.parse_args(argv)
    if args.beta is None:
        args.beta = 0.05 if args.model else 0.001  # the stand-in knows nothing: it has to leave itself far behind
    model, tokenizer, rows, held_out = prepare(args, standin_learning_rate=5e-4)
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    before = evaluate(model, tokenizer, held_out, args) if held_out else None
    result = train(model, reference, tokenizer, rows, args)
    if held_out:
        result["before"], result["after"] = before, evaluate(model, tokenizer, held_out, args)
        print(f"held-out reward {result['before']:.3f} -> {result['after']:.3f}")
    save(model, tokenizer, args.output)
    return result


if __name__ == "__main__":
    main()
