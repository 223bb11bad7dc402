"""Shared by the benchmarks: each side runs in a process of its own, in turn, and reports seconds and peak memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable


def resident_bytes() -> int:
    """Memory of this process now, from the kernel."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class PeakMemory:
    """Highest resident memory above that at entry, sampled every half millisecond, as `bytes`."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = resident_bytes()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.is_set():
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.0005)

    def __exit__(self, *_) -> None:
        self.peak = max(self.peak, resident_bytes())
        self.stop.set()
        self.thread.join()

    @property
    def bytes(self) -> int:
        return self.peak - self.start


def measure(step: Callable[[], None], repeats: int) -> dict[str, float]:
    """
    Peak memory of the first call in this process, then the least time of `repeats` further calls: on the clock, and
    of all processors, which other programs on the machine disturb less.
    """
    with PeakMemory() as memory:
        step()
    clock, processor = [], []
    for _ in range(repeats):
        start, start_processor = time.perf_counter(), time.process_time()
        step()
        clock.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
    return {"seconds": min(clock), "cpu_seconds": min(processor), "megabytes": memory.bytes / 2**20}


def run_sides(script: str, case: str, sides: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """
    Run `script --side NAME --case CASE` for each side in turn, `rounds` times, and keep the least of each figure.

    The side prints one line of JSON. Alternating makes both sides see the same machine.
    """
    results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, script, "--side", side, "--case", case]
            # Freed memory goes back to the system at once, so that the peak is that of live tensors.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
            environment |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}  # waiting is not work
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            results[side].append(json.loads(output.strip().splitlines()[-1]))
    return {side: {key: min(result[key] for result in runs) for key in runs[0]} for side, runs in results.items()}


def print_table(title: str, results: dict[str, dict[str, float]], baseline: str) -> None:
    """One line per side; the columns with an x are relative to the baseline (speed: more is faster)."""
    print(f"\n{title}")
    print(f"{'':24}{'seconds':>10}{'cpu s':>10}{'MiB':>10}{'speed':>10}{'by cpu':>10}{'memory':>10}")
    base = results[baseline]
    for side, result in results.items():
        speeds = [base[key] / result[key] for key in ("seconds", "cpu_seconds")]
        print(
            f"{side:24}{result['seconds']:10.2f}{result['cpu_seconds']:10.2f}{result['megabytes']:10.0f}"
            f"{speeds[0]:9.2f}x{speeds[1]:9.2f}x{result['megabytes'] / base['megabytes']:9.2f}x",
            flush=True,
        )
