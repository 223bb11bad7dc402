"""What the scripts of methods share that learn from rewards: which rewards, by name."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .config_file import did_you_mean
from .utils import ScriptArguments

if TYPE_CHECKING:
    from ..trainer.online_config import _OnlineConfig

logger = logging.getLogger(__name__)

BUILTIN_REWARDS: dict[str, dict[str, Any] | None] = {
    "accuracy_reward": None,
    "reasoning_accuracy_reward": None,
    "think_format_reward": None,
    "code_execution_reward": None,
    "get_soft_overlong_punishment": {"max_completion_len": 1280, "soft_punish_cache": 256},
    "get_repetition_penalty_reward": {"ngram_size": 3, "max_penalty": -1.0},
}
"""Name in `trl.rewards` -> None for a reward function, or what the function that makes one is called with."""


@dataclass
class _OnlineScriptArguments(ScriptArguments):
    """The dataset, and where rewards come from."""

    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Reward model: a sequence classifier with one label, on the Hub or a folder."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: names of built-in ones (" + ", ".join(BUILTIN_REWARDS) + "), or import paths "
            "of your own, such as `my_rewards.length_reward` for a function in my_rewards.py of the working directory."
        },
    )

    def __post_init__(self):
        for name in self.reward_funcs or []:
            _check_name(name)


def _check_name(name: str) -> None:
    """Refuse what can be neither a built-in name nor an import path, before anything is imported."""
    if name in BUILTIN_REWARDS:
        return
    if "/" in name or os.sep in name or name.endswith(".py"):
        module = Path(name).stem if name.endswith(".py") else "my_rewards"
        raise ValueError(
            f"`reward_funcs` are names of functions. Found {name!r}. A function in a file is named by its import path, "
            f"such as `{module}.my_function`; a reward model is given as `reward_model_name_or_path`."
        )
    if "." not in name:
        raise ValueError(
            f"There is no built-in reward function {name!r}.{did_you_mean(name, BUILTIN_REWARDS)} There are: "
            f"{', '.join(BUILTIN_REWARDS)}. A function of your own is named by its import path, such as "
            f"`my_rewards.{name}`; a reward model is given as `reward_model_name_or_path`."
        )


def load_reward_funcs(script_args: _OnlineScriptArguments, training_args: _OnlineConfig) -> list[str | Callable]:
    """
    The rewards that a script was asked for.

    Args:
        script_args: the names.
        training_args: warns where a reward does not fit it.

    Returns:
        The reward model's name, where there is one, then the functions in the order given: as `reward_weights` has it.

    Raises:
        ValueError: no reward at all, a name that is not built in, or an import path that leads to no function.
    """
    rewards: list[str | Callable] = []
    if script_args.reward_model_name_or_path:
        rewards.append(script_args.reward_model_name_or_path)
    rewards += [_load_function(name) for name in script_args.reward_funcs or []]
    if not rewards:
        raise ValueError(
            "Nothing to learn from: no reward. Name reward functions with `--reward_funcs` (built-in: "
            f"{', '.join(BUILTIN_REWARDS)}; or the import path of your own), or a model with "
            "`--reward_model_name_or_path`."
        )
    _warn_of_idle_punishment(script_args.reward_funcs or [], training_args.max_completion_length)
    return rewards


def _load_function(name: str) -> Callable:
    _check_name(name)
    if name not in BUILTIN_REWARDS:
        return _import_function(name)
    from .. import rewards

    settings = BUILTIN_REWARDS[name]
    return getattr(rewards, name) if settings is None else getattr(rewards, name)(**settings)


def _import_function(path: str) -> Callable:
    """The function at a dotted path. Modules of the working directory come first."""
    module_name, _, function_name = path.rpartition(".")
    module = _import_module(module_name, path)
    function = getattr(module, function_name, None)
    if inspect.isclass(function):
        raise ValueError(
            f"The reward function {path!r} is a class. Name a function, or an object with `__call__`: for instance add "
            f"`my_reward = {function_name}()` to {module_name} and name `{module_name}.my_reward`."
        )
    if callable(function):
        return function
    if function is not None:
        raise ValueError(f"The reward function {path!r} is no function, but a {type(function).__name__}.")
    here = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    where = f" ({module.__file__})" if getattr(module, "__file__", None) else ""
    raise ValueError(
        f"There is no reward function {path!r}: the module `{module_name}`{where} has no `{function_name}`."
        f"{did_you_mean(function_name, here)}"
    )


def _import_module(name: str, path: str) -> ModuleType:
    folder = os.getcwd()
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"The module `{name}` of the reward function {path!r} needs `{error.name}`, which is not there. "
                "Install it."
            ) from error
        file = error.name.replace(".", os.sep) + ".py"
        near = did_you_mean(error.name, [path.stem for path in Path(folder).glob("*.py")])
        raise ValueError(
            f"There is no module `{error.name}` for the reward function {path!r}: no {file} in the working directory "
            f"({folder}), and nothing of that name is installed.{near}"
        ) from error


def _warn_of_idle_punishment(names: list[str], max_completion_length: int | None) -> None:
    settings = BUILTIN_REWARDS["get_soft_overlong_punishment"]
    begins = settings["max_completion_len"] - settings["soft_punish_cache"]
    if "get_soft_overlong_punishment" in names and max_completion_length and max_completion_length <= begins:
        logger.warning(
            f"`get_soft_overlong_punishment` begins after {begins} tokens, and completions end at "
            f"max_completion_length={max_completion_length}: it will always be 0. Raise that, or write "
            f"`my_reward = get_soft_overlong_punishment({max_completion_length}, ...)` in a module of your own and name "
            "it by its import path."
        )
