"""Programs as completions: which code is run, what tests say about it, and what it is kept from."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time

import pytest

from trl.rewards import code_execution, code_execution_reward, get_code_execution_reward
from trl.rewards.code_execution import extract_code, read_tests
from trl.rewards.sandbox import confinement

pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs run on Unix only")
confined = pytest.mark.skipif(
    not all(confinement.available().values()), reason="this system has no Landlock or no seccomp"
)
FENCE = "```"
# Generous to a busy machine, strict where a program is to be stopped.
REWARD = get_code_execution_reward(time_limit_s=30, cpu_limit_s=10)


def fenced(code: str, tag: str = "python") -> str:
    return f"Here it is.\n{FENCE}{tag}\n{code}\n{FENCE}\n"


def run(code: str, *tests, reward=REWARD) -> tuple[float | None, str]:
    """The value of a program, and the words about it."""
    extra = {}
    (value,) = reward([fenced(code)], tests=[list(tests)], log_extra=extra.__setitem__)
    return value, extra["code_result"][0]


# ---- Which code ----


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (fenced("a = 1"), "a = 1\n"),
        (fenced("a = 1", "py") + fenced("b = 2", ""), "b = 2\n"),
        (fenced("a = 1") + fenced("{}", "json"), "a = 1\n"),
        (fenced("a = 1") + f"{FENCE}python\nb = ", "a = 1\n"),
        (f"1. Do:\n   {FENCE}Python3\n   if a:\n       b\n   {FENCE}", "if a:\n    b\n"),
        ("a = 1", None),
        ("", None),
        (f"{FENCE}python\na = 1", None),
    ],
    ids=["one", "last", "other language", "cut off", "indented", "no fence", "empty", "open"],
)
def test_extract_code(text, code):
    assert extract_code(text) == code


# ---- Tests of a row ----


@pytest.mark.parametrize(
    "value",
    [
        [{"input": "1", "output": "2"}],
        {"input": "1", "output": "2"},
        {"inputs": ["1"], "outputs": ["2"]},
        '{"inputs": ["1"], "outputs": ["2"]}',
        '[{"input": "1", "output": "2"}]',
        [{"input": "1", "output": "2", "code": None}],  # a table gives every row every field
    ],
)
def test_forms_of_tests(value):
    assert read_tests(value) == [{"input": "1", "output": "2"}]


def test_statements_are_tests():
    assert read_tests("assert a") == read_tests({"code": "assert a"}) == [{"code": "assert a"}]
    assert read_tests(["assert a", "assert b"]) == [{"code": "assert a"}, {"code": "assert b"}]
    assert read_tests("[a] = f()") == [{"code": "[a] = f()"}]


@pytest.mark.parametrize("value", [3, [3], [{"input": "1"}], [{"inputs": ["1"]}]])
def test_other_tests_are_refused(value):
    with pytest.raises(ValueError, match=r"Completion 1, column 'tests': A test is text"):
        REWARD([fenced("a"), fenced("a")], tests=["assert a", value])


# ---- Values ----


def test_share_of_passed_tests():
    completions = [fenced("def double(x):\n    return 2 * x"), fenced("def double(x):\n    return x"), "no code"]
    tests = [["assert double(2) == 4", "assert double(0) == 0"]] * 3
    extra = {}
    assert REWARD(completions, tests=tests, log_extra=extra.__setitem__, prompts=[""] * 3) == [1.0, 0.5, 0.0]
    assert extra["code_result"] == ["2/2 passed", "1/2 passed; AssertionError: ", "no code"]
    messages = [[{"role": "assistant", "content": completion}] for completion in completions]
    assert code_execution_reward(messages, tests=[tests[0], None, []]) == [1.0, None, None]


def test_input_and_output():
    program = "a, b = map(int, input().split())\nprint(a + b, ' ')\nprint()"
    pairs = [{"input": "1 2\n", "output": "3"}, {"input": "3 4", "output": "7\n"}, {"input": "1 1", "output": "3"}]
    value, words = run(program, *pairs)
    assert value == pytest.approx(2 / 3)
    assert words == "2/3 passed; printed '2  \\n\\n'"
    assert run("import sys\nprint(len(sys.stdin.read()))\nsys.exit()", {"input": "é\n" * 3, "output": "6"})[0] == 1.0


def test_expected_output_is_not_there():
    """A program that looks through everything it was started with does not find what it should print."""
    program = """
import sys
frame, seen = sys._getframe().f_back, ""
while frame:
    seen += str(frame.f_locals)
    frame = frame.f_back
