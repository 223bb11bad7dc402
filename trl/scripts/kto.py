"""
Kahneman-Tversky optimization from the command line: what `trl kto` runs.

```bash
trl kto --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/kto-mix-14k --output_dir out
```
"""

from __future__ import annotations

import argparse

from trl.scripts.training import make_script_parser, train_and_save, trainer_arguments
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, TrlParser, read_script_arguments
from trl.trainer.kto_config import KTOConfig
from trl.trainer.model_config import ModelConfig

ARGUMENTS = (ScriptArguments, KTOConfig, ModelConfig, DatasetMixtureConfig)


def main(
    script_args: ScriptArguments,
    training_args: KTOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """
    Train on answers that are good or bad, save, and push where asked.

    The reference is the model as it is loaded; an adapter's reference is the model without it.

    Args:
        script_args: the dataset.
        training_args: the training.
        model_args: model, quantization and adapter.
        dataset_args: a mixture of datasets, instead of the one of `script_args`.

    Raises:
        ValueError: no model, no dataset, or a split that is not there.
    """
    from trl import KTOTrainer

    trainer = KTOTrainer(**trainer_arguments(script_args, training_args, model_args, dataset_args))
    train_and_save(trainer, script_args, training_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> TrlParser:
    """The parser of this script; with `subparsers` (of a `TrlParser`) the subcommand `kto` there."""
    return make_script_parser("kto", "Kahneman-Tversky optimization.", ARGUMENTS, subparsers, prog)


if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
