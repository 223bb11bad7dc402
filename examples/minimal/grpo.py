"""Group relative policy optimization (https://huggingface.co/papers/2402.03300) with nothing hidden, read top to bottom.

    python examples/minimal/grpo.py                                   # a tiny stand-in, a minute on a laptop
    python examples/minimal/grpo.py --model Qwen/Qwen3-0.6B --data my_questions.jsonl --batch_size 8 --accumulation 8

Given the same completions it gives the losses of `GRPOTrainer` step for step (a test holds it to that), as that is set
by default: advantages over the deviation of their group, a clipped ratio for each token, the mean over the tokens of a
step. What it leaves out is what the trainer is for: the other losses, several rewards at once, reward models, tools and
environments, computing the prompt of a group once, projecting to the vocabulary in chunks, several devices, resuming.
"""

from __future__ import annotations

import argparse

import torch
from common import load, make_optimizer, make_parser, make_words, plan_generations, save, split_off, update
from dpo import collate, render


def make_standin_rows() -> list[dict]:
    """Asked with a word, its first letter is to be said three times. Nobody shows the model how: it finds out."""
    return [{"prompt": [{"role": "user", "content": word}], "answer": word[0] * 3} for word in make_words(6000)]


def reward(reply: str, row: dict) -> float:
    """The share of places where the reply is as the answer. Put any check of yours here that gives a number."""
    right = sum(a == b for a, b in zip(reply, row["answer"], strict=False))
    return right / max(len(reply), len(row["answer"]), 1)


def encode(tokenizer, row: dict) -> dict:
    return {**row, "prompt_ids": render(tokenizer, row["prompt"], add_generation_prompt=True)}


# ---- Sampling ----


