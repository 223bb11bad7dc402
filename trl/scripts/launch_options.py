"""The options of `accelerate launch`, and telling them from a script's own."""

from __future__ import annotations

import functools
from argparse import Action, ArgumentParser

from ._hf_argparser import string_to_bool
from .parser import TrlParser

ACCELERATE_CONFIG = "accelerate_config"
"""Our own launch option: the name of a built-in Accelerate config, or a file."""


@functools.cache
def _launch_parser() -> ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


@functools.cache
def _options() -> dict[str, Action]:
    """Long option -> action of `accelerate launch`, without its help."""
    options = _launch_parser()._option_string_actions
    return {text: action for text, action in options.items() if text.startswith("--") and action.dest != "help"}


def launch_option_names() -> set[str]:
    """Names of all launch options, without dashes."""
    return {text[2:].replace("-", "_") for text in _options()} | {ACCELERATE_CONFIG}


def is_launch_option(text: str) -> bool:
    """Whether `--name` (or a config file's `name`) is an option of the launcher."""
    return text.lstrip("-").replace("-", "_") in launch_option_names()


def split_launch_args(args: list[str], script_parser: TrlParser) -> tuple[list[str], list[str]]:
    """
    Tell the launcher's flags from the script's. A flag that both know is the script's.

    Args:
        args: flags and their values.
        script_parser: the script's parser.

    Returns:
        The launcher's arguments and the script's. What neither knows stays with the script's, whose parser says so.
    """
    launch_args, script_args = [], []
    position = 0
    while position < len(args):
        token = args[position]
        name, has_value, _ = token.partition("=")
        position += 1
        ours = name in script_parser._option_string_actions
        accelerate_config = name.replace("-", "_") == f"__{ACCELERATE_CONFIG}"
        if ours or not (name in _options() or accelerate_config):
            script_args.append(token)
            continue
        launch_args.append(token)
        takes_value = accelerate_config or _options()[name].nargs != 0
        if takes_value and not has_value and position < len(args):
            launch_args.append(args[position])
            position += 1
    return launch_args, script_args


def launch_args_from_config(remaining: list[str]) -> tuple[list[str], list[str]]:
    """
    Turn the config file's keys that no script flag has into launcher arguments.

    Args:
        remaining: `"--key", "value"` strings.

    Returns:
        The launcher's arguments, and the keys that the launcher does not know either.

    Raises:
        ValueError: a switch whose value is neither yes nor no.
    """
    launch_args, unknown = [], []
    for key, value in zip(remaining[::2], remaining[1::2], strict=True):
        flag = "--" + key[2:].replace("-", "_")
        if not is_launch_option(flag):
            unknown.append(key)
        elif value == "None":
            continue
        elif flag[2:] == ACCELERATE_CONFIG or _options()[flag].nargs != 0:
            launch_args += [flag, value]
        elif _is_yes(flag, value):
            launch_args.append(flag)
    return launch_args, unknown


def _is_yes(flag: str, value: str) -> bool:
    try:
        return string_to_bool(value)
    except Exception as error:
        raise ValueError(f"`{flag[2:]}` is a switch: true or false. Found {value!r}.") from error
