"""
Training a reward model from the command line: what `trl reward` runs.

```bash
trl reward --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/ultrafeedback_binarized --output_dir out
```
"""

from __future__ import annotations

import argparse

from trl.scripts.training import make_script_parser, train_and_save, trainer_arguments
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, TrlParser, read_script_arguments
from trl.trainer.model_config import ModelConfig
from trl.trainer.reward_config import RewardConfig

ARGUMENTS = (ScriptArguments, RewardConfig, ModelConfig, DatasetMixtureConfig)


def main(
    script_args: ScriptArguments,
    training_args: RewardConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """
    Train a reward model, save, and push where asked.

    Args:
        script_args: the dataset.
        training_args: the training.
        model_args: model, quantization and adapter. The flag's default task type, that of a language model, becomes
            that of a classifier.
        dataset_args: a mixture of datasets, instead of the one of `script_args`.

    Raises:
        ValueError: no model, no dataset, or a split that is not there.
    """
    from trl import RewardTrainer

    if model_args.lora_task_type == "CAUSAL_LM":
        model_args.lora_task_type = "SEQ_CLS"
    trainer = RewardTrainer(**trainer_arguments(script_args, training_args, model_args, dataset_args))
    train_and_save(trainer, script_args, training_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> TrlParser:
    """The parser of this script; with `subparsers` (of a `TrlParser`) the subcommand `reward` there."""
    return make_script_parser("reward", "Train a reward model.", ARGUMENTS, subparsers, prog)


if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
