"""
Sampling parameters in vLLM's words, the same for an engine in this process and for a server, and which log-probs to ask
for.

The loss takes the policy for what was sampled from: softmax of the logits divided by the temperature, over the whole
vocabulary. vLLM can tell a token's log-prob after all sampling steps ("processed") or before any ("raw"). Processed ones
are the loss's own as long as nothing but the temperature shapes the distribution; with top-p and the like they are those
of the tokens that were left, and a correction by them would be biased. Raw ones are right then, at temperature 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch

from .types import SamplingParams

LogpsMode = Literal["processed_logprobs", "raw_logprobs"]

# Below it, vLLM takes the most probable token.
SMALLEST_TEMPERATURE = 1e-5
LEAST_BIAS = -100.0
"""What vLLM takes as the least that is added to a logit."""

# Settings besides the temperature under which not every token is drawn with its softmax probability, and their values
# that change nothing.
_SHAPING = {
    "top_p": (1, 1.0, None),
    "top_k": (0, -1, None),
    "min_p": (0, 0.0, None),
    "repetition_penalty": (1, 1.0, None),
    "presence_penalty": (0, 0.0, None),
    "frequency_penalty": (0, 0.0, None),
    "min_tokens": (0, None),
    "logit_bias": (None,),
    "bad_words": (None,),
    "allowed_token_ids": (None,),
    "structured_outputs": (None,),
}


def request_settings(
    sampling: SamplingParams,
    *,
    max_tokens: int | None = None,
    stop_token_ids: Iterable[int] = (),
    structured_outputs_regex: str | None = None,
    never: Iterable[int] = (),
) -> dict[str, Any]:
    """
    A request's sampling settings, as `vllm.SamplingParams` and the server's routes name them; plain JSON.

    Args:
        sampling: how completions are sampled; its `n` and `seed` are left to the caller.
        max_tokens: most tokens of a completion. Default: `sampling.max_completion_length`.
        stop_token_ids: tokens that end a completion; the token itself is kept.
        structured_outputs_regex: regular expression that completions match. Wins over `structured_outputs` among the
            generation settings, with a warning.
        never: tokens that are not sampled, such as the placeholder of an image that is not there.
    """
    settings = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0 if sampling.min_p is None else sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_completion_length if max_tokens is None else max_tokens,
        "stop_token_ids": list(stop_token_ids),
        # 0: of the sampled token alone
        "logprobs": 0 if sampling.with_logps else None,
    }
    settings.update(sampling.generation_kwargs)
    if suppressed := {str(token): LEAST_BIAS for token in never}:
        settings["logit_bias"] = {**(settings.get("logit_bias") or {}), **suppressed}
    if structured_outputs_regex is not None:
        if "structured_outputs" in sampling.generation_kwargs:
            warnings.warn(
                "`vllm_structured_outputs_regex` and `generation_kwargs['structured_outputs']` are both given; the "
                "regular expression counts."
            )
        settings["structured_outputs"] = {"regex": structured_outputs_regex}
    return settings


def shaping_settings(settings: Mapping[str, Any]) -> list[str]:
    """Names of the settings, besides the temperature, under which tokens are not drawn with their softmax probability."""
    return [name for name, neutral in _SHAPING.items() if name in settings and settings[name] not in neutral]


def logps_mode(settings: Mapping[str, Any]) -> LogpsMode:
    """Which of vLLM's log-probs are those of the whole vocabulary at the settings' temperature (raw ones: at 1)."""
    return "raw_logprobs" if shaping_settings(settings) else "processed_logprobs"


def is_greedy(settings: Mapping[str, Any]) -> bool:
    """Whether the most probable token is taken each time: several completions of a prompt are one then."""
    return settings["temperature"] < SMALLEST_TEMPERATURE


def draw_seed() -> int:
    """A seed for a generation, from torch's global generator: a resumed run draws the same, and so samples the same."""
    return int(torch.randint(2**62, ()))


def request_seeds(seed: int, count: int) -> list[int]:
    """Seeds of a generation's requests."""
    generator = torch.Generator().manual_seed(seed)
    # vLLM adds the index of each of a request's completions to its seed.
    return torch.randint(2**62, (count,), generator=generator).tolist()
