"""
How long parts of a step take, sent to the experiment tracker of the run.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import Trainer


class ProfilingContext:
    """
    Time a block and log the seconds to the active run of wandb, mlflow and trackio.

    Args:
        name: what is timed.
        report_to: trackers of the run (`args.report_to`); others than the three get nothing.
        is_main_process: only the main process reports.
        step: training step of the figure, where the tracker wants one (mlflow).
        metric_prefix: first part of the key; the full key is `"<metric_prefix>: <name>"`.
    """

    def __init__(
        self,
        name: str,
        report_to: list[str],
        is_main_process: bool = True,
        step: int | None = None,
        metric_prefix: str = "profiling/Time taken",
    ):
        self.name = name
        self.report_to = report_to
        self.is_main_process = is_main_process
        self.step = step
        self.metric_prefix = metric_prefix
        self.duration: float | None = None
        self._start: float | None = None

    def __enter__(self) -> ProfilingContext:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.duration = time.perf_counter() - self._start
        self.report(self.duration)

    def report(self, seconds: float) -> None:
        """Send a duration that was measured elsewhere."""
        if self.is_main_process:
            self._send({f"{self.metric_prefix}: {self.name}": seconds})

    def _send(self, metrics: dict[str, float]) -> None:
        # A run can only be active in a tracker that was imported.
        wandb, mlflow, trackio = (
            sys.modules.get(name) if name in self.report_to else None for name in ("wandb", "mlflow", "trackio")
        )
        if wandb is not None and wandb.run is not None:
            wandb.log(metrics)
        if mlflow is not None and mlflow.active_run() is not None:
            mlflow.log_metrics(metrics, step=self.step)
        if trackio is not None and trackio.context_vars.current_run.get() is not None:
            trackio.log(metrics)


def profiling_context(trainer: Trainer, name: str) -> ProfilingContext:
    """
    Time a block of a trainer's work: `with profiling_context(self, "generate"): ...`.

    Args:
        trainer: whose run reports it.
        name: what is timed; the key has the trainer's class in front.
    """
    return ProfilingContext(
        name=f"{type(trainer).__name__}.{name}",
        report_to=trainer.args.report_to,
        is_main_process=trainer.accelerator.is_main_process,
        step=trainer.state.global_step,
    )


def profiling_decorator(func: Callable) -> Callable:
    """Time every call of a trainer's method."""

    @functools.wraps(func)
    def timed(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        with profiling_context(self, func.__name__):
            return func(self, *args, **kwargs)

    return timed
