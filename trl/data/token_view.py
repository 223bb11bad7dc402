"""Tokens as a person reads them: what is context, trained or cut, in terminal colours or brackets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

_RESET = "\033[0m"
_GREEN, _YELLOW = "\033[1;32m", "\033[1;33m"
_STYLES = {"context": "\033[2m", "trained": _GREEN, "chosen": _GREEN, "rejected": _YELLOW, "cut": "\033[9;31m"}
_BRACKETS = {
    "context": ("", ""),
    "trained": ("⟦", "⟧"),
    "chosen": ("⟦", "⟧"),
    "rejected": ("⟪", "⟫"),
    "cut": ("⟨cut: ", "⟩"),
}


def legend(kinds: Iterable[str], color: bool) -> str:
    """A line that shows how tokens of each kind are marked."""
    return "Tokens: " + " ".join(paint(kind, kind, color) for kind in kinds)


def paint(text: str, kind: str, color: bool) -> str:
    """A text marked as tokens of this kind are: `context`, `trained`, `chosen`, `rejected` or `cut`."""
    if color:
        # Restart the style on each line: pagers and terminals forget it at a line's end.
        return "\n".join(f"{_STYLES[kind]}{line}{_RESET}" if line else line for line in text.split("\n"))
    before, after = _BRACKETS[kind]
    return f"{before}{text}{after}"


def paint_tokens(input_ids: Sequence[int], kinds: Sequence[str], tokenizer: Any, color: bool) -> str:
    """The text of tokens, each run of one kind marked."""
    pieces = []
    for kind, run in itertools.groupby(zip(input_ids, kinds, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        pieces.append(paint(text, kind, color))
    return "".join(pieces)
