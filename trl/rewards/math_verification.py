"""
Is this the same mathematical object? Answers are parsed and compared by math-verify in a process of its own.

The process is started with the first question and kept. It may be asked from any thread, and an answer that it cannot
digest in time costs that answer only: the process is replaced.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from typing import IO, Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

PARSE_LIMIT_S = 10.0
VERIFY_LIMIT_S = 5.0
# The process imports a computer algebra system, on a machine that may be busy.
START_LIMIT_S = 180.0
# The process ends itself at its limits; this much later it is taken for dead in some other way.
GRACE_S = 5.0


@dataclass(frozen=True)
class MathVerdict:
    """
    What became of one comparison.

    Args:
        gold: the expected answer as it was understood; empty where nothing in it could be parsed.
        answer: the same of the answer that was given.
        equal: whether they are the same; `None` where there is nothing to compare with.
        given_up: the stage that took too long or too much memory (`"gold"`, `"answer"` or `"equal"`), if one did.
    """

    gold: str
    answer: str
    equal: bool | None
    given_up: str | None = None


class MathWorkerError(RuntimeError):
    """The process that compares answers does not run; the message has what it wrote last."""


class _Worker:
    """The process and a thread that reads its replies, so that waiting for one has a limit on every platform."""

    def __init__(self) -> None:
        # Not with `multiprocessing`: that would import the user's script again.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONSAFEPATH": "1"}
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trl.rewards.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
            encoding="utf-8",
        )
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, name="trl-math-replies", daemon=True).start()
        if self.receive(START_LIMIT_S) != {"ready": True}:
            self.stop()
            self._stderr.seek(0)
            words = self._stderr.read()[-2000:].decode(errors="replace").strip()
            raise MathWorkerError(f"The process that compares mathematical answers did not start. It said:\n{words}")

    def _read(self) -> None:
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put("")

    def send(self, request: dict[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:  # it ended since the last question; the missing reply says so
            pass

    def receive(self, limit_s: float) -> dict[str, Any] | None:
        """The next reply; `None` if the process ended or is silent for longer than the limit."""
        try:
            line = self._replies.get(timeout=limit_s)
        except queue.Empty:
            return None
        return json.loads(line) if line.endswith("\n") else None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class MathVerifier:
    """
    Compares answers with expected ones, in a process that is started when it is first needed.

    Args:
        parse_limit_s: time to parse one text, in seconds.
        verify_limit_s: time to compare two parsed answers, in seconds.
    """

    def __init__(self, parse_limit_s: float = PARSE_LIMIT_S, verify_limit_s: float = VERIFY_LIMIT_S):
        self.limits = {"parse": parse_limit_s, "verify": verify_limit_s}
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._owner: int | None = None

    def verify(self, answer: str, gold: str) -> MathVerdict:
        """
        Compare an answer with the expected one.

        Args:
            answer: text of a model, with its answer in a `\\boxed{}` or announced by words.
            gold: the expected answer, LaTeX or plain.

        Returns:
            The verdict. What takes too long could not be parsed, or is not equal.

        Raises:
            MathWorkerError: the process does not start.
        """
        with self._lock:
            if self._worker is None or self._owner != os.getpid():  # a forked process needs one of its own
                self._worker, self._owner = _Worker(), os.getpid()
            self._worker.send({"gold": gold, "answer": answer, "limits": self.limits})
            replies: dict[str, Any] = {"gold": "", "answer": "", "equal": None}
            for stage in ("gold", "answer", "equal"):
                limit = self.limits["verify" if stage == "equal" else "parse"]
                reply = self._worker.receive(limit + GRACE_S)
                if reply is None:
                    self._stop()
                    logger.warning(f"Comparing mathematical answers took too long or too much memory, at {stage!r}.")
                    equal = None if stage == "gold" else False
                    return MathVerdict(replies["gold"], replies["answer"], equal, given_up=stage)
                replies.update(reply)
                if stage == "gold" and not replies["gold"]:
                    break
            return MathVerdict(**replies)

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None and self._owner == os.getpid():
            worker.stop()

    def close(self) -> None:
        """End the process; the next question starts a new one."""
        with self._lock:
            self._stop()


default_verifier = MathVerifier()
atexit.register(default_verifier._stop)
