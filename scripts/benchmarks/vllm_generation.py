"""
Sampling for GRPO: Transformers' `generate` against vLLM in the training process, whose copy of the weights is updated and
checked before each generation, as it is after an optimizer step. Needs vLLM.

32 completions of 64 tokens at temperature 1, for 32 questions and for 16 of them twice; SmolLM2-135M-Instruct or any
other model:

    python scripts/benchmarks/vllm_generation.py SmolLM2-135M-Instruct
    python scripts/benchmarks/vllm_generation.py SmolLM2-135M-Instruct --dtype bfloat16 --repeats 9

Both engines are in one process, have the same model and the same number of threads, and take turns. Seconds are medians of
the repetitions, and the speed is the ratio of the medians. What an update costs by itself is measured afterwards.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl.rollouts.transformers_engine import TransformersEngine
from trl.rollouts.types import SamplingParams
from trl.rollouts.vllm_colocate import VLLMColocateEngine

# Read when vLLM is loaded.
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
ROWS = 32
STORIES = [
    "A farmer packs {a} boxes of apples with {b} apples in each, and gives {c} apples to a neighbour. How many are left?",
    "A train leaves at {c} past nine and stops {b} times for {a} minutes each. How many minutes does it stand still?",
    "Mia reads {b} pages on a weekday and {a} more on each day of the weekend. How many pages does she read in a week?",
    "A class of {a} pupils collects {b} bottles each. The shop pays {c} cents for a bottle. How much money is that?",
    "Of {a}{c} seats in a theatre, {b} rows with {c} seats are empty. How many people are there? Explain each step.",
    "A recipe for {c} people takes {a}0 grams of flour. How much flour do {b} people need, and why?",
    "Tom is {b} years old, his sister is {c} years younger, and his father is {a} years older. How old are they together?",
    "Write a short story about a lighthouse keeper who counts {a} ships in the morning and {b} ships in the evening.",
]


def make_questions(count: int) -> list[str]:
    """Different questions, always the same."""
    return [
        STORIES[index % len(STORIES)].format(a=11 + 3 * index, b=4 + index, c=2 + index % 5) for index in range(count)
    ]


class Seconds(NamedTuple):
    """On the clock, and of all processors, which other programs on the machine disturb less."""

    clock: float
    processor: float


def timed(function: Callable[[], object]) -> Seconds:
    start = time.perf_counter(), time.process_time()
    function()
    return Seconds(time.perf_counter() - start[0], time.process_time() - start[1])


def median(values: Sequence[Seconds]) -> Seconds:
    return Seconds(*map(statistics.median, zip(*values, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name or folder of a model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=64, help="length of a completion (default: 64)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both engines (default: all)")
    arguments = parser.parse_args()
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    accelerator, tokens = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no"), arguments.tokens
    model.to(accelerator.device)
    sampling = SamplingParams(max_completion_length=tokens)
    # All completions have the same length, so that both sides do the same work: stop tokens are ignored.
    for_vllm = SamplingParams(max_completion_length=tokens, with_logps=True, generation_kwargs={"ignore_eos": True})
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    transformers = TransformersEngine(model, accelerator, pad_token_id=pad_token_id, eos_token_ids=[])
    start = time.perf_counter()
    vllm = VLLMColocateEngine(
        model, accelerator, tokenizer, sampling=for_vllm, pad_token_id=pad_token_id, eos_token_ids=[],
        max_num_seqs=ROWS, max_model_length=1024,
    )  # fmt: skip
    print(f"vLLM is there after {time.perf_counter() - start:.1f} s; {torch.get_num_threads()} threads, "
          f"{arguments.dtype}, load {os.getloadavg()[0]:.1f}")  # fmt: skip

    ids = [
        list(
            tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        )
        for text in make_questions(ROWS)
    ]
    cases = {f"{ROWS} prompts": ids, f"{ROWS // 2} prompts, twice": [one for one in ids[::2] for _ in range(2)]}
    print(f"{ROWS} completions of {tokens} tokens; prompts of {min(map(len, ids))} to {max(map(len, ids))} tokens\n")
    print(f"{'':22}{'':11}{'Transformers':>14}{'vLLM':>9}{'update':>9}{'generate':>10}{'speed':>9}   of single turns")
    for name, prompts in cases.items():
        compare(name, prompts, transformers, vllm, model, sampling, for_vllm, arguments.repeats)
    print("\nAn update of vLLM's weights, seconds")
    for level, meaning in (("off", "not checked"), ("probe", "log-probs compared"), ("full", "and every layer")):
        vllm.verify = level
        vllm.update_weights(model)
        seconds = median([timed(lambda: vllm.update_weights(model)) for _ in range(max(arguments.repeats, 3))])
        print(f"{level:10}{meaning:24}{seconds.clock:10.3f} (clock){seconds.processor:10.3f} (processor)", flush=True)
    vllm.close()


def compare(name, prompts, transformers, vllm, model, sampling, for_vllm, repeats) -> None:
    """Two lines of the table, after a turn of each engine that does not count."""
    turns: list[dict[str, Seconds]] = []

    def sample(engine, how):
        rollouts = engine.generate(prompts, how)
        assert {len(rollout.completion_ids) for rollout in rollouts} == {how.max_completion_length}

    for turn in range(repeats + 1):
        gc.collect()
        transformers.update_weights(model)
        seconds = {
            "Transformers": timed(lambda: sample(transformers, sampling)),
            "update": timed(lambda: vllm.update_weights(model)),
            "generate": timed(lambda: sample(vllm, for_vllm)),
        }
        seconds["vLLM"] = Seconds(*map(sum, zip(seconds["update"], seconds["generate"], strict=True)))
        turns += [seconds] if turn else []
    middle = {column: median([seconds[column] for seconds in turns]) for column in turns[0]}
    for kind in Seconds._fields:
        figures = {column: getattr(value, kind) for column, value in middle.items()}
        ratios = [getattr(one["Transformers"], kind) / getattr(one["vLLM"], kind) for one in turns]
        print(
            f"{name if kind == 'clock' else '':22}{kind:11}{figures['Transformers']:14.2f}{figures['vLLM']:9.2f}"
            f"{figures['update']:9.2f}{figures['generate']:10.2f}{figures['Transformers'] / figures['vLLM']:8.2f}x"
            f"   {min(ratios):.2f}x to {max(ratios):.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