@torch.no_grad()
def sample(model, tokenizer, rows: list[dict], args: argparse.Namespace, greedy: bool = False) -> list[list[int]]:
    """Token ids of a completion for each row, its stop token included."""
    longest = max(len(row["prompt_ids"]) for row in rows)
    ids_BT, attention_BT = [], []
    for row in rows:  # padded on the left, so that all completions begin at the same place
        padding = longest - len(row["prompt_ids"])
        ids_BT.append([tokenizer.pad_token_id] * padding + row["prompt_ids"])
        attention_BT.append([0] * padding + [1] * len(row["prompt_ids"]))
    model.eval()
    output_BT = model.generate(
        input_ids=torch.tensor(ids_BT, device=model.device),
        attention_mask=torch.tensor(attention_BT, device=model.device),
        max_new_tokens=args.max_completion_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # From the whole distribution: these are the probabilities that the loss looks at.
        **({"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    )
    model.train()
    return [cut_after(ids, tokenizer.eos_token_id) for ids in output_BT[:, longest:].tolist()]


def cut_after(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop) + 1] if stop in ids else ids


def judge(tokenizer, rows: list[dict], completions: list[list[int]]) -> torch.Tensor:
    """The rewards of completions, [B]."""
    replies = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return torch.tensor([reward(reply, row) for reply, row in zip(replies, rows, strict=True)], dtype=torch.float64)


def evaluate(model, tokenizer, rows: list[dict], args: argparse.Namespace) -> float:
    """Mean reward of the likeliest replies."""
    return judge(tokenizer, rows, sample(model, tokenizer, rows, args, greedy=True)).mean().item()


# ---- Loss ----


def group_advantages(rewards_B: torch.Tensor, num_generations: int) -> torch.Tensor:
    """How much better a completion is than the mean of its group, in standard deviations. [B]"""
    rewards_PG = rewards_B.view(-1, num_generations)
    deviations_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    return (deviations_PG / (rewards_PG.std(dim=1, keepdim=True) + 1e-4)).flatten().float()


def completion_logps(model, rows: list[dict], completions: list[list[int]], pad_token_id: int):
    """Log-probability of each token, in nats, and which tokens are of the completion. [B, T]"""
    sequences = [(row["prompt_ids"], ids) for row, ids in zip(rows, completions, strict=True)]
    ids_BT, attention_BT, mask_BT = collate(sequences, None, pad_token_id, model.device)
    logits_BTV = model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits[:, :-1].float()
    logps_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)  # place t predicts t + 1
    return logps_BT, mask_BT[:, 1:]


def clipped_loss(ratios: torch.Tensor, advantages: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The likelier the better where the advantage is positive, until the ratio has gone far enough; and vice versa."""
    clipped = ratios.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratios * advantages, clipped * advantages)


# ---- Training ----


def train_on(model, optimizer, scheduler, rows, completions, advantages_B, args, pad_token_id) -> list[float]:
    """Take `iterations` optimizer steps on completions; returns their losses."""
    tokens = sum(len(ids) for ids in completions)  # of the whole step, however it is cut into micro-batches
    old_logps, losses = {}, []
    for _ in range(args.iterations):
        step_loss = 0.0
        for first in range(0, len(rows), args.batch_size):
            part = slice(first, first + args.batch_size)
            logps_BT, mask_BT = completion_logps(model, rows[part], completions[part], pad_token_id)
            old_logps_BT = old_logps.setdefault(first, logps_BT.detach())  # of the weights that sampled
            advantages_B1 = advantages_B[part, None].to(model.device)
            losses_BT = clipped_loss((logps_BT - old_logps_BT).exp(), advantages_B1, args.epsilon)
            loss = (losses_BT * mask_BT).sum() / tokens
            loss.backward()
            step_loss += loss.item()
        update(model, optimizer, scheduler, args.max_grad_norm)
        losses.append(step_loss)
    return losses


def train(model, tokenizer, rows: list[dict], args: argparse.Namespace) -> dict[str, list[float]]:
    """Train `model` in place; returns the loss of each optimizer step and the mean reward of each generation."""
    generations = plan_generations(len(rows), args)
    optimizer, scheduler = make_optimizer(model, args, len(generations) * args.iterations)
    losses, rewards = [], []
    model.train()
    for numbers in generations:
        batch = [rows[i] for i in numbers for _ in range(args.num_generations)]
        completions = sample(model, tokenizer, batch, args)
        rewards_B = judge(tokenizer, batch, completions)
        advantages_B = group_advantages(rewards_B, args.num_generations)
        losses += train_on(model, optimizer, scheduler, batch, completions, advantages_B, args, tokenizer.pad_token_id)
        rewards.append(rewards_B.mean().item())
        if len(rewards) % args.log_every == 0:
            print(f"generation {len(rewards):4d}/{len(generations)}  loss {losses[-1]:7.4f}  reward {rewards[-1]:.3f}")
    return {"losses": losses, "rewards": rewards}


def make_online_parser(description: str, output: str) -> argparse.ArgumentParser:
    parser = make_parser(description, "`prompt`, a list of messages, and `answer`", output, cuts_rows=False)
    parser.add_argument("--num_generations", type=int, default=8, help="completions of a prompt: a group")
    parser.add_argument("--max_completion_length", type=int, help="tokens; by default 256, or 4 for the stand-in")
    parser.add_argument("--iterations", type=int, default=1, help="optimizer steps on the same completions")
    parser.add_argument(
        "--epsilon", type=float, default=0.2, help="how far from 1 a ratio may go before it is clipped"
    )
    parser.set_defaults(batch_size=128)
    return parser


def prepare(args: argparse.Namespace, standin_learning_rate: float):
    """Fill in what depends on the model; then the model, its tokenizer, and the rows to train on and to test with."""
    args.learning_rate = args.learning_rate or (1e-6 if args.model else standin_learning_rate)
    args.max_completion_length = args.max_completion_length or (256 if args.model else 4)
    model, tokenizer, rows = load(args, make_standin_rows)
    rows, held_out = split_off([encode(tokenizer, row) for row in rows], args.eval_rows)
    print(f"{len(rows)} prompts to train on; {len(held_out)} held out")
    return model, tokenizer, rows, held_out


def main(argv: list[str] | None = None) -> dict:
    args = make_online_parser(__doc__, "grpo_output").parse_args(argv)
    model, tokenizer, rows, held_out = prepare(args, standin_learning_rate=1e-3)
    before = evaluate(model, tokenizer, held_out, args) if held_out else None
    result = train(model, tokenizer, rows, args)
    if held_out:
        result["before"], result["after"] = before, evaluate(model, tokenizer, held_out, args)
        print(f"held-out reward {result['before']:.3f} -> {result['after']:.3f}")
    save(model, tokenizer, args.output)
    return result


if __name__ == "__main__":
    main()
