"""Objectives state the derivative of what they return."""

from __future__ import annotations

import pytest
import torch

from trl.losses.language_modeling import LANGUAGE_MODELING_LOSSES, dft, nll

LOGPS = torch.tensor([-0.1, -1.0, -5.0, 0.0], dtype=torch.float64)


def test_nll_is_minus_the_log_probability():
    losses, derivatives = nll(LOGPS)
    assert torch.equal(losses, -LOGPS)
    assert derivatives.tolist() == [-1.0] * 4


def test_dft_weighs_by_a_constant_probability():
    losses, derivatives = dft(LOGPS)
    logps = LOGPS.clone().requires_grad_()
    expected = -logps.exp().detach() * logps
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(derivatives, torch.autograd.grad(expected.sum(), logps)[0])


@pytest.mark.parametrize("name", LANGUAGE_MODELING_LOSSES)
def test_objectives_keep_shape_and_leave_their_input(name):
    logps = LOGPS.clone().view(2, 2)
    losses, derivatives = LANGUAGE_MODELING_LOSSES[name](logps)
    assert losses.shape == derivatives.shape == (2, 2)
    assert torch.equal(logps, LOGPS.view(2, 2))
