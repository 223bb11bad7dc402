"""
Images in conversations: content blocks, and which image belongs to which placeholder.

A chat template for vision reads each message's content as a list of blocks, `{"type": "text", "text": ...}` and
`{"type": "image", "image": ...}`. Datasets often keep the images in a column of their own; here the two are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Image

from .formats import DatasetFormatError

ROLES = ("system", "user", "assistant", "tool")
IMAGE_SOURCES = ("image", "url", "path", "base64")
"""Keys under which an image block may carry its own image."""


def prepare_multimodal_messages(
    messages: list[dict[str, Any]], images: list[Any] | None = None
) -> list[dict[str, Any]]:
    """
    Turn a conversation and its images into the messages that a vision chat template reads.

    Text content becomes a list of blocks. Images go to the placeholders (`{"type": "image"}`) in their order; where a
    conversation has none, they come first in the first user message. A tool message keeps the images it carries.

    Args:
        messages (`list[dict[str, Any]]`):
            Messages with `role` and `content`; the content is text or a list of blocks. They are not changed.
        images (`list`, *optional*):
            The conversation's images.

    Returns:
        `list[dict[str, Any]]`: new messages, each with a list of blocks as its content.

    Raises:
        `ValueError`: the numbers of placeholders and images differ, or a role is not known.

    Example:

    ```python
    >>> prepare_multimodal_messages([{"role": "user", "content": "What is this?"}], images=[image])
    [{'role': 'user', 'content': [{'type': 'image', 'image': <PIL...>}, {'type': 'text', 'text': 'What is this?'}]}]
    ```
    """
    images = list(images or [])
    prepared = [{**message, "content": _to_blocks(message, index)} for index, message in enumerate(messages)]
    image_blocks = [
        block
        for message in prepared
        if message["role"] != "tool"
        for block in message["content"]
        if block.get("type") == "image"
    ]
    if images and not image_blocks:
        # Only a message of plain text is free for images; one made of blocks says itself where they are.
        for message, original in zip(prepared, messages, strict=True):
            if message["role"] == "user":
                if isinstance(original["content"], str):
                    image_blocks = [{"type": "image"} for _ in images]
                    message["content"] = [*image_blocks, *message["content"]]
                break

    empty = [block for block in image_blocks if not any(block.get(source) is not None for source in IMAGE_SOURCES)]
    if len(empty) != len(images):
        if not empty and len(image_blocks) == len(images):  # prepared before
            return prepared
        raise DatasetFormatError(
            f"The conversation has {len(empty)} image placeholder{'s' if len(empty) != 1 else ''} and "
            f"{len(images)} image{'s' if len(images) != 1 else ''}: there must be one for each. Put one "
            '{"type": "image"} block per image into the messages, or give the first user message as plain text to '
            "have all images placed before it."
        )
    for block, image in zip(empty, images, strict=True):
        block["image"] = image
    return prepared


def prepare_multimodal_messages_vllm(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Rename image blocks to the type under which vLLM takes images held in memory.

    Args:
        messages (`list[dict[str, Any]]`):
            Messages as [`prepare_multimodal_messages`] returns them. They are not changed.

    Returns:
        `list[dict[str, Any]]`: new messages, with blocks `{"type": "image_pil", "image_pil": ...}`.
    """

    def rename(block: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image_pil", "image_pil": block["image"]} if block.get("image") is not None else dict(block)

    return _map_image_blocks(messages, rename)


def strip_images_from_messages(messages: Sequence[dict[str, Any]] | str) -> list[dict[str, Any]] | str:
    """
    Take the images out of a conversation and leave their placeholders, e.g. to log it as text.

    Args:
        messages (`list[dict[str, Any]]` or `str`):
            A conversation, or plain text, which is returned as it is. Neither is changed.

    Returns:
        `list[dict[str, Any]]` or `str`: the conversation with every image block reduced to `{"type": "image"}`.
    """
    if isinstance(messages, str):
        return messages
    return _map_image_blocks(messages, lambda block: {"type": "image"})


def decode_images(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Images inside messages as images again, where a dataset keeps them as bytes.

    Args:
        messages (`list[dict[str, Any]]`):
            A conversation, not changed.

    Returns:
        `list[dict[str, Any]]`: the conversation, with what `PIL` reads in the place of `{"bytes": ..., "path": ...}`.
    """

    def decoded(block: dict[str, Any]) -> dict[str, Any]:
        stored = block.get("image")
        is_stored = isinstance(stored, dict) and bool({"bytes", "path"} & set(stored))
        return {**block, "image": Image().decode_example(stored)} if is_stored else block

    return _map_image_blocks(messages, decoded)


def _map_image_blocks(messages: Sequence[dict[str, Any]], change) -> list[dict[str, Any]]:
    """New messages in which every image block is `change(block)`; other content is shared with the old ones."""
    changed = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            blocks = [change(block) if _is_image(block) else block for block in content]
            message = {**message, "content": blocks}
        changed.append(message)
    return changed


def _is_image(block: Any) -> bool:
    return isinstance(block, dict) and str(block.get("type", "")).startswith("image")


def _to_blocks(message: dict[str, Any], index: int) -> list[dict[str, Any]]:
    """A message's content as a new list of new blocks, without the keys that a dataset filled with None."""
    if message["role"] not in ROLES:
        raise DatasetFormatError(
            f"Message {index} has the role {message['role']!r}; a conversation with images knows "
            f"{', '.join(map(repr, ROLES))}."
        )
    content = message.get("content")
    if isinstance(content, list):
        return [
            {key: value for key, value in block.items() if value is not None}
            if isinstance(block, dict)
            else {"type": "text", "text": block}
            for block in content
        ]
    return [{"type": "text", "text": content or ""}]
