"""
A whole step of supervised fine-tuning (forward and backward) of a small Llama, hidden 384, 8 layers; float32.

Baseline: `model(labels=...)` of Transformers. Ours computes the loss, and with it what the trainer logs (entropy,
accuracy). Three kinds of rows: every token trained; a 900-token prompt before a 100-token answer; rows of very
different length, where padding is left out as well.

    python scripts/benchmarks/sft_step.py
"""

from __future__ import annotations

import argparse
import json

from _measure import measure, print_table, run_sides

VOCAB = 49152
SIDES = ["full logits", "score_tokens"]
CASES = {
    "all": "4 x 1,024 tokens, all trained",
    "prompt": "4 x 1,000 tokens, prompt of 900, answer of 100",
    "ragged": "8 rows of 64 to 1,024 tokens, all trained",
}


def make_batch(case: str):
    import torch

    lengths = {"all": [1024] * 4, "prompt": [1000] * 4, "ragged": [1024, 512, 256, 256, 128, 128, 64, 64]}[case]
    width = max(lengths)
    input_ids = torch.randint(0, VOCAB, (len(lengths), width))
    attention_mask = (torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]).long()
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    if case == "prompt":
        labels[:, :900] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def run_side(side: str, case: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trl.losses.language_modeling import nll
    from trl.ops.scoring import score_tokens

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    batch = make_batch(case)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        if side == "full logits":
            loss = model(**batch, use_cache=False).loss
        else:
            scores = score_tokens(model, batch, objective=nll, outputs=("entropy", "is_top1"))
            loss = scores.loss_sum / scores.mask.sum()
        loss.backward()

    print(json.dumps(measure(step, repeats=3)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.case)
    else:
        for case in [arguments.case] if arguments.case else CASES:
            results = run_sides(__file__, case, SIDES, arguments.rounds)
            print_table(f"SFT step, float32, {CASES[case]}", results, SIDES[0])
