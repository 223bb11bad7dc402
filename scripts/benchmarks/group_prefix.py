"""
The learn phase of methods that sample (GRPO, RLOO): log-probabilities, entropies, loss (dapo) and backward for groups of
completions, on padded rows against rows that share their group's prompt. float32 and sdpa by default; a model of
SmolLM2-135M's size (hidden 576, 30 layers, vocabulary 49,152), since random weights cost the same as trained ones.

Rows are made as the trainers make them: right-padded, completions of 64 to 128 tokens, shuffled. Cases: 8 completions
after a prompt of 900 tokens; the same with gradient checkpointing, and without gradients, as old and reference
log-probabilities are computed; four groups of four in one micro-batch; and short prompts, where little can be shared.

    python scripts/benchmarks/group_prefix.py
    python scripts/benchmarks/group_prefix.py --case long
    python scripts/benchmarks/group_prefix.py --case long --prompt 300 --completions 16 --layers 8
    python scripts/benchmarks/group_prefix.py --case long --model HuggingFaceTB/SmolLM2-135M-Instruct

Fields of a case given on the command line replace those of the named one. All cases take about half an hour on one idle
core; the ratios of time show with 8 layers as well.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, fields, replace

from _measure import measure, print_table, run_sides


@dataclass(frozen=True)
class Case:
    """
    A micro-batch, and what is done with it.

    Args:
        other: the layout that padded rows are measured against.
        groups: prompts in the micro-batch.
        completions: rows of each.
        prompt: tokens of a prompt; further groups have a few less.
        shortest: tokens of the shortest completion.
        longest: tokens of the longest one; the others lie between.
        checkpointing: gradient checkpointing.
        forward_only: log-probabilities alone, without gradients.
        dtype: of the weights.
        attention: implementation.
        layers: of the random model.
        model: weights to load; default: random ones.
    """

    other: str = "shared_prefix"
    groups: int = 1
    completions: int = 8
    prompt: int = 900
    shortest: int = 64
    longest: int = 128
    checkpointing: bool = False
    forward_only: bool = False
    dtype: str = "float32"
    attention: str = "sdpa"
    layers: int = 30
    model: str | None = None

    def __str__(self) -> str:
        words = [
            f"{self.groups} x {self.completions} completions of {self.shortest} to {self.longest} tokens",
            f"prompt of {self.prompt}",
            "log-probabilities only" if self.forward_only else "forward and backward",
        ]
        words += ["gradient checkpointing"] if self.checkpointing else []
        words += [f"{self.layers} layers"] if self.layers != 30 and not self.model else []
        return ", ".join([*words, self.dtype])


CASES = {
    "long": Case(),
    "long, checkpointing": Case(checkpointing=True),
    "long, log-probs": Case(forward_only=True),
    "4 groups": Case(groups=4, completions=4, checkpointing=True, layers=8),
    "short": Case(other="auto", prompt=60),
    "short, 4 groups": Case(other="auto", groups=4, completions=4, prompt=60),
    "hardly worth it": Case(other="auto", prompt=40, shortest=96, longest=96),
}


def make_batch(case: Case, vocab_size: int):
    """The rows of a generation as a trainer keeps them, and which tokens of them are trained."""
    import torch

    from trl.rollouts.types import Rollout
    from trl.trainer.rollout_batches import labels_of, rollouts_to_batch

    lengths = torch.linspace(case.shortest, case.longest, case.completions).round().int()
    rollouts, groups = [], []
    for group in range(case.groups):
        prompt = torch.randint(3, vocab_size, (case.prompt - 7 * group,)).tolist()
        for length in lengths[torch.randperm(case.completions)].tolist():
            rollouts.append(Rollout(prompt, torch.randint(3, vocab_size, (length,)).tolist()))
            groups.append(group)
    batch = rollouts_to_batch(rollouts, groups, pad_token_id=0, device=torch.device("cpu"))
    return batch, labels_of(batch, batch["train_mask"])


def load_model(case: Case):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    options = {"dtype": getattr(torch, case.dtype), "attn_implementation": case.attention}
    if case.model:
        return AutoModelForCausalLM.from_pretrained(case.model, **options)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=case.layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, **options)


def run_side(layout: str, case: Case) -> None:
    import torch

    from trl.losses.policy import PolicyLossInputs, PolicyLossOptions, aggregate, policy_loss
    from trl.ops.scoring import install_scoring, score_tokens
    from trl.trainer.rollout_batches import completion_values

    torch.manual_seed(0)
    model = load_model(case).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, labels = make_batch(case, model.config.vocab_size)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    advantages = torch.randn(len(labels))
    options = PolicyLossOptions(loss_type="dapo", beta=0.0)
    install_scoring(model)  # asks the model for two logits once; not part of a step

    def score():
        return score_tokens(model, inputs, with_entropy=not case.forward_only, layout=layout, groups=batch["groups"])

    @torch.no_grad()
    def log_probs() -> None:
        score()

    def learn() -> None:
        model.zero_grad(set_to_none=True)
        scores = score()
        logps, entropies = (completion_values(values, batch) for values in (scores.logps, scores.entropies))
        loss = policy_loss(
            PolicyLossInputs(logps, advantages, batch["train_mask"], entropies_BT=entropies.detach()), options
        )
        sum(term.weight * term.total / term.count for term in aggregate(loss, options)).backward()

    result = measure(log_probs if case.forward_only else learn, repeats=2)
    print(json.dumps({**result, "layout": model._layout_choice.name}))


def compare(case: Case, rounds: int) -> None:
    """Both layouts in turn, and what the second costs of the first."""
    text = json.dumps(asdict(case))
    # The name of the layout is a string, of which the least is the only one.
    results = run_sides(__file__, text, ["padded", case.other], rounds)
    chosen = results[case.other]["layout"]
    print_table(f"{case}" + (f"; auto chose {chosen}" if case.other == "auto" else ""), results, "padded")
    ratios = {
        key: results[case.other][key] / results["padded"][key] for key in ("seconds", "cpu_seconds", "megabytes")
    }
    print(
        f"{case.other} takes {ratios['seconds']:.2f} of the time ({ratios['cpu_seconds']:.2f} of the processor's) "
        f"and {ratios['megabytes']:.2f} of the peak memory",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=f"one of: {'; '.join(CASES)}. Default: all")
    parser.add_argument("--rounds", type=int, default=1)
    for field in fields(Case):
        name = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(name, type=int if isinstance(field.default, int) else str)
    arguments = parser.parse_args()
    if arguments.side:
        run_side(arguments.side, Case(**json.loads(arguments.case)))
    else:
        if arguments.case not in (None, *CASES):
            parser.error(f"no case {arguments.case!r}; there are: {'; '.join(CASES)}")
        given = {field.name: getattr(arguments, field.name) for field in fields(Case)}
        given = {name: value for name, value in given.items() if value is not None}
        for name in [arguments.case] if arguments.case else CASES:
            compare(replace(CASES[name], **given), arguments.rounds)
