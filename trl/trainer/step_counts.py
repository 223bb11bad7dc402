"""Losses as sums, divided by what the whole optimizer step has: the same loss however the step was cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class StepCountsMixin:
    """
    Trainer methods that count what a loss is divided by, over the micro-batches and processes of an optimizer step.

    A unit is what a part of a loss is a sum over: pairs, rows, tokens, ...
    """

    _step_counts: Mapping[str, Tensor] = {}

    def count_step(self, counts: Iterable[Mapping[str, Tensor]], device: torch.device) -> Mapping[str, Tensor]:
        """
        Add up the counts of an optimizer step; all processes call this.

        Args:
            counts: by unit, of each micro-batch of this process.
            device: where to.

        Returns:
            The totals by unit, which `normalize` divides by from now on.
        """
        totals: dict[str, Tensor] = {}
        for units in counts:
            for unit, count in units.items():
                totals[unit] = totals.get(unit, 0) + count.to(device)
        if totals:
            dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
            stacked = torch.stack([total.to(dtype) for total in totals.values()])
            stacked = self.accelerator.reduce(stacked, reduction="sum") / max(self.get_tp_size(), 1)
            totals = dict(zip(totals, stacked, strict=True))
        self._step_counts = totals
        return totals

    def normalize(self, total: Tensor, unit: str, counts: Mapping[str, Tensor], over_step: bool) -> Tensor:
        """
        Divide a micro-batch's sum of losses.

        Args:
            total: the sum, scalar.
            unit: what it is a sum over.
            counts: number of each unit in this micro-batch.
            over_step: divide by the number in the whole optimizer step, such that what the base class makes of
                micro-batches, and the backends of processes, is the sum over the step divided by it.
        """
        if not over_step:
            return total / counts[unit].clamp(min=1)
        processes = self.accelerator.num_processes // max(self.get_tp_size(), 1)
        # In the loss's own precision: a float64 count would make a float64 loss.
        count = self._step_counts[unit].clamp(min=1).to(total.dtype)
        means_over_micro_batches = self.current_gradient_accumulation_steps if not self.loss_is_scaled_for_ga else 1
        return total / count * (means_over_micro_batches * processes)
