"""
Environments: a class per task, an instance per rollout.

An environment is a plain Python object. Its `reset` sets the scene, its public methods are the tools, `get_reward`,
if there is one, says how it went. Methods are looked up on the class, so that an attribute that happens to be callable
is never offered to the model.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .types import Messages

ENVIRONMENT_COLUMN = "environment"


class SupportsReset(Protocol):
    """What an environment must have."""

    def reset(self, **row: Any) -> str | list[dict[str, Any]] | None:
        """Begin anew for a row of the dataset; what is returned is shown to the model, at the end of the prompt."""


EnvironmentFactory = Callable[[], SupportsReset]


class EnvironmentPool:
    """
    Instances of environments, made when needed and used again in later batches.

    Args:
        factory: makes an environment, or a dict of such by name; then the column `environment` of a row names its own.

    Attributes:
        factories: by name; a single one is called `None`.
        environments: those of the last batch, one per rollout.

    Raises:
        ValueError: a class has no `reset`, or the dict is empty.
        TypeError: a factory cannot be called.
    """

    def __init__(self, factory: EnvironmentFactory | Mapping[str, EnvironmentFactory]):
        self.is_routed = isinstance(factory, Mapping)
        self.factories: dict[str | None, EnvironmentFactory] = dict(factory) if self.is_routed else {None: factory}
        if not self.factories:
            raise ValueError("`environment_factory` is an empty dict: it needs a factory for each environment.")
        self.environments: list[Any] = []
        self._instances = {name: [self._make(name)] for name in self.factories}

    @property
    def classes(self) -> list[type]:
        """The environments' classes, each once."""
        return list(dict.fromkeys(type(instances[0]) for instances in self._instances.values()))

    @property
    def rewarding_classes(self) -> list[type]:
        """Those of the classes that say themselves how a rollout went."""
        return [cls for cls in self.classes if callable(getattr(cls, "get_reward", None))]

    def tools_of(self, name: str | None) -> list[Callable]:
        """The tools of the environments of one name, bound to their first instance: to be described, not run."""
        return environment_tools(self._instances[name][0])

    def name_of(self, row: Mapping[str, Any]) -> str | None:
        """
        Which environment a row wants.

        Raises:
            ValueError: it names none, or one there is no factory for.
        """
        if not self.is_routed:
            return None
        name = row.get(ENVIRONMENT_COLUMN)
        if name not in self.factories:
            raise ValueError(
                f"A row's `{ENVIRONMENT_COLUMN}` is {name!r}, for which there is no factory. `environment_factory` has: "
                f"{', '.join(map(repr, self.factories))}."
            )
        return name

    def acquire(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """An instance for each row, no two the same. Those of the batch before are taken back by this."""
        used = dict.fromkeys(self.factories, 0)
        self.environments = []
        for row in rows:
            name = self.name_of(row)
            if used[name] == len(self._instances[name]):
                self._instances[name].append(self._make(name))
            self.environments.append(self._instances[name][used[name]])
            used[name] += 1
        return self.environments

    def reset_arguments(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What `reset` gets of a row: copies, for an environment may change them."""
        return copy.deepcopy(
            {key: value for key, value in row.items() if not (self.is_routed and key == ENVIRONMENT_COLUMN)}
        )

    def _make(self, name: str | None) -> Any:
        factory = self.factories[name]
        if not callable(factory):
            raise TypeError(f"`environment_factory` must be a class or function to call; found {factory!r}.")
        environment = factory()
        if not callable(getattr(type(environment), "reset", None)):
            raise ValueError(
                f"The environment {type(environment).__name__} has no `reset` method. It is called with a row's columns "
                "before every rollout: `def reset(self, **row) -> str | None`."
            )
        return environment


def environment_tools(environment: Any) -> list[Callable]:
    """The bound methods the model may call: public functions of the class, but not `reset` and `get_reward`."""
    names = [
        name
        for name, _ in inspect.getmembers(type(environment), inspect.isfunction)
        if not name.startswith("_") and name not in ("reset", "get_reward")
    ]
    return [getattr(environment, name) for name in names]


def append_observation(prompt: str | Messages, observation: str | Sequence[dict[str, Any]] | None) -> str | Messages:
    """
    A prompt with what `reset` returned at the end of its last message.

    Args:
        prompt: text or messages; not changed.
        observation: text, content blocks, or `None` for nothing.

    Raises:
        TypeError: the observation is something else.
    """
    if observation is None:
        return prompt
    if not isinstance(observation, str | list):
        raise TypeError(
            "`reset` of an environment returns text, a list of content blocks or None; found "
            f"{type(observation).__name__}."
        )
    if isinstance(prompt, str):
        if not isinstance(observation, str):
            raise TypeError("`reset` returned content blocks, which need a conversational prompt; this one is text.")
        return prompt + observation
    last = prompt[-1]
    content = last.get("content") or ""
    if isinstance(content, str) and isinstance(observation, str):
        joined: Any = content + observation
    else:
        joined = _as_blocks(content) + _as_blocks(observation)
    return [*prompt[:-1], {**last, "content": joined}]


def _as_blocks(content: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return list(content)
