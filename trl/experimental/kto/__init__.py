"""The former place of KTO, which is stable now: `from trl import KTOConfig, KTOTrainer`."""

import warnings
from dataclasses import dataclass
from typing import Any

from ...trainer.kto_config import KTOConfig as _KTOConfig
from ...trainer.kto_trainer import KTOTrainer as _KTOTrainer

__all__ = ["KTOConfig", "KTOTrainer"]


def _warn_moved(name: str) -> None:
    warnings.warn(
        f"`trl.experimental.kto.{name}` is now `trl.{name}`. The old path will be removed in version 2.0.",
        FutureWarning,
        stacklevel=3,
    )


@dataclass
class KTOConfig(_KTOConfig):
    """[`trl.KTOConfig`] under its former path; warns."""

    def __post_init__(self):
        _warn_moved("KTOConfig")
        super().__post_init__()


class KTOTrainer(_KTOTrainer):
    """[`trl.KTOTrainer`] under its former path; warns."""

    def __init__(self, *args: Any, **kwargs: Any):
        _warn_moved("KTOTrainer")
        super().__init__(*args, **kwargs)
