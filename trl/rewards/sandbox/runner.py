"""
Run a program against tests, each in a forked and confined process; started by `code_execution`, as a file.

On standard input comes a JSON object: `code`; `tests`, each `{"code": text}` (statements run after the program, in its
names) or `{"input": text}` (the program's standard input); `limits`. On standard output goes another: `protections`,
and `results`, an object per test: `ran` (it came to its end without an error), `error` (what happened else), and
`output` (what the program printed, for tests with an input). Expected outputs are not sent here: what a program cannot
see, it cannot print.

This process reads no byte of the program's as code; only its children do, and they can neither signal nor trace it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confinement

sys.path.pop(0)

MAX_REPORT_BYTES = 4096
MAX_ERROR_CHARS = 200


def main() -> None:
    """Serve one request."""
    sys.dont_write_bytecode = True
    request = json.load(sys.stdin.buffer)
    protections = confinement.available()
    results = []
    for index, test in enumerate(request["tests"]):
        folder = os.path.join(os.getcwd(), str(index))
        os.mkdir(folder)
        results.append(run_test(request["code"], test, request["limits"], protections, folder))
    json.dump({"protections": protections, "results": results}, sys.stdout)


def run_test(code: str, test: dict, limits: dict, protections: dict[str, bool], folder: str) -> dict:
    """Fork, run one test in the child, and tell how it ended."""
    report_read, report_write = os.pipe()
    output_read, output_write = os.pipe()
    stdin = tempfile.TemporaryFile()  # noqa: SIM115
    stdin.write(test.get("input", "").encode(errors="replace"))
    stdin.seek(0)
    token, write, end = os.urandom(16).hex(), os.write, os._exit
    child = os.fork()
    if child == 0:
        try:
            _become_child(stdin.fileno(), output_write if "input" in test else None, report_write)
            os.chdir(folder)
            os.environ.update(HOME=folder, TMPDIR=folder)
            tempfile.tempdir = None  # it was looked up for this process
            confinement.confine(limits, protections, folder)
            error = _execute(code, test)
            # Nothing is looked up in modules any more: the program may have put other things there.
            write(3, (token + error).encode(errors="replace"))
        finally:
            end(0)
    os.close(report_write)
    os.close(output_write)
    stdin.close()
    result = _watch(child, report_read, output_read, limits, token)
    os.close(report_read)
    os.close(output_read)
    return result


def _become_child(stdin: int, output: int | None, report: int) -> None:
    """Keep four descriptors: input, output, errors (to nowhere), and the report as number 3."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    # First out of the way of each other.
    kept = [os.dup(number) for number in (stdin, nowhere if output is None else output, nowhere, report)]
    kept = [number if number > 9 else _dup_above(number) for number in kept]
    for target, number in enumerate(kept):
        os.dup2(number, target)
    os.closerange(4, 65536)
    sys.stdin = open(0, encoding="utf-8", errors="replace")  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace")  # noqa: SIM115


def _dup_above(number: int) -> int:
    import fcntl

    return fcntl.fcntl(number, fcntl.F_DUPFD, 10)


def _execute(code: str, test: dict) -> str:
    """Run program and test; what went wrong, empty if nothing did."""
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        try:
            exec(compile(code, "<completion>", "exec"), names)
        except SystemExit as stop:
            if "code" in test or stop.code not in (None, 0):
                raise
        if "code" in test:
            exec(compile(test["code"], "<test>", "exec"), names)
        sys.stdout.flush()
    except BaseException as error:
        try:
            return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
        except BaseException:  # an error that cannot be shown
            return "error"
    return ""


def _watch(child: int, report: int, output: int, limits: dict, token: str) -> dict:
    """Read what the child says until it ends or its time is up, then see to it that it has ended."""
    deadline = time.monotonic() + limits["wall_s"]
    received = {report: b"", output: b""}
    room = {report: MAX_REPORT_BYTES, output: limits["output_bytes"]}
    open_ends, stopped = {report, output}, None
    while open_ends and stopped is None:
        ready, _, _ = select.select(list(open_ends), [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            stopped = f"no end within {limits['wall_s']:g} s"
        for end in ready:
            piece = os.read(end, 65536)
            received[end] += piece
            if not piece:
                open_ends.discard(end)
            elif len(received[end]) > room[end]:
                stopped = f"more than {room[end]} bytes of output"
    if stopped is not None:
        os.kill(child, signal.SIGKILL)
    status = _wait_until(child, deadline)
    return _result(status, stopped, received[report], received[output], token)


def _wait_until(child: int, deadline: float) -> int:
    """The child's exit status; it closed its ends, and gets until its deadline to end as well."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _result(status: int, stopped: str | None, report: bytes, output: bytes, token: str) -> dict:
    said = report.decode(errors="replace")
    if stopped is not None:
        error = stopped
    elif said.startswith(token):
        error = said[len(token) :]
    elif os.WIFSIGNALED(status):
        error = f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    else:
        error = "ended before its end"
    return {"ran": not error, "error": error, "output": output.decode(errors="replace")}


if __name__ == "__main__":
    main()
