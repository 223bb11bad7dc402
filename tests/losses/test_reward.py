"""Losses of reward models: the recorded figures, their derivatives, their limits."""

from __future__ import annotations

import math

import pytest
import torch

from tests.conftest import load_reference
from trl.losses.reward import bradley_terry_loss, centering_penalty

REFERENCE = {name: case for name, case in load_reference("sft").items() if case["trainer"] == "RewardTrainer"}


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_figures(name):
    case = REFERENCE[name]
    inputs, outputs = case["inputs"], case["outputs"]
    rewards = torch.tensor(inputs["rewards"], dtype=torch.float64, requires_grad=True)
    chosen, rejected = rewards.squeeze(-1).chunk(2)
    margins = torch.tensor(inputs["margin"]) if "margin" in inputs else None
    loss = bradley_terry_loss(chosen, rejected, margins).mean()
    coefficient = case["config"]["center_rewards_coefficient"]
    if coefficient is not None:
        loss = loss + coefficient * centering_penalty(chosen, rejected).mean()
    (gradient,) = torch.autograd.grad(loss, rewards)
    assert loss.item() == pytest.approx(outputs["loss"], abs=1e-6)
    torch.testing.assert_close(gradient.tolist(), outputs["grad_rewards"], rtol=1e-6, atol=1e-6)


def test_the_reference_has_margins_and_centering():
    seen = {(name.split("_")[1], case["config"]["center_rewards_coefficient"]) for name, case in REFERENCE.items()}
    assert seen == {("plain", None), ("margin", None), ("plain", 0.01), ("margin", 0.1)}


def test_derivatives():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margins = (torch.randn(4, dtype=torch.float64, generator=generator) for _ in range(3))
    chosen.requires_grad_()
    rejected.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: bradley_terry_loss(c, r, margins), (chosen, rejected))
    assert torch.autograd.gradcheck(centering_penalty, (chosen, rejected))


def test_equal_rewards_cost_ln_2_and_a_margin_more():
    reward, margin = torch.tensor([1.5]), torch.tensor([2.0])
    assert float(bradley_terry_loss(reward, reward)) == pytest.approx(math.log(2))
    assert float(bradley_terry_loss(reward + margin, reward, margin)) == pytest.approx(math.log(2))
    assert float(centering_penalty(reward, -reward)) == 0


def test_far_apart_everything_stays_finite():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = bradley_terry_loss(chosen, -chosen)
    assert losses.tolist() == [0, 2e4]
    assert torch.autograd.grad(losses.sum(), chosen)[0].tolist() == [0, -2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    chosen, rejected = torch.tensor([100.0], dtype=dtype), torch.tensor([300.0], dtype=dtype)
    assert bradley_terry_loss(chosen, rejected, torch.tensor([0.125])).tolist() == [200.125]
    assert centering_penalty(chosen, rejected).tolist() == [160000.0]  # beyond float16
