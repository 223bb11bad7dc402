"""
Checkpoints that are whole or not there.

`transformers.Trainer` writes a checkpoint file by file into `checkpoint-<step>`; a process killed meanwhile leaves a
folder that looks like a checkpoint and cannot be resumed. Here everything is written into a staging folder, which
becomes `checkpoint-<step>` by a rename when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The leading underscore keeps it out of Hub uploads, and its name out of the search for the last checkpoint.
STAGING_DIR = "_checkpoint_in_progress"
EXTRA_STATE_NAME = "trl_state.json"


class AtomicCheckpointMixin:
    """
    Trainer methods that write a checkpoint whole, and restore what the trainer itself remembers.

    A subclass extends `_extra_state` and `_load_extra_state` with what its own exact resumption needs.
    """

    _staging: str | None = None
    _resumed_from: str | None = None

    def _extra_state(self) -> dict[str, Any]:
        """What to remember besides weights, optimizer, scheduler and RNG, in JSON's types. Called on every process."""
        return {}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `_extra_state` returned. Called on every process."""

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging if self._staging is not None else super()._get_output_dir(trial)

    @contextlib.contextmanager
    def _staged(self, run_dir: str) -> Iterator[str]:
        self._staging = os.path.join(run_dir, STAGING_DIR)
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)  # what an earlier, killed run left
        self.accelerator.wait_for_everyone()
        try:
            yield self._staging
        finally:
            self._staging = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # while staged, the folder is about to move: `_save_checkpoint` pushes afterwards
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final = os.path.join(run_dir, folder)
        best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        best_before = self.state.best_model_checkpoint
        with self._staged(run_dir) as staging:
            super()._save_checkpoint(model, trial)
            extra_state = self._extra_state()
            staged = os.path.join(staging, folder)
            if self.args.should_save:
                # The base class looked for the best checkpoint inside the staging folder.
                found = self.state.best_global_step and (best == final or os.path.isdir(best))
                self.state.best_model_checkpoint = best if found else best_before
                self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
                with open(os.path.join(staged, EXTRA_STATE_NAME), "w", encoding="utf-8") as file:
                    json.dump(extra_state, file)
            self.accelerator.wait_for_everyone()  # every process has written its part
            if self.args.local_process_index == 0:
                self._publish(staged, final)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    @staticmethod
    def _publish(staged: str, final: str) -> None:
        """Rename a complete checkpoint into place. On a shared disk the first node's process does it for all."""
        if not os.path.isdir(staged):
            return
        replaced = os.path.join(os.path.dirname(staged), "replaced")
        if os.path.isdir(final):  # the same step saved twice, e.g. by the last step and the end of an epoch
            os.replace(final, replaced)
        os.replace(staged, final)
        shutil.rmtree(os.path.dirname(staged), ignore_errors=True)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last one in `args.output_dir`. The remaining
                steps are those of the uninterrupted run.

        Raises:
            ValueError: there is no such checkpoint.
        """
        if resume_from_checkpoint is True:
            output_dir = self.args.output_dir
            resume_from_checkpoint = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`, but there is no checkpoint in {os.path.abspath(output_dir)}. Start "
                    "without it, or name the checkpoint's folder."
                )
        elif resume_from_checkpoint and not os.path.isdir(resume_from_checkpoint):
            raise ValueError(f"`resume_from_checkpoint` names a folder that does not exist: {resume_from_checkpoint}")
        self._resumed_from = resume_from_checkpoint or None
        return super().train(self._resumed_from, *args, **kwargs)

    def _load_callback_state(self) -> None:
        # The one hook between the trainer state's restoration and the first step.
        super()._load_callback_state()
        path = os.path.join(self._resumed_from or "", EXTRA_STATE_NAME)
        if self._resumed_from is not None and os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                self._load_extra_state(json.load(file))
