"""`trl vllm-serve` as a process of its own, for tests with the real server; up within a `with` block."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import requests

from tests.two_processes import free_port

KEY = "a-key-for-tests"
READY_SECONDS = 240


class ServerProcess:
    """
    Args:
        model: folder of the model.
        folder: for logs, caches and weights on their way.
        options: further ones of `trl vllm-serve`.
        key: what requests have to carry, or None.
    """

    def __init__(self, model: str, folder: Path, *options: str, key: str | None = KEY):
        self.model, self.folder, self.options, self.key = model, Path(folder), options, key
        self.staging = self.folder / "staging"
        self.staging.mkdir(exist_ok=True)
        self.port = free_port()
        self.log = self.folder / "server.log"
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        try:
            self.start()
            self.wait()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.kill()

    def start(self) -> None:
        environment = {
            **{name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"},
            **({"VLLM_API_KEY": self.key} if self.key else {}),
            "TRL_SERVER_STAGING_DIR": str(self.staging),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment.setdefault("VLLM_CACHE_ROOT", str(self.folder / "cache"))
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.folder / "inductor"))
        command = [sys.executable, "-m", "trl.cli", "vllm-serve", "--model", self.model, "--port", str(self.port),
                   "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", *self.options]  # fmt: skip
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                cwd=Path(__file__).parents[2],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it is healthy."""
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.5)
        raise AssertionError(f"The server is not up. The end of its log:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """As `kill -9`, its workers too."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None
