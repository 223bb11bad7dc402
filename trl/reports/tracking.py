"""
Links to a run's page in the experiment trackers, and tables sent to one of them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ..import_utils import _is_package_available

if TYPE_CHECKING:
    from pandas import DataFrame


def _imported(name: str) -> Any | None:
    """A tracker's module where the run uses it: one that nobody imported has no active run."""
    return sys.modules.get(name)


def get_wandb_run_url() -> str | None:
    """Address of the active Weights & Biases run; None where there is none."""
    wandb = _imported("wandb")
    run = getattr(wandb, "run", None)
    return getattr(run, "url", None) or None


def get_trackio_space_url() -> str | None:
    """Address of the Space that shows the active trackio run; None where there is none or it is only local."""
    trackio = _imported("trackio")
    if trackio is None:
        return None
    run = trackio.context_vars.current_run.get()
    space = trackio.context_vars.current_space_id.get() if run is not None else None
    if not space:
        return None
    name = space.replace("/", "-").replace("_", "-").replace(".", "-").lower()
    query = f"?project={run.project}&runs={run.name}&sidebar=collapsed"
    return f"https://{name}.hf.space/{query}"


def _comet_experiment() -> Any | None:
    comet = _imported("comet_ml")
    if comet is None:
        return None
    return comet.get_running_experiment()


def get_comet_experiment_url() -> str | None:
    """Address of the running Comet experiment; None where there is none."""
    experiment = _comet_experiment()
    return experiment.url if experiment is not None else None


def log_table_to_comet_experiment(name: str, table: DataFrame) -> None:
    """
    Send a table to the running Comet experiment; nothing happens where there is none.

    Args:
        name: file name in the experiment, ending in `.csv`, `.tsv` or `.json`.
        table: the rows.

    Raises:
        ModuleNotFoundError: Comet is not installed.
    """
    if not _is_package_available("comet_ml"):
        raise ModuleNotFoundError("comet_ml is not installed. `pip install comet-ml`.")
    experiment = _comet_experiment()
    if experiment is not None:
        experiment.log_table(tabular_data=table, filename=name)
