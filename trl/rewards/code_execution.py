"""
A reward for programs that pass tests.

The last fenced block of a completion is run against the tests of its row, in a process of its own with few rights and
little time. How that process is kept apart, and what from it is not, is told in `get_code_execution_reward` and in the
guide on rewards. The work is done in `sandbox/`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..choices import check_number
from .texts import completion_text

__all__ = ["code_execution_reward", "get_code_execution_reward"]

logger = logging.get_logger(__name__)

RUNNER = Path(__file__).parent / "sandbox" / "runner.py"
# An interpreter starts and reads its request, on a machine that may be busy.
START_LIMIT_S = 30.0
MEBIBYTE = 1024**2

FENCED_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+.-]*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
PYTHON_TAGS = ("", "python", "python3", "py")


def extract_code(text: str) -> str | None:
    """The last closed block between ``` fences that is marked as Python or not at all; `None` where there is none."""
    blocks = [body for tag, body in FENCED_BLOCK.findall(text) if tag.lower() in PYTHON_TAGS]
    return textwrap.dedent(blocks[-1]) if blocks else None


# ---- Tests ----


def read_tests(value: Any) -> list[dict[str, str]]:
    """
    The tests of a row, each `{"code": ...}` or `{"input": ..., "output": ...}`.

    Args:
        value: a test or a list of them: text is statements, an object with `input` and `output` is what the program
            reads and should print. Also `{"inputs": [...], "outputs": [...]}`, and JSON of all these.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with contextlib.suppress(ValueError):  # statements may begin like that too
            value = json.loads(value)
    if isinstance(value, Mapping) and value.get("inputs") is not None and value.get("outputs") is not None:
        pairs = zip(value["inputs"], value["outputs"], strict=True)
        value = [{"input": given, "output": expected} for given, expected in pairs]
    tests = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [_read_test(test) for test in tests]


def _read_test(test: Any) -> dict[str, str]:
    if isinstance(test, str):
        return {"code": test}
    if isinstance(test, Mapping) and isinstance(test.get("output"), str):
        return {"input": test.get("input") or "", "output": test["output"]}
    if isinstance(test, Mapping) and isinstance(test.get("code"), str):
        return {"code": test["code"]}
    raise ValueError(
        "A test is text (statements, such as `assert f(1) == 2`) or an object with the texts `input` and `output`. "
        f"Found a {type(test).__name__}: {str(test)[:100]!r}."
    )


def _lines(output: str) -> list[str]:
    """Output as it is compared: without spaces at the ends of lines, and without empty lines at its end."""
    return [line.rstrip() for line in output.rstrip().splitlines()]


# ---- The process ----


@dataclass(frozen=True)
class _Limits:
    """For one test: seconds of time, seconds of processor, bytes, and numbers."""

    wall_s: float
    cpu_s: int
    memory_bytes: int
    file_bytes: int
    open_files: int
    output_bytes: int


def _environment(folder: str) -> dict[str, str]:
    """What the process finds in its environment: nothing of ours."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TMPDIR": folder, **threads}


def _run(code: str, tests: Sequence[Mapping[str, str]], limits: _Limits) -> dict[str, Any]:
    """
    Run a program against tests.

    Returns:
        The runner's reply; `results` is empty where it did not reply, and `problem` says why.
    """
    sent = [{key: text for key, text in test.items() if key != "output"} for test in tests]
    request = json.dumps({"code": code, "tests": sent, "limits": asdict(limits)}).encode()
    with tempfile.TemporaryDirectory(prefix="trl-code-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", str(RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        try:
            reply, words = process.communicate(request, timeout=START_LIMIT_S + len(tests) * (limits.wall_s + 1))
        except subprocess.TimeoutExpired:
            return {"results": [], "problem": "no reply in time"}
        finally:
            if process.returncode is None:  # else the group is gone: the runner waits for those that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    try:
        return json.loads(reply)
    except ValueError:
        said = words.decode(errors="replace").strip()[-1000:]
        return {"results": [], "problem": f"ended with code {process.returncode}: {said}"}


# ---- The reward ----


@dataclass(frozen=True)
class CodeExecutionReward:
    """A reward function made by [`get_code_execution_reward`]."""

    limits: _Limits
    tests_column: str = "tests"
    workers: int | None = None
    strict: bool = False
    __name__ = "code_execution_reward"

    def __call__(
        self,
        completions: Sequence[Any],
        log_extra: Callable[[str, list], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if self.tests_column not in columns:
            raise ValueError(
                f"The tests of programs are read from the column {self.tests_column!r}, and the dataset has none. Pass "
                "`tests_column=` to `get_code_execution_reward`, or rename the column."
            )
        _check_sandbox(self.strict)
        rows = columns[self.tests_column]
        codes = [extract_code(completion_text(completion)) for completion in completions]
        tests = [None if row is None else self._tests_of(index, row) for index, row in enumerate(rows)]
        with ThreadPoolExecutor(self.workers or min(os.cpu_count() or 1, 16)) as pool:
            outcomes = list(pool.map(self._outcome, codes, tests))
        if log_extra is not None:
            log_extra("code_result", [words for _, words in outcomes])
        return [value for value, _ in outcomes]

    def _tests_of(self, index: int, row: Any) -> list[dict[str, str]]:
        try:
            return read_tests(row)
        except ValueError as error:
            raise ValueError(f"Completion {index}, column {self.tests_column!r}: {error}") from error

    def _outcome(self, code: str | None, tests: list[dict[str, str]] | None) -> tuple[float | None, str]:
        """Value of a program, and a few words for the completions table."""
        if not tests:
            return None, "no tests"
        if code is None:
            return 0.0, "no code"
        reply = _run(code, tests, self.limits)
        if not reply["results"]:
            logger.warning(f"A program could not be run: {reply['problem']}.")
            return 0.0, reply["problem"]
        verdicts = [_verdict(test, result) for test, result in zip(tests, reply["results"], strict=True)]
        problems = [problem for problem in verdicts if problem is not None]
        passed = len(tests) - len(problems)
        words = f"{passed}/{len(tests)} passed" + (f"; {problems[0]}" if problems else "")
        return passed / len(tests), words


def _verdict(test: Mapping[str, str], result: Mapping[str, Any]) -> str | None:
    """Why a test failed; `None` if it passed."""
    if not result["ran"]:
        return result["error"]
    if "output" in test and _lines(result["output"]) != _lines(test["output"]):
        return f"printed {result['output'][:50]!r}"
    return None


_checked_protections: dict[str, bool] | None = None
_check_lock = threading.Lock()


def _check_sandbox(strict: bool) -> None:
    """Run a first program to see that programs run, and what they are kept from; once."""
    global _checked_protections
    with _check_lock:
        if _checked_protections is None:
            limits = get_code_execution_reward(time_limit_s=START_LIMIT_S).limits
            reply = _run("answer = 42", [{"code": "assert answer == 42"}], limits)
            results = reply["results"]
            if not results or not results[0]["ran"]:
                problem = results[0]["error"] if results else reply["problem"]
                raise RuntimeError(f"Programs do not run here, so nothing can be said about them: {problem}.")
            _checked_protections = reply["protections"]
            missing = _missing(_checked_protections)
            if missing and not strict:
                logger.warning(f"This system does not keep the programs that it runs from {missing}.")
    if strict and _missing(_checked_protections):
        raise RuntimeError(
            f"`strict=True`, and this system cannot keep programs from {_missing(_checked_protections)}. Run the "
            "training in a container without anything of value, and set `strict=False`."
        )


def _missing(protections: Mapping[str, bool]) -> str:
    kept_from = {
        "files": "the files of this user (it has no Landlock)",
        "network_and_processes": "the network and other processes (it has no seccomp, or is not x86-64 or ARM64)",
    }
    return " and ".join(words for key, words in kept_from.items() if not protections[key])


def get_code_execution_reward(
    tests_column: str = "tests",
    time_limit_s: float = 10.0,
    cpu_limit_s: float = 5.0,
    memory_limit_mb: int = 1024,
    file_limit_mb: int = 16,
    max_open_files: int = 64,
    output_limit_kb: int = 256,
    workers: int | None = None,
    strict: bool = False,
) -> Callable:
    """
    A reward for programs: the share of given tests that the Python code of a completion passes.

    The code is the last closed block between ``` fences that is marked as Python or not at all. Each test runs it anew,
    in a process of its own: without the environment variables and open files of this one, in an empty folder, with
    limits on time, memory, files and output; on Linux also without sockets, without starting processes or signalling
    others (seccomp), and without any file but those of Python and the system's libraries (Landlock, Linux 5.13).

    This keeps accidents in, and what a model comes upon while it searches for reward. It is not a wall against an
    attacker: the kernel is shared, code and statements of a test share a process (a program that looks for it can find
    the test and claim to have passed), and disk space is limited by file only. Tests with `input` and `output` are
    judged outside and cannot be forged. Where more is at stake, run the training in a container or virtual machine.

    Args:
        tests_column: column with the tests of a row: a text with statements (`assert f(2) == 4`), an object
            with `input` and `output` (what the program reads and should print; spaces at the ends of lines do not
            count), or a list of these. `{"inputs": [...], "outputs": [...]}` and JSON texts are understood. Without
            tests (`None`, an empty list) the reward does not apply.
        time_limit_s: seconds that a test may take.
        cpu_limit_s: seconds of processor time that a test may take.
        memory_limit_mb: address space of the process, in MiB; not enforced on macOS.
        file_limit_mb: size of a file that it writes, in MiB.
        max_open_files: open at a time.
        output_limit_kb: printed text that is read, in KiB; a program that prints more is stopped.
        workers: programs that run at the same time; default one per processor, at most 16.
        strict: refuse to run where the network, processes or files cannot be kept from the program.

    Returns:
        A reward function named `code_execution_reward`. Values are from 0 to 1; a completion without code gets 0. It
        logs the column `code_result`.

    Raises:
        RuntimeError: the platform has no limits on processes (Windows).
        ValueError: a limit is not positive.

    Example:

    ````python
    >>> from trl.rewards import get_code_execution_reward
    >>> reward = get_code_execution_reward(time_limit_s=5)
    >>> reward(["```python\\ndef double(x):\\n    return 2 * x\\n```"], tests=[["assert double(2) == 4", "assert double(1) == 3"]])
    [0.5]
    ````
    """
    if os.name != "posix":
        raise RuntimeError(
            "Running the code of completions needs the process limits of Unix (the module `resource`), which this "
            "platform does not have. Use Linux, or WSL on Windows."
        )
    settings = {
        "time_limit_s": time_limit_s,
        "cpu_limit_s": cpu_limit_s,
        "memory_limit_mb": memory_limit_mb,
        "file_limit_mb": file_limit_mb,
        "max_open_files": max_open_files,
        "output_limit_kb": output_limit_kb,
    }
    for name, value in settings.items():
        check_number(name, value, "a number above 0", lambda number: number > 0)
    limits = _Limits(
        wall_s=time_limit_s,
        cpu_s=math.ceil(cpu_limit_s),
        memory_bytes=memory_limit_mb * MEBIBYTE,
        file_bytes=file_limit_mb * MEBIBYTE,
        open_files=max_open_files,
        output_bytes=output_limit_kb * 1024,
    )
    return CodeExecutionReward(limits, tests_column, workers, strict)


def code_execution_reward(
    completions: list[list[dict[str, str]]],
    tests: list[Any],
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """
    The share of given tests that the Python code of a completion passes, with the default limits.

    See [`get_code_execution_reward`] for what runs how, what it is kept from, and what it is not.

    Args:
        completions: answers, as messages or text; of several messages the assistant's last one counts.
        tests: of each row: a text with statements, an object with `input` and `output`, or a list of these.
        log_extra: given by the trainer; receives the column `code_result`.
        **kwargs: the trainer's other arguments; not used.

    Returns:
        A value from 0 to 1 for each completion; `None` where there are no tests.

    Example:

    ````python
    >>> from trl.rewards import code_execution_reward
    >>> completion = "```python\\nprint(int(input()) * 2)\\n```"
    >>> code_execution_reward([completion], tests=[[{"input": "2", "output": "4"}]])
    [1.0]
    ````
    """
    return get_code_execution_reward()(completions, log_extra=log_extra, tests=tests)
