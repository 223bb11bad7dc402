"""Log-probabilities of sampled tokens, taken while `generate` runs, one step's scores at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import StoppingCriteria


class SampledLogps(StoppingCriteria):
    """
    Never stops; reads the log-probability of each new token from the scores it was drawn from, then frees the scores.

    `generate` has no hook between drawing a token and going on but this one, and keeps the scores of all steps until
    it returns: tokens x rows x vocabulary. Here the scores of a step are gone before the next begins.

    Needs `return_dict_in_generate=True` and `output_scores=True`. The scores are those after temperature, penalties
    and truncation, so the log-probabilities are those of the distribution that was drawn from.
    """

    def __init__(self):
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...], **kwargs) -> Tensor:
        last = scores[-1]
        logps_BV = torch.log_softmax(last.float(), dim=-1)
        self.steps.append(logps_BV.gather(1, input_ids[:, -1:].to(last.device))[:, 0])
        last.untyped_storage().resize_(0)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def stacked(self) -> Tensor:
        """All steps, [B, T]; where a row had ended, the value means nothing."""
        return torch.stack(self.steps, dim=1)
