"""
A step on preference pairs (forward and backward, sigmoid loss), float32, sdpa: padded rows against rows that share
their prompt. The model has the size of SmolLM2-135M: hidden 576, 30 layers, vocabulary 49,152; random weights cost the
same as trained ones.

Cases: prompts of five solved examples, about 900 tokens, with two answers of about 120; the same with gradient
checkpointing; and prompts of 100 tokens, where little can be shared.

    python scripts/benchmarks/shared_prefix.py
    python scripts/benchmarks/shared_prefix.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import json
import os

from _measure import measure, print_table, run_sides

VOCAB = 49152
SIDES = ["padded", "shared_prefix"]
# Tokens of the prompt and of the two answers, for each pair.
LONG = [(910, 104, 131), (884, 142, 117)]
SHORT = [(96, 104, 131), (121, 142, 117)]
CASES = {
    "5-shot": (LONG[:1], False, "1 pair, prompt of 910 tokens"),
    "5-shot, 2 pairs": (LONG, False, "2 pairs, prompts of about 900 tokens"),
    "5-shot, checkpointing": (LONG, True, "2 pairs, prompts of about 900 tokens, gradient checkpointing"),
    "0-shot": (SHORT, False, "2 pairs, prompts of about 100 tokens"),
}


def make_batch(pairs):
    """The chosen rows, then the rejected ones, as a trainer collates them."""
    import torch

    prompts = [torch.randint(3, VOCAB, (n_prompt,)) for n_prompt, _, _ in pairs]
    rows, labels = [], []
    for answer in (1, 2):
        for prompt, lengths in zip(prompts, pairs, strict=True):
            rows.append(torch.cat([prompt, torch.randint(3, VOCAB, (lengths[answer],))]))
            labels.append(rows[-1].clone())
            labels[-1][: len(prompt)] = -100
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }
    return batch, torch.arange(len(pairs)).repeat(2)


def load_model(path: str | None):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if path:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def run_side(side: str, case: str) -> None:
    import torch
    import torch.nn.functional as F

    from trl.ops.scoring import score_tokens

    torch.manual_seed(0)
    pairs, checkpointing, _ = CASES[case]
    model = load_model(os.environ.get("BENCHMARK_MODEL")).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, groups = make_batch(pairs)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        logps = score_tokens(model, batch, layout=side, groups=groups).logps.sum(dim=1)
        chosen, rejected = logps.chunk(2)
        (-F.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()

    print(json.dumps(measure(step, repeats=2)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", help="weights to load; default: random ones")
    arguments = parser.parse_args()
    if arguments.model:
        os.environ["BENCHMARK_MODEL"] = arguments.model  # for the processes of the two sides
    if arguments.side:
        run_side(arguments.side, arguments.case)
    else:
        for case in [arguments.case] if arguments.case else CASES:
            results = run_sides(__file__, case, SIDES, arguments.rounds)
            print_table(f"Pairs, float32, {CASES[case][2]}", results, SIDES[0])
