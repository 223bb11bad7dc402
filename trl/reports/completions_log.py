"""
The completions of a run with their rewards, step by step: shown in the terminal, kept as files, sent to the trackers
and, where asked for, to a dataset on the Hub.

The table has the columns `step`, `prompt`, `completion`, one for each source of reward, those that reward functions
report with `log_extra`, and `advantage`. Each step is a Parquet file that pandas and `datasets` read, one or all:
`load_dataset("parquet", data_files="<output_dir>/completions/*.parquet")`. For that a column has one type throughout:

- Prompts and completions are text. A conversation is written out, each message under its role; an answer that is a
  single message stands alone, so `completion` is what the model said.
- Rewards and advantages are numbers, missing where a source did not apply.
- A column of `log_extra` is numbers where all its values are, else text, and may be missing in some steps.

Nothing here may end a run: what cannot be written or sent is a warning. Only a dataset on the Hub that cannot be made
is an error, at construction, when nothing has been trained yet.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Image
from huggingface_hub import CommitScheduler
from huggingface_hub.utils import get_session
from torch import Tensor
from transformers.utils import is_rich_available, logging

from ..rewards.sources import unique_names
from .completions_table import print_prompt_completions_sample, render_text
from .model_card import generate_completions_card

logger = logging.get_logger(__name__)

ResultT = TypeVar("ResultT")

FOLDER = "completions"
UPLOAD_EVERY_MINUTES = 2
SETUP_LIMIT_S = 180.0
LAST_UPLOAD_LIMIT_S = 60.0
# The Hub's client waits forever by default; after so long without a byte a request has failed.
SILENCE_LIMIT_S = 600.0


@dataclass(frozen=True)
class _Row:
    prompt: Any
    completion: Any
    rewards: dict[str, float | None]
    advantage: float | None
    extra: dict[str, Any]
    images: list | None


class CompletionsLog:
    """
    Holds the last generation, and writes it as a table. For the main process only.

    Args:
        output_dir: the run's folder; the files go into `completions/` in it.
        maxlen: rows held at most, the newest.
        report_to: trackers of the run (`args.report_to`); wandb and trackio get the table, where they have a run.
        num_to_print: show so many completions in the terminal, chosen at random; default all.
        unique_prompts: send only the first completion of each prompt to the trackers.
        multimodal: send images to the trackers too.
        hub_repo: dataset on the Hub that the files are uploaded to, every two minutes; made where it does not exist.
        hub_private: whether it is made private; default as its owner's account has it.
        hub_token: token with write access; default the one you logged in with.
        print_table: show the table in the terminal; needs rich, and is left out without.
        trainer_name: the method, for the dataset's card.
        hub_model_id: the model's repository, for the dataset's card.

    Attributes:
        commit_scheduler: uploads the files in the background; None without `hub_repo`.

    Raises:
        RuntimeError: the dataset on the Hub cannot be made.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        *,
        maxlen: int,
        report_to: Sequence[str] = (),
        num_to_print: int | None = None,
        unique_prompts: bool = False,
        multimodal: bool = True,
        hub_repo: str | None = None,
        hub_private: bool | None = None,
        hub_token: str | None = None,
        print_table: bool = True,
        trainer_name: str | None = None,
        hub_model_id: str | None = None,
    ):
        self.folder = Path(output_dir) / FOLDER
        self.report_to = [report_to] if isinstance(report_to, str) else list(report_to or ())
        self.num_to_print = num_to_print
        self.unique_prompts = unique_prompts
        self.multimodal = multimodal
        self.print_table = print_table
        self._rows: deque[_Row] = deque(maxlen=maxlen)
        self._is_written = False
        self._text_columns: set[str] = set()
        self.commit_scheduler: CommitScheduler | None = None
        if hub_repo is not None:
            card = {"hub_model_id": hub_model_id, "trainer_name": trainer_name}
            self.commit_scheduler = _start_uploads(self.folder, hub_repo, hub_private, hub_token, card)
            # `atexit` is too late: by then the executors that an upload uses refuse work.
            at_exit = functools.partial(_close, weakref.ref(self))
            getattr(threading, "_register_atexit", lambda function: None)(at_exit)

    def __len__(self) -> int:
        return len(self._rows)

    # ---- What is held ----

    def add(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rewards: Mapping[str, Sequence[float | None]],
        advantages: Sequence[float],
        extra: Mapping[str, Sequence[Any]] | None = None,
        images: Sequence[list | None] | None = None,
    ) -> None:
        """
        Take N completions of a generation. What has been written goes; what has not stays, as far as there is room.

        Args:
            prompts: texts or conversations, N.
            completions: texts or conversations, N.
            rewards: values by source, N each; None or NaN where a source does not apply.
            advantages: N.
            extra: further columns by name, N values each.
            images: of each completion, its images or None.

        Raises:
            ValueError: they are not all N.
        """
        extra = extra or {}
        count = len(completions)
        sized = {"prompts": prompts, "advantages": advantages, **rewards, **extra, "images": images or [None] * count}
        for name, values in sized.items():
            if len(values) != count:
                raise ValueError(f"`{name}` has {len(values)} values for {count} completions. Give one for each.")
        if self._is_written:
            self.clear()
        for index in range(count):
            row = _Row(
                prompts[index],
                completions[index],
                {name: _number(values[index]) for name, values in rewards.items()},
                _number(advantages[index]),
                {name: values[index] for name, values in extra.items()},
                list(images[index]) if images is not None and images[index] else None,
            )
            self._rows.append(row)

    def clear(self) -> None:
        """Drop what is held, e.g. the training's completions before an evaluation adds its own."""
        self._rows.clear()
        self._is_written = False

    # ---- What is written ----

    def write(self, step: int) -> None:
        """
        Show the rows, write them to `completions/completions_<step>.parquet`, and send them to the trackers.

        They are held until the next `add`. A step that is written twice has the rows of the second time; without any
        rows nothing happens.

        Args:
            step: the training step.
        """
        if not self._rows:
            return
        if self.print_table and is_rich_available():
            _attempt("Showing the completions", lambda: self._print(step))
        self._is_written = True
        table = _attempt("Making a table of the completions", lambda: self._table(step))
        if table is None:
            return
        _attempt("Writing the completions", lambda: self._write_file(step, table))
        wandb, trackio = (sys.modules.get(name) if name in self.report_to else None for name in ("wandb", "trackio"))
        # A run can only be active in a tracker that was imported.
        if wandb is not None and wandb.run is not None:
            _attempt("Sending the completions to wandb", lambda: self._send_to_wandb(wandb, table))
        if trackio is not None and trackio.context_vars.current_run.get() is not None:
            _attempt("Sending the completions to trackio", lambda: self._send_to_trackio(trackio, table))

    def _print(self, step: int) -> None:
        rows = list(self._rows)
        print_prompt_completions_sample(
            [row.prompt for row in rows],
            [row.completion for row in rows],
            {name: [row.rewards.get(name) for row in rows] for name in self._reward_names()},
            [row.advantage for row in rows],
            step,
            self.num_to_print,
            {name: [row.extra.get(name, "") for row in rows] for name in self._extra_names()},
        )

    def _reward_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self._rows for name in row.rewards))

    def _extra_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self._rows for name in row.extra))

    def _table(self, step: int) -> pa.Table:
        rows = list(self._rows)
        rewards, extras = self._reward_names(), self._extra_names()
        # A reward function may be called like a column, or report one that is called like it.
        taken = ["step", "prompt", "completion", "advantage", "image"]
        names = unique_names([*taken, *rewards, *extras])[len(taken) :]
        columns = {
            "step": pa.array([int(step)] * len(rows)),
            "prompt": pa.array([_clean(render_text(row.prompt)) for row in rows]),
            "completion": pa.array([_clean(render_text(row.completion)) for row in rows]),
        }
        for column, name in zip(names, rewards, strict=False):
            columns[column] = pa.array([row.rewards.get(name) for row in rows], pa.float64())
        for column, name in zip(names[len(rewards) :], extras, strict=True):
            columns[column] = self._extra_column(column, [_plain(row.extra.get(name)) for row in rows])
        columns["advantage"] = pa.array([row.advantage for row in rows], pa.float64())
        return pa.table(columns)

    def _extra_column(self, column: str, values: list[Any]) -> pa.Array:
        """Numbers where all are and always were, else texts; the missing ones of an empty column pass for either."""
        present = [value for value in values if value is not None]
        if not all(isinstance(value, Real) for value in present):
            self._text_columns.add(column)
        if present and column not in self._text_columns:
            return pa.array([_number(value) for value in values], pa.float64())
        return pa.array([None if value is None else _to_text(value) for value in values], pa.string())

    def _write_file(self, step: int, table: pa.Table) -> None:
        path = self.folder / f"completions_{step:05d}.parquet"
        self.folder.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, for whoever reads along; the name is one that neither they nor the upload take up.
        temporary = self.folder / f".{path.name}.tmp"
        pq.write_table(table, temporary)
        os.replace(temporary, path)

    # ---- What is sent ----

    def _sent_rows(self, table: pa.Table) -> list[int]:
        prompts = table["prompt"].to_pylist()
        if not self.unique_prompts:
            return list(range(len(prompts)))
        first: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            first.setdefault(prompt, index)
        return list(first.values())

    def _sent_images(self, image_class: Callable[[Any], Any], chosen: list[int]) -> dict[str, list]:
        """The images of some rows as the tracker wants them, in a column `image`; no column where there are none."""
        shown = [self._rows[index].images for index in chosen]
        if not self.multimodal or not any(shown):
            return {}
        return {"image": [images and [image_class(_decoded(image)) for image in images] for images in shown]}

    def _send_to_wandb(self, wandb: Any, table: pa.Table) -> None:
        chosen = self._sent_rows(table)
        sent = {**table.take(chosen).to_pydict(), **self._sent_images(wandb.Image, chosen)}
        data = [list(row) for row in zip(*sent.values(), strict=True)]
        wandb.log({"completions": wandb.Table(columns=list(sent), data=data)})

    def _send_to_trackio(self, trackio: Any, table: pa.Table) -> None:
        chosen = self._sent_rows(table)
        frame = table.take(chosen).to_pandas().assign(**self._sent_images(trackio.Image, chosen))
        trackio.log({"completions": trackio.Table(dataframe=frame)})

    # ---- The Hub ----

    def close(self, limit_s: float = LAST_UPLOAD_LIMIT_S) -> None:
        """
        Upload what has not been uploaded yet, and wait for it; nothing to do without `hub_repo`.

        What is written afterwards is uploaded as before.

        Args:
            limit_s: longest wait, in seconds. When it is over, or the upload fails, the log says how to upload the
                files by hand, and no further upload is tried.
        """
        scheduler = self.commit_scheduler
        if scheduler is None:
            return
        try:
            _within(limit_s, scheduler.push_to_hub)
        except Exception as error:
            scheduler.stop()
            self.commit_scheduler = None
            command = ["hf", "upload", scheduler.repo_id, str(scheduler.folder_path), ".", "--repo-type", "dataset"]
            reason = f"no end after {limit_s:g} s" if isinstance(error, FutureTimeoutError) else _first_line(error)
            logger.warning(
                f"The last upload of completions to {scheduler.repo_id} failed: {reason}.\n"
                f"Nothing is lost: upload the files with: {shlex.join([*command, '--include', '*.parquet'])}"
            )


