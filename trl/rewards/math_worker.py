"""
The process that parses and compares mathematical answers, one request at a time; started by `math_verification`.

Why a process: a parser or a simplification may run for ever inside one long integer operation, where neither a signal
handler nor another thread gets a turn. This process has a time limit of its own that needs no turn: when a stage takes
too long, it ends itself, whatever it is busy with, and whether or not its parent is still there.

A request is a line of JSON, `{"gold": ..., "answer": ..., "limits": {"parse": s, "verify": s}}`. The reply is a line
per stage: `{"gold": text}`, `{"answer": text}`, `{"equal": true or false}`. An empty text is "nothing was found", and
after an empty gold no line follows.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

# An answer counts where the model marked it as one: in a box, or after words such as "the final answer is".
ANSWER_CONFIG = [
    LatexExtractionConfig(
        boxed_match_priority=0,
        try_extract_without_anchor=False,
        normalization_config=NormalizationConfig(units=True),
    )
]
MEMORY_LIMIT_BYTES = 4 * 1024**3


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


@contextlib.contextmanager
def _time_limit(seconds: float, silence: Any):
    """End the process when the block takes longer; a C thread watches, so a held interpreter lock does not matter."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=silence)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _shown(parsed: list) -> str:
    """A parsed answer as text; the library gives the expression first, then the text that it was read from."""
    try:
        return str(parsed[0])
    except Exception:  # e.g. an integer of more digits than Python prints
        return str(parsed[-1])


def serve() -> None:
    """Answer requests until there are no more."""
    # What libraries print must not get into the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    silence = open(os.devnull, "w")  # noqa: SIM115
    os.dup2(silence.fileno(), sys.stdout.fileno())

    def reply(line: dict[str, Any]) -> None:
        replies.write(json.dumps(line) + "\n")

    reply({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        limits = request["limits"]
        # The library's own limits are off: they rest on signals, which wait for the interpreter.
        options = {"extraction_mode": "first_match", "parsing_timeout": None}
        with _time_limit(limits["parse"], silence):
            gold = parse(request["gold"], **options)
            reply({"gold": _shown(gold) if gold else ""})
        if not gold:
            continue
        with _time_limit(limits["parse"], silence):
            answer = parse(request["answer"], extraction_config=ANSWER_CONFIG, **options)
            reply({"answer": _shown(answer) if answer else ""})
        with _time_limit(limits["verify"], silence):
            reply({"equal": bool(answer) and verify(gold, answer, timeout_seconds=None)})


if __name__ == "__main__":
    _limit_memory()
    serve()
