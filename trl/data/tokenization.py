"""
From a row to token ids and masks: the one routine that every trainer uses.

A row is plain text, a conversation, or a prompt with its completion (either of the two). It becomes `input_ids` and,
where asked for, `completion_mask` (1 from the first token that differs from the prompt's own) and `assistant_masks`
(1 on what the assistant wrote). Masks are found by position; no token value means anything here.

What follows (labels, truncation, packing) works on whole columns: `trl.data.token_lists`, `trl.data.packing`.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import ProcessorMixin

from .chat_templates import tokenize_conversation
from .formats import DatasetFormatError, describe_rows
from .templating import common_prefix_length, drop_none_fields
from .vision import prepare_multimodal_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def get_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The text tokenizer of a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def tokenize_text(processing_class: PreTrainedTokenizerBase | ProcessorMixin, texts: list[str]) -> list[list[int]]:
    """
    Token ids of plain texts, with the special tokens that the tokenizer itself adds; nothing is cut or padded.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The tokenizer, or the processor that holds it.
        texts (`list[str]`):
            Any number of texts.

    Returns:
        `list[list[int]]`: the ids of each text.
    """
    if not texts:
        return []
    # verbose=False: a text beyond the model's length is no news here, it is cut later and the report counts it.
    encoded = get_tokenizer(processing_class)(
        texts, padding=False, truncation=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return encoded["input_ids"]


def append_eos(text: str, eos_token: str | None) -> str:
    """The text with the end-of-sequence token at its end, never twice."""
    return text if not eos_token or text.endswith(eos_token) else text + eos_token


def prompt_boundary(prompt_ids: Sequence[int], *sequences: Sequence[int]) -> int:
    """
    Number of leading tokens that a prompt shares with each of the sequences that continue it.

    A tokenizer may merge the prompt's last characters with the first of the completion; the boundary then lies before
    the merged token, so that no token is split between the two.

    Args:
        prompt_ids (`Sequence[int]`):
            The prompt tokenized alone.
        *sequences (`Sequence[int]`):
            The prompt tokenized together with each completion.

    Returns:
        `int`: at most `len(prompt_ids)`.
    """
    return min((common_prefix_length(prompt_ids, sequence) for sequence in sequences), default=len(prompt_ids))


def parse_tools(tools: Any, row: int | str = "?") -> list | None:
    """
    The tools of a row as a list: JSON text is decoded, an empty list or text becomes `None`.

    Args:
        tools (`list`, `str` or `None`):
            The row's `tools`.
        row (`int` or `str`):
            Named in the error.

    Raises:
        `DatasetFormatError`: the text is not JSON, or is not a list.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools.strip() or "null")
        except json.JSONDecodeError as error:
            raise DatasetFormatError(
                f"Row {row}: `tools` is text but not JSON ({error}). It must hold a list of tool schemas."
            ) from error
    if not tools:
        return None
    if not isinstance(tools, (list, tuple)):
        raise DatasetFormatError(f"Row {row}: `tools` must be a list of tool schemas, found {type(tools).__name__}.")
    return drop_none_fields(tools)  # Arrow gives each schema the keys of all others, as None


