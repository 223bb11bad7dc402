"""
What a run would train on, token by token, without a model: what `trl preview <method>` prints.

Reads the same config and flags as the training script; no weights are loaded and nothing is trained.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .utils import DatasetMixtureConfig, ScriptArguments, load_script_dataset, select_split


@dataclass
class PreviewArguments:
    """How many examples are shown, and how."""

    num_examples: int = field(default=3, metadata={"help": "Rows to show."})
    color: Literal["auto", "always", "never"] = field(
        default="auto",
        metadata={"help": "Colours, or brackets. 'auto': colours on a terminal, unless NO_COLOR is set."},
    )


def preview_sft(
    script_args: ScriptArguments,
    training_args: Any,
    model_args: Any,
    dataset_args: DatasetMixtureConfig,
    preview_args: PreviewArguments,
) -> str:
    """
    The first rows of the training split as `SFTTrainer` would see them.

    Args:
        script_args: the dataset.
        training_args: an `SFTConfig`.
        model_args: whose tokenizer is used.
        dataset_args: a mixture of datasets.
        preview_args: how many rows, and colours.

    Returns:
        A legend and the rows.

    Raises:
        ValueError: no model, no dataset, or data that the trainer could not use.
    """
    from ..data.preflight import preview
    from ..data.preparation import LanguageModelingOptions

    processing_class = _processing_class(training_args, model_args)
    dataset = load_script_dataset(script_args, dataset_args)
    options = LanguageModelingOptions.of(training_args, packing=False, shuffle=False)
    return preview(
        select_split(dataset, script_args.dataset_train_split, "dataset_train_split"),
        processing_class,
        options,
        n=preview_args.num_examples,
        color=_use_color(preview_args.color),
    )


def preview_dpo(*arguments: Any) -> str:
    """The first pairs of the training split as `DPOTrainer` would see them; arguments as for [`preview_sft`]."""
    from ..data.preference_preparation import prepare_preference_dataset

    return _preview_preferences(prepare_preference_dataset, *arguments)


def preview_reward(*arguments: Any) -> str:
    """The first pairs of the training split as `RewardTrainer` would see them; arguments as for [`preview_sft`]."""
    from ..data.preference_preparation import prepare_reward_dataset

    return _preview_preferences(prepare_reward_dataset, *arguments)


def preview_kto(*arguments: Any) -> str:
    """The first answers of the training split as `KTOTrainer` would see them; arguments as for [`preview_sft`]."""
    from ..data.preference_preparation import prepare_unpaired_dataset

    return _preview_preferences(prepare_unpaired_dataset, *arguments, truncation_mode="keep_start")


def _preview_preferences(
    prepare: Callable[..., Any],
    script_args: ScriptArguments,
    training_args: Any,
    model_args: Any,
    dataset_args: DatasetMixtureConfig,
    preview_args: PreviewArguments,
    **overrides: Any,
) -> str:
    from ..data.preference_preparation import PreferenceOptions
    from ..data.preference_preview import preview_preferences

    processing_class = _processing_class(training_args, model_args)
    dataset = load_script_dataset(script_args, dataset_args)
    return preview_preferences(
        select_split(dataset, script_args.dataset_train_split, "dataset_train_split"),
        processing_class,
        PreferenceOptions.of(training_args, kl_block_size=None, num_proc=None, **overrides),
        prepare,
        n=preview_args.num_examples,
        color=_use_color(preview_args.color),
    )


def preview_grpo(
    script_args: ScriptArguments,
    training_args: Any,
    model_args: Any,
    dataset_args: DatasetMixtureConfig,
    preview_args: PreviewArguments,
) -> str:
    """
    The first prompts of the training split as completions are sampled for them, and what the rewards get of each row.

    Args:
        script_args: the dataset and the rewards, which are found or refused, but not called.
        training_args: a `GRPOConfig` or `RLOOConfig`.
        model_args: whose tokenizer is used.
        dataset_args: a mixture of datasets.
        preview_args: how many rows, and colours.

    Returns:
        The rows.

    Raises:
        ValueError: no model, no reward, or data that the trainer could not use.
    """
    from ..trainer.online_data import check_prompts
    from .online import load_reward_funcs

    load_reward_funcs(script_args, training_args)
    processing_class = _processing_class(training_args, model_args)
    dataset = select_split(
        load_script_dataset(script_args, dataset_args), script_args.dataset_train_split, "dataset_train_split"
    )
    check_prompts(dataset, "train", training_args)
    room = training_args.max_completion_length
    sampled = f"{training_args.num_generations} completions of {f'up to {room:,}' if room else 'any number of'} tokens"
    lines = [f"To each prompt {sampled} are sampled."]
    for number, row in enumerate(itertools.islice(iter(dataset), preview_args.num_examples)):
        lines += _show_prompt(number, row, processing_class, training_args, _use_color(preview_args.color))
    return "\n".join(lines)


preview_rloo = preview_grpo


def _show_prompt(
    number: int, row: dict[str, Any], processing_class: Any, training_args: Any, color: bool
) -> list[str]:
    """A prompt with the number of its tokens, and the other columns of its row, shortened."""
    from ..data.chat_templates import tokenize_conversation
    from ..data.template_rendering import inner_tokenizer
    from ..data.templating import drop_none_fields
    from ..data.token_view import paint_tokens

    tokenizer, prompt = inner_tokenizer(processing_class), row["prompt"]
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = tokenize_conversation(
            processing_class,
            drop_none_fields(prompt),
            add_generation_prompt=True,
            **(training_args.chat_template_kwargs or {}),
        )["input_ids"]
    columns = {name: repr(value) for name, value in row.items() if name != "prompt" and value is not None}
    for name, text in columns.items():
        columns[name] = text if len(text) <= 200 else f"{text[:200]}…"
    return [
        f"── row {number}: prompt, {len(ids):,} tokens",
        paint_tokens(ids, ["context"] * len(ids), tokenizer, color),
        *(f"{name} (for the rewards): {text}" for name, text in columns.items()),
    ]


def _processing_class(training_args: Any, model_args: Any) -> Any:
    from transformers import AutoTokenizer

    from ..models.loading import load_processing_class

    if model_args.model_name_or_path is None:
        raise ValueError("No model, so no tokenizer. Name one with `--model_name_or_path`: on the Hub, or a folder.")
    revision = (training_args.model_init_kwargs or {}).get("revision", model_args.model_revision)
    processing_class = load_processing_class(
        model_args.model_name_or_path, revision=revision, trust_remote_code=training_args.trust_remote_code
    )
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    path = getattr(training_args, "chat_template_path", None)  # DPO and KTO have none
    if path is not None and path.endswith((".jinja", ".j2")):
        if not Path(path).is_file():
            raise ValueError(f"`chat_template_path` names a template file, but {path} does not exist.")
        processing_class.chat_template = Path(path).read_text(encoding="utf-8")
    elif path is not None:
        source = AutoTokenizer.from_pretrained(path)
        processing_class.chat_template = source.chat_template
        tokenizer.add_tokens(list(source.added_tokens_decoder.values()))
        tokenizer.eos_token = source.eos_token
    eos_token = getattr(training_args, "eos_token", None)
    if eos_token is not None:
        tokenizer.eos_token = eos_token
    return processing_class


def _use_color(choice: str) -> bool:
    if choice == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return choice == "always"
