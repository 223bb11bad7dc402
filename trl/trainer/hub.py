"""
Pushing to the Hub without risking the run.

What a trainer does with the Hub happens here: making the repository, uploading checkpoints in the background, the push
at the end. An upload that fails for a passing reason is tried again; one that fails for good never ends a training. It
leaves the files on disk and a message with the reason, where they are, and the command that pushes them. Every wait
has a limit, because the Hub's client has none. The model card is not made here.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import get_session
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import PushInProgress, logging

from .checkpointing import EXTRA_STATE_NAME

logger = logging.get_logger(__name__)

ResultT = TypeVar("ResultT")

# Never part of a pushed model: private folders, and checkpoints, which have places of their own.
IGNORED_PATTERNS = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*")
# PEFT writes a card into each checkpoint. The Hub refuses it when the base model is a local folder, and ours is better.
CARD = "README.md"
# What a checkpoint holds only to be resumed from.
RESUME_ONLY_PATTERNS = (
    *("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", EXTRA_STATE_NAME),
    *("latest", "zero_to_fp32.py", "pytorch_model_fsdp*"),
)
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.bin.index.json")
SNAPSHOT_DIR = "_hub_push"
SETUP_LIMIT_S = 180.0
EXIT_LIMIT_S = 600.0
SILENCE_LIMIT_S = 600.0

_TRANSIENT_STATUS = {408, 409, 412, 425, 429, 500, 502, 503, 504}


class HubPushError(RuntimeError):
    """A push to the Hub failed for good. The message says why, where the files are, and how to push them."""


# ---- Failures ----


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status_code(error: BaseException) -> int | None:
    """HTTP status that an error, or what it was raised from, reports; None if there was no answer."""
    for cause in _chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return int(status)
    return None


def _is_connection_failure(error: BaseException) -> bool:
    # By name: huggingface_hub changed its HTTP library (httpx, httpx2), the class is called the same in both.
    return any(
        isinstance(cause, (ConnectionError, TimeoutError, FutureTimeoutError))
        or any(base.__name__ == "TransportError" for base in type(cause).__mro__)
        for cause in _chain(error)
    )


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: an overloaded or unreachable Hub, a cut connection, two commits at once."""
    status = _status_code(error)
    return status in _TRANSIENT_STATUS if status is not None else _is_connection_failure(error)


def describe_failure(error: BaseException) -> str:
    """One line with the reason, and what to do about it where the person can do something."""
    status = _status_code(error)
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if status == 401 or type(error).__name__ == "LocalTokenNotFoundError":
        return (
            "there is no token, or the Hub does not know it (401). Log in with `hf auth login`, or set HF_TOKEN to a "
            "token with write access (https://huggingface.co/settings/tokens)"
        )
    if status == 403:
        return "the token may not write there (403). Use one with write access, or a repository of your own"
    if status == 404:
        return f"not found (404): {first_line}"
    if status is not None and (status < 400 or status >= 500):
        return f"the Hub answered {status}"
    if status is not None:  # refused: it says why, e.g. what in the card's metadata is not valid
        return f"the Hub answered {status}: {' '.join(str(error).split())[:400]}"
    if isinstance(error, FutureTimeoutError) and not str(error):
        return "no answer in time"
    if _is_connection_failure(error):
        return f"the connection failed ({first_line})"
    return f"{type(error).__name__}: {first_line}"


def with_retries(
    action: Callable[[], ResultT], delays_s: tuple[float, ...], what: str, stop: threading.Event
) -> ResultT:
    """
    Call `action`; after a transient failure call it again, `len(delays_s)` times at most, waiting in between.

    Nobody waits any more once `stop` is set: the failure at hand is the last one.
    """
    for attempt in range(len(delays_s) + 1):
        try:
            return action()
        except Exception as error:
            if stop.is_set() or attempt == len(delays_s) or not is_transient(error):
                error.attempts = attempt + 1
                raise
            logger.warning(f"{what}: {describe_failure(error)}. Trying again in {delays_s[attempt]:g} s.")
            stop.wait(delays_s[attempt])
    raise AssertionError("unreachable")


# ---- Background work ----


_limited_clients: weakref.WeakSet = weakref.WeakSet()


def limit_silence(limit_s: float) -> None:
    """
    Have the Hub's shared HTTP client give up a request after `limit_s` seconds without a byte.

    By default it waits forever, also in threads that Python joins at the end of the process. A client that the user
    configured with time limits keeps them.
    """
    client = get_session()
    if client in _limited_clients or all(value is None for value in client.timeout.as_dict().values()):
        client.timeout = limit_s
        _limited_clients.add(client)


