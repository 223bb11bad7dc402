"""
Progress bars and metrics in the terminal, with rich.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import has_length
from transformers.utils import is_rich_available

_HIDDEN_METRICS = ("total_flos",)


class RichProgressCallback(TrainerCallback):
    """
    Show training and evaluation as progress bars, with the latest metrics in a table, grouped by what is before "/".

    Only the main process writes. Add it with `callbacks=[RichProgressCallback()]`; `disable_tqdm=True` hides the plain
    bar.

    Raises:
        ImportError: rich is not installed.
    """

    def __init__(self):
        if not is_rich_available():
            raise ImportError("RichProgressCallback needs rich. `pip install rich`.")
        self._progress: Any | None = None
        self._live: Any | None = None
        self._metrics: dict[str, Any] = {}
        self._training_task: Any | None = None
        self._prediction_task: Any | None = None

    # ---- Display ----

    def _start(self) -> None:
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("/"),
            TimeRemainingColumn(),
        )
        self._live = Live(self._render(), refresh_per_second=4)
        self._live.start()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.update(self._render(), refresh=True)
            self._live.stop()
        self._progress = self._live = self._training_task = self._prediction_task = None

    def _render(self) -> Any:
        from rich.columns import Columns
        from rich.console import Group
        from rich.table import Table

        groups: dict[str, Table] = {}
        for key, value in self._metrics.items():
            group, _, name = key.rpartition("/")
            table = groups.setdefault(group, Table(title=group or None, show_header=False))
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        return Group(Columns(list(groups.values())), self._progress)

    def _finish_prediction(self, state) -> None:
        if not state.is_world_process_zero or self._prediction_task is None:
            return
        if self._training_task is None:  # evaluation on its own
            self._stop()
        else:
            self._progress.remove_task(self._prediction_task)
        self._prediction_task = None

    # ---- Events ----

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._stop()  # of a run that failed before its end
        self._start()
        self._training_task = self._progress.add_task("Training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self._training_task is not None:
            self._progress.update(self._training_task, completed=state.global_step)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if self._progress is None:
            self._start()
        if self._prediction_task is None:
            total = len(eval_dataloader) if has_length(eval_dataloader) else None
            self._prediction_task = self._progress.add_task("Evaluation", total=total)
        self._progress.advance(self._prediction_task)

    def on_evaluate(self, args, state, control, **kwargs):
        self._finish_prediction(state)

    def on_predict(self, args, state, control, **kwargs):
        self._finish_prediction(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._live is None or not logs:
            return
        self._metrics = {
            **self._metrics,
            **{key: value for key, value in logs.items() if key not in _HIDDEN_METRICS},
        }
        self._live.update(self._render())

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._stop()
