"""
Examples in the form a trainer reads: chat templates applied, prompts found, pairs taken apart.

Every function takes one example, as `dataset.map` hands it over, or a whole dataset where rows become more or fewer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value

from .formats import (
    DatasetColumnError,
    DatasetFormatError,
    DatasetType,
    IterableDatasetType,
    get_dataset_column_names,
    is_conversational,
)
from .packing import get_dataset_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

TEMPLATED_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected", "label")
TEMPLATED_COMBINATIONS = (
    {"messages"},
    {"prompt"},
    {"prompt", "completion"},
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
    {"prompt", "completion", "label"},
)


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates


def apply_chat_template(
    example: dict[str, list[dict[str, str]]],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tools: list[dict | Callable] | None = None,
    **template_kwargs: Any,
) -> dict[str, str]:
    """
    Render a conversational example to text.

    A prompt that ends with the user (or a tool) gets the header of the assistant's turn; one that ends with the
    assistant is left open, to be continued. Completions are what the rendering of the whole adds to that of the
    prompt, so prompt and completion together are always exactly what the template makes of the conversation.

    Args:
        example (`dict[str, list[dict[str, str]]]`):
            Example with one of these sets of keys (others do not matter): `messages`; `prompt`; `prompt`,
            `completion`; `prompt`, `completion`, `label`; `prompt`, `chosen`, `rejected`; `chosen`, `rejected`.
            Its `chat_template_kwargs` (`dict`), if any, are handed to the template and win over `template_kwargs`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor with a chat template.
        tools (`list[dict | Callable]`, *optional*):
            Functions, or their JSON schemas, that the template describes to the model. An empty list is none.
        **template_kwargs (`Any`):
            Further variables of the template.

    Returns:
        `dict[str, str]`: the same keys with text, but `text` in place of `messages`; `label` as it was.

    Raises:
        `KeyError`: no such set of keys.
        `ValueError`: the prompt ends with a role that nobody answers to, e.g. `system`.

    Example:

    ```python
    >>> example = {
    ...     "prompt": [{"role": "user", "content": "What color is the sky?"}],
    ...     "completion": [{"role": "assistant", "content": "It is blue."}],
    ... }
    >>> apply_chat_template(example, tokenizer)
    {'prompt': '<|im_start|>user\\nWhat color is the sky?<|im_end|>\\n<|im_start|>assistant\\n',
     'completion': 'It is blue.<|im_end|>\\n'}
    ```
    """
    columns = {column for column in TEMPLATED_COLUMNS if column in example}
    if columns not in TEMPLATED_COMBINATIONS:
        combinations = "; ".join(
            ", ".join(f"`{column}`" for column in TEMPLATED_COLUMNS if column in combination)
            for combination in TEMPLATED_COMBINATIONS
        )
        found = ", ".join(f"`{column}`" for column in example) or "none"
        raise DatasetColumnError(
            f"A chat template is applied to an example with one of these sets of keys: {combinations}. Found: {found}."
        )
    if isinstance(tools, str):
        tools = json.loads(tools)
    options = {**template_kwargs, **(example.get("chat_template_kwargs") or {}), "tools": tools or None}

    def render(messages: list[dict], **how: bool) -> str:
        return processing_class.apply_chat_template(drop_none_fields(messages), tokenize=False, **{**options, **how})

    rendered = {}
    if "messages" in columns:
        rendered["text"] = render(example["messages"])
    branches = [column for column in ("completion", "chosen", "rejected") if column in columns]
    if "prompt" in columns:
        prompt = render(example["prompt"], **_how_prompt_ends(example["prompt"]))
        wholes = {column: render(example["prompt"] + example[column]) for column in branches}
        # A template may render the prompt otherwise once an answer follows (spaces, thinking): what all have in
        # common is the prompt then, and the rest belongs to the answer.
        for whole in wholes.values():
            prompt = prompt[: common_prefix_length(prompt, whole)]
        rendered["prompt"] = prompt
        rendered.update({column: whole[len(prompt) :] for column, whole in wholes.items()})
    else:
        rendered.update({column: render(example[column]) for column in branches})
    if "label" in columns:
        rendered["label"] = example["label"]
    return rendered


def _how_prompt_ends(prompt: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """How a prompt is rendered: followed by the assistant's header, or left open for its last message to go on."""
    last_role = prompt[-1]["role"] if prompt else None
    if last_role in ("user", "tool"):
        return {"add_generation_prompt": True}
    if last_role == "assistant":
        return {"continue_final_message": True}
    raise DatasetFormatError(
        f"A prompt must end with a message of `user` or `tool` (the assistant answers) or of `assistant` (it is "
        f"continued); this one ends with {last_role!r}."
    )