class Job(Future):
    """A future whose work can be told that nobody waits for it any more."""

    def __init__(self):
        super().__init__()
        self.stop = threading.Event()

    def abandon(self) -> None:
        """Ask the work to stop, and do not wait for it at the end of the process."""
        self.stop.set()
        _running.discard(self)


_running: set[Job] = set()


def _wait_at_exit() -> None:
    if _running:
        logger.warning(f"Waiting for {len(_running)} push(es) to the Hub, {EXIT_LIMIT_S:g} s at most.")
        wait(list(_running), timeout=EXIT_LIMIT_S)


# Daemon threads, so that a Hub that never answers cannot keep the process alive (an executor's threads would); hence the
# wait at exit. `atexit` is too late for it: executors, which the upload itself uses, refuse work by then.
getattr(threading, "_register_atexit", lambda function: None)(_wait_at_exit)


def run_in_background(action: Callable[[threading.Event], Any]) -> Job:
    """Run `action` in a daemon thread, given the event that asks it to stop; the job has its result or exception."""
    job = Job()
    job.set_running_or_notify_cancel()

    def run() -> None:
        try:
            job.set_result(action(job.stop))
        except BaseException as error:
            job.set_exception(error)
        finally:
            _running.discard(job)

    _running.add(job)
    threading.Thread(target=run, name="hub-push", daemon=True).start()
    return job


def _snapshot_file(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        with contextlib.suppress(OSError):  # a file system without hard links
            os.link(source, target)
            return
    shutil.copy2(source, target)


def _files(folder: Path) -> list[Path]:
    """Files of `folder` that may be pushed, relative to it."""
    relative = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in relative if not any(fnmatch(path.as_posix(), pattern) for pattern in IGNORED_PATTERNS)]


def snapshot_checkpoint(checkpoint: Path, output_dir: Path, target: Path, whole: bool) -> None:
    """
    Set aside what a push uploads, so that the run may go on writing, and deleting old checkpoints, meanwhile.

    Args:
        checkpoint: a complete checkpoint. Its files are hard-linked: nobody writes to them again.
        output_dir: the run's folder. Card, logs and pictures in it are copied.
        target: new folder that gets `model/`, and `checkpoint/` if `whole`.
        whole: also keep all that resuming needs.
    """
    sources = [source for source in checkpoint.rglob("*") if source.is_file() and source.name != CARD]
    for source in sources:
        if source.parent == checkpoint and not any(fnmatch(source.name, pattern) for pattern in RESUME_ONLY_PATTERNS):
            _snapshot_file(source, target / "model" / source.name, link=True)
        if whole:
            _snapshot_file(source, target / "checkpoint" / source.relative_to(checkpoint), link=True)
    for name in _files(output_dir):
        is_old_weight = any(fnmatch(name.name, pattern) for pattern in WEIGHT_PATTERNS)
        if not is_old_weight and not (target / "model" / name).exists():
            _snapshot_file(output_dir / name, target / "model" / name, link=False)


# ---- The trainer's part ----


