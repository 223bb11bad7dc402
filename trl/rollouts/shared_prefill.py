"""
The key/value cache of prompts that several rows have in common, computed once for all of them.

A group has one prompt. `generate` would run it through the model for every completion; here it is run once, and the
cache's rows are copied. With long prompts that is most of the work of sampling.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..ops.layouts import why_not_packed
from ..ops.scoring import find_causal_lm

# Settings of `generate` with which the cache is another one, or rows are copied on the way.
_EXCLUDING = ("cache_implementation", "num_beams", "num_return_sequences", "prompt_lookup_num_tokens", "use_cache")


def shared_prefill(
    model: nn.Module, inputs: dict[str, Tensor], prompts: Sequence[Sequence[int]], settings: Sequence[str] = ()
) -> DynamicCache | None:
    """
    The cache of all tokens of the rows but the last, of which `generate` goes on.

    Args:
        model: in evaluation mode, without an outer wrapper.
        inputs: `input_ids` and `attention_mask`, padded on the left, [B, T].
        prompts: the rows' tokens, by which equal ones are found.
        settings: names of the user's further settings of `generate`.

    Returns:
        The cache, with a row for each of the batch; None where no two prompts are equal, or where the model or the
        settings do not allow it.
    """
    numbers: dict[tuple[int, ...], int] = {}
    row_of = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    width = inputs["input_ids"].shape[1]
    if len(numbers) == len(row_of) or width < 2 or set(inputs) != {"input_ids", "attention_mask"}:
        return None
    causal_lm = find_causal_lm(model)
    if set(settings) & set(_EXCLUDING) or why_not_packed(causal_lm) is not None:
        return None
    parameters = inspect.signature(causal_lm.forward).parameters
    first = torch.tensor([row_of.index(number) for number in range(len(numbers))], device=model.device)
    mask = inputs["attention_mask"][first]
    outputs = model(
        input_ids=inputs["input_ids"][first][:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0)[:, :-1],
        past_key_values=DynamicCache(config=causal_lm.config),
        use_cache=True,
        **({"logits_to_keep": 1} if "logits_to_keep" in parameters else {}),  # nobody reads them
    )
    cache = outputs.past_key_values
    cache.batch_select_indices(torch.tensor(row_of, device=model.device))
    return cache
