"""
Names for cached steps of data preparation that stay the same from run to run.

`datasets` names a cached result by a hash of everything that went into it, objects included. A tokenizer object changes
its state when it is used (padding, truncation, caches), so that its hash is another one after every use, and nothing
would ever be found again. Here its content is hashed instead.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import transformers
from datasets import Dataset
from transformers import ProcessorMixin

from .tokenization import get_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of every fingerprint: raise it when the same input is to give other tokens, so that old caches are not used.
_ROUTINE_VERSION = 1


def fingerprint_processing_class(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """
    A hash of what a tokenizer does, equal in every process and before and after its use.

    It covers the vocabulary, merges, normalization and special tokens, and the chat template; not the padding and
    truncation that the last call happened to ask for.
    """
    tokenizer = get_tokenizer(processing_class)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = backend.to_str()
        # The text begins with the version, then the truncation and padding of the last call.
        content = content[max(content.find('"added_tokens"'), 0) :]
    else:
        content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs], default=str)
    template = tokenizer.chat_template
    processor_template = processing_class.chat_template if isinstance(processing_class, ProcessorMixin) else None
    return _hash(
        type(processing_class).__qualname__,
        type(tokenizer).__qualname__,
        content,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        [template, processor_template],
    )


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint_step(dataset: Dataset, step: str, *parts: Any) -> str:
    """
    The fingerprint of a dataset after a step of its preparation.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset before.
        step (`str`):
            Name of the step.
        *parts (`Any`):
            Whatever else decides the result; it must have a JSON form.
    """
    versions = [_ROUTINE_VERSION, transformers.__version__]
    return _hash(dataset._fingerprint, step, versions, parts)
