"""What goes into an engine and what comes out of it.

A prompt is token ids; a completion is token ids too, from the engine to the loss. Nothing on the way is decoded and
tokenized again, for that would train other tokens than those the policy sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

Messages = list[dict[str, Any]]

# ---------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingParams:
    """
    How completions are sampled; every engine understands it.

    Args:
        max_completion_length: most tokens that one call generates; `None`: as many as the model's context has room for.
        temperature: divides the logits; 0 is greedy decoding.
        top_p: smallest set of tokens whose probabilities sum up to this; 1.0 keeps all.
        top_k: number of most probable tokens kept; 0 keeps all.
        min_p: least probability kept, as a share of the largest one; `None` keeps all.
        repetition_penalty: divides the logits of tokens that occurred; 1.0 changes nothing.
        n: completions per prompt.
        seed: of this call's random numbers. Default: the process's generator goes on, which is what a resumed run
            restores.
        with_logps: whether the log-probabilities of the sampled tokens are wanted.
        generation_kwargs: further settings in the engine's own words; they win over the fields above.
    """

    max_completion_length: int | None = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    n: int = 1
    seed: int | None = None
    with_logps: bool = False
    generation_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "generation_kwargs", dict(self.generation_kwargs or {}))
        object.__setattr__(self, "top_k", 0 if self.top_k in (None, -1) else self.top_k)
        limits = {
            "max_completion_length": (self.max_completion_length is None or self.max_completion_length >= 1, ">= 1"),
            "temperature": (self.temperature >= 0, ">= 0 (0 is greedy decoding)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, ">= 0 (0 keeps every token)"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1], or None"),
            "repetition_penalty": (self.repetition_penalty > 0, "> 0 (1 changes nothing)"),
            "n": (self.n >= 1, ">= 1"),
        }
        for name, (holds, range_) in limits.items():
            if not holds:
                raise ValueError(f"`{name}` must be {range_}; found {getattr(self, name)!r}.")

    def greedy(self) -> SamplingParams:
        """The same with the most probable token at every step, and one completion per prompt."""
        return replace(self, temperature=0.0, n=1)


@dataclass(frozen=True)
class Prompt:
    """
    One prompt as an engine gets it.

    Args:
        ids: its tokens; a prompt is never truncated.
        images: the images in it, in the order of their placeholders; for engines that prepare images themselves.
        model_inputs: what a processor made of the images (`pixel_values`, ...), each tensor with this prompt's part
            along its first dimension; for engines that call the model.
    """

    ids: list[int]
    images: list[Any] | None = None
    model_inputs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        if not self.ids:
            raise ValueError("A prompt needs at least one token; this one is empty. Check the `prompt` column.")


def as_prompts(prompts: Iterable[Prompt | Sequence[int]]) -> list[Prompt]:
    """Prompts, also where only their tokens are given."""
    return [prompt if isinstance(prompt, Prompt) else Prompt(list(prompt)) for prompt in prompts]


# ---------------------------------------------------------------------------------------------------------------------
# What comes back
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """
    One prompt with what followed it: the policy's tokens, and those of tools and environments among them.

    A rollout checks itself when it is made. What cannot be trained on does not raise: the rollout then has an `error`
    and no token counts as the policy's, so one bad sample costs one sample.

    Args:
        prompt_ids: the prompt's tokens.
        completion_ids: all tokens after the prompt, the end-of-sequence token included where there is one.
        sampled_logps: log-probability of each completion token as the engine sampled it, in nats; 0.0 for tokens that
            the policy did not write, NaN where it is not known. `None`: the engine was not asked.
        policy_mask: per completion token 1 where the policy wrote it, 0 where a tool or environment did. Default: all 1.
        prompt: the prompt as text or messages, as reward functions get it.
        completion: the completion as text or messages, as reward functions get it.
        images: images of the prompt and of tool results, in the order of their placeholders.
        model_inputs: what a processor made of them, for the model's forward; see [`Prompt`].
        extra: further values of this sample, for reward functions.
        is_truncated: whether the completion stops without an end-of-sequence token.
        environment: the environment that the rollout took place in.
        tool_calls: number of calls the policy made.
        tool_failures: how many of them failed.
        turns: how often the policy spoke.
        error: why the sample cannot be trained on; `None` for a good one.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    sampled_logps: list[float] | None = None
    policy_mask: list[int] | None = None
    prompt: str | Messages | None = None
    completion: str | Messages | None = None
    images: list[Any] | None = None
    model_inputs: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    is_truncated: bool = False
    environment: Any = None
    tool_calls: int = 0
    tool_failures: int = 0
    turns: int = 1
    error: str | None = None

    def __post_init__(self):
        problems = [self.error] if self.error else []
        problems += self._check_ids("prompt_ids") + self._check_ids("completion_ids")
        length = len(self.completion_ids)
        if self.policy_mask is None:
            self.policy_mask = [1] * length
        self.policy_mask = [int(bool(written)) for written in self.policy_mask]
        if len(self.policy_mask) != length:
            problems.append(f"{len(self.policy_mask)} mask values for {length} completion tokens")
        problems += self._check_logps()
        if problems:
            self.error = "; ".join(problems)
            self.policy_mask = [0] * length

    @property
    def generated_length(self) -> int:
        """Number of tokens that the policy wrote."""
        return sum(self.policy_mask)

    def _check_ids(self, name: str) -> list[str]:
        ids = getattr(self, name)
        try:
            whole = [int(token) for token in ids]
        except (TypeError, ValueError):
            whole = None
        if whole is None or any(token < 0 or token != given for token, given in zip(whole, ids, strict=True)):
            setattr(self, name, [])
            return [f"`{name}` are not token ids"]
        setattr(self, name, whole)
        return []

    def _check_logps(self) -> list[str]:
        """Unknown values are NaN, of which the loss makes a ratio of 1; only a list of another length is refused."""
        if self.sampled_logps is None:
            return []
        count, length = len(self.sampled_logps), len(self.completion_ids)
        if count != length:
            self.sampled_logps = [math.nan] * length
            return [f"{count} sampled log-probabilities for {length} completion tokens"]
        self.sampled_logps = [_finite_or_nan(value) for value in self.sampled_logps]
        return []


def _finite_or_nan(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def is_truncated(completion_ids: Sequence[int], stop_ids: Iterable[int]) -> bool:
    """Whether a completion ends without a stop token (an end-of-sequence token, or padding). An empty one does."""
    return not completion_ids or completion_ids[-1] not in set(stop_ids)


# ---------------------------------------------------------------------------------------------------------------------
# Who does it
# ---------------------------------------------------------------------------------------------------------------------


@runtime_checkable
class RolloutEngine(Protocol):
    """
    Samples completions with the policy's current weights. A trainer never asks which engine it has.

    In a run of several processes, every method is called by all of them, in the same order.
    """

    max_model_length: int | None
    """Most tokens of prompt and completion together; `None` where the engine knows no limit."""

    def generate(self, prompts: Sequence[Prompt | Sequence[int]], sampling: SamplingParams) -> list[Rollout]:
        """`sampling.n` rollouts per prompt, those of one prompt side by side, in the order of the prompts; prompts may be none."""

    def update_weights(self, model: nn.Module) -> None:
        """From now on sample with the weights of `model`, as the trainer holds it (wrapped, adapters and all)."""

    def sleep(self) -> None:
        """Give back what memory can be spared until `wake`."""

    def wake(self) -> None:
        """Be ready to generate again."""

    def close(self) -> None:
        """End threads, processes and connections. Nothing is called afterwards."""
