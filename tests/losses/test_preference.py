"""Losses on pairs: the recorded figures, their derivatives, their limits, and which settings are refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import load_reference
from trl.losses.preference import (
    F_DIVERGENCE_TYPES,
    F_DIVERGENCES,
    PREFERENCE_LOSS_TYPES,
    PREFERENCE_LOSSES,
    PairLogps,
    PreferenceLossInputs,
    PreferenceLossOptions,
    preference_loss,
    sum_pair_logps,
    wpo_weights,
)
from trl.losses.preference_options import LOSSES_OF_ANY_DIVERGENCE, LOSSES_OF_SORTED_BATCHES

REFERENCE = {name: case for name, case in load_reference("preference").items() if case["dtype"] != "text"}
VALIDATION = {name: case for name, case in load_reference("preference").items() if case["dtype"] == "text"}
del VALIDATION["dpo_validation_sync_precompute"]  # of the trainer, not of the losses
SMOOTHED = {"exo_pair": 0.1, "robust": 0.1}  # label smoothing of the losses that want one
OF_PAIRS = [name for name in PREFERENCE_LOSS_TYPES if name not in LOSSES_OF_SORTED_BATCHES]


def options_for(*loss_types: str, **settings) -> PreferenceLossOptions:
    smoothing = max((SMOOTHED.get(name, 0.0) for name in loss_types), default=0.0)
    return PreferenceLossOptions(loss_type=loss_types, **{"label_smoothing": smoothing, **settings})


def quiet_options(**settings) -> PreferenceLossOptions:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a smoothing that the loss does not read
        return PreferenceLossOptions(**settings)


def mean_loss(terms, n_pairs: int, n_chosen_tokens: int) -> torch.Tensor:
    counts = {"pairs": n_pairs, "chosen_tokens": n_chosen_tokens}
    return sum(term.weight * term.total / counts[term.unit] for term in terms)


def loss_of_tokens(logps_RT, ref_logps_RT, mask_RT, options, log_sum_sq_probs_RT=None):
    """The whole way, from log-probs of tokens to the scalar that is minimised."""
    chosen_mask, rejected_mask = mask_RT.chunk(2)
    inputs = PreferenceLossInputs(
        policy=sum_pair_logps(logps_RT, mask_RT, options.ld_alpha),
        reference=sum_pair_logps(ref_logps_RT, mask_RT, options.ld_alpha),
        chosen_lengths_B=chosen_mask.sum(-1),
        rejected_lengths_B=rejected_mask.sum(-1),
        chosen_nll_B=-(logps_RT * mask_RT).chunk(2)[0].sum(-1),
        weights_B=wpo_weights(logps_RT, log_sum_sq_probs_RT, mask_RT) if options.use_weighting else None,
    )
    return mean_loss(preference_loss(inputs, options), len(chosen_mask), int(chosen_mask.sum()))


def random_inputs(n_pairs: int = 5, seed: int = 0, dtype=torch.float64, scale: float = 3.0) -> PreferenceLossInputs:
    generator = torch.Generator().manual_seed(seed)

    def numbers():
        return torch.randn(n_pairs, generator=generator, dtype=dtype)

    return PreferenceLossInputs(
        policy=PairLogps(scale * numbers() - 10, scale * numbers() - 10),
        reference=PairLogps(scale * numbers() - 10, scale * numbers() - 10),
        chosen_lengths_B=torch.randint(1, 9, (n_pairs,), generator=generator),
        rejected_lengths_B=torch.randint(1, 9, (n_pairs,), generator=generator),
        chosen_nll_B=numbers().abs(),
        weights_B=numbers().exp(),
    )


def rows(inputs: PreferenceLossInputs, piece: slice) -> PreferenceLossInputs:
    def cut(pair):
        return PairLogps(pair.chosen_B[piece], pair.rejected_B[piece])

    return PreferenceLossInputs(
        cut(inputs.policy),
        cut(inputs.reference),
        inputs.chosen_lengths_B[piece],
        inputs.rejected_lengths_B[piece],
        inputs.chosen_nll_B[piece],
        inputs.weights_B[piece],
    )


# ---- Against the recorded figures ----


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_figures(name):
    case = REFERENCE[name]
    dtype = getattr(torch, case["dtype"])
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    inputs, outputs = case["inputs"], case["outputs"]
    logps = torch.tensor(inputs["per_token_logps"], dtype=dtype, requires_grad=True)
    mask = torch.tensor(inputs["completion_mask"])[:, 1:]
    squares = torch.tensor(inputs["log_sum_sq_probs"], dtype=dtype) if "log_sum_sq_probs" in inputs else None

    options = quiet_options(**case["config"])
    loss = loss_of_tokens(logps, torch.tensor(inputs["ref_per_token_logps"], dtype=dtype), mask, options, squares)
    (gradient,) = torch.autograd.grad(loss, logps)

    def close(actual, expected):
        torch.testing.assert_close(
            actual.detach().double(), torch.tensor(expected).double(), rtol=tolerance, atol=tolerance
        )

    close(loss, outputs["loss"])
    # The figures continue a sequence's derivative over its padding; ours is 0 where nothing is scored.
    close(gradient, (torch.tensor(outputs["grad_per_token_logps"]).double() * mask).tolist())


def test_the_reference_has_every_loss():
    assert {name for case in REFERENCE.values() for name in case["config"]["loss_type"]} == set(PREFERENCE_LOSSES)
    assert tuple(PREFERENCE_LOSSES) == PREFERENCE_LOSS_TYPES
    assert tuple(F_DIVERGENCES) == F_DIVERGENCE_TYPES


@pytest.mark.parametrize("name", VALIDATION)
def test_reference_validation(name):
    case = VALIDATION[name]
    outputs, settings = case["outputs"], case["config"]
    raised = outputs["config_raises"] or outputs["init_raises"] or outputs["first_step_raises"]
    if name == "dpo_validation_robust_half":  # divides by zero at every step there
        raised = "ValueError"
    if raised:
        with pytest.raises({"ValueError": ValueError, "NotImplementedError": NotImplementedError}[raised]):
            PreferenceLossOptions(**settings)
    else:
        assert list(PreferenceLossOptions(**settings).loss_type) == outputs["loss_type"]
