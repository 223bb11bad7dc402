"""`--accelerate_config`: a built-in configuration of Accelerate by its name, or a file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..scripts.config_file import did_you_mean

FLAGS = ("--accelerate_config", "--accelerate-config")


def resolve_accelerate_config_argument(launch_args: list[str]) -> list[str]:
    """
    Turn `--accelerate_config NAME_OR_PATH` into `accelerate launch`'s `--config_file PATH`.

    Args:
        launch_args: arguments of the launcher. Where the flag is given more than once, the last counts.

    Returns:
        The arguments with the file in place of the name.

    Raises:
        ValueError: the value is missing, or neither a file nor a built-in name.
    """
    resolved: list[str] = []
    value = None
    tokens = iter(launch_args)
    for token in tokens:
        name, equals, text = token.partition("=")
        if name not in FLAGS:
            resolved.append(token)
            continue
        value = text if equals else next(tokens, None)
        if not value or value.startswith("--"):
            raise ValueError(
                f"`--accelerate_config` needs a value: one of {', '.join(builtin_configs())}, or the path of a file."
            )
    return resolved if value is None else ["--config_file", str(_find(value)), *resolved]


def builtin_configs() -> dict[str, Path]:
    """The built-in configurations: name -> file."""
    folder = Path(str(resources.files("trl.accelerate_configs")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _find(value: str) -> Path:
    if Path(value).is_file():
        return Path(value)
    builtin = builtin_configs()
    if value in builtin:
        return builtin[value]
    raise ValueError(
        f"`--accelerate_config {value}`: no such file, and no built-in configuration ({', '.join(builtin)})."
        f"{did_you_mean(value, builtin)}"
    )