def drop_none_fields(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    Remove the keys that a dataset filled with None because some other message has them.

    Arrow gives all messages of a column the same keys; templates ask whether `tool_calls` is defined. A message's
    `content` stays even when it is None, as templates ask for that too.

    Args:
        messages (`Iterable[Mapping[str, Any]]`):
            A conversation. It is not changed.

    Returns:
        `list[dict[str, Any]]`: new messages.
    """
    return [
        {key: _drop_none(value) for key, value in message.items() if value is not None or key == "content"}
        for message in messages
    ]


def _drop_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _drop_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_drop_none(item) for item in value]
    return value


def maybe_apply_chat_template(
    example: dict[str, list[dict[str, str]]],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tools: list[dict | Callable] | None = None,
    **template_kwargs: Any,
) -> dict[str, str]:
    """
    Render an example to text if it is conversational, and leave it alone otherwise.

    Args:
        example (`dict[str, list[dict[str, str]]]`):
            Example, see [`apply_chat_template`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor with a chat template.
        tools (`list[dict | Callable]`, *optional*):
            Functions, or their JSON schemas, that the template describes to the model.
        **template_kwargs (`Any`):
            Further variables of the template.

    Returns:
        `dict[str, str]`: the rendered example, or the very example that was given.
    """
    if not is_conversational(example):
        return example
    return apply_chat_template(example, processing_class, tools, **template_kwargs)


def tokenize(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin, value: str | list[dict[str, Any]], **kwargs: Any
) -> dict[str, list]:
    """
    Tokenize one text, or one conversation through the chat template.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor.
        value (`str` or `list[dict[str, Any]]`):
            Text, or messages.
        **kwargs (`Any`):
            Arguments of the tokenizer's call, or of its `apply_chat_template`, e.g. `tools`.

    Returns:
        `dict[str, list]`: `input_ids` and what else the tokenizer gives, without a batch dimension.
    """
    if isinstance(value, str):
        encoded = dict(processing_class(text=value, **kwargs))
    else:
        messages = drop_none_fields(value)
        encoded = dict(processing_class.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs))
    if hasattr(processing_class, "tokenizer"):  # a processor answers with a batch even for one example
        encoded = {key: item[0] if isinstance(item, list) else item for key, item in encoded.items()}
    return encoded


CHATML_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")


def maybe_convert_to_chatml(example: dict[str, list]) -> dict[str, list]:
    """
    Rename ShareGPT's keys: `from` and `value` of each message to `role` and `content`, `conversations` to `messages`.

    Args:
        example (`dict[str, list]`):
            Example with conversations under `prompt`, `completion`, `chosen`, `rejected`, `messages` or
            `conversations`. It is not changed.

    Returns:
        `dict[str, list]`: the converted example; whatever has no such key stays as it was. Roles keep their names.

    Example:

    ```python
    >>> maybe_convert_to_chatml({"conversations": [{"from": "user", "value": "What color is the sky?"}]})
    {'messages': [{'role': 'user', 'content': 'What color is the sky?'}]}
    ```
    """
    converted = dict(example)
    for column in CHATML_COLUMNS:
        value = converted.get(column)
        if isinstance(value, list):
            converted[column] = [_to_chatml(message) for message in value]
    if "conversations" in converted:
        converted["messages"] = converted.pop("conversations")
    return converted


def _to_chatml(message: Any) -> Any:
    if not isinstance(message, dict) or not ("from" in message or "value" in message):
        return message
    converted = {key: value for key, value in message.items() if key not in ("from", "value")}
    # Where a dataset mixes both forms, each message has the keys of both, and None under those of the other.
    for old, new in (("from", "role"), ("value", "content")):
        if old in message and (message[old] is not None or new not in message):
            converted[new] = message[old]
    return converted


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def common_prefix_length(ids: Sequence[Any], other_ids: Sequence[Any]) -> int:
    """
    Number of leading elements that two sequences share.

    Args:
        ids (`list[int]`):
            A sequence, e.g. of token ids.
        other_ids (`list[int]`):
            Another one.

    Returns:
        `int`: between 0 and the length of the shorter.
    """
    shorter = min(len(ids), len(other_ids))
    if ids[:shorter] == other_ids[:shorter]:  # the usual case, at the speed of a comparison
        return shorter
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, other_ids, strict=False)))


def extract_prompt(example: dict[str, Sequence]) -> dict[str, Sequence]:
    """
    Split a pair into its prompt, which is what both answers begin with, and the two answers.

    Each answer keeps at least its last element, and a space before the split goes to the answers.

    Args:
        example (`dict[str, Sequence]`):
            Example with `chosen` and `rejected`, two texts or two conversations.

    Returns:
        `dict[str, Sequence]`: `prompt`, `chosen` and `rejected`.

    Example:

    ```python
    >>> extract_prompt({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    {'prompt': 'The sky is', 'chosen': ' blue.', 'rejected': ' green.'}
    ```
    """
    chosen, rejected = example["chosen"], example["rejected"]
    split = min(common_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    split = max(split, 0)
    if split > 0 and chosen[split - 1] == " ":
        split -= 1
    return {"prompt": chosen[:split], "chosen": chosen[split:], "rejected": rejected[split:]}


def maybe_extract_prompt(example: dict[str, list]) -> dict[str, list]:
    """
    Split a pair into prompt and answers unless it has its prompt already.

    Args:
        example (`dict[str, list]`):
            Any example. It is left alone where it is no pair, or where its `prompt` is of the same kind as `chosen`
            (both text or both messages). A textual prompt beside whole conversations is no prompt of theirs: the
            conversations' common beginning replaces it.

    Returns:
        `dict[str, list]`: `prompt`, `chosen` and `rejected`, or the very example that was given.
    """
    if "chosen" not in example or "rejected" not in example:
        return example
    if example.get("prompt") is not None:
        prompt_is_messages = is_conversational({"prompt": example["prompt"]})
        answers_are_messages = is_conversational({"chosen": example["chosen"]})
        if prompt_is_messages == answers_are_messages:
            return example
    return extract_prompt({"chosen": example["chosen"], "rejected": example["rejected"]})


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def unpair_preference_dataset(
    dataset: DatasetType | IterableDatasetType, **map_kwargs: Any
) -> DatasetType | IterableDatasetType:
    """
    Turn each pair into two rows with a label: the chosen answer (`True`) and the rejected one (`False`).

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.DatasetDict`] or their iterable kin):
            Dataset with columns `chosen` and `rejected`; all others are repeated.
        **map_kwargs (`Any`):
            Further arguments of [`~datasets.Dataset.map`], e.g. `num_proc` and `desc`. Of each batch of `batch_size`
            rows (1000 by default) the chosen answers come first.

    Returns:
        The dataset with `completion` and `label` in place of `chosen` and `rejected`.

    Example:

    ```python
    >>> dataset = Dataset.from_list([{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}])
    >>> unpair_preference_dataset(dataset)[:]
    {'prompt': ['The sky is', 'The sky is'], 'completion': [' blue.', ' green.'], 'label': [True, False]}
    ```
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        return type(dataset)({name: unpair_preference_dataset(split, **map_kwargs) for name, split in dataset.items()})

    return unpair_columns(dataset, {"completion": ("chosen", "rejected")}, **map_kwargs)


def unpair_columns(
    dataset: Dataset | IterableDataset,
    columns: Mapping[str, tuple[str, str]],
    order: Callable[[int], Sequence[int]] | None = None,
    **map_kwargs: Any,
) -> Dataset | IterableDataset:
    """
    Map [`unpair_table`] over a dataset; the arguments are those of the two functions.
    """
    original_format = get_dataset_format(dataset)
    replaced = {chosen: new for new, (chosen, _) in columns.items()}
    replaced |= {rejected: "label" for _, rejected in columns.values()}
    if original_format.get("columns"):
        shown = (replaced.get(column, column) for column in original_format["columns"])
        original_format["columns"] = list(dict.fromkeys(shown))
    features = dataset.features
    if features is not None and all(features[chosen] == features[rejected] for chosen, rejected in columns.values()):
        unpaired = {name: kind for name, kind in features.items() if name not in replaced}
        unpaired |= {name: features[chosen] for name, (chosen, _) in columns.items()} | {"label": Value("bool")}
        map_kwargs.setdefault("features", Features(unpaired))
    unpaired = dataset.with_format("arrow").map(
        unpair_table,
        batched=True,
        remove_columns=list(replaced),
        fn_kwargs={"columns": dict(columns), "order": order},
        **map_kwargs,
    )
    return unpaired.with_format(**original_format)


def unpair_table(
    table: pa.Table,
    columns: Mapping[str, tuple[str, str]],
    order: Callable[[int], Sequence[int]] | None = None,
) -> pa.Table:
    """
    Two labelled rows of each pair in an Arrow table; what a dataset of pairs is mapped over with.

    Args:
        table (`pa.Table`):
            Pairs.
        columns (`Mapping[str, tuple[str, str]]`):
            New column -> columns of its values in the chosen and in the rejected rows. Other columns are repeated.
        order (`Callable[[int], Sequence[int]]`, *optional*):
            Of `n` pairs, the numbers of the rows in their new order: 0 to n - 1 are the chosen, n to 2n - 1 the
            rejected ones. By default the chosen come first.
    """
    shared = table.drop_columns([column for pair in columns.values() for column in pair])
    halves = []
    for side, label in ((0, True), (1, False)):
        half = shared
        for name, pair in columns.items():
            half = half.append_column(name, table[pair[side]])
        halves.append(half.append_column("label", pa.array([label] * len(table), pa.bool_())))
    both = pa.concat_tables(halves, promote_options="permissive")
    return both if order is None else both.take(pa.array(order(len(table)), pa.int64()))


def maybe_unpair_preference_dataset(
    dataset: DatasetType, num_proc: int | None = None, desc: str | None = None
) -> DatasetType:
    """
    Turn pairs into labelled rows if the dataset has pairs, and leave it alone otherwise.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.DatasetDict`]):
            Any dataset; of a dict, the first split decides.
        num_proc (`int`, *optional*):
            Number of processes.
        desc (`str`, *optional*):
            Words beside the progress bar.

    Returns:
        The dataset as [`unpair_preference_dataset`] makes it, or the very dataset that was given.
    """
    first = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    if not {"chosen", "rejected"} <= set(get_dataset_column_names(first)):
        return dataset
    if isinstance(first, IterableDataset):
        return unpair_preference_dataset(dataset)
    return unpair_preference_dataset(dataset, num_proc=num_proc, desc=desc)