print("an_input" in seen, "an_" + "output" in seen)
"""
    assert run(program, {"input": "an_input", "output": "True False"}, {"input": "", "output": "an_output"})[0] == 0.5


def test_tests_are_apart():
    """Each test runs the program anew: what one leaves behind, in memory or in files, the next does not find."""
    program = "import os\nseen = []\nfiles = os.listdir('.')\nopen('left', 'w').close()"
    test = "assert not seen and not files\nseen.append(1)"
    assert run(program, test, test)[0] == 1.0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended before its end"),
        ("import os; os.write(3, b'x' * 40); os._exit(0)", "ended before its end"),
        ("import os; os.closerange(0, 100)", "ended before its end"),
        ("import ctypes; ctypes.string_at(0)", "ended by SIGSEGV"),
        ("class E(Exception):\n    def __str__(self):\n        raise E\nraise E", "error"),
        ("print('\\ud800')\n\0", "S"),
    ],
)
def test_program_that_ends_otherwise_has_passed_nothing(code, words):
    value, said = run(code, "pass")
    assert value == 0.0
    assert said.startswith(f"0/1 passed; {words}")


# ---- Limits ----


@pytest.mark.parametrize(
    ("code", "limit", "words"),
    [
        ("import time; time.sleep(60)", {"time_limit_s": 1.0}, "no end within 1 s"),
        ("while True: pass", {"cpu_limit_s": 1}, "ended by SIGKILL"),
        (
            "import signal\nfor s in (signal.SIGXCPU, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\nwhile 1: pass",
            {"cpu_limit_s": 1},
            "ended by SIGKILL",
        ),
        ("a = bytearray(10**9)", {"memory_limit_mb": 256}, "MemoryError"),
        ("with open('a', 'wb') as f: f.write(b'a' * 2 * 2**20)", {"file_limit_mb": 1}, "OSError: [Errno 27]"),
        ("files = [open('/dev/null') for _ in range(100)]", {"max_open_files": 20}, "OSError: [Errno 24]"),
    ],
    ids=["time", "processor", "processor, signals ignored", "memory", "file size", "open files"],
)
def test_limits(code, limit, words):
    if "memory_limit_mb" in limit and sys.platform == "darwin":
        pytest.skip("macOS does not limit address space")
    reward = get_code_execution_reward(**{"time_limit_s": 30, "cpu_limit_s": 10, **limit})
    start = time.monotonic()
    value, said = run(code, "pass", reward=reward)
    assert value == 0.0
    assert said.startswith(f"0/1 passed; {words}")
    assert time.monotonic() - start < 25


def test_flood_of_output():
    reward = get_code_execution_reward(time_limit_s=30, output_limit_kb=4)
    assert run("while True: print('x' * 100)", {"input": "", "output": ""}, reward=reward) == (
        0.0,
        "0/1 passed; more than 4096 bytes of output",
    )


def test_one_hanging_program_among_others():
    reward = get_code_execution_reward(time_limit_s=2, workers=2)
    completions = [fenced("while True: pass"), fenced("a = 1"), fenced("import time; time.sleep(9)"), fenced("a = 1")]
    assert reward(completions, tests=["assert a == 1"] * 4) == [0.0, 1.0, 0.0, 1.0]


# ---- What a program is kept from ----


def test_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    program = "import os\nprint('SECRET_TOKEN' in os.environ, os.environ['HOME'] == os.getcwd())"
    assert run(program, {"input": "", "output": "False True"}) == (1.0, "1/1 passed")


def test_open_files_are_not_inherited(tmp_path):
    """Descriptors of the training process, sockets and checkpoints among them, are not there, inheritable or not."""
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        count = "import os\nn = 0\nfor i in range(4, 200):\n    try: os.fstat(i); n += 1\n    except OSError: pass"
        assert run(count, "assert n == 0") == (1.0, "1/1 passed")


@confined
@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])",
        "import os; os.system('true') and os.kill(0, 0)",
        "import os; os.fork()",
        "import os; os.setsid()",
        "import os; os.kill(os.getppid(), 0)",
        "import os; os.kill({pid}, 0)",
        "import os; os.execv('/bin/true', ['true'])",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
        "import resource; resource.prlimit({pid}, resource.RLIMIT_NOFILE, (10, 10))",
        "open('/etc/passwd').read()",
        "open('/proc/{pid}/environ').read()",
        "open('/proc/self/status').read()",
        "open({file!r}).read()",
        "open({file!r}, 'w')",
        "open({file!r}, 'a')",
        "import os; os.truncate({file!r}, 0)",
        "import os; os.remove({file!r})",
        "import os; os.rename({file!r}, 'mine')",
        "import os; os.link({file!r}, 'mine')",
        "import os; os.symlink({file!r}, 'mine'); open('mine')",
        "import os; os.chmod({file!r}, 0)",
        "import os; os.utime({file!r}, (0, 0))",
        "import os; os.setxattr({file!r}, 'user.a', b'a')",
        "import os; os.listdir({folder!r})",
        "import os; os.mkdir('../other')",
        "import os, sys; open(os.path.join(sys.prefix, 'left'), 'w')",
    ],
)
def test_refused(attempt, tmp_path):
    """An attempt fails with an error of permission, and the file that it was after is as it was."""
    file = tmp_path / "checkpoint"
    file.write_text("weights")
    before = os.stat(file)
    attempt = attempt.format(pid=os.getpid(), file=str(file), folder=str(tmp_path))
    value, said = run(attempt, "pass")
    assert value == 0.0
    assert any(error in said for error in ("PermissionError", "Invalid cross-device link", "not allowed to raise"))
    assert file.read_text() == "weights"
    after = os.stat(file)
    assert (after.st_mode, after.st_mtime) == (before.st_mode, before.st_mtime)


@confined
def test_not_everything_is_refused():
    """What exercises need is there: threads, temporary files, asyncio, the standard library, installed packages."""
    program = """
