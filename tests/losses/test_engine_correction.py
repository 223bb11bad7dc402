"""The engine's log-probs against the trainer's: the recorded figures, the four modes, and log-probs that are missing."""

from __future__ import annotations

import math

import pytest
import torch

from tests.conftest import load_reference
from trl.losses.engine_correction import engine_correction, engine_differences
from trl.losses.policy import PolicyLossOptions
from trl.losses.policy_metrics import engine_agreement, engine_metrics
from trl.losses.policy_options import ENGINE_CORRECTION_MODES

REFERENCE = {name: case for name, case in load_reference("policy").items() if name.startswith("vllm_is_")}
NAN = math.nan


def with_nan(rows) -> torch.Tensor:
    return torch.tensor([[NAN if value is None else value for value in row] for row in rows])


def values(metrics) -> dict[str, float]:
    means = {name: float(total / count) for name, (total, count) in metrics.means.items()}
    return means | {name: float(value) for name, value in (metrics.minima | metrics.maxima).items()}


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_figures(name):
    inputs, outputs = REFERENCE[name]["inputs"], REFERENCE[name]["outputs"]
    correction = engine_correction(
        torch.tensor(inputs["old_per_token_logps"]),
        with_nan(inputs["sampling_per_token_logps"]),
        torch.tensor(inputs["completion_mask"]),
        PolicyLossOptions(**REFERENCE[name]["config"]),
    )
    expected = torch.tensor(outputs["importance_sampling_ratio"])
    torch.testing.assert_close(correction.ratios_BT, expected, rtol=1e-5, atol=1e-5)
    metrics = values(engine_metrics(correction))
    del metrics["sampling/sampling_kl"]  # not among the recorded figures
    assert metrics == pytest.approx(outputs["metrics"], rel=1e-5, abs=1e-5)


def test_the_figures_cover_every_mode():
    assert {case["config"]["vllm_importance_sampling_mode"] for case in REFERENCE.values()} == set(
        ENGINE_CORRECTION_MODES
    )


OLD = torch.tensor([[0.5, 2.0, 4.0], [2.0, 1.0, 9.0]]).log()
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", [[0.8, 2.0, 3.0], [2.0, 1.0, 1.0]]),
        ("token_mask", [[0.0, 2.0, 0.0], [2.0, 1.0, 1.0]]),
        ("sequence_truncate", [[3.0], [2.0]]),
        ("sequence_mask", [[0.0], [2.0]]),
    ],
)
def test_modes(mode, expected):
    options = PolicyLossOptions(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=0.8)
    ratios = engine_correction(OLD, torch.zeros(2, 3), MASK, options).ratios_BT
    torch.testing.assert_close(ratios, torch.tensor(expected))


@pytest.mark.parametrize("mode", ENGINE_CORRECTION_MODES)
@pytest.mark.parametrize("missing", [NAN, math.inf, -math.inf])
def test_missing_log_probs_are_ratio_1_and_no_difference(mode, missing):
    options = PolicyLossOptions(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=100.0)
    engine = torch.zeros(2, 3)
    engine[0, 2] = missing
    correction = engine_correction(OLD, engine, MASK, options)
    known = engine_correction(OLD, torch.where(engine == 0, engine, OLD), MASK, options)
    torch.testing.assert_close(correction.ratios_BT, known.ratios_BT)
    assert values(engine_metrics(correction))["sampling/sampling_logp_difference/mean"] == pytest.approx(
        (OLD[0, :2].abs().sum() + OLD[1, :2].abs().sum()).item() / 4
    )
    nothing = engine_correction(OLD, torch.full((2, 3), missing), MASK, options)
    assert (nothing.ratios_BT == 1).all()
    metrics = engine_metrics(nothing)
    assert int(metrics.means["sampling/sampling_logp_difference/mean"][1]) == 0
    assert float(metrics.maxima["sampling/sampling_logp_difference/max"]) == -math.inf


def test_agreement_has_the_divergence_from_engine_to_trainer():
    """What the engine sampled, log q - log p on average; with many samples of known q and p, their KL divergence."""
    q, p = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    tokens = torch.multinomial(q, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, len(tokens))
    logps, engine = p.log()[tokens][None], q.log()[tokens][None]
    metrics = values(engine_agreement(*engine_differences(logps, engine, mask)))
    assert metrics["sampling/sampling_kl"] == pytest.approx(float((q * (q / p).log()).sum()), abs=0.01)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(2.5), abs=1e-5)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.7 * math.log(2.5), abs=0.01)


@pytest.mark.parametrize("mode", ENGINE_CORRECTION_MODES)
def test_what_is_masked_does_not_count(mode):
    options = PolicyLossOptions(vllm_importance_sampling_mode=mode)
    dirty = OLD.masked_fill(MASK == 0, NAN)
    clean = engine_correction(OLD, torch.zeros(2, 3), MASK, options)
    actual = engine_correction(dirty, torch.zeros(2, 3).masked_fill(MASK == 0, 7.0), MASK, options)
    assert torch.equal(actual.ratios_BT, clean.ratios_BT)
    assert torch.equal(actual.differences_BT, clean.differences_BT)
    empty = engine_correction(OLD, torch.zeros(2, 3), torch.tensor([[0, 0, 0], [1, 1, 0]]), options)
    assert int(engine_metrics(empty).means["sampling/importance_sampling_ratio/mean"][1]) == (
        2 if mode.startswith("token") else 1
    )


@pytest.mark.parametrize("mode", ENGINE_CORRECTION_MODES)
@pytest.mark.parametrize("old", [1e3, -1e3, -math.inf])
def test_far_from_the_engine_ratios_stay_finite(mode, old):
    for bounds in ({}, {"vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": None}):
        options = PolicyLossOptions(vllm_importance_sampling_mode=mode, **bounds)
        correction = engine_correction(torch.full((1, 2), old), torch.zeros(1, 2), torch.ones(1, 2), options)
        assert correction.ratios_BT.isfinite().all()
        assert correction.differences_BT.isfinite().all()
