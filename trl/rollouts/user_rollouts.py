"""
Rollouts made by a function of the user's: what it must return, and what becomes of it.

`rollout_func(prompts, trainer)` replaces prompt templating, sampling, tools and all. It gets the prompts as the dataset
has them and returns a dict with one entry per prompt under each key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.template_rendering import ProcessingClass, inner_tokenizer
from .conversation import read_message
from .types import Messages, Rollout, is_truncated

REQUIRED_KEYS = ("prompt_ids", "completion_ids", "logprobs")
MASK_KEY = "env_mask"


def rollouts_of_user_function(
    output: Mapping[str, Any],
    prompts: Sequence[str | Messages],
    processing_class: ProcessingClass,
    eos_token_ids: Sequence[int],
) -> list[Rollout]:
    """
    The rollouts in what a `rollout_func` returned.

    Args:
        output: has `prompt_ids`, `completion_ids` and `logprobs` (of the sampled tokens; `None` if not known), each
            with a list per prompt; where tools or environments wrote some of the tokens, `env_mask`, with 1 for each
            token of the policy and 0 for the others. Any further list goes to the reward functions value by value,
            and a value that is no list goes to all.
        prompts: that the function was called with.
        processing_class: tokenizer or processor, to read the completions.
        eos_token_ids: tokens that end a completion.

    Returns:
        One rollout per prompt; a sample whose lists do not fit each other has an `error`.

    Raises:
        TypeError: the function did not return a dict.
        ValueError: keys are missing, or a list has another length than `prompts`.
    """
    columns = _check_columns(output, len(prompts))
    tokenizer = inner_tokenizer(processing_class)
    stop_ids = [*eos_token_ids, tokenizer.pad_token_id]
    rollouts = []
    for index, prompt in enumerate(prompts):
        row = {key: values[index] for key, values in columns.items()}
        logps = row.pop("logprobs")
        rollout = Rollout(
            row.pop("prompt_ids"),
            row.pop("completion_ids"),
            sampled_logps=[_sampled(value) for value in logps] if logps is not None else None,
            policy_mask=row.pop(MASK_KEY, None),
            prompt=prompt,
            extra=row,
        )
        rollout.is_truncated = is_truncated(rollout.completion_ids, stop_ids)
        rollout.completion = _read(tokenizer, rollout)
        rollouts.append(rollout)
    return rollouts


def _check_columns(output: Mapping[str, Any], count: int) -> dict[str, Sequence[Any]]:
    if not isinstance(output, Mapping):
        raise TypeError(f"`rollout_func` returned a {type(output).__name__}; it must return a dict.")
    missing = [key for key in REQUIRED_KEYS if key not in output]
    if missing:
        raise ValueError(
            f"`rollout_func` must return the keys {', '.join(REQUIRED_KEYS)}; missing: {', '.join(missing)}. Found: "
            f"{', '.join(map(str, output)) or 'none'}. (`logprobs` may be None where they are not known.)"
        )
    columns = {}
    for key, values in output.items():
        if hasattr(values, "tolist"):  # a tensor or array
            values = values.tolist()
        # None as a whole stands for "not known", any other value that is no list is the same for all samples.
        columns[key] = list(values) if isinstance(values, list | tuple) else [values] * count
        if len(columns[key]) != count:
            raise ValueError(
                f"`rollout_func` returned {len(columns[key])} values under {key!r} for {count} prompts. Return one for "
                "each prompt, in the order of the prompts."
            )
    return columns


def _sampled(value: Any) -> Any:
    """Some engines give the log-probabilities of several candidates per token; the sampled one stands first."""
    return value[0] if isinstance(value, list | tuple) and value else value


def _read(tokenizer: Any, rollout: Rollout) -> str | Messages:
    if isinstance(rollout.prompt, str):
        return tokenizer.decode(rollout.completion_ids, skip_special_tokens=True)
    return [read_message(tokenizer, rollout.completion_ids, rollout.prompt_ids)]
