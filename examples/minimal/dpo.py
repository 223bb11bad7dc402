"""Direct Preference Optimization (https://huggingface.co/papers/2305.18290) with nothing hidden, read top to bottom.

    python examples/minimal/dpo.py                                    # a tiny stand-in, half a minute on a laptop
    python examples/minimal/dpo.py --model Qwen/Qwen3-0.6B --data my_pairs.jsonl --batch_size 2 --accumulation 8

It gives the losses of `DPOTrainer` step for step (a test holds it to that). What it leaves out is what the trainer is
for: the other losses, computing a pair's prompt once, log-probs of the reference computed ahead, adapters that are
their own reference, projecting to the vocabulary in chunks, several devices, resuming.
"""

from __future__ import annotations

import argparse
import copy

import torch
from common import load, make_optimizer, make_parser, make_words, plan_steps, save, split_off, update
from torch.nn.functional import logsigmoid


def make_standin_rows() -> list[dict]:
    """Of a word in capitals and the word spelled backwards, the first is preferred."""
    return [
        {
            "prompt": [{"role": "user", "content": word}],
            "chosen": [{"role": "assistant", "content": word.upper()}],
            "rejected": [{"role": "assistant", "content": word[::-1]}],
        }
        for word in make_words(3000)
    ]


# ---- From a row to token ids ----


def render(tokenizer, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )


def common_length(a: list[int], b: list[int]) -> int:
    """How many tokens two lists share from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def encode_answers(tokenizer, prompt: list[dict], answers: list[list[dict]]) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of each answer to it. The prompt ends where any answer's text departs from it."""
    prompt_ids = render(tokenizer, prompt, add_generation_prompt=True)
    whole = [render(tokenizer, prompt + answer) for answer in answers]
    start = min(common_length(prompt_ids, ids) for ids in whole)
    return prompt_ids[:start], [ids[start:] for ids in whole]


def encode(tokenizer, row: dict) -> dict[str, list[int]]:
    prompt_ids, (chosen_ids, rejected_ids) = encode_answers(tokenizer, row["prompt"], [row["chosen"], row["rejected"]])
    return {"prompt": prompt_ids, "chosen": chosen_ids, "rejected": rejected_ids}


def collate(sequences: list[tuple[list[int], list[int]]], max_length: int, pad_token_id: int, device):
    """R rows of prompt and answer, cut to `max_length`, padded on the right to the longest, T; and which are answer."""
    rows = [(prompt + answer)[:max_length] for prompt, answer in sequences]
    longest = max(len(ids) for ids in rows)
    ids_RT, attention_RT, answer_RT = [], [], []
    for ids, (prompt, _) in zip(rows, sequences, strict=True):
        padding = longest - len(ids)
        ids_RT.append(ids + [pad_token_id] * padding)
        attention_RT.append([1] * len(ids) + [0] * padding)
        answer_RT.append([0] * len(prompt) + [1] * (len(ids) - len(prompt)) + [0] * padding)
    return tuple(torch.tensor(x, device=device) for x in (ids_RT, attention_RT, answer_RT))


# ---- Loss ----


def answer_logps(model, ids_RT, attention_RT, answer_RT) -> torch.Tensor:
    """Log-probability that the model gives each whole answer, in nats: the sum over its tokens. [R]"""
    logits_RTV = model(input_ids=ids_RT, attention_mask=attention_RT, use_cache=False).logits[:, :-1].float()
    logps_RT = logits_RTV.log_softmax(-1).gather(-1, ids_RT[:, 1:, None]).squeeze(-1)  # position t predicts t + 1
    return (logps_RT * answer_RT[:, 1:]).sum(-1)


def pair_rewards(model, reference, pairs: list[dict], args: argparse.Namespace, pad_token_id: int):
    """Implicit rewards of the chosen and of the rejected answers, [B] each: beta times how much likelier they became."""
    sequences = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    batch = collate(sequences, args.max_length, pad_token_id, model.device)
    logps_R = answer_logps(model, *batch)
    with torch.no_grad():
        reference_logps_R = answer_logps(reference, *batch)
    return (args.beta * (logps_R - reference_logps_R)).chunk(2)


def loss_sum(chosen_rewards_B: torch.Tensor, rejected_rewards_B: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood, under Bradley and Terry's model, that the chosen answers win; summed over the pairs."""
    return -logsigmoid(chosen_rewards_B - rejected_rewards_B).sum()


@torch.no_grad()
def evaluate(model, reference, pairs: list[dict], args: argparse.Namespace, pad_token_id: int) -> dict[str, float]:
    """Mean loss of a pair, and in how many the chosen answer has the higher reward."""
    model.eval()
    loss = wins = 0.0
    for start in range(0, len(pairs), args.batch_size):
        rewards = pair_rewards(model, reference, pairs[start : start + args.batch_size], args, pad_token_id)
        loss += loss_sum(*rewards).item()
        wins += (rewards[0] > rewards[1]).sum().item()
    return {"eval_loss": loss / len(pairs), "eval_accuracy": wins / len(pairs)}


# ---- Training ----


def train(model, reference, pairs: list[dict], args: argparse.Namespace, pad_token_id: int) -> list[float]:
    """Train `model` in place against the frozen `reference`; returns the loss of each optimizer step."""
    steps = plan_steps(len(pairs), args)
    optimizer, scheduler = make_optimizer(model, args, len(steps))
    losses = []
    model.train()
    for numbers in steps:
        step_loss = margin = 0.0
        for first in range(0, len(numbers), args.batch_size):
            batch = [pairs[i] for i in numbers[first : first + args.batch_size]]
            rewards = pair_rewards(model, reference, batch, args, pad_token_id)
            loss = loss_sum(*rewards) / len(numbers)  # over the pairs of the step: the last micro-batch may be short
            loss.backward()
            step_loss += loss.item()
            margin += (rewards[0] - rewards[1]).sum().item() / len(numbers)
        update(model, optimizer, scheduler, args.max_grad_norm)
        losses.append(step_loss)
        if len(losses) % args.log_every == 0:
            print(f"step {len(losses):4d}/{len(steps)}  loss {step_loss:.4f}  reward margin {margin:.3f}")
    return losses


def main(argv: list[str] | None = None) -> dict:
    parser = make_parser(__doc__, "`prompt`, `chosen` and `rejected`, lists of messages", "dpo_output")
    parser.add_argument("--beta", type=float, default=0.1, help="how strongly the policy is held to the reference")
    args = parser.parse_args(argv)
    args.learning_rate = args.learning_rate or (1e-6 if args.model else 5e-4)
    model, tokenizer, rows = load(args, make_standin_rows)
    reference = copy.deepcopy(model).requires_grad_(False).eval()

    pairs = [encode(tokenizer, row) for row in rows]
    pairs = [pair for pair in pairs if len(pair["prompt"]) < args.max_length]  # else nothing of the answers is left
    pairs, held_out = split_off(pairs, args.eval_rows)
    print(f"{len(pairs)} pairs to train on; {len(held_out)} held out")

    result = {"losses": train(model, reference, pairs, args, tokenizer.pad_token_id)}
    if held_out:
        result.update(evaluate(model, reference, held_out, args, tokenizer.pad_token_id))
        print(f"held-out loss {result['eval_loss']:.4f}, reward accuracy {result['eval_accuracy']:.3f}")
    save(model, tokenizer, args.output)
    return result


if __name__ == "__main__":
    main()
