"""
Supervised fine-tuning from the command line: what `trl sft` runs.

```bash
trl sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara --output_dir out
```
"""

from __future__ import annotations

import argparse
from typing import Any

from transformers.utils import logging

from trl.scripts.utils import (
    DatasetMixtureConfig,
    ScriptArguments,
    TrlParser,
    load_script_dataset,
    read_script_arguments,
    select_split,
)
from trl.trainer.model_config import ModelConfig
from trl.trainer.sft_config import SFTConfig

logger = logging.get_logger(__name__)

ARGUMENTS = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)


def main(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """
    Fine-tune, save, and push where asked.

    Args:
        script_args: the dataset.
        training_args: the training.
        model_args: model, quantization and adapter.
        dataset_args: a mixture of datasets, instead of the one of `script_args`.

    Raises:
        ValueError: no model, no dataset, or a split that is not there.
    """
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    if model_args.model_name_or_path is None:
        raise ValueError("No model. Name one with `--model_name_or_path`: on the Hub, or a folder.")
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)

    dataset = load_script_dataset(script_args, dataset_args)
    train_dataset = select_split(dataset, script_args.dataset_train_split, "dataset_train_split")
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = select_split(dataset, script_args.dataset_test_split, "dataset_test_split")

    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args.resume_from_checkpoint))
    trainer.accelerator.print("Training is complete.")

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"The model is saved in {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"The model is on the Hub: {trainer.hub_model_id}.")
    if hasattr(trainer, "end"):  # Transformers >= 5.18
        trainer.end()


def model_init_kwargs(model_args: ModelConfig, training_args: SFTConfig) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`: the model flags, then what `model_init_kwargs` says otherwise."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def checkpoint_to_resume(value: str | bool | None) -> str | bool | None:
    """`--resume_from_checkpoint` is a folder, or `true` for the newest checkpoint of the output folder."""
    return {"true": True, "false": None}.get(value.lower(), value) if isinstance(value, str) else value


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> TrlParser:
    """
    The parser of this script.

    Args:
        subparsers: make it the subcommand `sft` there; its parent must be a `TrlParser`.
        prog: name in the help.

    Returns:
        The parser.
    """
    if subparsers is not None:
        return subparsers.add_parser("sft", help="Supervised fine-tuning.", dataclass_types=ARGUMENTS)
    return TrlParser(ARGUMENTS, prog=prog)


if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
