"""A plain `transformers.Trainer` on the tiny model, for callbacks that work with any trainer."""

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from tests.conftest import build_model

PROMPTS = ["the sky is", "what is 12 plus", "sort the list 3, 1"]


def make_trainer(tokenizer, output_dir, callbacks=(), model=None, eval_rows=None, **arguments):
    def collate(rows):
        ids = torch.tensor([(tokenizer(row["text"])["input_ids"] * 8)[:8] for row in rows])
        return {"input_ids": ids, "labels": ids}

    rows = [{"text": text} for text in ("the sky is blue", "the sea is deep", "hello world", "how are you") * 4]
    eval_rows = eval_rows or [{"text": f"{prompt} blue and deep", "prompt": prompt} for prompt in PROMPTS]
    settings = {
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "remove_unused_columns": False,
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        **arguments,
    }
    return Trainer(
        model=model if model is not None else build_model(),
        args=TrainingArguments(output_dir=str(output_dir), **settings),
        data_collator=collate,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(eval_rows),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
