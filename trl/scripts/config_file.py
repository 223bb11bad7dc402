"""
The `--config` file: a YAML mapping whose keys are flags without the dashes, and `env:` for environment variables.

Light on purpose: a command reads it, and sets the environment, before anything heavy is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that reads `1e-5` as a number (YAML 1.1 wants `1.0e-5`) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key_node.value!r} stands there twice", problem_mark=key_node.start_mark
                )
            if isinstance(key_node.value, str):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def pop_config_flag(args: Iterable[str]) -> tuple[str | None, list[str]]:
    """
    Take `--config PATH` or `--config=PATH` out of command line arguments.

    Args:
        args: the arguments.

    Returns:
        The path (None when there is none) and the other arguments.

    Raises:
        ValueError: the path is missing, or two are given.
    """
    paths, rest = [], []
    tokens = iter(args)
    for token in tokens:
        if token == "--config":
            path = next(tokens, None)
            if path is None or path.startswith("--"):
                raise ValueError("`--config` needs the path of a YAML file: --config run.yaml")
            paths.append(path)
        elif token.startswith("--config="):
            paths.append(token.removeprefix("--config="))
        else:
            rest.append(token)
    if len(paths) > 1:
        raise ValueError(f"`--config` takes one file, found {len(paths)}: {', '.join(paths)}.")
    return (paths[0] if paths else None), rest


def load_config_file(path: str | os.PathLike) -> dict[str, Any]:
    """
    Read a YAML config.

    Args:
        path: the file.

    Returns:
        Its keys and values; nothing for an empty file.

    Raises:
        ValueError: the file is missing, is no YAML, or holds something else than `key: value` lines.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        siblings = sorted(p.name for p in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        raise ValueError(f"There is no config file {path}.{did_you_mean(file.name, siblings)}")
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The config file {path} is not valid YAML: {error}") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise ValueError(
            f"The config file {path} must be a mapping, `key: value` on each line. Found a {type(config).__name__}."
        )
    return {str(key): value for key, value in config.items()}


def apply_environment(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Set the environment variables of a config's `env` key.

    Args:
        config: as read from the file.

    Returns:
        The config without `env`.

    Raises:
        ValueError: `env` is not a mapping.
    """
    rest = dict(config)
    environment = rest.pop("env", None)
    if environment is None:
        return rest
    if not isinstance(environment, Mapping):
        raise ValueError(
            f"`env` in a config file is a mapping of variables, e.g. `env: {{WANDB_PROJECT: mine}}`. Found "
            f"{environment!r}."
        )
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return rest


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` for the known name nearest to `name`, or nothing."""
    known = sorted(known, key=len)
    near = get_close_matches(name, known, n=1, cutoff=0.6) or [other for other in known if other.startswith(name)]
    return f" Did you mean `{near[0]}`?" if near else ""
