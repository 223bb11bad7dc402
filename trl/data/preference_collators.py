"""
Batches for learning from preferences: a prompt with two answers (DPO), or with one that is good or bad (KTO); of token
ids, or of rows with images.

Every batch is padded on the right; packed and shared-prefix layouts are made of it when the model is called. A mask
follows positions, never token values: where the padding token is also the stop token, the stop token that an answer
ends with counts all the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.data.data_collator import DataCollatorMixin

from .formats import DatasetColumnError
from .padding import as_tensor, completion_span, float_column, pad_right
from .reward_collator import DataCollatorForPreference as DataCollatorForRewardPreference
from .templating import maybe_extract_prompt
from .token_lists import TRUNCATION_MODES
from .vision_batches import (
    append_completions,
    cut_and_pad,
    encode_prompts,
    images_of,
    render_answers,
    repeat_prompts,
)

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = [
    "DataCollatorForPreference",
    "DataCollatorForRewardPreference",
    "DataCollatorForUnpairedPreference",
    "DataCollatorForVisionPreference",
    "DataCollatorForVisionUnpairedPreference",
]


@dataclass
class DataCollatorForPreference(DataCollatorMixin):
    """
    Turn tokenized pairs into one batch.

    Each row has `prompt_ids`, `chosen_ids` and `rejected_ids` and, optionally, `ref_chosen_logps` and
    `ref_rejected_logps` (nats). The batch of B rows has `input_ids`, `attention_mask` and `completion_mask`, int64
    `[2B, T]`, padded on the right: each prompt with its chosen answer, then, in the same order, each with its rejected
    one. The log-probs become float32 `[B]`.

    Args:
        pad_token_id (`int`):
            Id put at padded positions of `input_ids`.
        max_length (`int`, *optional*):
            Longest sequence kept, in tokens, prompt and answer together. Each of the two sequences of a pair is cut
            for itself. `None` cuts nothing.
        truncation_mode (`str`, defaults to `"keep_start"`):
            What a cut keeps: `"keep_start"` (the prompt, and the beginning of the answer) or `"keep_end"` (the answer,
            and the end of the prompt).
        pad_to_multiple_of (`int`, *optional*):
            Round the length T of the batch up to a multiple of this many tokens.
        return_tensors (`str`, defaults to `"pt"`):
            Only `"pt"` is supported.

    Raises:
        `ValueError`: `truncation_mode` is unknown, or a log-prob of the reference is missing in some rows.

    Example:

    ```python
    >>> collator = DataCollatorForPreference(pad_token_id=0)
    >>> collator([{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]}])
    {'input_ids': tensor([[1, 2, 3, 4, 5],
                          [1, 2, 3, 6, 0]]),
     'attention_mask': tensor([[1, 1, 1, 1, 1],
                               [1, 1, 1, 1, 0]]),
     'completion_mask': tensor([[0, 0, 0, 1, 1],
                                [0, 0, 0, 1, 0]])}
    ```
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"truncation_mode={self.truncation_mode!r} is unknown; use one of "
                f"{', '.join(map(repr, TRUNCATION_MODES))}."
            )

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [
            (example["prompt_ids"], example[name]) for name in ("chosen_ids", "rejected_ids") for example in examples
        ]
        batch = _join_and_pad(rows, self.pad_token_id, self.max_length, self.truncation_mode, self.pad_to_multiple_of)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in examples[0]:
                batch[name] = float_column(examples, name)
        return batch


