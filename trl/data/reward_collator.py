"""Batches for reward models: two whole sequences per row, the better one and the worse one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin

from .padding import as_tensor, float_column, pad_right


@dataclass
class DataCollatorForPreference(DataCollatorMixin):
    """
    Turn tokenized pairs into one batch for a reward model.

    Each row has `chosen_ids` and `rejected_ids` and, optionally, `margin` (float). The batch of B rows has
    `input_ids` and `attention_mask`, int64 `[2B, T]`, padded on the right: all chosen sequences, then all rejected
    ones in the same order. `margin` becomes float32 `[B]`.

    Args:
        pad_token_id (`int`):
            Id put at padded positions of `input_ids`. The attention mask follows positions, so it may be the id of a
            real token as well.
        pad_to_multiple_of (`int`, *optional*):
            Round the length T of the batch up to a multiple of this many tokens.
        return_tensors (`str`, defaults to `"pt"`):
            Only `"pt"` is supported.

    Raises:
        `ValueError`: `margin` is missing, or no number, in some rows of a batch.

    Example:

    ```python
    >>> DataCollatorForPreference(pad_token_id=0)([{"chosen_ids": [1, 2, 3], "rejected_ids": [4, 5], "margin": 0.5}])
    {'input_ids': tensor([[1, 2, 3],
                          [4, 5, 0]]),
     'attention_mask': tensor([[1, 1, 1],
                               [1, 1, 0]]),
     'margin': tensor([0.5000])}
    ```
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        sequences = [as_tensor(example[name]) for name in ("chosen_ids", "rejected_ids") for example in examples]
        batch = {
            "input_ids": pad_right(sequences, self.pad_token_id, self.pad_to_multiple_of),
            "attention_mask": pad_right([torch.ones_like(ids) for ids in sequences], 0, self.pad_to_multiple_of),
        }
        if "margin" in examples[0]:
            batch["margin"] = float_column(examples, "margin")
        return batch
