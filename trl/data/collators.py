"""
Batches for language modeling: rows of token ids become padded or padding-free tensors; rows with images go through
their processor here, because pixels are too large to be prepared ahead.

A mask follows positions, never token values: where the padding token is also the stop token, the stop token a row
ends with is still trained, and only the positions after it are padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from transformers.data.data_collator import DataCollatorMixin

from .padding import as_tensor, pad_right
from .token_lists import IGNORE_INDEX
from .vision import prepare_multimodal_messages
from .vision_batches import append_completions, cut_and_pad, encode_prompts, images_of, render_answers

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass
class DataCollatorForLanguageModeling(DataCollatorMixin):
    """
    Turn tokenized rows into one batch for a causal language model.

    Each row has `input_ids` and, optionally, `labels` (default: all tokens are trained) and `seq_lengths` (the lengths
    of the documents packed into the row).

    Padded (default): rows are padded on the right; the batch has `input_ids`, `labels` and `attention_mask`, all int64
    `[B, T]`.

    Padding-free: all documents of all rows stand one after another in a single row. There is no attention mask;
    instead `position_ids` restart at 0 with each document, and `cu_seq_lens_q`, `cu_seq_lens_k` (int32
    `[documents + 1]`), `max_length_q`, `max_length_k` (int) and `seq_idx` (int32 `[1, T]`) tell attention kernels
    where each begins. The first label of each document is -100, since no token before it may predict it.

    Args:
        pad_token_id (`int`):
            Id put at padded positions of `input_ids`. Labels there are -100.
        padding_free (`bool`, defaults to `False`):
            Build a padding-free batch.
        return_position_ids (`bool`, defaults to `False`):
            Add `position_ids` to a padded batch, as sequence parallelism needs (with `seq_lengths` they restart with
            each document).
        pad_to_multiple_of (`int`, *optional*):
            Round the length T of the batch up to a multiple of this many tokens. In a padding-free batch the padding
            is one document of its own at the end of the row.
        return_tensors (`str`, defaults to `"pt"`):
            Only `"pt"` is supported.
    """

    pad_token_id: int
    padding_free: bool = False
    return_position_ids: bool = False
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        input_ids = [as_tensor(example["input_ids"]) for example in examples]
        labels = [
            as_tensor(example["labels"]) if "labels" in example else ids.clone()
            for example, ids in zip(examples, input_ids, strict=True)
        ]
        if "seq_lengths" in examples[0]:
            lengths = [_as_list(example["seq_lengths"]) for example in examples]
        else:
            lengths = [[len(ids)] for ids in input_ids]
        self._check_lengths(input_ids, labels, lengths)
        if self.padding_free:
            return self._flatten(input_ids, labels, lengths)
        return self._pad(input_ids, labels, lengths)

    @staticmethod
    def get_position_ids_from_packed_seq_lengths(batch_seq_lengths: list[list[int]]) -> list[torch.Tensor]:
        """
        Position ids of packed rows: counted from 0 in each document.

        Args:
            batch_seq_lengths (`list[list[int]]`):
                For each row the lengths of its documents, in tokens.

        Returns:
            `list[torch.Tensor]`: one int64 tensor per row, as long as the sum of its lengths.
        """
        return [
            torch.cat([torch.arange(length) for length in lengths])
            if len(lengths)
            else torch.zeros(0, dtype=torch.int64)
            for lengths in batch_seq_lengths
        ]

    def _pad(self, input_ids: list[torch.Tensor], labels: list[torch.Tensor], lengths: list[list[int]]) -> dict:
        batch = {
            "input_ids": pad_right(input_ids, self.pad_token_id, self.pad_to_multiple_of),
            "labels": pad_right(labels, IGNORE_INDEX, self.pad_to_multiple_of),
        }
        if self.return_position_ids:
            position_ids = self.get_position_ids_from_packed_seq_lengths(lengths)
            batch["position_ids"] = pad_right(position_ids, 0, self.pad_to_multiple_of)
        ones = [torch.ones_like(ids) for ids in input_ids]
        batch["attention_mask"] = pad_right(ones, 0, self.pad_to_multiple_of)
        return batch

    def _flatten(self, input_ids: list[torch.Tensor], labels: list[torch.Tensor], lengths: list[list[int]]) -> dict:
        documents = [length for length in chain.from_iterable(lengths) if length > 0]
        total = sum(documents)
        padding = -total % self.pad_to_multiple_of if self.pad_to_multiple_of else 0
        if padding:
            # One document, not one per token: attention over the padding then costs what any document of its length
            # does, and kernels need not walk through hundreds of documents of one token.
            documents.append(padding)
            input_ids = [*input_ids, torch.full((padding,), self.pad_token_id)]
            labels = [*labels, torch.full((padding,), IGNORE_INDEX)]

        document_lengths = torch.tensor(documents, dtype=torch.int32)
        cu_seq_lens = torch.zeros(len(documents) + 1, dtype=torch.int32)
        torch.cumsum(document_lengths, dim=0, out=cu_seq_lens[1:])
        starts = cu_seq_lens[:-1].long()
        labels_T = torch.cat(labels)
        labels_T[starts] = IGNORE_INDEX
        seq_idx_T = torch.repeat_interleave(torch.arange(len(documents)), document_lengths.long())
        position_ids_T = torch.arange(total + padding) - starts[seq_idx_T]
        longest = max(documents)
        return {
            "input_ids": torch.cat(input_ids).unsqueeze(0),
            "labels": labels_T.unsqueeze(0),
            "position_ids": position_ids_T.unsqueeze(0),
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens.clone(),
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": seq_idx_T.to(torch.int32).unsqueeze(0),
        }

    @staticmethod
    def _check_lengths(input_ids: list[torch.Tensor], labels: list[torch.Tensor], lengths: list[list[int]]) -> None:
        for row, (ids, row_labels, row_lengths) in enumerate(zip(input_ids, labels, lengths, strict=True)):
            if len(ids) != len(row_labels):
                raise ValueError(
                    f"Row {row} of the batch has {len(ids)} `input_ids` but {len(row_labels)} `labels`; each token "
                    f"needs exactly one label ({IGNORE_INDEX} where it is not trained)."
                )
            if sum(row_lengths) != len(ids):
                raise ValueError(
                    f"Row {row} of the batch has {len(ids)} `input_ids` but its `seq_lengths` {row_lengths} sum to "
                    f"{sum(row_lengths)}. Drop `seq_lengths`, or pack the rows again."
                )


@dataclass
class DataCollatorForVisionLanguageModeling(DataCollatorMixin):
    """
    Turn rows with images into one batch for a vision-language model.

    Each row has `images` (list) or `image` (one), and one of: `messages`; `prompt` and `completion`; or a text column.
    Images are placed in the first user message where the messages have no placeholders of their own. The batch has
    `input_ids`, `attention_mask` and `labels` (int64 `[B, T]`, padded on the right) and whatever the processor makes
    of the images (`pixel_values`, ...).

    Args:
        processor ([`~transformers.ProcessorMixin`]):
            Tokenizes the text and prepares the images.
        max_length (`int`, *optional*):
            Longest sequence kept, in tokens; the rest is cut at the end. `None` cuts nothing.
        completion_only_loss (`bool`, defaults to `False`):
            Train the completion only. Needs rows of `prompt` and `completion`.
        assistant_only_loss (`bool`, defaults to `False`):
            Train the assistant's turns only. Needs rows of `messages` and a chat template with generation markers.
        chat_template (`str`, *optional*):
            Template used in place of the processor's own.
        pad_to_multiple_of (`int`, *optional*):
            Round the length T of the batch up to a multiple of this many tokens.
        dataset_text_field (`str`, defaults to `"text"`):
            Name of the text column.
        return_tensors (`str`, defaults to `"pt"`):
            Only `"pt"` is supported.

    Raises:
        `ValueError`: a loss option does not fit the rows, or `max_length` cuts into an image.
        `KeyError`: the rows have none of the accepted columns.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    completion_only_loss: bool = False
    assistant_only_loss: bool = False
    chat_template: str | None = None
    pad_to_multiple_of: int | None = None
    dataset_text_field: str = "text"
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        first = examples[0]
        is_conversation = "messages" in first
        is_pair = "prompt" in first and "completion" in first
        if not (is_conversation or is_pair or self.dataset_text_field in first):
            raise KeyError(
                f"A row with images needs `messages`, or `prompt` and `completion`, or `{self.dataset_text_field}`. "
                f"Found: {', '.join(f'`{name}`' for name in first) or 'no column'}."
            )
        if self.assistant_only_loss and not is_conversation:
            raise ValueError(
                "assistant_only_loss=True needs rows of `messages`, so that the assistant's turns can be told from the "
                f"others. Found: {', '.join(f'`{name}`' for name in first)}. With `prompt` and `completion`, use "
                "completion_only_loss=True."
            )
        if self.completion_only_loss and not is_pair:
            raise ValueError(
                "completion_only_loss=True needs rows of `prompt` and `completion`. "
                f"Found: {', '.join(f'`{name}`' for name in first)}. With `messages`, use assistant_only_loss=True."
            )

        images = [images_of(example) for example in examples]
        if is_conversation:
            encoded = self._encode_messages(examples, images)
        elif is_pair:
            encoded = self._encode_pairs(examples, images)
        else:
            encoded = self._encode_texts([example[self.dataset_text_field] for example in examples], images)
        return self._finish(encoded, examples)

    def _encode_messages(self, examples: list[dict], images: list[list]) -> dict[str, torch.Tensor]:
        conversations = [
            _with_template_images(prepare_multimodal_messages(example["messages"], images=row_images))
            for example, row_images in zip(examples, images, strict=True)
        ]
        encoded = self.processor.apply_chat_template(
            conversations,
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=self.assistant_only_loss,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        encoded = dict(encoded)
        if self.assistant_only_loss:
            mask = torch.as_tensor(encoded["assistant_masks"])
            empty = (mask.sum(dim=1) == 0).nonzero().flatten().tolist()
            if empty:
                raise RuntimeError(
                    f"assistant_only_loss=True, but no assistant token was found in row(s) {empty} of the batch. "
                    "Either the conversation has no assistant turn, or the chat template has no "
                    "{% generation %} … {% endgeneration %} around it (trl.get_training_chat_template adds them)."
                )
            encoded["assistant_masks"] = mask
        return encoded

    def _encode_texts(self, texts: list[str], images: list[list]) -> dict[str, torch.Tensor]:
        encoded = self.processor(
            images=images if any(images) else None,
            text=texts,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        return dict(encoded)

    def _encode_pairs(self, examples: list[dict], images: list[list]) -> dict[str, torch.Tensor]:
        rendered = [
            render_answers(example, self.processor, ("completion",), self.chat_template) for example in examples
        ]
        is_plain = isinstance(examples[0]["prompt"], str)
        prompts = encode_prompts(
            self.processor, [texts["prompt"] for texts in rendered], images, add_special_tokens=is_plain
        )
        return append_completions(self.processor, prompts, [texts["completion"] for texts in rendered])

    def _finish(self, encoded: dict[str, Any], examples: list[dict]) -> dict[str, Any]:
        """Labels by position, then the cut, then the last padding."""
        labels = encoded["input_ids"].clone()
        labels[encoded["attention_mask"] == 0] = IGNORE_INDEX
        assistant_mask = encoded.pop("assistant_masks", None)
        completion_mask = encoded.pop("completion_mask", None)
        if self.assistant_only_loss:
            labels[assistant_mask == 0] = IGNORE_INDEX
        if self.completion_only_loss:
            labels[completion_mask == 0] = IGNORE_INDEX
        encoded["labels"] = labels

        return cut_and_pad(encoded, self.processor, self.max_length, self.pad_to_multiple_of)


def _as_list(values: Any) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _with_template_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A copy of messages whose content blocks keep only the keys that have a value.

    Rows read from Arrow carry every key of every block (`{"type": "text", "text": …, "image": None}`), and a processor
    takes the mere presence of `image` for an image.
    """
    return [
        {
            **message,
            "content": [{key: value for key, value in block.items() if value is not None} for block in content],
        }
        if isinstance(content := message.get("content"), list)
        else dict(message)
        for message in messages
    ]