@dataclass
class DataCollatorForUnpairedPreference(DataCollatorMixin):
    """
    Turn tokenized answers, each good or bad, into one batch.

    Each row has `prompt_ids`, `completion_ids` and `label` (bool: the answer is good) and, optionally,
    `KL_completion_ids` (the answer of another row, from which KTO estimates its KL term), `ref_logps` and
    `ref_KL_logps` (nats). The batch of B rows has `input_ids`, `attention_mask` and `completion_mask`, int64 `[B, T]`,
    padded on the right; the same three with the prefix `KL_` for the prompts with the other rows' answers, padded to a
    length of their own; `label`, bool `[B]`; and the log-probs, float32 `[B]`.

    Args:
        pad_token_id (`int`):
            Id put at padded positions of `input_ids`.
        max_length (`int`, *optional*):
            Longest sequence kept, in tokens, prompt and answer together; the rest is cut at the end. `None` cuts
            nothing.
        pad_to_multiple_of (`int`, *optional*):
            Round the lengths of the batch up to a multiple of this many tokens.
        return_tensors (`str`, defaults to `"pt"`):
            Only `"pt"` is supported.

    Raises:
        `ValueError`: a log-prob of the reference is missing in some rows.

    Example:

    ```python
    >>> collator = DataCollatorForUnpairedPreference(pad_token_id=0)
    >>> collator([{"prompt_ids": [1, 2], "completion_ids": [3], "KL_completion_ids": [4, 5], "label": True}])
    {'input_ids': tensor([[1, 2, 3]]),
     'attention_mask': tensor([[1, 1, 1]]),
     'completion_mask': tensor([[0, 0, 1]]),
     'KL_input_ids': tensor([[1, 2, 4, 5]]),
     'KL_attention_mask': tensor([[1, 1, 1, 1]]),
     'KL_completion_mask': tensor([[0, 0, 1, 1]]),
     'label': tensor([True])}
    ```
    """

    pad_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._pad(examples, "completion_ids")
        if "KL_completion_ids" in examples[0]:
            batch |= _with_kl_prefix(self._pad(examples, "KL_completion_ids"))
        batch["label"] = _labels(examples)
        for name in ("ref_logps", "ref_KL_logps"):
            if name in examples[0]:
                batch[name] = float_column(examples, name)
        return batch

    def _pad(self, examples: list[dict[str, Any]], answer: str) -> dict[str, Tensor]:
        rows = [(example["prompt_ids"], example[answer]) for example in examples]
        return _join_and_pad(rows, self.pad_token_id, self.max_length, "keep_start", self.pad_to_multiple_of)


@dataclass
class DataCollatorForVisionPreference(DataCollatorMixin):
    """
    Turn pairs with images into one batch for a vision-language model.

    Each row has `images` (list) or `image` (one), `chosen` and `rejected`, and usually `prompt`; without one, the
    common beginning of the two answers is their prompt. Text and messages are both fine; with messages, images are
    placed in the first user message of the prompt where it has no placeholders of its own. The batch of B rows has
    `input_ids`, `attention_mask` and `completion_mask` (int64 `[2B, T]`, padded on the right: chosen rows, then
    rejected ones) and whatever the processor makes of the images (`pixel_values`, …), once for each of the 2B rows.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Tokenizes the text and prepares the images.
        max_length (`int`, *optional*):
            Longest sequence kept, in tokens, prompt and answer together; the rest is cut at the end. `None` cuts
            nothing.
        pad_to_multiple_of (`int`, *optional*):
            Not supported with images.
        return_tensors (`str`, defaults to `"pt"`):
            Only `"pt"` is supported.

    Raises:
        `NotImplementedError`: `pad_to_multiple_of` is set.
        `KeyError`: a row has no pair.
        `ValueError`: `max_length` cuts into an image.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        _refuse_multiple(self)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        _check_columns(examples, ("chosen", "rejected"))
        images = [images_of(example) for example in examples]
        examples = [{**example, **maybe_extract_prompt(example)} for example in examples]
        texts, prompts = _render_and_encode(self.processor, examples, ("chosen", "rejected"), images)
        answers = [row[name] for name in ("chosen", "rejected") for row in texts]
        batch = append_completions(self.processor, repeat_prompts(prompts, 2), answers)
        return _cut(batch, self.processor, self.max_length)


@dataclass
class DataCollatorForVisionUnpairedPreference(DataCollatorMixin):
    """
    Turn answers about images, each good or bad, into one batch for a vision-language model.

    Each row has `images` (list) or `image` (one), `prompt`, `completion` (text or messages) and `label` (bool). The
    batch of B rows has `input_ids`, `attention_mask` and `completion_mask` (int64 `[B, T]`, padded on the right),
    `label` (bool `[B]`) and whatever the processor makes of the images (`pixel_values`, …). For KTO's KL term it has
    all but the labels once more, with the prefix `KL_`, where each prompt has the answer of the row before it (the first
    that of the last). The images belong to the prompts, so those tensors are the same ones.

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Tokenizes the text and prepares the images.
        max_length (`int`, *optional*):
            Longest sequence kept, in tokens, prompt and answer together; the rest is cut at the end. `None` cuts
            nothing.
        pad_to_multiple_of (`int`, *optional*):
            Not supported with images.
        calculate_kl (`bool`, defaults to `True`):
            Make the tensors with the prefix `KL_`.
        return_tensors (`str`, defaults to `"pt"`):
            Only `"pt"` is supported.

    Raises:
        `NotImplementedError`: `pad_to_multiple_of` is set.
        `KeyError`: a row has no prompt, completion or label.
        `ValueError`: `max_length` cuts into an image.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    calculate_kl: bool = True
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        _refuse_multiple(self)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        _check_columns(examples, ("prompt", "completion", "label"))
        images = [images_of(example) for example in examples]
        texts, prompts = _render_and_encode(self.processor, examples, ("completion",), images)
        answers = [row["completion"] for row in texts]
        batch = self._answer(prompts, answers)
        if self.calculate_kl:
            batch |= _with_kl_prefix(self._answer(prompts, [answers[-1], *answers[:-1]]))
        batch["label"] = _labels(examples)
        return batch

    def _answer(self, prompts: dict[str, Any], answers: list[str]) -> dict[str, Any]:
        return _cut(append_completions(self.processor, prompts, answers), self.processor, self.max_length)


