"""
The doctor: reads the log while a run goes on, and says what looks ill, what that usually means, and what to try.

What it looks for is in `doctor_rules.py`. It remembers nothing itself: whether an episode goes on is read from the log
history, which a checkpoint holds, so a resumed run gets the warnings that the uninterrupted one would have had.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from .doctor_rules import Rule, default_rules
from .run_log import RunLog, log_prefix

logger = logging.get_logger(__name__)


class DoctorCallback(TrainerCallback):
    """
    Warn when a run's log shows a known illness; silent else.

    Each finding is one warning on the main process: what was seen, what it usually means, what to try. While it lasts,
    its logs carry `doctor/<rule>` = 1 (`eval_doctor/<rule>` in evaluations), for the trackers too. It is warned of
    again after it has been away for `calm_logs` logs. To switch the doctor off: `trainer.remove_callback(DoctorCallback)`.

    Args:
        rules: rules of your own, or some of the default ones with other thresholds, such as
            `[GradNormSpike(score=8.0)]`. A rule takes the place of the default one of its name.
        without: names of rules to leave out.
        calm_logs: logs without a finding that end its episode; default 10.
        starts_at_reference: whether the policy is the reference before the first step, as the trainer knows; the first
            loss is judged only then.

    Raises:
        ValueError: a name in `without` that no rule has.
    """

    def __init__(
        self,
        rules: Sequence[Rule] = (),
        without: Collection[str] = (),
        calm_logs: int = 10,
        starts_at_reference: bool = False,
    ):
        by_name = {rule.name: rule for rule in (*default_rules(), *rules)}
        unknown = set(without) - set(by_name)
        if unknown:
            raise ValueError(
                f"`without` names no rule: {', '.join(sorted(unknown))}. The rules are {', '.join(by_name)}."
            )
        self.rules = [rule for name, rule in by_name.items() if name not in without]
        self.calm_logs = calm_logs
        self.starts_at_reference = starts_at_reference

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,
    ):
        if not logs or not state.log_history:
            return
        run = RunLog(state.log_history, args, state.max_steps, model, self.starts_at_reference)
        if "train_runtime" in run.newest:  # the summary at the end repeats what the logs said
            return
        prefix = log_prefix(run.newest)
        kind = "other" if prefix is None else "eval" if prefix else "train"
        for rule in list(self.rules):
            seen = self._check(rule, run, state) if kind in rule.kinds else None
            if seen is None:
                continue
            key = f"{prefix or ''}doctor/{rule.name}"
            if not self._is_going_on(state.log_history, key) and state.is_world_process_zero:
                logger.warning(
                    f"Step {state.global_step}, {rule.name}: {seen}.\n"
                    f"  What it usually means: {rule.meaning}\n"
                    f"  What to try: {rule.advice}"
                )
            # The log is a copy of the history's entry: one goes to the trackers, one into checkpoints.
            logs[key] = state.log_history[-1][key] = 1.0

    def _check(self, rule: Rule, run: RunLog, state: TrainerState) -> str | None:
        try:
            return rule.check(run)
        except Exception as error:  # a run must not end by its doctor
            if state.is_world_process_zero:
                problem = f"{type(error).__name__}: {error}"
                logger.warning(f"Rule {rule.name!r} failed and is left out from now on: {problem}")
            self.rules.remove(rule)
            return None

    def _is_going_on(self, history: Sequence[Mapping[str, Any]], key: str) -> bool:
        """Whether the finding was in one of the last logs of the newest entry's kind before it."""
        prefix, left = log_prefix(history[-1]), self.calm_logs
        for entry in islice(reversed(history), 1, None):
            if left == 0:
                return False
            if log_prefix(entry) == prefix:
                if key in entry:
                    return True
                left -= 1
        return False


def install_doctor(handler: CallbackHandler) -> DoctorCallback:
    """
    Put the doctor first among the callbacks, so that those that show and send logs see its findings.

    Args:
        handler: the trainer's callbacks.

    Returns:
        The user's own, where there is one, else a new one.
    """
    doctor = handler.pop_callback(DoctorCallback) or DoctorCallback()
    handler.callbacks.insert(0, doctor)
    return doctor
