"""
Sampling a group: its prompt through the model once, against once for every completion.

One group of 8 completions of 32 tokens, a Llama of SmolLM2-135M's shape with random weights, float32:

    python scripts/benchmarks/shared_prefill.py
    python scripts/benchmarks/shared_prefill.py --case short
"""

from __future__ import annotations

import argparse
import json

from _measure import measure, print_table, run_sides
from shared_prefix import load_model

SIDES = ["for each completion", "once"]
CASES = {"long": 900, "middle": 250, "short": 30}
GROUP, LENGTH, VOCABULARY = 8, 32, 1000


def run_side(side: str, case: str) -> None:
    import torch
    from accelerate import Accelerator

    from trl.rollouts import transformers_engine
    from trl.rollouts.types import SamplingParams

    if side != SIDES[1]:
        transformers_engine.shared_prefill = lambda *args: None
    torch.manual_seed(0)
    engine = transformers_engine.TransformersEngine(
        load_model(None), Accelerator(cpu=True), pad_token_id=0, eos_token_ids=[]
    )
    prompt = torch.randint(1, VOCABULARY, (CASES[case],)).tolist()
    sampling = SamplingParams(max_completion_length=LENGTH, n=GROUP)
    print(json.dumps(measure(lambda: engine.generate([prompt], sampling), repeats=2)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.case)
    else:
        for case in [arguments.case] if arguments.case else CASES:
            results = run_sides(__file__, case, SIDES, arguments.rounds)
            print_table(f"{GROUP} completions of {LENGTH} tokens, prompt of {CASES[case]}", results, SIDES[0])
