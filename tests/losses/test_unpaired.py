"""Losses on single completions: the recorded figures, their derivatives, their limits."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import load_reference
from trl.losses.unpaired import UNPAIRED_LOSSES, unpaired_loss

REFERENCE = {name: case for name, case in load_reference("sft").items() if case["trainer"] == "KTOTrainer"}
LABELS = torch.tensor([True, False, True, False, False])
LOGRATIOS = torch.tensor([-2.0, -1.0, 0.5, 0.0, 3.0], dtype=torch.float64)


def _logratios(policy, reference, mask_BT) -> torch.Tensor:
    policy, reference = (torch.as_tensor(x, dtype=torch.float64) for x in (policy, reference))
    return ((policy - reference) * mask_BT).sum(-1)


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_figures(name):
    case = REFERENCE[name]
    inputs, outputs = case["inputs"], case["outputs"]
    mask = torch.tensor(inputs["completion_mask"])[:, 1:]
    logps = torch.tensor(inputs["per_token_logps"], dtype=torch.float64, requires_grad=True)
    kl = None
    if "KL_completion_mask" in inputs:
        kl_mask = torch.tensor(inputs["KL_completion_mask"])[:, 1:]
        kl = _logratios(inputs["KL_per_token_logps"], inputs["ref_KL_per_token_logps"], kl_mask).mean()
        assert max(float(kl), 0) == pytest.approx(outputs["metrics"]["kl"], abs=1e-9)
    logratios = _logratios(logps, inputs["ref_per_token_logps"], mask)
    loss = unpaired_loss(logratios, torch.tensor(inputs["label"]), kl, **case["config"]).mean()
    (gradient,) = torch.autograd.grad(loss, logps)
    assert loss.item() == pytest.approx(outputs["loss"], abs=1e-6)
    expected = torch.tensor(outputs["grad_per_token_logps"], dtype=torch.float64) * mask
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


def test_the_reference_has_every_loss():
    assert {case["config"]["loss_type"] for case in REFERENCE.values()} == set(UNPAIRED_LOSSES)


@pytest.mark.parametrize("kl", [0.7, -0.7])
@pytest.mark.parametrize("loss_type", UNPAIRED_LOSSES)
def test_derivatives(loss_type, kl):
    kl = torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    settings = {"loss_type": loss_type, "beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    logratios = LOGRATIOS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unpaired_loss(x, LABELS, kl.detach(), **settings), logratios)
    losses = unpaired_loss(logratios, LABELS, kl, **settings)
    assert torch.autograd.grad(losses.sum(), kl, allow_unused=True) == (None,)


@pytest.mark.parametrize("loss_type", UNPAIRED_LOSSES)
def test_far_from_the_reference_everything_stays_finite(loss_type):
    logratios = torch.tensor([1e4, 1e4, -1e4, -1e4], requires_grad=True)
    labels = torch.tensor([True, False, True, False])
    losses = unpaired_loss(logratios, labels, torch.tensor(5.0), loss_type=loss_type)
    assert losses.tolist() == [0, 1, 1, 0]
    assert torch.autograd.grad(losses.sum(), logratios)[0].isfinite().all()


def test_a_negative_kl_counts_as_zero():
    zero, negative, positive = (unpaired_loss(LOGRATIOS, LABELS, torch.tensor(kl)) for kl in (0.0, -3.0, 3.0))
    assert torch.equal(negative, zero)
    assert (positive[LABELS] > zero[LABELS]).all()
    assert (positive[~LABELS] < zero[~LABELS]).all()


@pytest.mark.parametrize("labels", [LABELS, LABELS.long()])
def test_a_fresh_policy_has_a_loss_of_half_the_weights(labels):
    losses = unpaired_loss(torch.zeros(5), labels, torch.tensor(0.0), desirable_weight=2.0, undesirable_weight=0.5)
    assert losses.dtype == torch.float32
    assert losses.tolist() == [1.0, 0.25, 1.0, 0.25, 0.25]


def test_cutting_a_batch_changes_nothing():
    kl = torch.tensor(0.3)
    whole = unpaired_loss(LOGRATIOS, LABELS, kl)
    pieces = [unpaired_loss(LOGRATIOS[cut], LABELS[cut], kl) for cut in (slice(0, 1), slice(1, 3), slice(3, 5))]
    assert torch.equal(torch.cat(pieces), whole)


def test_refused():
    with pytest.raises(ValueError, match="Did you mean 'apo_zero_unpaired'"):
        unpaired_loss(LOGRATIOS, LABELS, loss_type="apo_zero")
    with pytest.raises(ValueError, match="needs `kl`"):
        unpaired_loss(LOGRATIOS, LABELS, loss_type="kto")
