"""Run a script as two processes of one group, on gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

# After a group is gone, gloo's and autograd's threads now and then abort the interpreter while it ends. What is tested
# is over by then, so the processes leave without that.
_END = """
import os, sys, torch.distributed
torch.distributed.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_on_two_processes(script: str, *arguments: str, seconds: float = 120, **environment: str) -> list[str]:
    """What the two processes printed. A process that fails fails the test, with what it wrote to stderr."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script + _END, *arguments],
            env={
                **os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
                **environment,
            },
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    failures = {rank: errors[-3000:] for rank, (_, errors) in enumerate(outputs) if processes[rank].returncode}
    assert not failures, "\n".join(f"Process {rank}: {errors}" for rank, errors in failures.items())
    return [output for output, _ in outputs]
