"""Small list and arithmetic tasks in chat form, generated without end, with items held out for testing.

Four kinds, each asked in a few phrasings:

    Sort these digits: 7 2 9 4        -> 2 4 7 9
    Read this backwards: 3 8 8 1 5    -> 5 1 8 8 3
    How many times does 3 appear in 3 1 3 4 3 8?  -> 3
    What is 37 + 58?                  -> 95

Every answer can be checked exactly, so the same file serves fine-tuning (a `completion` to learn from), evaluation and
reinforcement learning (`prompt` and `answer`). Demonstrations can be made as people's are: not always right. A question
is held out when a hash of its text says so; no row of one split can therefore appear in the other, whatever the sizes
and seeds.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator

from datasets import Dataset

PHRASINGS = {
    "sort": ["Sort these digits: {}", "Put {} in order.", "Order the digits {}, smallest first."],
    "reverse": ["Read this backwards: {}", "Reverse {}.", "Give the digits {} from last to first."],
    "count": ["How many times does {} appear in {}?", "Count the digit {} in {}."],
    "add": ["What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?"],
}
HELD_OUT_SHARE = 16  # one question in sixteen is kept for testing


def make_sort(rng: random.Random) -> tuple[tuple, str]:
    digits = [str(rng.randrange(10)) for _ in range(rng.randint(3, 6))]
    return (" ".join(digits),), " ".join(sorted(digits))


def make_reverse(rng: random.Random) -> tuple[tuple, str]:
    digits = [str(rng.randrange(10)) for _ in range(rng.randint(3, 6))]
    return (" ".join(digits),), " ".join(reversed(digits))


def make_count(rng: random.Random) -> tuple[tuple, str]:
    wanted = str(rng.randrange(10))
    digits = [wanted if rng.random() < 0.4 else str(rng.randrange(10)) for _ in range(rng.randint(3, 6))]
    return (wanted, " ".join(digits)), str(digits.count(wanted))


def make_add(rng: random.Random) -> tuple[tuple, str]:
    first, second = rng.randrange(50), rng.randrange(50)
    return (first, second), str(first + second)


MAKERS: dict[str, Callable[[random.Random], tuple[tuple, str]]] = {
    "sort": make_sort,
    "reverse": make_reverse,
    "count": make_count,
    "add": make_add,
}


def is_held_out(question: str) -> bool:
    return zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0


def spoil(answer: str) -> str:
    """What a careless writer says: a list without its last digit, a number one too large."""
    *digits, last = answer.split()
    return " ".join(digits) if digits else str(int(last) + 1)


def generate_rows(held_out: bool, seed: int, careless: float = 0.0) -> Iterator[dict]:
    """Yield distinct rows of one split for ever, the kinds in turn."""
    rng, mood = random.Random(seed), random.Random(f"mood {seed}")
    seen = set()
    while True:
        for kind, make in MAKERS.items():
            values, answer = make(rng)
            question = rng.choice(PHRASINGS[kind]).format(*values)
            if question in seen or is_held_out(question) is not held_out:
                continue
            seen.add(question)
            written = spoil(answer) if mood.random() < careless else answer
            yield {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": written}],
                "answer": answer,
                "kind": kind,
            }


def make_dataset(size: int, *, held_out: bool = False, seed: int = 0, careless: float = 0.0) -> Dataset:
    """A prompt-completion dataset in chat form.

    Args:
        size: number of rows, all different.
        held_out: take questions of the test split instead of the training split.
        seed: of the generator.
        careless: share of completions that are wrong, each in the same way (see `spoil`).

    Returns:
        Dataset with columns `prompt` and `completion` (lists of messages), `answer` (str, always right) and `kind` (str).
    """
    rows = generate_rows(held_out, seed, careless)
    return Dataset.from_list([next(rows) for _ in range(size)])


def is_correct(reply: str, answer: str) -> bool:
    return reply.strip() == answer
