"""`trl preview <method>`: show what a run would train on, before it starts."""

from __future__ import annotations

import importlib
from argparse import Namespace, _SubParsersAction

from .base import Command, CommandContext

PREVIEWS = {method: f"preview_{method}" for method in ("sft", "dpo", "kto", "reward", "grpo", "rloo")}
"""Method -> function of `trl.scripts.preview`."""


class PreviewCommand(Command):
    """
    Prints the first examples of a run as coloured tokens: context, trained, cut; of methods that sample, the prompts.
    Loads no model.
    """

    def __init__(self):
        super().__init__("preview", "Show what a run would train on, token by token, without a model.")

    def register(self, subparsers: _SubParsersAction) -> None:
        """Add the command. After the method come the flags of its training script."""
        parser = subparsers.add_parser(self.name, help=self.help_text, add_help=False, allow_abbrev=False)
        parser.add_argument("method", nargs="?")

    def run(self, args: Namespace, context: CommandContext) -> int:
        """
        Read the flags and the config as training would, and print the examples.

        Raises:
            ValueError: no or an unknown method, arguments that do not exist, or data that cannot be used.
        """
        arguments = context.argv_after(self.name)
        if not arguments or arguments[0] in ("-h", "--help"):
            print(
                "usage: trl preview METHOD [--config CONFIG] [options]\n\n"
                f"{self.help_text}\nMethods: {', '.join(PREVIEWS)}. "
                "`trl preview METHOD --help` lists the options: those of `trl METHOD`, and how many rows to show."
            )
            return 0
        method, *arguments = arguments
        if method not in PREVIEWS:
            raise ValueError(
                f"`trl preview` is followed by a method: {', '.join(PREVIEWS)}. Found {method!r}. "
                "For example: trl preview sft --config run.yaml"
            )
        from ...scripts.config_file import apply_environment, load_config_file, pop_config_flag

        path, _ = pop_config_flag(arguments)
        if path is not None:
            apply_environment(load_config_file(path))  # before the libraries that read it are imported

        from ...scripts import preview
        from ...scripts.launch_options import split_launch_args
        from ...scripts.parser import TrlParser
        from ...scripts.utils import read_script_arguments

        script = importlib.import_module(f"trl.scripts.{method}")
        parser = TrlParser((*script.ARGUMENTS, preview.PreviewArguments), prog=f"trl preview {method}")
        _, script_args = split_launch_args(arguments, parser)  # so that the same line works with `preview` in it
        print(getattr(preview, PREVIEWS[method])(*read_script_arguments(parser, script_args)))
        return 0
