"""`trl vllm-serve` as it is typed."""

import socket
import subprocess
import sys

import pytest

from trl.cli import main
from trl.scripts import vllm_serve


@pytest.fixture
def started(monkeypatch):
    """What would have been started."""
    calls = []
    monkeypatch.setattr(vllm_serve.os, "execve", lambda program, command, environment: calls.append(command))
    monkeypatch.setattr(vllm_serve, "is_vllm_available", lambda min_version=None: True)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return calls


def test_flags_reach_the_server(started):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    main(["vllm-serve", "--model", "m", "--port", port, "--max-model-len", "64", "--served-model-name", "n"])
    (command,) = started
    assert command[4] == "m"
    assert command[-2:] == ["--served-model-name", "n"]
    for flag, value in (("--port", port), ("--max-model-len", "64")):
        assert command[command.index(flag) + 1] == value


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["vllm-serve", "--help"])
    assert exit.value.code == 0
    output = capsys.readouterr().out
    assert "usage: trl vllm-serve" in output
    assert "VLLM_API_KEY" in output


def test_it_is_listed(capsys):
    main([])
    assert "vllm-serve" in capsys.readouterr().out


def test_what_is_wrong_is_said_without_a_traceback():
    command = [sys.executable, "-m", "trl.cli", "vllm-serve", "--model", "m", "--host", "0.0.0.0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode in (1, 2)  # 1 where vLLM is not installed, which is said first
    assert any(line.startswith("trl vllm-serve: error: ") for line in result.stderr.splitlines())
    assert "Traceback" not in result.stderr
    assert "VLLM_API_KEY" in result.stderr or "trl[vllm]" in result.stderr


def test_vllm_is_not_installed(started, monkeypatch, capsys):
    monkeypatch.setattr(vllm_serve, "is_vllm_available", lambda min_version=None: False)
    assert main(["vllm-serve", "--model", "m"]) == 1
    assert 'pip install "trl[vllm]"' in capsys.readouterr().err
    assert started == []


def test_no_model(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["vllm-serve"])
    assert exit.value.code == 2
    assert "--model" in capsys.readouterr().err
