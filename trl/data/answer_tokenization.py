"""
Prompts and answers of preference data to tokens: checked, the prompt found where it is not given, split at one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .formats import DatasetFormatError
from .pair_checks import PairChecker, is_empty_answer
from .templating import extract_prompt
from .tokenization import RowTokenizer

MERGED = "prompt_tokens_merged"
"""Column that counts the tokens of a prompt that were not found again before its answers."""


@dataclass(frozen=True)
class AnswerTokenizer:
    """
    Tokenizes batches of prompts and their answers; what is mapped over a dataset of preferences.

    Args:
        row_tokenizer ([`~trl.data.tokenization.RowTokenizer`]):
            Knows tokenizer and end-of-sequence token.
        checker ([`~trl.data.pair_checks.PairChecker`]):
            Looks at the rows first.
        answers (`tuple[str, ...]`):
            Columns of answers.
        has_prompt (`bool`):
            Whether there is a column `prompt`; otherwise it is what both answers begin with.
        whole (`bool`):
            Tokenize prompt and answer as one.
    """

    row_tokenizer: RowTokenizer
    checker: PairChecker
    answers: tuple[str, ...]
    has_prompt: bool
    whole: bool = False

    @property
    def finds_prompt(self) -> bool:
        """Whether the columns `prompt`, `chosen` and `rejected` are rewritten."""
        return not self.has_prompt and not self.whole

    def __call__(self, rows: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        """
        Args:
            rows (`Mapping[str, list]`):
                Columns of a batch.
            indices (`Sequence[int]`):
                Numbers of the rows in their dataset, for errors.

        Returns:
            `dict[str, list]`: the token columns, empty lists where an answer is empty; `prompt_tokens_merged` where
            prompts are kept apart; and `prompt`, `chosen` and `rejected` where the prompt had to be found.

        Raises:
            `DatasetFormatError`: a row is not as it must be, or the chat template cannot render it.
        """
        self.checker.check(rows, indices)
        split = self._split_prompts(rows)
        usable = [
            number
            for number, answers in enumerate(zip(*(split[answer] for answer in self.answers), strict=True))
            if not any(map(is_empty_answer, answers))
        ]
        for number in usable:
            prompt = split["prompt"][number] if "prompt" in split and not self.whole else None
            answers = {answer: split[answer][number] for answer in self.answers}
            self.checker.check_answers(indices[number], prompt, answers)
        # A reward model reads whole sequences: what was split off to look at it is left where it was.
        source = rows if self.whole else {**rows, **split}
        chosen_rows = {column: [values[number] for number in usable] for column, values in source.items()}
        encoded = self._encode(chosen_rows, [indices[number] for number in usable])
        output = {
            column: _scatter(values, usable, len(indices), 0 if column == MERGED else [])
            for column, values in encoded.items()
        }
        return {**output, **split} if self.finds_prompt else output

    def _split_prompts(self, rows: Mapping[str, list]) -> dict[str, list]:
        if self.has_prompt or len(self.answers) == 1:
            return {column: rows[column] for column in ("prompt", *self.answers)}
        pairs = zip(*(rows[answer] for answer in self.answers), strict=True)
        split = [extract_prompt({"chosen": chosen, "rejected": rejected}) for chosen, rejected in pairs]
        return {column: [example[column] for example in split] for column in ("prompt", *self.answers)}

    def _encode(self, rows: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        conversational = self.checker.conversational
        try:
            if self.whole:
                return {
                    f"{answer}_ids": self.row_tokenizer.encode_whole(rows, indices, answer, conversational)[
                        "input_ids"
                    ]
                    for answer in self.answers
                }
            boundaries, merged, wholes = self.row_tokenizer.continue_prompts(
                rows, indices, self.answers, conversational
            )
        except ValueError:
            raise  # says itself what is wrong, and in which row
        except Exception as error:
            raise DatasetFormatError(
                f"The {self.checker.name} dataset: the chat template cannot render a conversation: "
                f"{type(error).__name__}: {error}"
            ) from error
        starts = list(zip(boundaries, *(whole["input_ids"] for whole in wholes), strict=True))
        columns = {"prompt_ids": [ids[:start] for start, ids, *_ in starts], MERGED: merged}
        for number, answer in enumerate(self.answers, start=1):
            columns[f"{answer}_ids"] = [row[number][row[0] :] for row in starts]
        return columns


def _scatter(values: list, places: list[int], n_rows: int, nothing: Any) -> list:
    """The values at their places among `n_rows`, and `nothing` elsewhere."""
    if len(places) == n_rows:
        return values
    spread = [nothing] * n_rows
    for place, value in zip(places, values, strict=True):
        spread[place] = value
    return spread
