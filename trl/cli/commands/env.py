"""`trl env`: what is installed, for a bug report."""

from __future__ import annotations

from argparse import Namespace, _SubParsersAction

from .base import Command, CommandContext


class EnvCommand(Command):
    """Prints the versions and devices that a bug report should name."""

    def __init__(self):
        super().__init__("env", "Print versions and devices, for a bug report.")

    def register(self, subparsers: _SubParsersAction) -> None:
        """Add the command; it has no options of its own."""
        subparsers.add_parser(self.name, help=self.help_text, description=self.help_text, allow_abbrev=False)

    def run(self, args: Namespace, context: CommandContext) -> int:
        """Print the table."""
        rest = context.argv_after(self.name)
        if rest:
            raise ValueError(f"`trl env` takes no arguments, found {' '.join(rest)}.")
        from ...scripts.env import print_env

        print_env()
        return 0