class HubPushMixin:
    """
    `transformers.Trainer`'s Hub methods, made safe. Goes before `Trainer` among the bases.

    Attributes:
        hub_wait_limit_s: longest wait for one push, in seconds.
        hub_retry_delays_s: seconds between the attempts of one push; one attempt more than delays.
    """

    hub_wait_limit_s: float = 3600.0
    hub_retry_delays_s: tuple[float, ...] = (2.0, 5.0, 15.0, 30.0)
    push_in_progress: PushInProgress | None = None
    _push_descriptions: dict[Job, tuple[Path, str]] | None = None  # push -> (checkpoint, how to do it by hand)

    # ---- The repository ----

    def init_hf_repo(self, token: str | None = None) -> None:
        """
        Make the repository (and the branch `hub_revision`) if it is not there. Main process only.

        Raises:
            HubPushError: the Hub refused or cannot be reached. At construction nothing has been trained yet.
        """
        if not self.is_world_process_zero():
            return
        token = token if token is not None else self.args.hub_token
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        api = HfApi(library_name="trl")

        def make() -> str:
            url = api.create_repo(name, token=token, private=self.args.hub_private_repo, exist_ok=True)
            revision = self.args.hub_revision
            if revision is not None and revision != "main" and not revision.startswith("refs/"):
                api.create_branch(url.repo_id, branch=revision, token=token, exist_ok=True)
            return url.repo_id

        what = f"Making the repository {name} on the Hub"
        job = run_in_background(lambda stop: with_retries(make, self.hub_retry_delays_s, what, stop))
        try:
            self.hub_model_id = job.result(timeout=min(SETUP_LIMIT_S, self.hub_wait_limit_s))
        except Exception as error:
            job.abandon()
            raise HubPushError(
                f"{what} failed: {describe_failure(error)}.\n"
                "To go on without it, set `push_to_hub=False` and push the result later with `hf upload`."
            ) from error
        self.push_in_progress = None
        shutil.rmtree(Path(self.args.output_dir) / SNAPSHOT_DIR, ignore_errors=True)  # what a killed run left

    # ---- Uploading ----

    def _upload(
        self,
        folder: str | os.PathLike,
        what: str,
        stop: threading.Event,
        *,
        message: str | None,
        token: str | None,
        revision: str | None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Upload a folder as one commit, trying again after transient failures until `stop`. `what` is for messages."""
        api = HfApi(library_name="trl")

        def upload() -> CommitInfo:
            limit_silence(min(SILENCE_LIMIT_S, self.hub_wait_limit_s))
            return api.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=folder,
                commit_message=message,
                token=token,
                revision=revision,
                **kwargs,
            )

        return with_retries(upload, self.hub_retry_delays_s, f"Pushing {what} to {self.hub_model_id}", stop)

    def _upload_command(
        self, folder: str | os.PathLike, revision: str | None, path_in_repo: str = ".", exclude: tuple[str, ...] = ()
    ) -> str:
        parts = ["hf", "upload", self.hub_model_id or self.args.hub_model_id, os.path.abspath(folder), path_in_repo]
        if revision is not None:
            parts += ["--revision", revision]
        if self.args.hub_private_repo:
            parts.append("--private")
        for pattern in exclude:
            parts += ["--exclude", pattern]
        return " ".join(shlex.quote(str(part)) for part in parts)

    def _failure_message(self, what: str, error: BaseException, folder: str | os.PathLike, command: str) -> str:
        attempts = getattr(error, "attempts", 1)
        tries = f" after {attempts} attempts" if attempts > 1 else ""
        if isinstance(error, FutureTimeoutError) and not str(error):
            reason = f"no end after {self.hub_wait_limit_s:g} s (`hub_wait_limit_s` of the trainer)"
        else:
            reason = describe_failure(error)
        return (
            f"Pushing {what} to {self.hub_model_id} failed{tries}: {reason}.\n"
            f"Nothing is lost: the files are in {os.path.abspath(folder)}\n"
            f"Push them with: {command}"
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Start uploading a complete checkpoint in the background. Never raises."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        previous = self.push_in_progress
        if previous is not None and not previous.is_done() and not self.args.hub_always_push:
            logger.warning(
                f"{Path(checkpoint_folder).name} is not pushed, because the push before it is still running. "
                "`hub_always_push=True` queues it instead."
            )
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._report_finished_pushes()
        try:
            self._start_checkpoint_push(Path(checkpoint_folder), previous)
        except Exception as error:  # e.g. no space left for the snapshot
            command = self._upload_command(checkpoint_folder, self.args.hub_revision, exclude=(CARD,))
            logger.error(
                self._failure_message(Path(checkpoint_folder).name, error, checkpoint_folder, command)
                + "\nTraining goes on."
            )

    def _start_checkpoint_push(self, checkpoint: Path, previous: PushInProgress | None) -> None:
        strategy = self.args.hub_strategy
        target = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        whole = strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        path_in_repo = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        progress = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch)}"
        message = f"Training in progress, {progress}"
        snapshot = Path(self.args.output_dir) / SNAPSHOT_DIR / checkpoint.name
        shutil.rmtree(snapshot, ignore_errors=True)
        snapshot_checkpoint(checkpoint, Path(self.args.output_dir), snapshot, whole)
        earlier = [] if previous is None else list(previous.jobs)

        def push(stop: threading.Event) -> None:
            wait(earlier, timeout=self.hub_wait_limit_s)  # one after the other, commits stay in order
            try:
                self._upload(snapshot / "model", checkpoint.name, stop, message=message, **target)
                if whole:
                    self._upload(
                        snapshot / "checkpoint",
                        checkpoint.name,
                        stop,
                        message=f"{message}, checkpoint",
                        path_in_repo=path_in_repo,
                        delete_patterns="*",  # shards or states of the checkpoint before do not stay behind
                        **target,
                    )
            finally:
                shutil.rmtree(snapshot, ignore_errors=True)

        job = run_in_background(push)
        self._push_descriptions = self._push_descriptions or {}
        self._push_descriptions[job] = (
            checkpoint,
            self._upload_command(checkpoint, target["revision"], path_in_repo if whole else ".", exclude=(CARD,)),
        )
        if previous is None or previous.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            previous.jobs.append(job)

    def _report_failed_push(self, job: Job, error: BaseException) -> None:
        checkpoint, command = self._push_descriptions.pop(job)
        message = self._failure_message(checkpoint.name, error, checkpoint, command)
        if not checkpoint.exists():  # deleted since, by `save_total_limit`
            message = message.splitlines()[0] + "\nNewer checkpoints have taken its place, and are pushed in turn."
        logger.error(message)

    def _report_finished_pushes(self) -> None:
        """Tell of background pushes that failed since the last time."""
        for job in [job for job in self._push_descriptions or {} if job.done()]:
            error = job.exception()
            if error is not None:
                self._report_failed_push(job, error)
            else:
                del self._push_descriptions[job]

    def _finish_current_push(self) -> None:
        """Wait for the background pushes, `hub_wait_limit_s` at most. Never raises."""
        pending = [job for job in self._push_descriptions or {} if not job.done()]
        if pending:
            logger.warning(f"Waiting for {len(pending)} push(es) to the Hub, {self.hub_wait_limit_s:g} s at most.")
            wait(pending, timeout=self.hub_wait_limit_s)
        self._report_finished_pushes()
        for job in list(self._push_descriptions or {}):
            job.abandon()
            self._report_failed_push(job, FutureTimeoutError())

    # ---- Saving and pushing by the user ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # `training_args.bin` is a pickle of the arguments, and is pushed: without the token.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            self.args.hub_token = token

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model and its processing class, and push them where `push_to_hub=True`.

        The files are what was asked for: a push that fails is reported and does not raise.
        """
        super().save_model(output_dir, _internal_call=True)
        if not self.args.push_to_hub or _internal_call:
            return
        try:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        except HubPushError as error:
            logger.error(str(error))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Save the model, its processing class and the card into `output_dir`, and upload that folder.

        Args:
            commit_message: first line of the commit.
            blocking: wait for the upload's end, `hub_wait_limit_s` at most.
            token: token with write access; default `args.hub_token`, then the one you logged in with.
            revision: branch to commit to; default `args.hub_revision`, then the main branch.
            **kwargs: passed to `create_model_card` (`model_name`, `dataset_name`, `tags`).

        Returns:
            The commit; with `blocking=False` a future of it; None on other processes than the main one.

        Raises:
            HubPushError: the upload failed. Everything is in `output_dir`, and the message has the command to push it.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        revision = revision if revision is not None else self.args.hub_revision
        self.save_model(_internal_call=True)  # every process: it may gather the weights
        if not self.is_world_process_zero():
            return None
        model_name = kwargs.pop("model_name", None)
        if model_name is None:
            hub_model_id = self.args.hub_model_id
            model_name = hub_model_id.split("/")[-1] if hub_model_id else Path(self.args.output_dir).name
        if getattr(self.model, "model_tags", None):
            tags = kwargs.get("tags") or []
            kwargs["tags"] = list(
                dict.fromkeys([*([tags] if isinstance(tags, str) else tags), *self.model.model_tags])
            )
        if self.hub_model_id is None:  # `push_to_hub=False` until now
            self.init_hf_repo(token=token)
        self.create_model_card(model_name=model_name, **kwargs)
        self._finish_current_push()

        output_dir = self.args.output_dir
        command = self._upload_command(output_dir, revision, exclude=IGNORED_PATTERNS)

        def push(stop: threading.Event) -> CommitInfo:
            try:
                return self._upload(
                    output_dir,
                    "the model",
                    stop,
                    message=commit_message,
                    token=token,
                    revision=revision,
                    ignore_patterns=list(IGNORED_PATTERNS),
                )
            except Exception as error:
                raise HubPushError(self._failure_message("the model", error, output_dir, command)) from error

        job = run_in_background(push)
        if not blocking:
            return job
        try:
            return job.result(timeout=self.hub_wait_limit_s)
        except FutureTimeoutError as error:
            job.abandon()
            raise HubPushError(self._failure_message("the model", error, output_dir, command)) from error
