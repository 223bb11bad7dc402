"""
What every pre-flight report has: rows given, kept and dropped by reason, remarks, and the table they are shown in.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .formats import describe_rows

logger = logging.getLogger(__name__)

# A stream that has dropped this many rows and kept none will not get better; an endless wait must not look like work.
HOPELESS_ROWS = 1000


@dataclass
class Dropped:
    """Rows that are not trained on, for one reason."""

    count: int = 0
    rows: list[int] = field(default_factory=list)  # the first few, as numbered in the dataset given

    def add(self, indices: Sequence[int]) -> None:
        self.count += len(indices)
        self.rows.extend(int(index) for index in indices[: max(0, 10 - len(self.rows))])


@dataclass
class DatasetReport:
    """
    What became of the rows of a dataset on their way to the trainer.

    Args:
        name (`str`, defaults to `"train"`):
            Name of the dataset.
        streaming (`bool`, defaults to `False`):
            The rows are prepared while they are read. Only `rows_in`, `rows_kept` and `dropped` are counted then, and
            only in the process that reads.

    Attributes:

    - `rows_in`, `rows_kept` (`int`): examples given, and examples left.
    - `dropped` (`dict[str, Dropped]`): by reason, how many examples were dropped and the first row numbers.
    - `max_length` (`int` or `None`): the limit, in tokens.
    - `prompts_merged` (`Dropped`): prompts whose last tokens merge with what follows.
    - `notes` (`list[str]`): remarks that deserve a reader.
    """

    name: str = "train"
    streaming: bool = False
    rows_in: int = 0
    rows_kept: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    max_length: int | None = None
    prompts_merged: Dropped = field(default_factory=Dropped)
    notes: list[str] = field(default_factory=list)

    @property
    def rows_dropped(self) -> int:
        """Examples dropped, for whatever reason."""
        return sum(dropped.count for dropped in self.dropped.values())

    def drop(self, reason: str, indices: Sequence[int]) -> None:
        """Count rows as dropped for a reason; no rows, no entry."""
        if len(indices):
            self.dropped.setdefault(reason, Dropped()).add(indices)

    def count_batch(self, indices: Sequence[int], lost: Mapping[str, np.ndarray]) -> None:
        """
        Count a batch of a streamed dataset as it goes by, and log the first rows lost for each reason.

        Args:
            indices (`Sequence[int]`):
                Numbers of the rows in the stream.
            lost (`Mapping[str, np.ndarray]`):
                By reason, booleans: which rows are dropped for it. A row is dropped for one reason at most.

        Raises:
            `ValueError`: the first thousand rows and more were dropped and none kept.
        """
        numbers = np.asarray(indices)
        self.rows_in += len(numbers)
        self.rows_kept += len(numbers) - sum(int(mask.sum()) for mask in lost.values())
        for reason, mask in lost.items():
            rows = numbers[mask].tolist()
            if rows and reason not in self.dropped:
                logger.warning(
                    "%s dataset: %s dropped (%s). Further ones are counted in silence.",
                    self.name,
                    describe_rows(rows),
                    reason,
                )
            self.drop(reason, rows)
        if self.rows_kept == 0 and self.rows_in >= HOPELESS_ROWS:
            self.raise_if_unusable()

    def raise_if_unusable(self) -> None:
        """
        Stop here rather than train on nothing.

        Raises:
            `ValueError`: the dataset is empty, or nothing in it can be trained. The message names the first rows.
        """
        if self.streaming and self.rows_in < HOPELESS_ROWS:
            return
        if self.rows_in == 0:
            raise ValueError(f"The {self.name} dataset is empty: it has 0 rows, and at least 1 is needed.")
        if self._is_usable():
            return
        reasons = "; ".join(
            f"{describe_rows_of(dropped)}: {reason}" for reason, dropped in self.dropped.items() if dropped.count
        )
        raise ValueError(
            f"The {self.name} dataset has no token to train on: none of its {self.rows_in:,} rows is left"
            f"{f' ({reasons})' if reasons else ''}. {self._advice()}"
        )

    def _is_usable(self) -> bool:
        return self.rows_kept > 0

    def _advice(self) -> str:
        return "Check the rows that are named."

    def rows(self) -> list[tuple[str, str]]:
        """The lines of the table, as label and value."""
        lines = [("examples", f"{self.rows_in:,}" if self.rows_in else "counted while they are read")]
        if self.streaming:
            lines.append(("tokens", "unknown: the dataset is streamed"))
        if self.rows_dropped or not self.streaming:
            lines.append(("  kept", f"{self.rows_kept:,}"))
        for reason, dropped in self.dropped.items():
            lines.append(("  dropped", f"{dropped.count:,} — {reason} ({describe_rows_of(dropped)})"))
        if self.prompts_merged.count:
            merged = self.prompts_merged
            lines.append(("merged prompts", f"{merged.count:,} end within a token ({describe_rows_of(merged)})"))
        return lines

    def render(self) -> str:
        """The report as a short table: boxed where `rich` is installed, plain lines otherwise."""
        title = f"Pre-flight: {self.name} dataset"
        try:
            return _render_rich(title, self.rows(), self.notes)
        except ImportError:
            return _render_plain(title, self.rows(), self.notes)

    def __str__(self) -> str:
        return self.render()


def describe_rows_of(dropped: Dropped) -> str:
    """`row 3`; `rows 1, 4 and 20 more`."""
    listed = dropped.rows[:5]
    more = dropped.count - len(listed)
    text = f"row{'s' if dropped.count > 1 else ''} {', '.join(map(str, listed))}"
    return f"{text} and {more:,} more" if more > 0 else text


def percent(part: int, total: int) -> str:
    return f"{part / total:.1%}" if total else "0%"


def _render_plain(title: str, rows: Iterable[tuple[str, str]], notes: Sequence[str]) -> str:
    lines = [title, *(f"  {label:<16}{value}" for label, value in rows), *(f"  ! {note}" for note in notes)]
    return "\n".join(lines)


def _render_rich(title: str, rows: Iterable[tuple[str, str]], notes: Sequence[str]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.ROUNDED, show_header=False)
    for label, value in rows:
        table.add_row(Text(label), Text(value))
    for note in notes:
        table.add_row(Text("note"), Text(note))
    console = Console(file=io.StringIO(), width=110, color_system=None)
    console.print(table)
    return console.file.getvalue().rstrip()
