"""
What callbacks that show completions share: prompts from the evaluation set, and generating for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import GenerationConfig, Trainer

from ..data.templating import maybe_apply_chat_template
from ..models.generation import unwrap_model_for_generation

Prompt = str | list[dict[str, Any]]


def _prompt_of(row: dict[str, Any]) -> Prompt:
    if "prompt" in row:
        return row["prompt"]
    messages = list(row["messages"])
    while len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def evaluation_prompts(trainer: Trainer, num_prompts: int | None, callback: str) -> list[Prompt]:
    """
    The first prompts of the trainer's evaluation set: column `prompt`, or `messages` without the last answer.

    Raises:
        ValueError: there is no evaluation set, or it has neither column.
    """
    dataset = trainer.eval_dataset
    if dataset is None:
        raise ValueError(f"{callback} generates for the evaluation set's prompts. Give the trainer an `eval_dataset`.")
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    rows = dataset if num_prompts is None else dataset.take(num_prompts)
    columns = dataset.column_names or []
    if "prompt" not in columns and "messages" not in columns:
        raise ValueError(
            f"{callback} needs a column `prompt` (or `messages`) in the `eval_dataset`. Found: {', '.join(columns)}."
        )
    if isinstance(rows, Dataset):
        rows = rows.select_columns(["prompt" if "prompt" in columns else "messages"])
    return [_prompt_of(row) for row in rows]


def _as_text(prompts: Sequence[Prompt], tokenizer: Any) -> list[str]:
    return [maybe_apply_chat_template({"prompt": prompt}, tokenizer)["prompt"] for prompt in prompts]


@torch.no_grad()
def generate_completions(
    trainer: Trainer, prompts: Sequence[Prompt], generation_config: GenerationConfig | None
) -> tuple[list[str], list[str]]:
    """
    Complete the prompts with the model as it is now; each process takes its share. A collective call.

    Args:
        trainer: whose model, tokenizer and evaluation batch size are used.
        prompts: texts or conversations.
        generation_config: how to sample; default the model's own.

    Returns:
        Prompts and completions as text, of all processes, in order.
    """
    accelerator, model = trainer.accelerator, trainer.model_wrapped
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    texts = _as_text(prompts, tokenizer)
    conversational = [not isinstance(prompt, str) for prompt in prompts]
    training = model.training
    model.eval()
    completions = []
    try:
        with (
            accelerator.split_between_processes(list(zip(texts, conversational, strict=True))) as share,
            unwrap_model_for_generation(model, accelerator) as unwrapped,
        ):
            size = trainer.args.per_device_eval_batch_size
            for start in range(0, len(share), size):
                completions += _generate(unwrapped, tokenizer, share[start : start + size], generation_config)
    finally:
        model.train(training)
    return texts, gather_object(completions)


def _generate(model: Any, tokenizer: Any, batch: list[tuple[str, bool]], config: GenerationConfig | None) -> list[str]:
    texts = [text for text, _ in batch]
    inputs = tokenizer(
        texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not batch[0][1],  # a chat template writes its own
        return_token_type_ids=False,
    ).to(model.device)
    output = model.generate(**inputs, generation_config=config)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
