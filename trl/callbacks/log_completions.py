"""
A growing table of completions in the experiment tracker.
"""

from __future__ import annotations

import sys
from typing import Any

import pandas as pd
from transformers import GenerationConfig, Trainer, TrainerCallback

from ..reports.tracking import log_table_to_comet_experiment
from .sampling import evaluation_prompts, generate_completions


class LogCompletionsCallback(TrainerCallback):
    """
    Every `freq` steps, complete prompts of the evaluation set and send the table of all completions so far.

    The table has the columns step, prompt and completion; it goes to Weights & Biases as `completions` and to Comet as
    `completions.csv`, where the run reports to them.

    Args:
        trainer: the trainer; needs an `eval_dataset` with a column `prompt` (or `messages`).
        generation_config: how to sample; default the model's own.
        num_prompts: take the first so many; default all.
        freq: steps between tables; default `args.eval_steps`.

    Raises:
        ValueError: no evaluation set, no prompts in it, or neither `freq` nor `eval_steps`.
    """

    def __init__(
        self,
        trainer: Trainer,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        freq: int | None = None,
    ):
        self.trainer = trainer
        self.generation_config = generation_config
        self.freq = freq
        self.table: list[list[Any]] = []
        self._last_logged_step = -1
        self.prompts = evaluation_prompts(trainer, num_prompts, type(self).__name__)

    def on_step_end(self, args, state, control, **kwargs):
        freq = self.freq or state.eval_steps
        if not freq:
            raise ValueError("LogCompletionsCallback has no rhythm: give it `freq`, or set `eval_steps`.")
        if state.global_step == self._last_logged_step or state.global_step % freq != 0:
            return
        self._last_logged_step = state.global_step
        prompts, completions = generate_completions(self.trainer, self.prompts, self.generation_config)
        if not self.trainer.accelerator.is_main_process:
            return
        steps = [str(state.global_step)] * len(prompts)
        self.table += [list(row) for row in zip(steps, prompts, completions, strict=True)]
        self._send(args)

    def _send(self, args) -> None:
        columns = ["step", "prompt", "completion"]
        wandb = sys.modules.get("wandb") if "wandb" in args.report_to else None
        if wandb is not None:
            wandb.log({"completions": wandb.Table(columns=columns, data=self.table)})
        if "comet_ml" in args.report_to:
            log_table_to_comet_experiment("completions.csv", pd.DataFrame(self.table, columns=columns))
