"""`trl vllm-serve`: a vLLM server that trainers sample from and send new weights to."""

from __future__ import annotations

import sys
from argparse import Namespace, _SubParsersAction

from .base import Command, CommandContext


class VllmServeCommand(Command):
    """Becomes vLLM's own server, with the routes for new weights."""

    def __init__(self):
        super().__init__("vllm-serve", "Serve a model with vLLM to sample from while training.")

    def register(self, subparsers: _SubParsersAction) -> None:
        """Add the command. Its flags, and its help, are the script's: they cost an import."""
        subparsers.add_parser(self.name, help=self.help_text, add_help=False, allow_abbrev=False)

    def run(self, args: Namespace, context: CommandContext) -> int:
        """
        Check the arguments, then become the server.

        Returns:
            The exit code, where the server was not even started.

        Raises:
            ValueError: arguments that cannot be used.
        """
        from ...scripts import vllm_serve

        try:
            vllm_serve.main(*vllm_serve.read_arguments(context.argv_after(self.name), prog="trl vllm-serve"))
        except ImportError as error:
            print(f"trl vllm-serve: error: {error}", file=sys.stderr)
        return 1
