"""
Trainers that learn from fixed completions, and the same training as a plain loop over one completion at a time.

The completions follow from prompt and place in the group alone, so that every cut, layout and number of processes trains
on the same ones. The loop knows nothing of batches, padding or chunks; it is told only which completions were sampled
and trained on when.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.rollouts.types import Prompt, Rollout, SamplingParams, is_truncated

from ..conftest import build_model, build_tokenizer

GROUP = 4
PROMPTS = [
    "the sky is",
    "what is 12 plus 30?",
    "sort the list 3, 1, 2:",
    "hello world,",
    "beautiful is better",
    "user",
]
TOKENIZER = build_tokenizer()
EOS = TOKENIZER.eos_token_id
PROMPT_IDS = [tuple(TOKENIZER(prompt)["input_ids"]) for prompt in PROMPTS]
MAX_LENGTH = 10
TEMPERATURE = 0.8
LEARNING_RATE = 4e-4
# Adam divides a gradient by its own size, so rounding noise in a tiny gradient would move a weight by the whole learning
# rate; with this epsilon it moves nothing.
ADAM_EPSILON = 1e-3
TOLERANCE = 1e-5
QUIET = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
SETTINGS = {
    **QUIET,
    "num_train_epochs": 1,
    "learning_rate": LEARNING_RATE,
    "adam_epsilon": ADAM_EPSILON,
    "lr_scheduler_type": "constant",
    "shuffle_dataset": False,
    "num_generations": GROUP,
    "generation_batch_size": 3 * GROUP,
    "max_completion_length": MAX_LENGTH,
    "temperature": TEMPERATURE,
}

Key = tuple[int, int]  # prompt, place in the group


def build_policy(seed: int = 0, **config: Any) -> nn.Module:
    """The tiny model with larger logits: fresh weights find all tokens alike, and entropies would teach nothing."""
    model = build_model(seed=seed, **config)
    model.lm_head.weight.data *= 15
    return model


@contextlib.contextmanager
def quick_garbage_collection() -> Iterator[None]:
    """A trainer collects garbage at each start; what the imports left behind is most of what it would look through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ---- Completions that do not depend on the policy ----


@dataclass(frozen=True)
class Sample:
    """One completion: two in three end with the stop token, the others were cut off; every third token is a tool's."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def env_mask(self) -> list[int]:
        return [int(index % 3 != 1) for index in range(len(self.completion_ids))]

    @property
    def is_truncated(self) -> bool:
        return self.completion_ids[-1] != EOS


def make_sample(prompt: int, place: int) -> Sample:
    rng = random.Random(f"{prompt} {place}")
    ids = [rng.randrange(4, 400) for _ in range(rng.randint(1, MAX_LENGTH - 1))]
    return Sample(PROMPT_IDS[prompt], (*ids, EOS) if (prompt + place) % 3 else tuple(ids))


SAMPLES: dict[Key, Sample] = {
    (prompt, place): make_sample(prompt, place) for prompt in range(len(PROMPTS)) for place in range(GROUP)
}
KEYS = {(sample.prompt_ids, sample.completion_ids): key for key, sample in SAMPLES.items()}
assert len(KEYS) == len(SAMPLES)


def samples_for(prompts: Sequence[tuple[int, ...]], process_index: int, group: int = GROUP) -> list[Sample]:
    """Those of a process's share of a generation batch."""
    first = process_index * len(prompts)
    return [SAMPLES[PROMPT_IDS.index(ids), (first + index) % group] for index, ids in enumerate(prompts)]


