"""Conversations with images as tokens, and as the tensors that go to the model beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from ..data.formats import DatasetFormatError
from ..data.template_rendering import Messages, ProcessingClass
from ..data.vision import IMAGE_SOURCES, prepare_multimodal_messages

ModelInputs = dict[str, Tensor]


def images_in(messages: Messages | str) -> list[Any]:
    """The images that messages carry in their own blocks, in order; a placeholder without one carries none."""
    if isinstance(messages, str):
        return []
    blocks = [
        block
        for message in messages
        if isinstance(message.get("content"), list)
        for block in message["content"]
        if block.get("type") == "image"
    ]
    return [block[source] for block in blocks for source in IMAGE_SOURCES if block.get(source) is not None]


def encode_with_images(
    processing_class: ProcessingClass,
    messages: Messages | str,
    images: list[Any] | None = None,
    **options: Any,
) -> tuple[list[int], ModelInputs]:
    """
    A conversation's tokens, placeholders written out, and what the processor made of its images.

    Args:
        processing_class: a processor.
        messages: the conversation.
        images: those that are not in the messages themselves.
        **options: of the processor's `apply_chat_template`.

    Raises:
        ValueError: the prompt is text, there is only a tokenizer, or placeholders and images differ in number.
    """
    if isinstance(messages, str) or not isinstance(processing_class, ProcessorMixin):
        need = "a conversational prompt" if isinstance(messages, str) else "a processor, not only a tokenizer"
        raise DatasetFormatError(f"A prompt with images needs {need}.")
    encoded = processing_class.apply_chat_template(
        [prepare_multimodal_messages(messages, images)],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )
    inputs = dict(encoded)
    inputs.pop("attention_mask", None)
    return inputs.pop("input_ids")[0].tolist(), inputs


def is_per_token(name: str) -> bool:
    """Whether a tensor of a processor has a value for every token, rather than for every image or patch."""
    return name.endswith("token_type_ids")


def padded_types(types: Tensor | None, length: int) -> Tensor:
    """Token types of `length` tokens, of which the first may have been given: what came later is text, type 0."""
    types = types.reshape(-1) if types is not None else torch.zeros(0, dtype=torch.long)
    return torch.nn.functional.pad(types, (0, length - len(types)))


def extend_model_inputs(inputs: ModelInputs, further: Mapping[str, Tensor], length: int) -> ModelInputs:
    """
    The tensors of a conversation that goes on with further images.

    Args:
        inputs: of the first `length` tokens.
        further: of the tokens that follow.
        length: number of tokens before.
    """
    extended = dict(inputs)
    for name, tensor in further.items():
        if is_per_token(name):
            extended[name] = torch.cat([padded_types(inputs.get(name), length), tensor.reshape(-1)])[None]
        else:
            extended[name] = torch.cat([inputs[name], tensor]) if name in inputs else tensor
    return extended


def collate_model_inputs(
    inputs: list[ModelInputs], lengths: list[int], padding_side: str = "left", width: int | None = None
) -> ModelInputs:
    """
    The images of several rows as one batch.

    Args:
        inputs: per row.
        lengths: number of tokens per row.
        padding_side: where the rows' tokens are padded.
        width: to how many. Default: the longest.
    """
    width = width or max(lengths)
    batch = {}
    for name in dict.fromkeys(name for row in inputs for name in row):
        if is_per_token(name):
            rows = [padded_types(row.get(name), length) for row, length in zip(inputs, lengths, strict=True)]
            filled = [(width - len(row), 0) if padding_side == "left" else (0, width - len(row)) for row in rows]
            batch[name] = torch.stack([torch.nn.functional.pad(*pair) for pair in zip(rows, filled, strict=True)])
        else:
            batch[name] = torch.cat([row[name] for row in inputs if name in row])
    return batch
