"""
Tracing what a model answers in evaluation, and scoring it, with Weave.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig, Trainer, TrainerCallback
from transformers.utils import logging

from ..import_utils import is_weave_available
from .sampling import evaluation_prompts, generate_completions

logger = logging.get_logger(__name__)


class WeaveCallback(TrainerCallback):
    """
    At each evaluation, complete prompts of the evaluation set and log them to Weave.

    Without scorers every completion is a trace. With scorers it is an evaluation: each completion gets each scorer's
    score, and the summary has their averages (`avg_<scorer>`), `successful_predictions` and `total_predictions`. What
    goes wrong in logging or in a scorer is a warning; training goes on.

    Args:
        trainer: the trainer; needs an `eval_dataset` with a column `prompt` (or `messages`).
        project_name: Weave project; default that of the active Weights & Biases run.
        scorers: name -> function of (prompt, completion) that returns a score.
        generation_config: how to sample; default the model's own.
        num_prompts: take the first so many; default all.
        dataset_name: what Weave calls the dataset.
        model_name: what Weave calls the model; default the model's own name.

    Raises:
        ValueError: no evaluation set, or no prompts in it; when training begins, no project.
    """

    def __init__(
        self,
        trainer: Trainer,
        project_name: str | None = None,
        scorers: dict[str, Callable] | None = None,
        generation_config: GenerationConfig | None = None,
        num_prompts: int | None = None,
        dataset_name: str = "eval_dataset",
        model_name: str | None = None,
    ):
        self.trainer = trainer
        self.project_name = project_name
        self.scorers = scorers or {}
        self.generation_config = generation_config
        self.num_prompts = num_prompts
        self.dataset_name = dataset_name
        self.model_name = model_name
        self._weave: Any | None = None
        self._last_logged_step = -1
        if not is_weave_available():
            logger.warning("Weave is not installed, so WeaveCallback will log nothing. `pip install weave`.")
        self.prompts = evaluation_prompts(trainer, num_prompts, type(self).__name__)

    @property
    def is_evaluation_mode(self) -> bool:
        """Whether completions are scored (there are scorers) or only traced."""
        return bool(self.scorers)

    # ---- Events ----

    def on_train_begin(self, args, state, control, **kwargs):
        self._initialize(state)

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self._last_logged_step or not is_weave_available():
            return
        self._last_logged_step = state.global_step
        self._initialize(state)  # `evaluate` may be called without training
        # Collective: on every process, though only the main one logs.
        prompts, completions = generate_completions(self.trainer, self.prompts, self.generation_config)
        if not self.trainer.accelerator.is_main_process or self._weave is None:
            return
        try:
            if self.is_evaluation_mode:
                self._log_evaluation(prompts, completions, state)
            else:
                self._log_traces(prompts, completions, state)
        except Exception as error:
            logger.warning(f"Weave logged nothing at step {state.global_step}: {type(error).__name__}: {error}")

    # ---- Logging ----

    def _initialize(self, state) -> None:
        if self._weave is not None or not is_weave_available() or not state.is_world_process_zero:
            return
        project = self.project_name or self._project_of_wandb_run()
        if project is None:
            raise ValueError(
                "WeaveCallback has no project: pass `project_name`, or train with an active Weights & Biases run "
                '(`report_to="wandb"`).'
            )
        import weave

        try:
            weave.init(project)
        except Exception as error:
            logger.warning(f"Weave could not be started for {project}: {type(error).__name__}: {error}")
            return
        self._weave = weave

    @staticmethod
    def _project_of_wandb_run() -> str | None:
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is None:
            return None
        return f"{run.entity}/{run.project}" if run.entity else run.project

    def _model_name(self) -> str:
        name = self.model_name or getattr(self.trainer.model.config, "_name_or_path", "") or "model"
        return name.rstrip("/").split("/")[-1]

    def _attributes(self, state) -> dict[str, Any]:
        return {"training_step": state.global_step, "model_name": self._model_name()}

    def _log_traces(self, prompts: list[str], completions: list[str], state) -> None:
        @self._weave.op(name="generate_completion")
        def trace(prompt: str, completion: str, training_step: int, model_name: str) -> dict[str, str]:
            return {"prompt": prompt, "completion": completion}

        for prompt, completion in zip(prompts, completions, strict=True):
            trace(prompt=prompt, completion=completion, **self._attributes(state))

    def _log_evaluation(self, prompts: list[str], completions: list[str], state) -> None:
        evaluation = self._weave.EvaluationLogger(model=self._model_name(), dataset=self.dataset_name)
        totals = dict.fromkeys(self.scorers, 0.0)
        counts = dict.fromkeys(self.scorers, 0)
        successful = 0
        for prompt, completion in zip(prompts, completions, strict=True):
            prediction = evaluation.log_prediction(inputs={"prompt": prompt}, output=completion)
            complete = True
            for name, scorer in self.scorers.items():
                try:
                    score = scorer(prompt, completion)
                    prediction.log_score(scorer=name, score=score)
                    totals[name] += float(score)
                    counts[name] += 1
                except Exception as error:
                    complete = False
                    logger.warning(f"The scorer {name!r} failed: {type(error).__name__}: {error}")
            prediction.finish()
            successful += complete
        summary = {f"avg_{name}": totals[name] / counts[name] for name in self.scorers if counts[name]}
        evaluation.log_summary(
            {
                **self._attributes(state),
                **summary,
                "successful_predictions": successful,
                "total_predictions": len(prompts),
            }
        )
