"""
Losses and metrics as sums with counts.

A micro-batch adds what it saw, on its device, without waiting for it. The mean is taken once per log call, over all
micro-batches and processes, so it never depends on how a batch was cut.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

# Between the name of a metric and that of its part.
_PART = "#"


class Reducer:
    """
    Collects `(sum, count)` pairs and extremes by mode and name, and running totals by name.

    Args:
        accelerator: tells the device and gathers over processes.
        replicas: how many processes see the same batch (tensor parallelism). Totals are divided by it; means are not
            touched by it.
    """

    def __init__(self, accelerator: Accelerator, replicas: int = 1):
        self.accelerator = accelerator
        self.replicas = max(replicas, 1)
        self._pending: dict[str, dict[str, Tensor]] = defaultdict(dict)  # mode -> name -> [sum, count] of this process
        self._extremes: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)  # mode -> name -> which, value
        self._pending_totals: dict[str, Tensor] = {}  # name -> what this process counted since the last reduction
        self._totals: dict[str, float] = {}  # name -> total over all processes, as of the last reduction

    def _pair(self, total: Tensor | float, count: Tensor | float) -> Tensor:
        device = self.accelerator.device
        # float64 counts tokens exactly up to 2^53; MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        with torch.no_grad():
            return torch.stack([torch.as_tensor(x, device=device, dtype=dtype).detach() for x in (total, count)])

    def add(
        self, mode: str, name: str, total: Tensor | float, count: Tensor | float = 1, part: str | None = None
    ) -> None:
        """
        Add a sum over `count` items to the mean called `name`.

        With `part`, to one of several means whose sum is the value; it is left out as long as one has no item.
        """
        pair = self._pair(total, count)
        pending = self._pending[mode]
        key = name if part is None else f"{name}{_PART}{part}"
        pending[key] = pending[key] + pair if key in pending else pair

    def add_extreme(self, mode: str, name: str, value: Tensor | float, which: str) -> None:
        """Keep the least (`which="min"`) or greatest (`"max"`) of the values added; an infinite one is none, and 0 if all are."""
        device = self.accelerator.device
        value = torch.as_tensor(value, device=device, dtype=torch.float32).detach()
        known = self._extremes[mode].get(name)
        if known is not None:
            value = (torch.minimum if which == "min" else torch.maximum)(known[1], value)
        self._extremes[mode][name] = (which, value)

    def add_total(self, name: str, amount: Tensor | float) -> None:
        """Add to a running total, which no log call clears."""
        pair = self._pair(amount, 0)
        self._pending_totals[name] = self._pending_totals[name] + pair if name in self._pending_totals else pair

    def clear(self, mode: str) -> None:
        self._pending[mode] = {}
        self._extremes[mode] = {}

    def _extremes_over_processes(self, mode: str) -> dict[str, tuple[str, float]]:
        mine = {name: (which, value.item()) for name, (which, value) in self._extremes[mode].items()}
        found: dict[str, tuple[str, float]] = {}
        for theirs in gather_object([mine]):
            for name, (which, value) in theirs.items():
                best = min if which == "min" else max
                found[name] = (which, best(found[name][1], value) if name in found else value)
        return found

    def _over_processes(self, local: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Sum pairs over processes; a name that only some of them have counts too."""
        mine = {name: tuple(pair.tolist()) for name, pair in local.items()}
        summed: dict[str, tuple[float, float]] = {}
        for theirs in gather_object([mine]):
            for name, (total, count) in theirs.items():
                before = summed.get(name, (0.0, 0.0))
                summed[name] = (before[0] + total, before[1] + count)
        return summed

    def reduce(self, mode: str) -> dict[str, float]:
        """
        Means and extremes of everything added to `mode` since the last call, and all totals. A collective call: every
        process makes it.

        Returns:
            name -> value. A mean over no item is left out.
        """
        summed = self._over_processes(self._pending[mode])
        empty = {key.partition(_PART)[0] for key, (_, count) in summed.items() if not count}
        means: dict[str, float] = {}
        for key, (total, count) in summed.items():
            name = key.partition(_PART)[0]
            if name not in empty:
                means[name] = means.get(name, 0.0) + total / count
        for name, (_, value) in self._extremes_over_processes(mode).items():
            means[name] = value if math.isfinite(value) else 0.0
        self.clear(mode)
        for name, (amount, _) in self._over_processes(self._pending_totals).items():
            self._totals[name] = self._totals.get(name, 0) + amount / self.replicas
        self._pending_totals = {}
        return {**means, **self._totals}

    def state(self) -> dict:
        """What a checkpoint keeps, in JSON's types. A collective call."""
        pending = self._over_processes(self._pending["train"])
        totals = dict(self._totals)
        for name, (amount, _) in self._over_processes(self._pending_totals).items():
            totals[name] = totals.get(name, 0) + amount / self.replicas
        extremes = self._extremes_over_processes("train")
        return {
            "pending": {name: list(pair) for name, pair in pending.items()},
            "extremes": {name: list(pair) for name, pair in extremes.items() if math.isfinite(pair[1])},
            "totals": totals,
        }

    def load_state(self, state: dict) -> None:
        """Take up where a checkpoint left off. The main process carries the pending sums of all."""
        self._pending.clear()
        self._extremes.clear()
        self._pending_totals = {}
        self._totals = dict(state["totals"])
        if self.accelerator.is_main_process:
            self._pending["train"] = {name: self._pair(*pair) for name, pair in state["pending"].items()}
            for name, (which, value) in state.get("extremes", {}).items():
                self.add_extreme("train", name, value, which)
