"""From parsed arguments to a saved model: what every training script does the same way."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .parser import TrlParser
from .utils import DatasetMixtureConfig, ScriptArguments, load_script_dataset, select_split

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from ..trainer.model_config import ModelConfig


def make_script_parser(
    name: str,
    help_text: str,
    dataclass_types: tuple[type, ...],
    subparsers: argparse._SubParsersAction | None = None,
    prog: str | None = None,
) -> TrlParser:
    """
    The parser of a training script.

    Args:
        name: the method, such as `"sft"`.
        help_text: a line of what it does.
        dataclass_types: the dataclasses whose fields are its flags, in the order in which its `main` takes them.
        subparsers: make it the subcommand `name` there; its parent must be a `TrlParser`.
        prog: name in the help.

    Returns:
        The parser.
    """
    if subparsers is not None:
        return subparsers.add_parser(name, help=help_text, dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


def trainer_arguments(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> dict[str, Any]:
    """
    What a script gives to its trainer, whichever that is.

    Args:
        script_args: the dataset.
        training_args: the training; its `model_init_kwargs` are completed with the model flags.
        model_args: model, quantization and adapter.
        dataset_args: a mixture of datasets, instead of the one of `script_args`.

    Returns:
        Keyword arguments: `model`, `args`, `train_dataset`, `eval_dataset` (None unless `eval_strategy` asks for
        evaluation), `quantization_config`, `peft_config`.

    Raises:
        ValueError: no model, no dataset, or a split that is not there.
    """
    from trl import get_peft_config, get_quantization_config

    if model_args.model_name_or_path is None:
        raise ValueError("No model. Name one with `--model_name_or_path`: on the Hub, or a folder.")
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)

    dataset = load_script_dataset(script_args, dataset_args)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = select_split(dataset, script_args.dataset_test_split, "dataset_test_split")
    return {
        "model": model_args.model_name_or_path,
        "args": training_args,
        "train_dataset": select_split(dataset, script_args.dataset_train_split, "dataset_train_split"),
        "eval_dataset": eval_dataset,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }


def train_and_save(trainer: Trainer, script_args: ScriptArguments, training_args: TrainingArguments) -> None:
    """
    Train, save, and push where asked.

    Args:
        trainer: as the script made it.
        script_args: the dataset's name, for the model card.
        training_args: where to save, what to resume, and whether to push.
    """
    if script_args.ignore_bias_buffers:
        leave_out_boolean_buffers(trainer.model)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args.resume_from_checkpoint))
    trainer.accelerator.print("Training is complete.")

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"The model is saved in {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"The model is on the Hub: {trainer.hub_model_id}.")
    if hasattr(trainer, "end"):  # Transformers >= 5.18
        trainer.end()


def model_init_kwargs(model_args: ModelConfig, training_args: TrainingArguments) -> dict[str, Any]:
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


def leave_out_boolean_buffers(model: nn.Module) -> None:
    """Keep DistributedDataParallel from synchronising boolean buffers (causal masks), which it cannot send."""
    import torch

    boolean = [name for name, buffer in model.named_buffers() if buffer.dtype == torch.bool]
    model._ddp_params_and_buffers_to_ignore = [*getattr(model, "_ddp_params_and_buffers_to_ignore", []), *boolean]
