"""
A reward that is a model: a sequence classifier whose first logit is the value of prompt and completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from ..data.formats import is_conversational
from ..data.templating import apply_chat_template
from ..models.loading import create_model_from_path, get_config_model_id, load_processing_class


class RewardModel:
    """
    A sequence classifier with its tokenizer.

    Args:
        model: name or path, loaded with one label; or the model.
        processing_class: its tokenizer; default the one published with it. A tokenizer without a pad token pads with
            its end-of-sequence token. The id is written into the model's config: the model finds the last token by it.
        model_init_kwargs: options of `from_pretrained`, for a name or path.
        chat_template_kwargs: variables for the chat template of a conversational prompt.
        batch_size: completions in one forward; default all.
    """

    def __init__(
        self,
        model: str | nn.Module,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
    ):
        if isinstance(model, str):
            model = _load_classifier(model, dict(model_init_kwargs or {}))
        self.model = model
        self.name = get_config_model_id(model.config).rstrip("/").split("/")[-1] or type(model).__name__
        self.tokenizer = processing_class or self._load_tokenizer()
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token is None:
                raise ValueError(
                    f"The tokenizer of the reward model {self.name} has neither a pad nor an eos token. Set "
                    "`tokenizer.pad_token` and pass it in `reward_processing_classes`."
                )
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.batch_size = batch_size

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        model_id = get_config_model_id(self.model.config)
        if not model_id:
            raise ValueError(
                f"The reward model {self.name} was made in memory and has no name to find a tokenizer by. Pass one in "
                "`reward_processing_classes`."
            )
        return load_processing_class(model_id, text_only=True)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """The values of completions, given their prompts; both text, or both messages."""
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        size = self.batch_size or max(len(texts), 1)
        return [value for start in range(0, len(texts), size) for value in self._score(texts[start : start + size])]

    def _text(self, prompt: Any, completion: Any) -> str:
        if is_conversational({"prompt": prompt}):
            messages = {"messages": list(prompt) + list(completion)}
            return apply_chat_template(messages, self.tokenizer, **self.chat_template_kwargs)["text"]
        return prompt + completion

    @torch.inference_mode()
    def _score(self, texts: list[str]) -> list[float]:
        # The template wrote the special tokens that belong there.
        inputs = self.tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        device = next(self.model.parameters()).device
        logits_BL: Tensor = self.model(**inputs.to(device)).logits
        return logits_BL[:, 0].float().tolist()


def _load_classifier(model_id: str, init_kwargs: dict[str, Any]) -> nn.Module:
    """A sequence classifier with one label, in evaluation mode."""
    options = {
        key: init_kwargs[key]
        for key in ("revision", "token", "cache_dir", "subfolder", "trust_remote_code")
        if key in init_kwargs
    }
    init_kwargs.setdefault("config", AutoConfig.from_pretrained(model_id, num_labels=1, **options))
    # Where it belongs is known to who prepares it.
    init_kwargs.setdefault("device_map", None)
    return create_model_from_path(model_id, AutoModelForSequenceClassification, **init_kwargs).eval()
