"""What the minimal scripts share and no method is about: a stand-in model, loading, the order of rows, the optimizer.

The method itself, from a row to the loss, is in each script.
"""

from __future__ import annotations

import argparse
import os
import random

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    get_scheduler,
    set_seed,
)

# ---- A stand-in: bytes for tokens, a random Llama, and words to spell backwards ----

STANDIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def build_standin(model_class: type = LlamaForCausalLM, **config):
    tokenizer = ByT5Tokenizer(extra_ids=0, chat_template=STANDIN_TEMPLATE)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **config,
    )
    return model_class(config), tokenizer


def make_words(count: int) -> list[str]:
    """Random words of 3 to 6 letters, all different; a few less than `count`."""
    rng = random.Random(0)
    return list(dict.fromkeys("".join(rng.choices("aeioub", k=rng.randint(3, 6))) for _ in range(count)))


# ---- Command line ----


def make_parser(description: str, data: str, output: str, cuts_rows: bool = True) -> argparse.ArgumentParser:
    """
    The arguments that every minimal script takes. `data` says which columns, `output` is the default folder, and
    `cuts_rows` whether rows are cut at a length.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal model; by default a tiny stand-in")
    parser.add_argument("--data", help=f"name of a dataset, or a .jsonl file: {data}")
    parser.add_argument("--split", default="train", help="split of the dataset to train on")
    parser.add_argument("--output", default=output, help="folder for the trained model")
    parser.add_argument("--batch_size", type=int, default=16, help="rows in one forward pass")
    parser.add_argument("--accumulation", type=int, default=1, help="forward passes in one optimizer step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, help="by default one for real models, or for the stand-in")
    parser.add_argument("--schedule", default="linear", help="of the learning rate: linear, cosine, constant, ...")
    parser.add_argument("--warmup_steps", type=int, default=0)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are scaled down to this norm")
    if cuts_rows:
        parser.add_argument("--max_length", type=int, default=1024, help="tokens of a row; the rest is cut")
    parser.add_argument("--eval_rows", type=int, default=64, help="rows kept from the end for evaluation")
    parser.add_argument("--log_every", type=int, default=20, help="steps between two lines of output")
    parser.add_argument("--seed", type=int, default=42)
    return parser


# ---- Model and rows ----


def load(args: argparse.Namespace, make_standin_rows, build=build_standin, load_model=AutoModelForCausalLM):
    """
    Seed, then load or make the model, its tokenizer and the rows.

    Returns:
        Model (in float32, on the GPU where there is one), tokenizer (with a pad token), rows.
    """
    set_seed(args.seed)
    if args.model:
        model = load_model.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:
        model, tokenizer = build()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not args.data:
        rows = Dataset.from_list(make_standin_rows())
    elif os.path.isfile(args.data):
        rows = load_dataset("json", data_files=args.data, split="train")
    else:
        rows = load_dataset(args.data, split=args.split)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, rows


def split_off(examples: list, held_out_rows: int) -> tuple[list, list]:
    """The examples to train on, and the last ones, held out."""
    cut = len(examples) - held_out_rows
    return examples[:cut], examples[cut:]


# ---- Order and optimizer ----


def plan_steps(count: int, args: argparse.Namespace, shuffle: bool = True) -> list[list[int]]:
    """For each optimizer step of the run, the numbers of its rows."""
    rows_per_step = args.batch_size * args.accumulation
    steps = []
    for epoch in range(args.epochs):
        order = list(range(count))
        if shuffle:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
        steps += [order[start : start + rows_per_step] for start in range(0, count, rows_per_step)]
    return steps


def plan_generations(count: int, args: argparse.Namespace) -> list[list[int]]:
    """For each time that completions are sampled, the numbers of its prompts; as many as fill the optimizer step."""
    prompts = args.batch_size * args.accumulation // args.num_generations
    generator = torch.Generator().manual_seed(args.seed)
    generations = []
    for _ in range(args.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        generations += [order[start : start + prompts] for start in range(0, count - prompts + 1, prompts)]
    return generations


def make_optimizer(model, args: argparse.Namespace, total_steps: int):
    """AdamW and its schedule. Norms and biases are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    return optimizer, get_scheduler(args.schedule, optimizer, args.warmup_steps, total_steps)


def update(model, optimizer, scheduler, max_grad_norm: float) -> None:
    """One optimizer step with the gradients that are there."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def save(model, tokenizer, folder: str) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"saved to {folder}")
