"""
What will be learned from preference data, before the first step: which rows are left, and what their lengths say.

Answers are cut at `max_length` by the collator; here is counted what the cut will leave of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from .dataset_report import DatasetReport, percent
from .token_lists import TokenLists

EMPTY_ANSWER = "empty answer"
IDENTICAL = "chosen and rejected are the same"
PROMPT_FILLS = "the prompt alone fills max_length"
SAME_AFTER_CUT = "chosen and rejected are the same within max_length"
NOTHING_SCORED = "no token of an answer has one before it"
TOO_LONG = "longer than max_length"

# Shares of pairs from which on the answers' lengths alone tell the better one too well.
_BIASED_SHARE, _BIASED_PAIRS = 0.75, 20
# So many rows of one label without a break do not come by chance.
_SORTED_SHARE, _SORTED_ROWS = 0.1, 64


@dataclass
class PairReport(DatasetReport):
    """
    What became of a dataset of preferences on its way to the trainer.

    Args:
        name (`str`, defaults to `"train"`):
            Name of the dataset.
        streaming (`bool`, defaults to `False`):
            The rows are prepared while they are read. Only `rows_in`, `rows_kept` and `dropped` are counted then, and
            only in the process that reads.

    Attributes beyond those of [`~trl.data.dataset_report.DatasetReport`], all of the rows kept:

    - `lengths` (`dict[str, tuple[float, int]]`): of `prompt`, `chosen`, `rejected` or `completion`, the median and the
      largest number of tokens, before truncation.
    - `rows_truncated` (`int`): rows of which `max_length` cuts an answer.
    - `prompt_share` (`float` or `None`): share of all tokens that belong to prompts; half of it is saved where a
      prompt is computed once for its two answers.
    - `chosen_longer_share`, `rejected_longer_share` (`float` or `None`): shares of pairs in which this answer is the
      longer one.
    - `stop_tokens` (`list[str]`), `stop_token_share` (`float` or `None`): tokens that end a generation, and the share
      of chosen or desirable answers in which one of them is left after truncation.
    - `desirable`, `undesirable` (`int` or `None`): answers of each label, for unpaired data.
    """

    lengths: dict[str, tuple[float, int]] = field(default_factory=dict)
    rows_truncated: int = 0
    prompt_share: float | None = None
    chosen_longer_share: float | None = None
    rejected_longer_share: float | None = None
    stop_tokens: list[str] = field(default_factory=list)
    stop_token_share: float | None = None
    desirable: int | None = None
    undesirable: int | None = None

    def _advice(self) -> str:
        if any(reason in self.dropped for reason in (PROMPT_FILLS, SAME_AFTER_CUT, TOO_LONG)):
            return f"Raise max_length (it is {self.max_length}), or shorten the rows."
        return "Look at the rows that are named: both answers are needed, and a difference between them."

    def rows(self) -> list[tuple[str, str]]:
        """The lines of the table, as label and value."""
        lines = super().rows()
        if self.streaming:
            return lines
        for column, (median, longest) in self.lengths.items():
            lines.append((column, f"median {median:,.0f} tokens, longest {longest:,}"))
        if "prompt" in self.lengths and self.max_length is not None:
            lines.append(("truncated", f"{self.rows_truncated:,} rows at max_length={self.max_length:,}"))
        if self.prompt_share is not None:
            once = (
                f"; computed once per pair, {self.prompt_share / 2:.1%} of the work is saved"
                if {"prompt", "chosen"} <= set(self.lengths) and self.desirable is None
                else ""
            )
            lines.append(("prompt share", f"{self.prompt_share:.1%} of all tokens{once}"))
        if self.chosen_longer_share is not None:
            longer = f"chosen in {self.chosen_longer_share:.1%} of pairs, rejected in {self.rejected_longer_share:.1%}"
            lines.append(("longer answer", longer))
        if self.desirable is not None:
            total = self.desirable + self.undesirable
            lines.append(
                (
                    "labels",
                    f"{self.desirable:,} desirable ({percent(self.desirable, total)}), {self.undesirable:,} not",
                )
            )
        if self.stop_token_share is not None:
            stop = " or ".join(self.stop_tokens)
            lines.append(("stop token", f"{stop} trained in {self.stop_token_share:.1%} of the answers to prefer"))
        return lines

    def note_length_bias(self) -> None:
        """Remark on answers whose length alone tells which is the better one."""
        if self.rows_kept < _BIASED_PAIRS:
            return
        for longer, share, learned in (
            ("chosen", self.chosen_longer_share, "to write more"),
            ("rejected", self.rejected_longer_share, "to write less"),
        ):
            if share >= _BIASED_SHARE:
                self.notes.append(
                    f"The {longer} answer is the longer one in {share:.0%} of pairs: the model may learn {learned} "
                    "instead of what was meant. Balance the data, or use a loss that weighs length out."
                )

    def note_classes(self, labels: np.ndarray) -> None:
        """
        Count unpaired data by label; remark on a label that is missing, and on rows that are sorted by it.

        Args:
            labels (`np.ndarray`):
                Booleans `[rows]`, in the order of training.
        """
        self.desirable, self.undesirable = int(labels.sum()), int((~labels).sum())
        starts = np.concatenate([[0], np.flatnonzero(labels[1:] != labels[:-1]) + 1, [len(labels)]])
        longest = int(np.diff(starts).max())
        if self.desirable and self.undesirable and longest >= max(_SORTED_ROWS, _SORTED_SHARE * len(labels)):
            self.notes.append(
                f"{longest:,} rows in a row have the same label, and rows are trained in their order: shuffle the "
                "dataset first, dataset.shuffle(seed=42)."
            )
        missing = "desirable" if not self.desirable else "undesirable" if not self.undesirable else None
        if missing and self.rows_kept:
            value = missing == "desirable"
            self.notes.append(
                f"There is no {missing} answer (label {value}): half of the loss has nothing to learn from."
            )


@dataclass(frozen=True)
class CutAnswers:
    """
    Prompts and answers as the collator will cut them, for counting.

    Args:
        prompts ([`TokenLists`] or `None`):
            Prompts; `None` where the answers hold them.
        answers (`Mapping[str, TokenLists]`):
            By name: `chosen` and `rejected`, or `completion`.
        max_length (`int` or `None`):
            Longest prompt with answer, in tokens.
        mode (`str`):
            `"keep_start"` or `"keep_end"`.
    """

    prompts: TokenLists | None
    answers: Mapping[str, TokenLists]
    max_length: int | None
    mode: str

    @property
    def is_pair(self) -> bool:
        return len(self.answers) == 2

    def windows(self) -> np.ndarray | None:
        """How many tokens of an answer fit, int64 `[rows]`; may be negative. `None`: all."""
        if self.max_length is None or self.prompts is None:
            return None
        n_rows = len(self.prompts.lengths)
        return self.max_length - (self.prompts.lengths if self.mode == "keep_start" else np.zeros(n_rows, np.int64))

    def cut_lengths(self) -> list[np.ndarray]:
        """Tokens of each answer after the cut, int64 `[rows]` per answer."""
        windows = self.windows()
        if windows is None:
            return [lists.lengths for lists in self.answers.values()]
        return [np.clip(lists.lengths, 0, np.maximum(windows, 0)) for lists in self.answers.values()]

    def cut_answers(self, lengths: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """Row by row, the tokens of each answer after the cut to `lengths`."""
        columns = [lists.to_arrays() for lists in self.answers.values()]
        for row, answers in enumerate(zip(*columns, strict=True)):
            sizes = [int(length[row]) for length in lengths]
            if self.mode == "keep_end":
                yield [answer[len(answer) - size :] for answer, size in zip(answers, sizes, strict=True)]
            else:
                yield [answer[:size] for answer, size in zip(answers, sizes, strict=True)]

    def lost(self) -> dict[str, np.ndarray]:
        """By reason, booleans `[rows]`: which rows are dropped for it. A row has its first reason only."""
        uncut = [lists.lengths for lists in self.answers.values()]
        reasons = {EMPTY_ANSWER: np.any([lengths == 0 for lengths in uncut], axis=0)}
        if self.is_pair:
            reasons[IDENTICAL] = self._are_same(uncut)
        if self.prompts is None and self.max_length is not None:
            reasons[TOO_LONG] = np.any([lengths > self.max_length for lengths in uncut], axis=0)
        if self.prompts is not None:
            lengths = self.cut_lengths()
            if self.max_length is not None and self.mode == "keep_start":
                reasons[PROMPT_FILLS] = self.prompts.lengths >= self.max_length
            if self.is_pair and self.max_length is not None:
                reasons[SAME_AFTER_CUT] = self._are_same(lengths)
            reasons[NOTHING_SCORED] = np.any([self._scored(length) == 0 for length in lengths], axis=0)
        found = np.zeros(len(uncut[0]), bool)
        for reason, mask in reasons.items():
            reasons[reason] = mask & ~found
            found |= mask
        return reasons

    def _are_same(self, lengths: list[np.ndarray]) -> np.ndarray:
        pairs = (np.array_equal(chosen, rejected) for chosen, rejected in self.cut_answers(lengths))
        return np.fromiter(pairs, bool, len(lengths[0]))

    def _scored(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of cut answers that have a token before them to be predicted from."""
        has_context = self.prompts.lengths > 0
        if self.max_length is not None and self.mode == "keep_end":
            has_context &= lengths < self.max_length
        return lengths - (~has_context & (lengths > 0))
