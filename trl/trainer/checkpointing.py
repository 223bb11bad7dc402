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
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    TrainOutput,
    has_length,
    rotate_checkpoints,
    sort_checkpoints,
)
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The leading underscore keeps it out of Hub uploads, and its name out of the search for the last checkpoint.
STAGING_DIR = "_checkpoint_in_progress"
EXTRA_STATE_NAME = "trl_state.json"


def last_complete_checkpoint(output_dir: str) -> str | None:
    """
    The newest checkpoint of a folder that holds every file it was saved with; a newer incomplete one is warned of.

    A checkpoint lists its files (`trl_state.json`). One without a list, from another program, counts where it has a
    trainer state.
    """
    if not os.path.isdir(output_dir):
        return None
    for checkpoint in reversed(sort_checkpoints(output_dir)):
        missing = _missing_files(checkpoint)
        if not missing:
            return checkpoint
        logger.warning(
            f"{checkpoint} is incomplete ({missing[0]} is missing or cut short): looking for an older checkpoint."
        )
    return None


def _missing_files(checkpoint: str) -> list[str]:
    """Files that a checkpoint was saved with and that are absent or shorter now."""
    sizes = {TRAINER_STATE_NAME: None}
    extra_state = os.path.join(checkpoint, EXTRA_STATE_NAME)
    if os.path.isfile(extra_state):
        try:
            with open(extra_state, encoding="utf-8") as file:
                sizes.update(json.load(file).get("files", {}))
        except json.JSONDecodeError:
            return [EXTRA_STATE_NAME]
    paths = {name: os.path.join(checkpoint, name) for name in sizes}
    return [
        name
        for name, size in sizes.items()
        if not os.path.isfile(paths[name]) or (size is not None and os.path.getsize(paths[name]) != size)
    ]


def _file_sizes(folder: str) -> dict[str, int]:
    paths = [os.path.join(directory, name) for directory, _, names in os.walk(folder) for name in names]
    return {os.path.relpath(path, folder): os.path.getsize(path) for path in sorted(paths)}


class AtomicCheckpointMixin:
    """
    Trainer methods that write a checkpoint whole, and restore what the trainer itself remembers.

    A subclass extends `_extra_state` and `_load_extra_state` with what its own exact resumption needs, and
    `_save_extra_files` and `_load_extra_files` where that is tensors.
    """

    _staging: str | None = None
    _resumed_from: str | None = None

    def _extra_state(self) -> dict[str, Any]:
        """What to remember besides weights, optimizer, scheduler and RNG, in JSON's types. Called on every process."""
        return {"pass": self._pass, "pass_began_at_step": self._pass_began_at_step}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `_extra_state` returned. Called on every process."""
        self._pass, self._pass_began_at_step = state["pass"], state["pass_began_at_step"]

    def _save_extra_files(self, folder: str) -> None:
        """Write further files into a checkpoint that is being made. Called on every process."""

    def _load_extra_files(self, checkpoint: str) -> None:
        """Read what `_save_extra_files` wrote. Called on every process."""

    # The base class works out from the step where it stopped in the data, which takes the data's length. A stream has
    # none, so the pass over it and the step at which that pass began are remembered.
    _pass = 0
    _pass_began_at_step = 0

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        self._pass = self._pass_began_at_step = 0
        passes, batches = super()._init_training_state(*args, **kwargs)
        if self._resumed_from is not None and not has_length(self.train_dataset) and not self.args.ignore_data_skip:
            steps = self.state.global_step - self._pass_began_at_step
            return self._pass, steps * self.args.gradient_accumulation_steps
        return passes, batches

    def _run_epoch(self, *args: Any, epoch: int, epochs_trained: int, **kwargs: Any) -> None:
        if not (self._resumed_from is not None and epoch == epochs_trained):  # else: restored, in the middle of a pass
            self._pass, self._pass_began_at_step = epoch, self.state.global_step
        super()._run_epoch(*args, epoch=epoch, epochs_trained=epochs_trained, **kwargs)

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
            self._save_extra_files(staged)
            if self.args.should_save:
                # The base class looked for the best checkpoint inside the staging folder.
                found = self.state.best_global_step and (best == final or os.path.isdir(best))
                self.state.best_model_checkpoint = best if found else best_before
                self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()  # every process has written its part
            if self.args.should_save:
                files = _file_sizes(staged)  # before it is opened: the list does not name itself
                with open(os.path.join(staged, EXTRA_STATE_NAME), "w", encoding="utf-8") as file:
                    json.dump({**extra_state, "files": files}, file)
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
            resume_from_checkpoint = last_complete_checkpoint(output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint=True`, but there is no checkpoint (a complete one) in {os.path.abspath(output_dir)}. Start "
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
            self._load_extra_files(self._resumed_from)
