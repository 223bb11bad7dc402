"""`trl <method>`: run the method's script, through Accelerate's launcher."""

from __future__ import annotations

import importlib
import subprocess
import sys
from argparse import Namespace, _SubParsersAction

from .base import Command, CommandContext

TRAINING_METHODS = {
    "sft": "Fine-tune a model on texts or conversations (supervised fine-tuning).",
    "dpo": "Learn from pairs of answers, one preferred to the other (direct preference optimization).",
    "kto": "Learn from single answers that are good or bad (Kahneman-Tversky optimization).",
    "reward": "Train a model that scores answers, from pairs (reward model).",
    "grpo": "Sample answers and learn from their rewards, each compared with its group (GRPO).",
    "rloo": "Sample answers and learn from their rewards, less the mean of the others (REINFORCE leave-one-out).",
}
"""Method -> line of help. Each has a script `trl/scripts/<method>.py` with `make_parser` and `main`."""


class TrainingCommand(Command):
    """
    Runs the training script of a method.

    Flags that the script does not know go to `accelerate launch`, and so do such keys of the config file; the rest
    goes to the script.

    Args:
        name: the method.
    """

    def __init__(self, name: str):
        super().__init__(name, TRAINING_METHODS.get(name, f"Run the {name} training script."))

    def register(self, subparsers: _SubParsersAction) -> None:
        """Add the command. Its flags, and its help, are the script's: they cost an import."""
        subparsers.add_parser(self.name, help=self.help_text, add_help=False, allow_abbrev=False)

    def run(self, args: Namespace, context: CommandContext) -> int:
        """
        Check the arguments, then launch the script and wait for it.

        Returns:
            The script's exit code.

        Raises:
            ValueError: arguments that neither the script nor the launcher can use.
        """
        arguments = context.argv_after(self.name)
        from ...scripts.config_file import apply_environment, load_config_file, pop_config_flag

        path, _ = pop_config_flag(arguments)
        if path is not None:
            apply_environment(load_config_file(path))  # before the libraries that read it are imported

        from ...scripts.launch_options import launch_args_from_config, launch_option_names, split_launch_args

        script = importlib.import_module(f"trl.scripts.{self.name}")
        parser = script.make_parser(prog=f"trl {self.name}")
        parser.epilog = "Options of `accelerate launch` (such as --num_processes) are passed on to it."
        launch_args, script_args = split_launch_args(arguments, parser)
        rest, from_config = parser.apply_config(script_args)
        config_launch_args, unknown = launch_args_from_config(from_config)
        parser.refuse_unknown(unknown, [], also_known=launch_option_names())
        _, unknown_flags = parser.parse_known_args(rest)
        parser.refuse_unknown([], unknown_flags, also_known=launch_option_names())
        return self._launch([*config_launch_args, *launch_args], script_args)

    def _launch(self, launch_args: list[str], script_args: list[str]) -> int:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        from ..accelerate_launcher import launch_training_script

        try:
            launch_training_script(self.name, launch_args, script_args)
        except subprocess.CalledProcessError as error:  # the script has said why
            return error.returncode if error.returncode > 0 else 128 - error.returncode
        except ChildFailedError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
