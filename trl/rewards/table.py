"""
What the reward functions said about a batch of completions.

Shapes: F functions, N completions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class RewardTable:
    """
    Values of N completions by F sources of reward.

    Args:
        names: of the sources.
        weights_F: their weights, [F].
        values_FN: their values, [F, N], float32; NaN where a source does not apply or has failed.
        extras: columns for the completions table, each with a value per completion.
        metrics: what was reported with `log_metric`: the values by name.
        failed_counts: of each source, completions without a value because it failed.
        latencies_s: of each source, seconds until its answer (or until it was given up).
        errors: of the sources that failed, what happened.
    """

    names: list[str]
    weights_F: Tensor
    values_FN: Tensor
    extras: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    failed_counts: list[int] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def totals_N(self) -> Tensor:
        """Weighted sum of a completion's values, [N]; what does not apply adds nothing, NaN where nothing applies."""
        totals_N = (self.values_FN * self.weights_F.to(self.values_FN).unsqueeze(1)).nansum(0)
        return totals_N.masked_fill(self.values_FN.isnan().all(0), float("nan"))

    def health(self) -> dict[str, tuple[float, float]]:
        """
        How the sources fare, as sums and counts, such that batches and processes add up.

        Returns:
            By key: `rewards/{name}/latency_s`, seconds of a call; `rewards/{name}/none_rate`, share of completions
            without a value, for whatever reason; `rewards/{name}/error_rate`, share of completions without one because
            the source failed.
        """
        completions = float(self.values_FN.shape[1])
        missing_F = self.values_FN.isnan().sum(1).tolist()
        figures: dict[str, tuple[float, float]] = {}
        for index, name in enumerate(self.names):
            figures[f"rewards/{name}/latency_s"] = (self.latencies_s[index], 1.0)
            figures[f"rewards/{name}/none_rate"] = (float(missing_F[index]), completions)
            figures[f"rewards/{name}/error_rate"] = (float(self.failed_counts[index]), completions)
        return figures