def _join_and_pad(
    rows: Sequence[tuple[Any, Any]],
    pad_token_id: int,
    max_length: int | None,
    truncation_mode: str,
    pad_to_multiple_of: int | None,
) -> dict[str, Tensor]:
    """Prompts and answers as one sequence each, cut, then padded on the right; masks by position."""
    sequences, spans = [], []
    for prompt, answer in rows:
        ids = torch.cat([as_tensor(prompt), as_tensor(answer)])
        length = len(ids) if max_length is None else min(len(ids), max_length)
        first = len(ids) - length if truncation_mode == "keep_end" else 0
        kept = slice(first, first + length)
        sequences.append(ids[kept])
        spans.append(completion_span(len(prompt), len(answer))[kept])
    return {
        "input_ids": pad_right(sequences, pad_token_id, pad_to_multiple_of),
        "attention_mask": pad_right([torch.ones_like(ids) for ids in sequences], 0, pad_to_multiple_of),
        "completion_mask": pad_right(spans, 0, pad_to_multiple_of),
    }


def _render_and_encode(
    processor: ProcessorMixin, examples: list[dict[str, Any]], branches: Sequence[str], images: list[list]
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The texts of each row, and the encoded prompts with their images."""
    texts = [render_answers(example, processor, branches) for example in examples]
    is_plain = isinstance(examples[0]["prompt"], str)
    return texts, encode_prompts(processor, [row["prompt"] for row in texts], images, add_special_tokens=is_plain)


def _cut(batch: dict[str, Any], processor: ProcessorMixin, max_length: int | None) -> dict[str, Any]:
    batch = cut_and_pad(batch, processor, max_length)
    if max_length is not None and not batch["completion_mask"].any(dim=1).all():
        # Rows of token ids are dropped before training; how long a prompt with images is, is known only here.
        warnings.warn(
            f"max_length={max_length} leaves nothing of the answer in some rows with images: they teach nothing. "
            "Raise max_length, or filter rows with long prompts out of the dataset.",
            stacklevel=2,
        )
    return batch


def _with_kl_prefix(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"KL_{key}": value for key, value in batch.items()}


def _labels(examples: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([bool(example["label"]) for example in examples])


def _refuse_multiple(collator: Any) -> None:
    if collator.pad_to_multiple_of is not None:
        raise NotImplementedError(
            f"{type(collator).__name__} does not support pad_to_multiple_of={collator.pad_to_multiple_of}: leave it "
            "None for rows with images."
        )


def _check_columns(examples: list[dict[str, Any]], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in examples[0]]
    if missing:
        raise DatasetColumnError(
            f"A row with images needs {', '.join(f'`{name}`' for name in needed)}. "
            f"Found: {', '.join(f'`{name}`' for name in examples[0]) or 'no column'}."
        )