import asyncio, collections, ctypes, hashlib, json, re, sqlite3, tempfile, threading
import numpy as np

async def answer():
    await asyncio.sleep(0)
    return 42

results = []
thread = threading.Thread(target=lambda: results.append(asyncio.run(answer())))
thread.start()
thread.join()
with tempfile.NamedTemporaryFile() as file:
    file.write(b"a")
"""
    assert run(program, "assert results == [42] and int(np.arange(3).sum()) == 3") == (1.0, "1/1 passed")


def test_nothing_is_left(tmp_path, monkeypatch):
    """No folder and no process of a program stays behind, stopped or not."""
    monkeypatch.setattr(code_execution.tempfile, "tempdir", str(tmp_path))
    reward = get_code_execution_reward(time_limit_s=1)
    run("open('a', 'w').write('a')\nimport time\ntime.sleep(60)", "pass", "pass", reward=reward)
    assert os.listdir(tmp_path) == []
    if sys.platform.startswith("linux"):
        runners = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
        assert not [line for line in runners.splitlines() if str(os.getpid()) in line and "runner.py" in line]


# ---- Where it cannot run ----


def test_strict_needs_every_protection(monkeypatch):
    monkeypatch.setattr(code_execution, "_checked_protections", {"files": False, "network_and_processes": True})
    assert run("a = 1", "assert a")[0] == 1.0
    with pytest.raises(RuntimeError, match="cannot keep programs from the files of this user"):
        run("a = 1", "assert a", reward=get_code_execution_reward(strict=True))


def test_runner_that_does_not_run(monkeypatch, tmp_path):
    """Where nothing can be run, all programs would look wrong: that is an error, not a reward of 0."""
    runner = tmp_path / "runner.py"
    runner.write_text("raise SystemExit('no runner today')")
    monkeypatch.setattr(code_execution, "RUNNER", runner)
    monkeypatch.setattr(code_execution, "_checked_protections", None)
    with pytest.raises(RuntimeError, match="Programs do not run here.*no runner today"):
        run("a = 1", "assert a")


def test_without_protections_limits_remain(monkeypatch, tmp_path):
    """A kernel that knows neither Landlock nor seccomp still limits time and memory, and programs run."""
    source = (code_execution.RUNNER.parent / "confinement.py").read_text()
    (tmp_path / "confinement.py").write_text(
        source.replace("return max(_libc().syscall(", "return 0 and (_libc().syscall(").replace(
            "return libc.prctl(PR_SET_SECCOMP", "return False and libc.prctl(PR_SET_SECCOMP"
        )
    )
    (tmp_path / "runner.py").write_text(code_execution.RUNNER.read_text())
    monkeypatch.setattr(code_execution, "RUNNER", tmp_path / "runner.py")
    monkeypatch.setattr(code_execution, "_checked_protections", None)
    warned = []
    monkeypatch.setattr(code_execution.logger, "warning", warned.append)
    reward = get_code_execution_reward(time_limit_s=30, cpu_limit_s=1)
    assert run("a = 1", "assert a", reward=reward)[0] == 1.0
    assert run("while True: pass", "pass", reward=reward)[1].endswith("ended by SIGKILL")
    assert any("no Landlock" in message and "no seccomp" in message for message in warned)


def test_settings():
    with pytest.raises(ValueError, match="`time_limit_s` is a number above 0"):
        get_code_execution_reward(time_limit_s=0)
    with pytest.raises(ValueError, match="column 'checks', and the dataset has none"):
        get_code_execution_reward(tests_column="checks")([fenced("a")], tests=["a"])
    assert get_code_execution_reward(tests_column="checks")([fenced("a = 1")], checks=["a"]) == [1.0]
    copy = pickle.loads(pickle.dumps(REWARD))
    assert copy == REWARD
    assert copy.__name__ == "code_execution_reward"


def test_platform_without_limits(monkeypatch):
    monkeypatch.setattr(code_execution.os, "name", "nt")
    with pytest.raises(RuntimeError, match="process limits of Unix"):
        get_code_execution_reward()
