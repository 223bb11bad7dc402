"""
The LM head and the loss alone: hidden states in, loss and gradients out; float32, vocabulary 49,152, 4 x 1,024 tokens.

Baseline: project all positions, then Transformers' causal loss. Ours, once for the loss alone and once with what the
trainer logs besides (entropy, accuracy), which the baseline does not compute.

    python scripts/benchmarks/head_loss.py
"""

from __future__ import annotations

import argparse
import json

from _measure import measure, print_table, run_sides

ROWS, LENGTH, HIDDEN, VOCAB = 4, 1024, 384, 49152
SIDES = ["full logits", "fused", "fused, with metrics"]


def run_side(side: str) -> None:
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    from trl.losses.language_modeling import nll
    from trl.ops.head import LogitTransform, token_objective

    torch.manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, HIDDEN, requires_grad=True)
    weight = (torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5).requires_grad_()
    labels = torch.randint(0, VOCAB, (ROWS, LENGTH))
    outputs = ("entropy", "is_top1") if "metrics" in side else ()

    def step() -> None:
        hidden.grad = weight.grad = None
        if side == "full logits":
            loss = ForCausalLMLoss(hidden @ weight.t(), labels, VOCAB)
        else:
            scored = hidden[:, :-1].flatten(0, 1)
            values = token_objective(scored, weight, None, labels[:, 1:].flatten(), LogitTransform(), nll, outputs)
            loss = values["loss_sum"] / scored.shape[0]
        loss.backward()

    print(json.dumps(measure(step, repeats=5)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--case", default="")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side)
    else:
        results = run_sides(__file__, "", SIDES, arguments.rounds)
        print_table(f"Head and loss, float32, {ROWS} x {LENGTH} tokens, vocabulary {VOCAB}", results, SIDES[0])
