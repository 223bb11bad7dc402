"""Give a base model the chat template, and the special tokens it needs, of another model."""

from __future__ import annotations

import itertools

from transformers import AddedToken, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def clone_chat_template(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer_path: str,
    resize_to_multiple_of: int | None = 64,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]:
    """
    Copy the chat template of another tokenizer, with its added tokens and end-of-sequence token.

    Tokens that the source has added and the tokenizer lacks are added, the embeddings grow to hold them, and the
    vocabulary is filled up with `<extra_id_N>` to the size of the embeddings, so that every row has a token.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model whose embeddings grow; its `eos_token_id` becomes the source's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that gets the template; changed in place.
        source_tokenizer_path (`str`):
            Folder or Hub name of the tokenizer to copy from.
        resize_to_multiple_of (`int`, *optional*, defaults to `64`):
            Make the number of embeddings a multiple of this. `None` for exactly as many as there are tokens.

    Returns:
        `tuple`: the model, the tokenizer, and the ids (`list[int]`) of all tokens that were added.

    Raises:
        `RuntimeError`: in the end the vocabulary and the embeddings differ in size.

    Example:

    ```python
    >>> model, tokenizer, added_tokens = clone_chat_template(model, tokenizer, "Qwen/Qwen3-0.6B")
    ```
    """
    source = AutoTokenizer.from_pretrained(source_tokenizer_path)
    if not source.chat_template:
        raise ValueError(f"The tokenizer of {source_tokenizer_path} has no chat template to copy.")
    tokenizer.chat_template = source.chat_template

    known = tokenizer.get_vocab()
    missing = [token for token in source.added_tokens_decoder.values() if token.content not in known]
    tokenizer.add_tokens(missing)
    added = [token.content for token in missing]
    _copy_eos_token(model, tokenizer, source)

    # Never fewer embeddings than before: many models have more rows than their tokenizer has tokens.
    size = max(len(tokenizer), model.get_input_embeddings().num_embeddings)
    model.resize_token_embeddings(new_num_tokens=size, pad_to_multiple_of=resize_to_multiple_of)
    rows = model.get_input_embeddings().num_embeddings
    added += _fill_vocabulary(tokenizer, rows)
    if len(tokenizer) != rows:
        raise RuntimeError(
            f"After copying the chat template of {source_tokenizer_path} the tokenizer has {len(tokenizer)} tokens, "
            f"but the model has {rows} embeddings. This happens when token ids have gaps; check "
            "`sorted(tokenizer.get_vocab().values())`."
        )
    return model, tokenizer, tokenizer.convert_tokens_to_ids(added)


def _copy_eos_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase
) -> None:
    if source.eos_token is None:
        return
    tokenizer.eos_token = source.eos_token
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    if getattr(model, "generation_config", None) is not None:  # a classifier has none
        model.generation_config.eos_token_id = tokenizer.eos_token_id


def _fill_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    """Add `<extra_id_0>`, `<extra_id_1>`, … until there are `size` tokens; names that exist already are passed over."""
    known = tokenizer.get_vocab()
    names = (name for name in map("<extra_id_{}>".format, itertools.count()) if name not in known)
    filling = list(itertools.islice(names, max(size - len(tokenizer), 0)))
    tokenizer.add_tokens([AddedToken(name) for name in filling])
    return filling