# ---- Values ----


def _plain(value: Any) -> Any:
    """A scalar tensor or array as its number, NaN as None; anything else as it is."""
    if isinstance(value, (Tensor, np.generic, np.ndarray)):
        value = value.tolist()
    return None if isinstance(value, float) and math.isnan(value) else value


def _number(value: Any) -> float | None:
    value = _plain(value)
    return float(value) if isinstance(value, Real) else None


def _to_text(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        return _clean(json.dumps(value, ensure_ascii=False, default=str))
    return _clean(str(value))


def _clean(text: str) -> str:
    """Without lone surrogates, which no file format takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _decoded(image: Any) -> Any:
    """An image that a dataset gives undecoded, decoded."""
    if not isinstance(image, Mapping):
        return image
    return Image().decode_example(image) if image.get("bytes") is not None else image["path"]


# ---- Work that may fail or hang ----


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _attempt(what: str, action: Callable[[], ResultT]) -> ResultT | None:
    try:
        return action()
    except Exception as error:  # a run must not end by its log
        logger.warning(f"{what} failed: {_first_line(error)}. Training goes on.")
        return None


def _within(limit_s: float, action: Callable[[], ResultT]) -> ResultT:
    """The result of `action`, run in a daemon thread, which cannot keep the process from ending."""
    future: Future[ResultT] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="completions-upload", daemon=True).start()
    return future.result(timeout=limit_s)


class _Uploads(CommitScheduler):
    """A scheduler whose uploads come one after the other, whoever asks for them, and give up on a silent Hub."""

    def __init__(self, **options: Any):
        self._one_at_a_time = threading.Lock()
        _limit_silence()
        super().__init__(**options)

    def push_to_hub(self) -> Any:
        with self._one_at_a_time:
            _limit_silence()
            return super().push_to_hub()


def _limit_silence() -> None:
    client = get_session()
    if all(value is None for value in client.timeout.as_dict().values()):
        client.timeout = SILENCE_LIMIT_S


def _start_uploads(
    folder: Path, repo: str, private: bool | None, token: str | None, card: dict[str, str | None]
) -> CommitScheduler:
    def start() -> CommitScheduler:
        return _Uploads(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            every=UPLOAD_EVERY_MINUTES,
            private=private,
            token=token,
            allow_patterns="*.parquet",
        )

    try:
        scheduler = _within(SETUP_LIMIT_S, start)
    except Exception as error:
        reason = f"no answer in {SETUP_LIMIT_S:g} s" if isinstance(error, FutureTimeoutError) else _first_line(error)
        raise RuntimeError(
            f"The dataset {repo!r} for the logged completions cannot be made on the Hub: {reason}.\n"
            "Log in with `hf auth login`, or set HF_TOKEN to a token with write access. To go on without it, leave out "
            f"`log_completions_hub_repo`: the files are in {folder} all the same."
        ) from error

    def push_card() -> None:
        if scheduler.api.file_exists(scheduler.repo_id, "README.md", repo_type="dataset"):
            return  # of an earlier part of this run, or the user's own
        readme = generate_completions_card(scheduler.repo_id.split("/")[-1], **card)
        readme.push_to_hub(scheduler.repo_id, token=token, repo_type="dataset")

    _attempt("Writing the card of the completions' dataset", lambda: _within(SETUP_LIMIT_S, push_card))
    return scheduler


def _close(reference: weakref.ref[CompletionsLog]) -> None:
    log = reference()
    if log is not None:
        log.close()
