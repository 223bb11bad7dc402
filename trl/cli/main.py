"""
Entry point of `trl`: picks the command and hands over.

Nothing heavy is imported here, so that `trl --help` answers at once.
"""

from __future__ import annotations

import argparse
import sys

from .commands import CommandContext, get_commands


def main(argv: list[str] | None = None) -> int:
    """
    Run `trl`.

    Args:
        argv: the arguments after `trl`. By default those of the process.

    Returns:
        The exit code.

    Raises:
        ValueError: arguments that cannot be used. On the command line (`argv` None) it is printed instead, and the
            exit code is 2.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    commands = {command.name: command for command in get_commands()}
    parser = argparse.ArgumentParser(prog="trl", description="Post-training of language models.", allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for command in commands.values():
        command.register(subparsers)

    namespace, unknown = parser.parse_known_args(arguments)
    if namespace.command is None:
        if unknown:
            parser.error(f"unknown argument {unknown[0]}; a command comes first: trl {next(iter(commands))} ...")
        parser.print_help()
        return 0
    try:
        return commands[namespace.command].run(namespace, CommandContext(argv=arguments))
    except ValueError as error:
        if argv is not None:
            raise
        print(f"trl {namespace.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
