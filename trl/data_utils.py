"""Data functions under the path users know; they live in `trl.data`."""

from .data.formats import (
    DatasetType,
    IterableDatasetType,
    get_dataset_column_names,
    is_conversational,
    is_conversational_from_value,
)
from .data.packing import get_dataset_format as _get_dataset_format
from .data.packing import pack_dataset
from .data.templating import (
    apply_chat_template,
    common_prefix_length,
    extract_prompt,
    maybe_apply_chat_template,
    maybe_convert_to_chatml,
    maybe_extract_prompt,
    maybe_unpair_preference_dataset,
    unpair_preference_dataset,
)
from .data.templating import tokenize as _tokenize
from .data.vision import prepare_multimodal_messages, prepare_multimodal_messages_vllm

__all__ = [
    "DatasetType",
    "IterableDatasetType",
    "_get_dataset_format",
    "_tokenize",
    "apply_chat_template",
    "common_prefix_length",
    "extract_prompt",
    "get_dataset_column_names",
    "is_conversational",
    "is_conversational_from_value",
    "maybe_apply_chat_template",
    "maybe_convert_to_chatml",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "pack_dataset",
    "prepare_multimodal_messages",
    "prepare_multimodal_messages_vllm",
    "unpair_preference_dataset",
]
