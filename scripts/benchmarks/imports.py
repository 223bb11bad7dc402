"""Import times, each in a fresh interpreter, in turn: `import trl`, transformers' Trainer, and our SFTTrainer."""

import statistics
import subprocess
import sys

STATEMENTS = ["pass", "import trl", "from transformers import Trainer", "from trl import SFTTrainer"]
CODE = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def measure(statement: str) -> float:
    command = [sys.executable, "-c", CODE.format(statement)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main(rounds: int = 5) -> None:
    times = {statement: [] for statement in STATEMENTS}
    for _ in range(rounds):
        for statement in STATEMENTS:
            times[statement].append(measure(statement))
    for statement, seconds in times.items():
        print(f"{statement:40} median {statistics.median(seconds):6.3f} s   best {min(seconds):6.3f} s")
    extra = statistics.median(times["from trl import SFTTrainer"]) - statistics.median(
        times["from transformers import Trainer"]
    )
    print(f"SFTTrainer over transformers' Trainer: {extra:+.3f} s")


if __name__ == "__main__":
    main()
