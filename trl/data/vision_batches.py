"""
Batches with images, made by a processor while training runs: pixels are too large to be prepared ahead.

What the collators for language modeling and for preferences share: the images of a row, prompts (with images) and
completions tokenized apart and joined, and the cut at `max_length`, which must not lose a piece of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .padding import completion_span, pad_right
from .templating import apply_chat_template
from .token_lists import IGNORE_INDEX
from .vision import prepare_multimodal_messages

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# Tensors [B, T] with one entry per token, and the value of a padded entry (that of `input_ids` is the tokenizer's).
TOKEN_PADDING = {
    "input_ids": None,
    "attention_mask": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "completion_mask": 0,
    "labels": IGNORE_INDEX,
}


def images_of(example: Mapping[str, Any]) -> list:
    """The images of a row as a list; an empty one for a row without."""
    if example.get("images") is not None:
        return list(example["images"])
    return [example["image"]] if example.get("image") is not None else []


def render_answers(
    example: Mapping[str, Any],
    processor: ProcessorMixin,
    branches: Sequence[str],
    chat_template: str | None = None,
) -> dict[str, str]:
    """
    The texts of a row's prompt and answers; images go to the prompt.

    Args:
        example: row with `prompt` and the columns of `branches`, all text or all messages. Its `tools` and
            `chat_template_kwargs`, if any, go to the template.
        processor: has the chat template.
        branches: names of the answers' columns, e.g. `("chosen", "rejected")`.
        chat_template: used in place of the processor's own.

    Returns:
        `prompt` and each branch, as text.
    """
    if isinstance(example["prompt"], str):
        return {name: example[name] for name in ("prompt", *branches)}
    messages = {"prompt": prepare_multimodal_messages(example["prompt"], images=images_of(example))}
    messages |= {name: prepare_multimodal_messages(example[name]) for name in branches}
    template = {"chat_template": chat_template} if chat_template is not None else {}
    return apply_chat_template(
        {**messages, "chat_template_kwargs": example.get("chat_template_kwargs")},
        processor,
        tools=example.get("tools"),
        **template,
    )


def encode_prompts(
    processor: ProcessorMixin, prompts: list[str], images: list[list], *, add_special_tokens: bool
) -> dict[str, Any]:
    """
    Tokenize prompts and prepare their images, once.

    Args:
        processor: makes both.
        prompts: B texts, with the processor's placeholders for images.
        images: those of each prompt.
        add_special_tokens: put the tokenizer's special tokens in. A chat template has written its own, a plain prompt
            has none.

    Returns:
        What the processor returns: tensors [B, T] padded on the right, and those of the images.
    """
    return dict(
        processor(
            images=images if any(images) else None,
            text=prompts,
            add_special_tokens=add_special_tokens,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
    )


def repeat_prompts(prompts: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Encoded prompts, images included, one block of all rows after another: [B, ...] becomes [times * B, ...].

    Rows of text and images both lead their tensors, so this is what the processor would make of the repeated rows,
    without opening an image twice.
    """
    return {
        key: torch.cat([value] * times) if isinstance(value, Tensor) else list(value) * times
        for key, value in prompts.items()
    }


def append_completions(
    processor: ProcessorMixin, prompts: Mapping[str, Any], completions: list[str]
) -> dict[str, Any]:
    """
    Tokenize completions and put each behind its prompt.

    Prompt and completion are tokenized apart, so that the boundary between them is exact.

    Args:
        processor: tokenizes.
        prompts: encoded prompts of B rows, padded on the right.
        completions: B texts.

    Returns:
        The tensors of `prompts`, with those per token grown by the completions and padded on the right, and
        `completion_mask` (int64 [B, T]).
    """
    tails = dict(
        processor(text=completions, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    )
    rows = range(len(completions))
    head_mask, tail_mask = prompts["attention_mask"].bool(), tails["attention_mask"].bool()
    joined = {key: value for key, value in prompts.items() if key not in TOKEN_PADDING}
    for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key not in prompts:
            continue
        # A completion has no image, so its type is 0 where the processor gives it none.
        tail = tails.get(key)
        tail = torch.zeros_like(tails["input_ids"]) if tail is None else tail
        sequences = [torch.cat([prompts[key][i][head_mask[i]], tail[i][tail_mask[i]]]) for i in rows]
        joined[key] = pad_right(sequences, padding_value(processor, key))
    spans = [completion_span(int(head_mask[i].sum()), int(tail_mask[i].sum())) for i in rows]
    joined["completion_mask"] = pad_right(spans, 0)
    return joined


def cut_and_pad(
    batch: Mapping[str, Any],
    processor: ProcessorMixin,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
) -> dict[str, Any]:
    """
    Cut a batch that is padded on the right at its end, and pad it to a round length.

    Args:
        batch: its tensors of [`TOKEN_PADDING`] are cut and padded, the others are left alone.
        processor: knows the padding token and the tokens that stand for an image.
        max_length: longest row kept, in tokens; `None` cuts nothing.
        pad_to_multiple_of: rounds the length up to a multiple of this.

    Raises:
        ValueError: `max_length` cuts off a piece of an image.
    """
    length = batch["input_ids"].shape[1]
    if max_length is not None and length > max_length:
        check_images_kept(batch["input_ids"], processor, max_length)
        length = max_length
    target = -(-length // pad_to_multiple_of) * pad_to_multiple_of if pad_to_multiple_of else length
    return {
        key: torch.nn.functional.pad(value[:, :length], (0, target - length), value=padding_value(processor, key))
        if key in TOKEN_PADDING
        else value
        for key, value in batch.items()
    }


def check_images_kept(input_ids: Tensor, processor: ProcessorMixin, max_length: int) -> None:
    """Raise `ValueError` where the tokens of an image reach beyond `max_length`."""
    image_token_ids = image_token_ids_of(processor)
    is_image = torch.isin(input_ids, torch.tensor(image_token_ids, dtype=input_ids.dtype))
    rows = is_image[:, max_length:].any(dim=1).nonzero().flatten().tolist()
    if rows:
        needed = int(is_image.nonzero()[:, 1].max()) + 1
        raise ValueError(
            f"max_length={max_length} cuts image tokens of row(s) {rows} of the batch, and the model would "
            f"find fewer image tokens than image features. These rows need max_length of at least {needed}; raise "
            "it, or set max_length=None to cut nothing."
        )


def padding_value(processor: Any, key: str) -> int:
    """What a padded entry of the tensor `key` holds."""
    if key != "input_ids":
        return TOKEN_PADDING[key]
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def image_token_ids_of(processor: Any) -> list[int]:
    """Ids that stand for a piece of an image in `input_ids`; empty where the processor does not tell."""
    # With Gemma 3 the processor's token is the placeholder, and the tokenizer's the one that it becomes.
    ids = {getattr(owner, "image_token_id", None) for owner in (processor, processor.tokenizer)}
    ids |= set(getattr(processor, "image_token_ids", None) or [])
    token = getattr(processor, "image_token", None)
    if ids == {None} and token is not None:
        ids.add(processor.tokenizer.convert_tokens_to_ids(str(token)))
    return sorted(ids - {None})
