"""
REINFORCE leave-one-out from the command line: what `trl rloo` runs.

```bash
trl rloo --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/DeepMath-103K --reward_funcs accuracy_reward --output_dir out
```
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from trl.scripts.online import _OnlineScriptArguments, load_reward_funcs
from trl.scripts.training import make_script_parser, train_and_save, trainer_arguments
from trl.scripts.utils import DatasetMixtureConfig, TrlParser, read_script_arguments
from trl.trainer.model_config import ModelConfig
from trl.trainer.rloo_config import RLOOConfig


@dataclass
class RLOOScriptArguments(_OnlineScriptArguments):
    """
    Arguments of `trl rloo` besides those of the training, the model and mixtures.

    Args:
        reward_model_name_or_path: reward model, on the Hub or a folder. By default none.
        reward_funcs: reward functions, by built-in name or import path. By default none.

    Raises:
        ValueError: a name that is not built in, and no import path.
    """


ARGUMENTS = (RLOOScriptArguments, RLOOConfig, ModelConfig, DatasetMixtureConfig)


def main(
    script_args: RLOOScriptArguments,
    training_args: RLOOConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> None:
    """
    Sample completions, learn from their rewards, save, and push where asked.

    Args:
        script_args: the dataset and the rewards.
        training_args: the training.
        model_args: model, quantization and adapter.
        dataset_args: a mixture of datasets, instead of the one of `script_args`.

    Raises:
        ValueError: no model, no dataset, a split that is not there, no reward, or one that cannot be found.
    """
    from trl import RLOOTrainer

    reward_funcs = load_reward_funcs(script_args, training_args)  # first: no model is loaded for a misspelt name
    arguments = trainer_arguments(script_args, training_args, model_args, dataset_args)
    train_and_save(RLOOTrainer(reward_funcs=reward_funcs, **arguments), script_args, training_args)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> TrlParser:
    """The parser of this script; with `subparsers` (of a `TrlParser`) the subcommand `rloo` there."""
    return make_script_parser("rloo", "REINFORCE leave-one-out.", ARGUMENTS, subparsers, prog)


if __name__ == "__main__":
    main(*read_script_arguments(make_parser()))
