"""Entropy in policy losses: the recorded masks, the quantile, and the controller of the bonus."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.conftest import load_reference
from trl.losses.entropy import EntropyController, entropy_threshold
from trl.losses.policy import PolicyLossInputs, PolicyLossOptions, policy_loss

REFERENCE = {name: case for name, case in load_reference("policy").items() if name.startswith("high_entropy_mask")}


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_masks(name):
    case = REFERENCE[name]
    entropies, mask = (torch.tensor(case["inputs"][key]) for key in ("entropies", "mask"))
    share = 1 - case["config"]["threshold_quantile"]
    threshold = entropy_threshold(entropies[mask.bool()], share)
    inputs = PolicyLossInputs(torch.zeros_like(entropies), torch.ones(len(mask)), mask, entropies_BT=entropies)
    loss = policy_loss(inputs, PolicyLossOptions(top_entropy_quantile=share), threshold)
    assert loss.trained_mask_BT.int().tolist() == case["outputs"]["mask"]
    assert (loss.losses_BT != 0).int().tolist() == case["outputs"]["mask"]


@pytest.mark.parametrize("share", [0.0, 0.13, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_threshold_is_a_quantile(share, count):
    entropies = torch.rand(count, generator=torch.Generator().manual_seed(count))
    torch.testing.assert_close(entropy_threshold(entropies, share), torch.quantile(entropies, 1 - share))
    kept = int((entropies >= entropy_threshold(entropies, share)).sum())
    assert kept >= 1
    assert kept == pytest.approx(share * count, abs=1)


def test_threshold_of_nothing_trains_nothing():
    assert entropy_threshold(torch.zeros(0), 0.5) == math.inf


def controller(**changes) -> EntropyController:
    settings = {"entropy_coef": 0.01, "entropy_target": 0.2, "entropy_coef_delta": 0.004, "entropy_coef_max": 0.015}
    return EntropyController.of(PolicyLossOptions(use_adaptive_entropy=True, **{**settings, **changes}))


def test_controller_steers_towards_the_target():
    steered = controller()
    assert steered.active_coef == 0  # nothing is known yet
    coefficients = []
    for entropy in (0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.1, math.nan):
        steered.update(entropy)
        coefficients.append((round(steered.coef, 6), round(steered.active_coef, 6)))
    assert coefficients == [
        (0.014, 0.014),
        (0.015, 0.015),
        (0.011, 0),
        (0.007, 0),
        (0.003, 0),
        (0, 0),
        (0, 0),
        (0.004, 0.004),
        (0.004, 0.004),
    ]


@pytest.mark.parametrize("seen", [0, 1, 3])
def test_controller_goes_on_where_it_was(seen):
    entropies = [0.1, 0.3, 0.15, 0.1, 0.25]
    whole, first, second = controller(), controller(), controller(entropy_coef=0.5)
    for entropy in entropies[:seen]:
        first.update(entropy)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for entropy in entropies[:seen]:
        whole.update(entropy)
    assert (second.coef, second.active_coef) == (whole.coef, whole.active_coef)
    for entropy in entropies[seen:]:
        whole.update(entropy)
        second.update(entropy)
        assert (second.coef, second.active_coef) == (whole.coef, whole.active_coef)
