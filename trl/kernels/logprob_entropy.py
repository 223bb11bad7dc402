"""Log-probabilities and entropies from logits that exist already, without a second tensor of their size in the forward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.head import accumulation_dtype

# Rows are taken in blocks of about this many logits, so that what is computed on the way stays small.
_BLOCK_ELEMENTS = 2**24


class _LogProbEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV: Tensor, index_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(logits_NV.dtype)
        size = max(1, _BLOCK_ELEMENTS // logits_NV.shape[1])
        logps, entropies, normalizers = [], [], []
        for logits_CV, index_C in zip(logits_NV.split(size), index_N.split(size), strict=True):
            x_CV = logits_CV.to(dtype) / temperature
            normalizer_C = x_CV.logsumexp(dim=-1)
            logps.append(x_CV.gather(1, index_C.unsqueeze(1)).squeeze(1) - normalizer_C)
            probs_CV = (x_CV - normalizer_C.unsqueeze(1)).exp_()
            entropies.append(normalizer_C - probs_CV.mul_(x_CV).sum(dim=-1))
            normalizers.append(normalizer_C)
        logps_N, entropies_N, normalizers_N = torch.cat(logps), torch.cat(entropies), torch.cat(normalizers)
        ctx.save_for_backward(logits_NV, index_N, normalizers_N, entropies_N)
        ctx.temperature, ctx.size = temperature, size
        return logps_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps_N: Tensor, grad_entropy_N: Tensor):
        logits_NV, index_N, normalizers_N, entropies_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        for start in range(0, len(logits_NV), ctx.size):
            rows = slice(start, start + ctx.size)
            logps_CV = logits_NV[rows].to(normalizers_N.dtype) / ctx.temperature
            logps_CV.sub_(normalizers_N[rows].unsqueeze(1))
            probs_CV = logps_CV.exp()
            grad_CV = logps_CV.add_(entropies_N[rows].unsqueeze(1)).mul_(-grad_entropy_N[rows].unsqueeze(1))
            grad_CV.sub_(grad_logps_N[rows].unsqueeze(1)).mul_(probs_CV)
            grad_CV.scatter_add_(1, index_N[rows].unsqueeze(1), grad_logps_N[rows].unsqueeze(1))
            grad_NV[rows] = grad_CV.div_(ctx.temperature)
        return grad_NV, None, None


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """
    Log-probabilities of given tokens and the entropies of the predictions; both are differentiable.

    Args:
        logits: [..., V].
        index: token ids, [...].
        temperature: divides the logits; default 1.
        row_mask: [...], True where the position counts; elsewhere both results and the gradient are 0. Default: all.

    Returns:
        Log-probabilities and entropies in nats, [...], float32 (float64 for float64 logits).
    """
    shape = index.shape
    logits_NV, index_N = logits.reshape(-1, logits.shape[-1]), index.reshape(-1)
    if row_mask is None:
        logps_N, entropies_N = _LogProbEntropyFunction.apply(logits_NV, index_N, temperature)
        return logps_N.view(shape), entropies_N.view(shape)
    mask_N = row_mask.reshape(-1).bool()
    logps, entropies = _LogProbEntropyFunction.apply(logits_NV[mask_N], index_N[mask_N], temperature)
    zeros_N = torch.zeros(mask_N.shape, dtype=logps.dtype, device=logps.device)
    return tuple(zeros_N.masked_scatter(mask_N, values).view(shape) for values in (logps, entropies))
