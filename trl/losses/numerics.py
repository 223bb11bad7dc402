"""Keeping the numbers of a loss within what their type can hold."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in float32 if its type is a half one, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def bounded_exponents(exponents: Tensor) -> Tensor:
    """In float32 or better, cut where their exponential would leave the range of the type they came in."""
    bound = 11.0 if exponents.dtype == torch.float16 else 80.0
    return at_least_fp32(exponents).clamp(max=bound)
