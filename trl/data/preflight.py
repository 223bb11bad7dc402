"""
What will be trained on, before the first step: a short table of counts, and a few rows as coloured tokens.

The counts come from the prepared rows themselves, not from what the settings promise. Where the data is streamed
nothing can be counted ahead; the report then says so, and keeps count while the rows go by.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, IterableDataset

from .dataset_report import DatasetReport, percent
from .token_lists import IGNORE_INDEX
from .token_view import legend, paint_tokens
from .tokenization import get_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from .preparation import LanguageModelingOptions

NO_TRAINED_TOKEN = "no trained token"
CUT_OFF = "no trained token left after truncation"
PACKED_CONTEXT = "packed row without a trained token"


@dataclass
class PreparationReport(DatasetReport):
    """
    What became of a dataset on its way to a language-modeling trainer.

    Args:
        name (`str`, defaults to `"train"`):
            Name of the dataset.
        streaming (`bool`, defaults to `False`):
            The rows are prepared while they are read. Only `rows_in`, `rows_kept` and `dropped` are counted then, and
            only in the process that reads.

    Attributes beyond those of [`~trl.data.dataset_report.DatasetReport`], all counted after truncation unless they
    say otherwise:

    - `tokens_trained`, `tokens_context` (`int`): tokens with and without a label. The first token of a document is
      context: nothing comes before it that could predict it.
    - `rows_truncated`, `tokens_cut` (`int`): examples over `max_length`, and tokens lost by it.
    - `longest`, `median` (`int`, `float`): tokens per example, before truncation.
    - `rows_packed` (`int` or `None`), `packing_efficiency` (`float` or `None`): rows after packing, and the share of
      their capacity that holds tokens.
    - `stop_tokens` (`list[str]`), `stop_token_share` (`float` or `None`): tokens that end a generation, and the share
      of kept examples in which one of them is trained.
    """

    tokens_trained: int = 0
    tokens_context: int = 0
    rows_truncated: int = 0
    tokens_cut: int = 0
    longest: int = 0
    median: float = 0.0
    rows_packed: int | None = None
    packing_strategy: str | None = None
    packing_efficiency: float | None = None
    stop_tokens: list[str] = field(default_factory=list)
    stop_token_share: float | None = None

    @property
    def rows_dropped(self) -> int:
        """Examples dropped, for whatever reason."""
        return sum(dropped.count for reason, dropped in self.dropped.items() if reason != PACKED_CONTEXT)

    def count_stream(self, indices: Sequence[int], trained_uncut: np.ndarray, trained: np.ndarray) -> None:
        """
        Count a batch of a streamed dataset as it goes by.

        Args:
            indices (`Sequence[int]`):
                Numbers of the rows in the stream.
            trained_uncut (`np.ndarray`):
                Trained tokens of each row, before truncation.
            trained (`np.ndarray`):
                Trained tokens of each row, after it. Rows without any are dropped.

        Raises:
            `ValueError`: the first thousand rows and more were dropped and none kept.
        """
        masked = trained_uncut == 0
        self.count_batch(indices, {NO_TRAINED_TOKEN: masked, CUT_OFF: ~masked & (trained == 0)})

    def _is_usable(self) -> bool:
        return self.rows_kept > 0 and (self.streaming or self.tokens_trained > 0)

    def _advice(self) -> str:
        if CUT_OFF in self.dropped:
            return (
                f"With max_length={self.max_length} what is to be trained lies behind the cut; raise max_length, or "
                "shorten the prompts."
            )
        return "Check the mask columns and labels, and what completion_only_loss and assistant_only_loss leave over."

    def rows(self) -> list[tuple[str, str]]:
        """The lines of the table, as label and value."""
        lines = super().rows()
        if self.streaming:
            return lines
        total = self.tokens_trained + self.tokens_context
        lines += [
            ("tokens trained", f"{self.tokens_trained:,} ({percent(self.tokens_trained, total)})"),
            ("tokens context", f"{self.tokens_context:,}"),
            ("length", f"median {self.median:,.0f}, longest {self.longest:,}"),
            (
                "truncated",
                f"{self.rows_truncated:,} examples, {self.tokens_cut:,} tokens cut at max_length={self.max_length:,}"
                if self.max_length is not None
                else "no (max_length=None)",
            ),
        ]
        if self.rows_packed is not None:
            efficiency = f"{self.packing_efficiency:.1%} full" if self.packing_efficiency is not None else ""
            lines.append(("packed", f"{self.rows_packed:,} rows ({self.packing_strategy}), {efficiency}"))
        if self.stop_token_share is not None:
            stop = " or ".join(self.stop_tokens)
            lines.append(("stop token", f"{stop} trained in {self.stop_token_share:.1%} of examples"))
        return lines


# ---------------------------------------------------------------------------------------------------------------------
# A look at the tokens
# ---------------------------------------------------------------------------------------------------------------------

_KINDS = ("context", "trained", "cut")


def preview(
    dataset_or_rows: Dataset | IterableDataset | Sequence[Mapping[str, Any]],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    options: LanguageModelingOptions,
    n: int = 3,
    color: bool = True,
    *,
    formatting_func: Any = None,
) -> str:
    """
    The first rows of a dataset as the trainer will see them: which tokens are context, trained, or cut.

    Args:
        dataset_or_rows ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or list of rows):
            Unprepared rows.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Tokenizer or processor.
        options ([`~trl.data.preparation.LanguageModelingOptions`]):
            The settings of the run. Packing is left out, so that each row stays recognizable.
        n (`int`, defaults to `3`):
            Number of rows.
        color (`bool`, defaults to `True`):
            Mark with terminal colours; otherwise with brackets.
        formatting_func (`Callable`, *optional*):
            As given to the trainer.

    Returns:
        `str`: a legend and the rows.
    """
    from .preparation import encode_rows

    rows = [dict(row) for row in itertools.islice(iter(dataset_or_rows), n)]
    if not rows:
        raise ValueError("There is nothing to preview: the dataset has no rows.")
    blocks = [legend(_KINDS, color)]
    for number, (input_ids, labels) in enumerate(encode_rows(rows, processing_class, options, formatting_func)):
        kinds = _token_kinds(labels, options)
        counts = ", ".join(f"{kinds.count(kind):,} {kind}" for kind in _KINDS)
        warning = "" if "trained" in kinds else " — nothing trained: this row will be dropped"
        blocks.append(f"── row {number}: {len(input_ids):,} tokens ({counts}){warning}")
        blocks.append(paint_tokens(input_ids, kinds, get_tokenizer(processing_class), color))
    return "\n".join(blocks)


def _token_kinds(labels: Sequence[int], options: LanguageModelingOptions) -> list[str]:
    kinds = ["context" if label == IGNORE_INDEX else "trained" for label in labels]
    limit = options.max_length if not options.packing or options.packing_strategy == "bfd" else None
    over = max(0, len(kinds) - limit) if limit is not None else 0
    if over and options.truncation_mode == "keep_end" and not options.packing:
        kinds[:over] = ["cut"] * over
    elif over:
        kinds[-over:] = ["cut"] * over
    first = next((i for i, kind in enumerate(kinds) if kind != "cut"), None)
    if first is not None:
        kinds[first] = "context"  # nothing before it predicts it
    return kinds
