"""
The command line of a script: flags from dataclasses, defaults from a YAML file.

A value comes from the dataclass, else from the file, else from the flag: the later wins, always.
"""

from __future__ import annotations

import sys
from argparse import Action, ArgumentError, ArgumentTypeError, _SubParsersAction
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from ._hf_argparser import DataClass, DataClassType, HfArgumentParser, is_list, split_optional
from .config_file import apply_environment, did_you_mean, load_config_file, pop_config_flag


class TrlParser(HfArgumentParser):
    """
    Argument parser of a script: flags from dataclasses, and a YAML file (`--config`) that sets their defaults.

    Args:
        dataclass_types: a dataclass, or several; their fields become flags. None may have a field `config`.
        **kwargs: as for `argparse.ArgumentParser`. Abbreviated flags are off by default.

    Raises:
        ValueError: a dataclass has a field `config`.

    Example:
        ```python
        parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
        script_args, training_args, model_args = parser.parse_args_and_config()
        ```
    """

    def __init__(self, dataclass_types: DataClassType | Iterable[DataClassType] | None = None, **kwargs: Any):
        if dataclass_types is None:
            dataclass_types = []
        elif is_dataclass(dataclass_types):
            dataclass_types = [dataclass_types]
        dataclass_types = list(dataclass_types)
        for dataclass_type in dataclass_types:
            if any(field.name == "config" for field in fields(dataclass_type)):
                raise ValueError(
                    f"{dataclass_type.__name__} has a field `config`, a name that is reserved for the flag of the YAML "
                    "file. Rename the field."
                )
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(dataclass_types, **kwargs)

    # ---- Parsing ----

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[DataClass, ...]:
        """
        Parse flags and the YAML file they name into the dataclasses.

        Args:
            args: the arguments. By default those of the process.
            return_remaining_strings: also return what no field took, as a list of strings: first the file's keys
                (`"--key", "value"`), then the flags.
            fail_with_unknown_args: refuse what no field took, unless it is returned.
            separate_remaining_strings: return it as two lists, of the file and of the flags.

        Returns:
            The dataclass instances in order; then, where asked for, the remaining strings.

        Raises:
            ValueError: the file is missing or malformed, or something was left over.
        """
        rest, config_remaining = self.apply_config(args)
        *outputs, cli_remaining = self.parse_args_into_dataclasses(
            rest, return_remaining_strings=True, look_for_args_file=False
        )
        if separate_remaining_strings:
            return (*outputs, config_remaining, cli_remaining)
        if return_remaining_strings:
            return (*outputs, config_remaining + cli_remaining)
        if fail_with_unknown_args:
            self.refuse_unknown(config_remaining[::2], cli_remaining)
        return tuple(outputs)

    def apply_config(self, args: Iterable[str] | None = None) -> tuple[list[str], list[str]]:
        """
        Take the YAML file from the arguments, set the environment it asks for, and make its values the defaults.

        Args:
            args: the arguments. By default those of the process.

        Returns:
            The arguments without `--config`, and the file's keys and values that no flag has.
        """
        path, rest = pop_config_flag(sys.argv[1:] if args is None else args)
        if path is None:
            return rest, []
        config = apply_environment(load_config_file(path))
        try:
            return rest, self.set_defaults_with_config(**config)
        except ValueError as error:
            raise ValueError(f"{Path(path).name}: {error}") from error

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """
        Make values the defaults of the flags of the same name, in subcommands too. A required flag with a default is
        required no longer.

        Args:
            **kwargs: field names and values.

        Returns:
            What no flag took, as `"--key", "value"` strings.

        Raises:
            ValueError: a value that the field cannot take.
        """
        unused = {key: value for key, value in kwargs.items() if not self._set_default(key, value)}
        return [text for key, value in unused.items() for text in (f"--{key}", str(value))]

    def _set_default(self, key: str, value: Any) -> bool:
        used = False
        name = key.replace("-", "_")
        for action in self._actions:
            if isinstance(action, _SubParsersAction):
                for parser in set(action.choices.values()):  # an alias is the same parser again
                    used |= parser._set_default(key, value)
            elif action.dest == name and action.option_strings and name != "help":
                # Of `--field` and `--no_field`, the first has the type; both have the default.
                first = next(a for a in self._actions if a.dest == name)
                action.default = _default_from_config(first, value)
                action.required = False
                used = True
        return used

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, without the usage of all flags in front of it, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\nAll options: {self.prog} --help\n")

    # ---- What is not known ----

    def known_keys(self) -> set[str]:
        """The keys that a config file may have, those of subcommands too."""
        keys = {action.dest for action in self._actions if action.option_strings and action.dest != "help"}
        for action in self._actions:
            if isinstance(action, _SubParsersAction):
                keys = keys.union(*(parser.known_keys() for parser in action.choices.values()))
        return keys

    def refuse_unknown(self, keys: Iterable[str], flags: Iterable[str], also_known: Iterable[str] = ()) -> None:
        """
        Raise for what nobody knows.

        Args:
            keys: keys of the YAML file that no flag has; leading dashes do not count.
            flags: arguments that no flag took.
            also_known: further names to suggest.

        Raises:
            ValueError: there is something; it names the nearest known flag of each.
        """
        known_keys = {*self.known_keys(), "env", *also_known}
        known_flags = {option.lstrip("-").replace("-", "_") for option in self._option_string_actions} | known_keys
        problems = []
        for key in keys:
            name = key.lstrip("-").replace("-", "_")
            problems.append(f"Unknown key `{key.lstrip('-')}` in the config file.{did_you_mean(name, known_keys)}")
        for flag in flags:
            if flag.startswith("--"):
                text = flag.partition("=")[0]
                near = did_you_mean(text[2:].replace("-", "_"), {*known_flags, "config"} - {"env"})
                problems.append(f"Unknown argument `{text}`.{near.replace('`', '`--', 1)}")
        if not problems:
            problems = [f"Unexpected argument `{flag}`: it belongs to no flag." for flag in flags]
        if problems:
            raise ValueError("\n".join(problems))


