"""What a command of `trl` is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from argparse import Namespace, _SubParsersAction
from dataclasses import dataclass


@dataclass(frozen=True)
class CommandContext:
    """
    What a command knows about how it was called.

    Args:
        argv: all arguments after `trl`.
    """

    argv: list[str]

    def argv_after(self, token: str) -> list[str]:
        """
        The arguments that follow the first `token`.

        Args:
            token: such as the command's name.

        Returns:
            They; nothing where `token` does not occur.
        """
        if token not in self.argv:
            return []
        return list(self.argv[self.argv.index(token) + 1 :])


class Command(ABC):
    """
    A command of `trl`.

    Args:
        name: what is typed.
        help_text: a line for `trl --help`.
    """

    def __init__(self, name: str, help_text: str):
        self.name = name
        self.help_text = help_text

    @abstractmethod
    def register(self, subparsers: _SubParsersAction) -> None:
        """
        Add the command to the parser of `trl`.

        Args:
            subparsers: as `add_subparsers` returned it.
        """

    @abstractmethod
    def run(self, args: Namespace, context: CommandContext) -> int:
        """
        Do what the command is for.

        Args:
            args: what the parser of `trl` made of the arguments.
            context: the arguments themselves.

        Returns:
            The exit code.
        """
