"""
A whole DPO step (optimizer included) of a small Llama, hidden 384, 12 layers, vocabulary 16,384; float32.

Baseline: a frozen copy of the model is the reference, and runs beside the policy. Against it: the reference's log-probs
were computed before training (`precompute_ref_log_probs`). Two kinds of pairs: prompts of about 100 tokens, and of
about 500, the latter with an adapter too.

    python scripts/benchmarks/precomputed_reference.py
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time

from _measure import PeakMemory, print_table, run_sides

VOCAB = 16384
STEPS = 4  # of which the first is not counted
SIDES = ["reference copy", "precomputed"]
# Tokens of the prompt and of the two answers, for each pair.
CASES = {
    "short": (
        [(96, 104, 131), (121, 142, 117), (88, 90, 160), (110, 120, 97)],
        "4 pairs, prompts of about 100 tokens",
    ),
    "long": ([(510, 104, 131), (484, 142, 117)], "2 pairs, prompts of about 500 tokens"),
    "lora": ([(510, 104, 131), (484, 142, 117)], "2 pairs, prompts of about 500 tokens, LoRA"),
}


def make_dataset(lengths: list[tuple[int, int, int]]):
    import torch
    from datasets import Dataset

    def row(*counts: int) -> dict[str, list[int]]:
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        return {column: torch.randint(3, VOCAB, (n,)).tolist() for column, n in zip(columns, counts, strict=True)}

    return Dataset.from_list([row(*counts) for counts in lengths])


def run_side(side: str, case: str) -> None:
    import torch
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        """Seconds of each step: on the clock, and of all processors."""

        def __init__(self):
            self.steps = []

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, *_, **__):
            self.steps.append((time.perf_counter() - self.start[0], time.process_time() - self.start[1]))

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=384, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    lengths, _ = CASES[case]
    model, clock = LlamaForCausalLM(config), Clock()
    ref_model = peft_config = None
    if case == "lora":
        from peft import LoraConfig

        peft_config = LoraConfig(r=16, target_modules="all-linear")
        ref_model = copy.deepcopy(model) if side == "reference copy" else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=model,
            ref_model=ref_model,
            args=DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=len(lengths),
                precompute_ref_log_probs=side == "precomputed",
                gradient_checkpointing=False,
                max_length=None,
                max_steps=STEPS,
                save_strategy="no",
                disable_tqdm=True,
                bf16=False,
                use_cpu=True,
                report_to="none",
            ),
            train_dataset=make_dataset(lengths * STEPS),
            processing_class=ByT5Tokenizer(),  # the rows are tokenized already
            callbacks=[clock],
            peft_config=peft_config,
        )
        with PeakMemory() as memory:
            trainer.train()
    seconds, cpu_seconds = (min(column) for column in zip(*clock.steps[1:], strict=True))
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "megabytes": memory.bytes / 2**20}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, arguments.case)
    else:
        for case in [arguments.case] if arguments.case else CASES:
            results = run_sides(__file__, case, SIDES, arguments.rounds)
            print_table(f"DPO step, float32, {CASES[case][1]}", results, SIDES[0])