def _default_from_config(action: Action, value: Any) -> Any:
    """
    What a flag's default becomes when the config file says `value`, checked as the flag's own text would be.

    Args:
        action: the flag.
        value: as YAML has it: None, bool, number, text, list or mapping.

    Returns:
        The value in the field's type.

    Raises:
        ValueError: the field cannot take it; the message names the field.
    """
    annotation = getattr(action, "annotation", None)
    if annotation is None:  # a flag that is no dataclass field
        return value
    members, optional = split_optional(annotation)
    try:
        if value is None:
            if not optional and members[0] in (bool, int, float):
                raise ArgumentTypeError(f"cannot be empty; remove it to get the default ({action.default})")
            return None
        if isinstance(value, list):
            if not is_list(annotation):
                raise ArgumentTypeError(f"takes one value, found the list {value}")
            return [_element(action, item) for item in value]
        if isinstance(value, dict):
            if any((getattr(m, "__origin__", m)) is dict for m in members):
                return value
            if is_dataclass(members[0]):
                return members[0](**value)
            raise ArgumentTypeError(f"takes no mapping, found {value}")
        return _scalar(action, members, value)
    except (ArgumentTypeError, ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"`{action.dest}` {_reason(action, value, error)}") from error


def _element(action: Action, item: Any) -> Any:
    """An item of a list: text and numbers as the flag reads them; mappings (datasets) as they are."""
    return item if isinstance(item, dict) or item is None else _read(action, item)


def _scalar(action: Action, members: tuple[Any, ...], value: Any) -> Any:
    """A single value. Where it is of one of the field's types already it stays; else its text is read."""
    if type(value) in members and action.choices is None and not isinstance(value, str):
        return value
    if value is True and action.nargs == "?" and action.const is not None:
        return action.const
    if action.nargs == "+" and str not in members:
        return [_read(action, value)]
    if isinstance(value, bool) and members[0] in (int, float):
        raise ArgumentTypeError(f"takes a number, found {value}")
    if isinstance(value, float) and value.is_integer() and members[0] is int:
        value = int(value)  # `max_steps: 1e3`
    return _read(action, value)


def _read(action: Action, value: Any) -> Any:
    text = str(value)
    if isinstance(value, bool) and action.choices is not None:
        text = "yes" if value else "no"  # YAML reads a bare `no` as a boolean
    result = action.type(text) if callable(action.type) else text
    if action.choices is not None and result is not None and result not in action.choices:
        near = did_you_mean(text, map(str, action.choices))
        raise ArgumentTypeError(f"takes one of {', '.join(map(str, action.choices))}; found {text!r}.{near}")
    return result


def _reason(action: Action, value: Any, error: Exception) -> str:
    if isinstance(error, ArgumentTypeError):
        return str(error)
    kind = getattr(action.type, "__name__", str(action.type))
    return f"takes a value of type {kind}, found {value!r}"
