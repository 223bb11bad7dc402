"""The commands of `trl`. A method whose trainer exists is one line in `TRAINING_METHODS`."""

from .base import Command, CommandContext
from .env import EnvCommand
from .preview import PreviewCommand
from .training import TRAINING_METHODS, TrainingCommand
from .vllm_serve import VllmServeCommand

__all__ = ["Command", "CommandContext", "get_commands"]


def get_commands() -> list[Command]:
    """
    All commands, in the order in which the help lists them.

    Returns:
        One object per command.
    """
    return [*(TrainingCommand(name) for name in TRAINING_METHODS), PreviewCommand(), VllmServeCommand(), EnvCommand()]