@dataclass(frozen=True)
class RowTokenizer:
    """
    Tokenizes batches of rows for language modeling; what a trainer maps over its dataset.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer, or a processor for text-only rows.
        text_field (`str`, defaults to `"text"`):
            Column of plain text, where the rows have neither `messages` nor `prompt` and `completion`.
        eos_token (`str`, *optional*):
            Appended to plain texts and plain completions that do not end with it. Conversations end as their chat
            template ends them.
        assistant_mask (`bool`, defaults to `False`):
            Also return `assistant_masks`. Needs conversations.
    """

    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    text_field: str = "text"
    eos_token: str | None = None
    assistant_mask: bool = False

    def __call__(self, rows: Mapping[str, list], indices: Sequence[int] | None = None) -> dict[str, list]:
        """
        Args:
            rows (`Mapping[str, list]`):
                Columns of a batch: `messages`, or `prompt` and `completion`, or the text column; optionally `tools`
                and `chat_template_kwargs`.
            indices (`Sequence[int]`, *optional*):
                Numbers of the rows in their dataset, for errors.

        Returns:
            `dict[str, list]`: `input_ids`; for prompt and completion also `completion_mask` and `prompt_tokens_merged`
            (how many tokens of the prompt alone were not found again); with `assistant_mask` also `assistant_masks`.

        Raises:
            `DatasetFormatError`: a row lacks a value or is of another kind than the others.
            `RuntimeError`: the assistant mask of a row has no 1.
        """
        n_rows = len(next(iter(rows.values()), []))
        indices = range(n_rows) if indices is None else indices
        columns = self._columns(rows)
        conversational = self._check_kind(rows, columns, indices)
        if len(columns) == 2:
            encoded = self._prompts_and_completions(rows, indices, conversational)
        elif conversational:
            encoded = self._conversations(rows, indices, rows[columns[0]])
        else:
            texts = [append_eos(text, self.eos_token) for text in rows[columns[0]]]
            encoded = {"input_ids": tokenize_text(self.processing_class, texts)}
        if self.assistant_mask:
            self._check_assistant_masks(encoded, indices)
        return encoded

    def _columns(self, rows: Mapping[str, list]) -> tuple[str, ...]:
        if "prompt" in rows and "completion" in rows:
            return ("prompt", "completion")
        return ("messages",) if "messages" in rows else (self.text_field,)

    def _check_kind(self, rows: Mapping[str, list], columns: tuple[str, ...], indices: Sequence[int]) -> bool:
        """True for conversations, False for plain text; an error where rows lack a value or differ in kind."""
        kinds = {}
        for column in columns:
            for index, value in zip(indices, rows[column], strict=True):
                if value is None:
                    raise DatasetFormatError(
                        f"Row {index} has no `{column}` (it is None). Each row needs one; drop such rows, e.g. "
                        f'dataset.filter(lambda row: row["{column}"] is not None).'
                    )
                kinds.setdefault(isinstance(value, str), (index, column))
        if len(kinds) == 2:
            (text_row, text_column), (chat_row, chat_column) = kinds[True], kinds[False]
            raise DatasetFormatError(
                f"Plain text and conversations are mixed: `{text_column}` of row {text_row} is a text, `{chat_column}` "
                f"of row {chat_row} is a list. Bring all rows to one form; a text becomes a conversation as "
                '[{"role": "user", "content": text}].'
            )
        conversational = False in kinds
        if self.assistant_mask and not conversational:
            raise ValueError(
                "assistant_only_loss=True needs conversations (`messages`, or `prompt` and `completion` as lists of "
                f"messages), but `{columns[0]}` holds plain text. Convert the dataset, or set "
                "assistant_only_loss=False; with `prompt` and `completion`, completion_only_loss=True trains the "
                "completion only."
            )
        return conversational

    def _conversations(
        self, rows: Mapping[str, list], indices: Sequence[int], conversations: Sequence, **options: Any
    ) -> dict[str, list]:
        tools = rows.get("tools") or [None] * len(conversations)
        kwargs = rows.get("chat_template_kwargs") or [None] * len(conversations)
        _check_template_kwargs(kwargs, indices)
        masked = self.assistant_mask and not options.get("add_generation_prompt", False)
        encoded = []
        for index, messages, row_tools, row_kwargs in zip(indices, conversations, tools, kwargs, strict=True):
            # Arrow gives each row the arguments of all others, as None.
            template_kwargs = {key: value for key, value in (row_kwargs or {}).items() if value is not None}
            row_tools = parse_tools(row_tools, index)
            try:
                encoded.append(
                    tokenize_conversation(
                        self.processing_class,
                        self._prepare_messages(messages),
                        tools=row_tools,
                        assistant_mask=masked,
                        **{**template_kwargs, **options},
                    )
                )
            except Exception as error:
                # The template or the masks say what is wrong with the conversation; only here is known which one.
                _add_note(error, f"(row {index} of the dataset)")
                raise
        keys = ("input_ids", "assistant_masks") if masked else ("input_ids",)
        return {key: [_flat(row[key]) for row in encoded] for key in keys}

    def _prepare_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        messages = drop_none_fields(messages)
        # A processor's chat template reads content as a list of blocks, also where there are no images.
        return prepare_multimodal_messages(messages) if isinstance(self.processing_class, ProcessorMixin) else messages

    def _prompts_and_completions(
        self, rows: Mapping[str, list], indices: Sequence[int], conversational: bool
    ) -> dict[str, list]:
        boundaries, merged, [encoded] = self.continue_prompts(rows, indices, ("completion",), conversational)
        encoded["completion_mask"] = [
            [0] * boundary + [1] * (len(ids) - boundary)
            for boundary, ids in zip(boundaries, encoded["input_ids"], strict=True)
        ]
        encoded["prompt_tokens_merged"] = merged
        return encoded

    def continue_prompts(
        self, rows: Mapping[str, list], indices: Sequence[int], answers: Sequence[str], conversational: bool
    ) -> tuple[list[int], list[int], list[dict[str, list]]]:
        """
        Tokenize prompts alone and with each of their answers; an answer begins where the sequences part.

        Args:
            rows (`Mapping[str, list]`):
                Columns of a batch: `prompt`, the answers, and optionally `tools` and `chat_template_kwargs`.
            indices (`Sequence[int]`):
                Numbers of the rows in their dataset, for errors.
            answers (`Sequence[str]`):
                Columns that continue the prompt, e.g. `("chosen", "rejected")`.
            conversational (`bool`):
                Messages rather than text.

        Returns:
            `tuple`: for each row, where its answers begin (the same place for all of them) and how many tokens of the
            prompt alone were not found again; for each column of answers, the encoded prompt with the answer.
        """
        if conversational:
            prompt_ids = self._conversations(rows, indices, rows["prompt"], add_generation_prompt=True)["input_ids"]
        else:
            prompt_ids = tokenize_text(self.processing_class, list(rows["prompt"]))
        wholes = [self.encode_whole(rows, indices, answer, conversational) for answer in answers]
        sequences = zip(prompt_ids, *(whole["input_ids"] for whole in wholes), strict=True)
        boundaries = [prompt_boundary(prompt, *with_answers) for prompt, *with_answers in sequences]
        merged = [len(prompt) - boundary for prompt, boundary in zip(prompt_ids, boundaries, strict=True)]
        return boundaries, merged, wholes

    def encode_whole(
        self, rows: Mapping[str, list], indices: Sequence[int], answer: str, conversational: bool
    ) -> dict[str, list]:
        """
        Tokenize each row's `prompt`, where there is one, together with what follows it in the column `answer`.

        The arguments and the form of the result are those of [`RowTokenizer.continue_prompts`].
        """
        wholes = rows[answer]
        if "prompt" in rows:
            join = _join_messages if conversational else operator.add
            wholes = [join(prompt, follows) for prompt, follows in zip(rows["prompt"], wholes, strict=True)]
        if conversational:
            return self._conversations(rows, indices, wholes)
        return {
            "input_ids": tokenize_text(self.processing_class, [append_eos(text, self.eos_token) for text in wholes])
        }

    @staticmethod
    def _check_assistant_masks(encoded: Mapping[str, list], indices: Sequence[int]) -> None:
        empty = [index for index, mask in zip(indices, encoded["assistant_masks"], strict=True) if 1 not in mask]
        if empty:
            raise RuntimeError(
                f"assistant_only_loss=True, but no assistant token was found in {describe_rows(empty)}. Either the "
                "conversation has no assistant turn (drop the row), or the chat template marks none (see "
                "trl.get_training_chat_template)."
            )


def _check_template_kwargs(kwargs: Sequence[Any], indices: Sequence[int]) -> None:
    for index, row_kwargs in zip(indices, kwargs, strict=True):
        if row_kwargs is not None and not isinstance(row_kwargs, Mapping):
            raise DatasetFormatError(
                f"Row {index}: `chat_template_kwargs` must be a dictionary of template variables, found "
                f"{type(row_kwargs).__name__}."
            )


def _join_messages(prompt: Sequence, answer: Sequence) -> list:
    return [*prompt, *answer]


def _flat(values: Any) -> list[int]:
    """A processor returns a batch of one where a tokenizer returns one sequence."""
    return values[0] if len(values) and isinstance(values[0], (list, tuple)) else values


def _add_note(error: Exception, note: str) -> None:
    """Append a note to an error's own message, so that it shows on every Python version and in every log."""
    if error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]} {note}", *error.args[1:])
