"""
Samplers for methods that sample: every prompt several times in a row, every generation batch several times over.

With `mini_repeat_count=3`, `batch_size=2` and `repeat_count=2`, the prompts `a b c d e` come as
`aaabbb aaabbb cccddd cccddd`: groups of equal prompts stay together, a batch of prompts is used twice before the next
one, and the incomplete last batch (`e`) is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import Sampler


class RepeatSampler(Sampler[int]):
    """
    Sampler that repeats each index in a row, and each batch of indices as a whole.

    Args:
        data_source (`Sized`):
            Dataset to sample from.
        mini_repeat_count (`int`):
            How many times an index is repeated in a row.
        batch_size (`int`, *optional*, defaults to `1`):
            Number of distinct indices in a batch. An incomplete last batch is left out.
        repeat_count (`int`, *optional*, defaults to `1`):
            How many times a batch is repeated before the next one.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether to draw a new order for every pass.
        seed (`int`, *optional*):
            Seed of the orders; drawn from PyTorch's global generator when `None`.

    Example:

    ```python
    >>> list(RepeatSampler(range(5), mini_repeat_count=2, batch_size=2, repeat_count=2, shuffle=False))
    [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    ```
    """

    def __init__(
        self,
        data_source: Sized,
        mini_repeat_count: int,
        batch_size: int = 1,
        repeat_count: int = 1,
        shuffle: bool = True,
        seed: int | None = None,
    ):
        for name, value in (
            ("mini_repeat_count", mini_repeat_count),
            ("batch_size", batch_size),
            ("repeat_count", repeat_count),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.data_source = data_source
        self.mini_repeat_count = mini_repeat_count
        self.batch_size = batch_size
        self.repeat_count = repeat_count
        self.shuffle = shuffle
        self.seed = seed
        if shuffle:
            self._seed = int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed
            self._generator = torch.Generator().manual_seed(self._seed)
        self._next_pass = 0

    def set_epoch(self, epoch: int) -> None:
        """
        Make the next pass the one of this epoch, so that a resumed run sees the order of the uninterrupted one.

        Args:
            epoch (`int`):
                Number of passes that came before.
        """
        if epoch == self._next_pass:
            return
        if epoch < self._next_pass:
            self._next_pass = 0
            if self.shuffle:
                self._generator.manual_seed(self._seed)
        while self._next_pass < epoch:
            self._draw_order()

    def _draw_order(self) -> list[int]:
        self._next_pass += 1
        n = len(self.data_source)
        return torch.randperm(n, generator=self._generator).tolist() if self.shuffle else list(range(n))

    def __iter__(self) -> Iterator[int]:
        order = self._draw_order()
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            batch = order[start : start + self.batch_size]
            for _ in range(self.repeat_count):
                for index in batch:
                    for _ in range(self.mini_repeat_count):
                        yield index

    def __len__(self) -> int:
        n_batches = len(self.data_source) // self.batch_size
        return n_batches * self.batch_size * self.mini_repeat_count * self.repeat_count


def repeat_iterable_dataset(
    dataset: IterableDataset, mini_repeat_count: int, batch_size: int = 1, repeat_count: int = 1
) -> IterableDataset:
    """
    Repeat the examples of a stream as [`RepeatSampler`] repeats indices, in the order of the stream.

    Args:
        dataset ([`~datasets.IterableDataset`]):
            Stream of examples.
        mini_repeat_count (`int`):
            How many times an example is repeated in a row.
        batch_size (`int`, *optional*, defaults to `1`):
            Number of distinct examples in a batch. An incomplete last batch is left out.
        repeat_count (`int`, *optional*, defaults to `1`):
            How many times a batch is repeated before the next one.

    Returns:
        [`~datasets.IterableDataset`]: a stream that can be resumed and split over workers as the original.
    """
    return dataset.map(
        _repeat_batch,
        batched=True,
        batch_size=batch_size,
        drop_last_batch=True,
        features=dataset.features,
        fn_kwargs={"mini_repeat_count": mini_repeat_count, "repeat_count": repeat_count},
    )


def _repeat_batch(batch: dict[str, list[Any]], mini_repeat_count: int, repeat_count: int) -> dict[str, list[Any]]:
    return {
        column: [value for value in values for _ in range(mini_repeat_count)] * repeat_count
        for column, values in batch.items()
    }


class WholeStream(TorchIterableDataset):
    """
    A stream that every process reads from its beginning to its end, and takes its rows of each batch from.

    accelerate would give each process some of a stream's shards where there are enough of them; a group of rows that
    spans processes would then be of different prompts.

    Args:
        dataset ([`~datasets.IterableDataset`]):
            Stream of examples, in the same order on every process.
    """

    def __init__(self, dataset: IterableDataset):
        self.dataset = dataset

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as in this epoch."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dataset)