def fixed_rollouts(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
    """A `rollout_func`."""
    ids = [PROMPT_IDS[PROMPTS.index(prompt)] for prompt in prompts]
    samples = samples_for(ids, trainer.accelerator.process_index)
    return {
        "prompt_ids": [list(sample.prompt_ids) for sample in samples],
        "completion_ids": [list(sample.completion_ids) for sample in samples],
        "logprobs": None,
        "env_mask": [sample.env_mask for sample in samples],
    }


class FixedEngine:
    """An engine that has its completions already."""

    max_model_length = None

    def __init__(self, accelerator):
        self.accelerator = accelerator

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        samples = samples_for([tuple(prompt.ids) for prompt in prompts], self.accelerator.process_index)
        return [
            Rollout(
                list(sample.prompt_ids),
                list(sample.completion_ids),
                is_truncated=is_truncated(sample.completion_ids, [EOS]),
            )
            for sample in samples
        ]

    def update_weights(self, model: nn.Module) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


# ---- Rewards ----


def low_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Share of tokens in the lower half of the vocabulary."""
    return [sum(token < 200 for token in ids) / len(ids) for ids in completion_ids]


def short(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """Shortness, which does not apply to completions of an odd length."""
    return [None if len(ids) % 2 else -len(ids) / 4 for ids in completion_ids]


def nothing(completion_ids: list[list[int]], **kwargs: Any) -> list[None]:
    """Applies to no completion."""
    return [None] * len(completion_ids)


# ---- Trainers ----


def dataset(prompts: Iterable[str] = PROMPTS) -> Dataset:
    return Dataset.from_list([{"prompt": prompt} for prompt in prompts])


ARGUMENTS = (
    "model", "peft_config", "callbacks", "eval_dataset", "train_dataset", "rollout_func", "tools", "compute_metrics",
)  # fmt: skip


def make_online_trainer(method: str, output_dir: Any, reward_funcs: Any = low_ids, **settings: Any):
    """A trainer of `grpo` or `rloo` on the tiny model; what is no field of the config is an argument of the trainer."""
    trainer_class, config_class = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[method]
    settings = {"output_dir": str(output_dir), **settings}
    arguments = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    arguments.setdefault("model", build_policy())
    arguments.setdefault("train_dataset", dataset())
    return trainer_class(
        reward_funcs=reward_funcs, args=config_class(**settings), processing_class=build_tokenizer(), **arguments
    )


def make_fixed_trainer(method: str, output_dir: Any, reward_funcs: Any = low_ids, **settings: Any):
    """The same, learning from the fixed completions."""
    settings = {**SETTINGS, **settings}
    if method == "grpo":
        return make_online_trainer(method, output_dir, reward_funcs, rollout_func=fixed_rollouts, **settings)
    trainer = make_online_trainer(method, output_dir, reward_funcs, **settings)
    trainer.rollouts.conversations.engine = FixedEngine(trainer.accelerator)
    return trainer


# ---- What a trainer did ----


@dataclass(frozen=True)
class Generation:
    """Completions that were sampled together."""

    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Step:
    """An optimizer step: the completions of its micro-batches."""

    micro_batches: tuple[tuple[Key, ...], ...]

    @property
    def keys(self) -> tuple[Key, ...]:
        return tuple(sorted(key for keys in self.micro_batches for key in keys))


def keys_of(batch: dict[str, Any]) -> tuple[Key, ...]:
    """Which completions a micro-batch holds, by their tokens."""
    columns = batch["input_ids"], batch["prompt_lengths"], batch["completion_mask"].sum(1)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return tuple(KEYS[tuple(ids[:prompt]), tuple(ids[prompt : prompt + length])] for ids, prompt, length in rows)


def record(trainer) -> list[Generation | Step]:
    """What the trainer will sample and train on, in order; a list that fills up."""
    events: list[Generation | Step] = []
    generate, begin_step = trainer.make_training_batch, trainer._begin_step

    def recorded_generate(model, rows):
        batches = generate(model, rows)
        if trainer.mode == "train":
            events.append(Generation(together([key for batch in batches for key in keys_of(batch)])))
        return batches

    def recorded_step(model, row_batches):
        begin_step(model, row_batches)
        events.append(Step(together([keys_of(batch) for batch in trainer._micro_batches])))

    def together(items: list) -> tuple:
        return tuple(gather_object(items))

    trainer.make_training_batch, trainer._begin_step = recorded_generate, recorded_step
    return events


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def step_losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- The plain loop, in float64 ----


@dataclass
class Plain:
    """
    Trains on one completion at a time.

    Args:
        method: `grpo` or `rloo`.
        rewards: the functions.
        options: fields of the config that change the loss.
    """

    method: str
    rewards: Sequence[Any] = (low_ids,)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.model, self.reference = build_policy().double(), build_policy().double()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, eps=ADAM_EPSILON, weight_decay=0.0
        )
        self.advantages: dict[Key, float] = {}
        self.old_logps: dict[Key, Tensor] = {}
        self.ref_logps: dict[Key, Tensor] = {}
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.entropy_coef, self.last_entropy = self.option("entropy_coef", 0.0), math.inf

    def option(self, name: str, default: Any) -> Any:
        return self.options.get(name, default)

    @property
    def beta(self) -> float:
        return self.option("beta", {"grpo": 0.0, "rloo": 0.05}[self.method])

    def run(self, events: Iterable[Generation | Step]) -> Plain:
        for event in events:
            if isinstance(event, Generation):
                self.generate(event.keys)
            else:
                self.step(event)
        return self

    def mask(self, key: Key) -> Tensor:
        sample = SAMPLES[key]
        if self.option("mask_truncated_completions", False) and sample.is_truncated:
            return torch.zeros(len(sample.completion_ids), dtype=torch.bool)
        if self.method == "rloo":
            return torch.ones(len(sample.completion_ids), dtype=torch.bool)
        return torch.tensor(sample.env_mask, dtype=torch.bool)

    def score(self, model: nn.Module, key: Key) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the trained tokens of a completion."""
        sample = SAMPLES[key]
        ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1][len(sample.prompt_ids) - 1 :]
        logps = log_softmax(logits / self.option("temperature", TEMPERATURE), dim=-1)
        entropies = -(logps.exp() * logps).sum(-1)
        chosen = logps.gather(-1, torch.tensor(sample.completion_ids)[:, None]).squeeze(-1)
        return chosen[self.mask(key)], entropies[self.mask(key)]

    # ---- Rewards and advantages ----

    @torch.no_grad()
    def generate(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self.old_logps[key] = self.score(self.model, key)[0]
            self.ref_logps[key] = self.score(self.reference, key)[0]
        self.advantages.update((self.rloo_advantages if self.method == "rloo" else self.grpo_advantages)(keys))

    def rewards_of(self, key: Key) -> float | None:
        values = [function(completion_ids=[list(SAMPLES[key].completion_ids)])[0] for function in self.rewards]
        weights = self.option("reward_weights", [1.0] * len(values))
        known = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
        return math.fsum(known) if known else None

    def groups(self, keys: Sequence[Key]) -> dict[Key, list[float]]:
        """Of each completion that has a reward, those of its group."""
        rewards = {key: self.rewards_of(key) for key in keys}
        known = {key: reward for key, reward in rewards.items() if reward is not None}
        if self.method == "rloo" and self.beta:
            for key in known:
                known[key] -= self.beta * (self.old_logps[key] - self.ref_logps[key]).sum().item()
        self.returns = known
        return {key: [known[other] for other in known if other[0] == key[0]] for key in known}

    def grpo_advantages(self, keys: Sequence[Key]) -> dict[Key, float]:
        groups = self.groups(keys)
        scale = self.option("scale_rewards", "group")
        advantages = dict.fromkeys(keys, 0.0)
        for key, group in groups.items():
            compared = group if scale == "group" else list(self.returns.values())
            if len(compared) > 1:
                divisor = 1.0 if scale == "none" else statistics.stdev(compared) + 1e-4
                advantages[key] = (self.returns[key] - statistics.fmean(group)) / divisor
        return advantages

    def rloo_advantages(self, keys: Sequence[Key]) -> dict[Key, float]:
        advantages = dict.fromkeys(keys, 0.0)
        for key, group in self.groups(keys).items():
            if len(group) > 1:
                others = (math.fsum(group) - self.returns[key]) / (len(group) - 1)
                advantages[key] = self.returns[key] - others
        if self.option("normalize_advantages", False):
            values = list(advantages.values())
            mean, std = statistics.fmean(values), statistics.stdev(values)
            advantages = {key: (value - mean) / (std + 1e-4) for key, value in advantages.items()}
        return advantages

    # ---- The loss ----

    def token_losses(self, key: Key, logps: Tensor) -> Tensor:
        """Of each trained token of a completion."""
        low = 1 - self.option("epsilon", 0.2)
        high = 1 + (self.option("epsilon_high", None) or self.option("epsilon", 0.2))
        advantage, logratios = self.advantages[key], logps - self.old_logps[key]
        level = "trajectory" if self.method == "rloo" else self.option("importance_sampling_level", "token")
        if level == "sequence":
            logratios = logratios.mean().expand_as(logps)
        elif level == "trajectory":
            logratios = logratios.sum().expand_as(logps)
        ratios = logratios.exp()
        kind = self.option("loss_type", "dapo")
        if kind == "cispo":
            losses = -ratios.detach().clamp(max=self.option("epsilon_high", None)) * advantage * logps
        elif kind == "vespo":
            k, decay = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
            w = logratios.detach().sum()
            losses = -(decay + k * w - decay * w.exp()).exp() * advantage * logps
        else:
            losses = -torch.minimum(ratios * advantage, ratios.clamp(low, high) * advantage)
        return losses, ratios

    def step(self, event: Step) -> None:
        scores = {key: self.score(self.model, key) for key in event.keys}
        trained = self.trained_tokens(scores)
        losses = {}
        for key, (logps, _) in scores.items():
            values, ratios = self.token_losses(key, logps)
            values = values * trained[key]
            if self.method == "grpo" and self.beta:
                drift = self.ref_logps[key] - logps
                kl = drift.exp() - drift - 1
                values = values + self.beta * (kl * ratios if self.option("use_bias_correction_kl", True) else kl)
            losses[key] = values
        loss = self.average(losses, event) + self.entropy_bonus(scores, trained)
        loss.backward()
        self.grad_norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def trained_tokens(self, scores: dict[Key, tuple[Tensor, Tensor]]) -> dict[Key, Tensor]:
        """Tokens whose entropy is high enough."""
        share = self.option("top_entropy_quantile", 1.0)
        everything = torch.cat([entropies for _, entropies in scores.values()]).detach()
        threshold = everything.quantile(1 - share) if share < 1 else -1.0
        return {key: entropies.detach() >= threshold - 1e-9 for key, (_, entropies) in scores.items()}

    def average(self, losses: dict[Key, Tensor], event: Step) -> Tensor:
        kind = "grpo" if self.method == "rloo" else self.option("loss_type", "dapo")
        rows = list(losses.values())
        if kind in ("grpo", "sapo"):
            return sum(row.mean() if len(row) else row.sum() for row in rows) / len(rows)
        if kind == "dr_grpo":
            return torch.cat(rows).sum() / (len(rows) * MAX_LENGTH)
        if kind == "bnpo":
            means = [torch.cat([losses[key] for key in keys]).mean() for keys in event.micro_batches]
            return torch.stack(means).mean()
        return torch.cat(rows).mean()

    def entropy_bonus(self, scores: dict[Key, tuple[Tensor, Tensor]], trained: dict[Key, Tensor]) -> Tensor:
        coef = self.entropy_coef
        everything = torch.cat([entropies for _, entropies in scores.values()]).detach()
        if self.option("use_adaptive_entropy", False):
            target, delta = self.option("entropy_target", 0.2), self.option("entropy_coef_delta", 0.005)
            coef = coef if self.last_entropy <= target else 0.0
            self.last_entropy = everything.mean().item()
            moved = self.entropy_coef + (delta if self.last_entropy <= target else -delta)
            self.entropy_coef = min(max(moved, 0.0), 1.0)
        chosen = torch.cat([entropies[trained[key]] for key, (_, entropies) in scores.items()])
        return -coef * chosen.mean()


# ---- Holding one against the other ----


def train_and_compare(trainer, plain: Plain) -> list[Generation | Step]:
    """Train, replay what was trained on in the plain loop, and compare; returns what happened."""
    events = record(trainer)
    trainer.train()
    assert_same_training(trainer, plain.run(events))
    return events


def assert_same_training(trainer, plain: Plain) -> None:
    compare(step_losses(trainer), trained_weights(trainer.model), plain)


def compare(losses: Sequence[float], weights: dict[str, Tensor], plain: Plain) -> None:
    """Losses of all steps, and final weights."""
    assert len(plain.losses) > 1
    assert all(abs(a - b) <= TOLERANCE for a, b in zip(losses, plain.losses, strict=True)), (losses, plain.losses)
    expected, start = trained_weights(plain.model), dict(build_policy().named_parameters())
    assert weights.keys() == expected.keys()
    furthest = max((weights[name] - start[name]).abs().max().item() for name in weights)
    assert furthest > LEARNING_RATE / 2, "the runs agree, but nothing was learnt"
    for name, weight in weights.items():
        torch.testing.assert_close(weight.double(), expected[name], atol=TOLERANCE, rtol=0, msg=name)
