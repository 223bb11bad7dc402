"""Policy losses: the recorded figures, their derivatives, their limits, their sums, and which settings are refused."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from tests.conftest import load_reference
from trl.losses import advantages, engine_correction, entropy, policy
from trl.losses.entropy import entropy_threshold
from trl.losses.policy import (
    POLICY_LOSS_TYPES,
    POLICY_LOSSES,
    PolicyLossInputs,
    PolicyLossOptions,
    aggregate,
    count_units,
    policy_loss,
)
from trl.losses.policy_metrics import policy_metrics
from trl.losses.policy_options import ENGINE_CORRECTION_MODES, IMPORTANCE_SAMPLING_LEVELS

FIGURES = load_reference("policy")
LOSSES = {
    name: case
    for name, case in FIGURES.items()
    if "loss" in case["outputs"] and case["trainer"] in ("GRPOTrainer", "RLOOTrainer")
}
PAGE = (Path(__file__).parents[2] / "docs" / "policy_losses.md").read_text(encoding="utf-8")
NAN = math.nan


def quiet_options(**settings) -> PolicyLossOptions:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of combinations that are defined, but seldom meant
        return PolicyLossOptions(**settings)


# ---- Against the recorded figures ----


class Case:
    """A recorded case as inputs and options."""

    def __init__(self, case: dict):
        config, inputs = dict(case["config"]), case["inputs"]
        self.dtype = getattr(torch, case["dtype"])
        self.tolerance = 1e-6 if self.dtype == torch.float64 else 1e-5
        self.accumulation = config.pop("gradient_accumulation_steps", 1)
        self.steps_per_generation = config.pop("steps_per_generation", self.accumulation)
        self.is_eval = config.pop("mode", "train") == "eval"
        self.num_items_in_batch = inputs.get("num_items_in_batch")
        self.logps = self.tensor(inputs["per_token_logps"]).requires_grad_()
        self.entropies = self.tensor(inputs["entropies"]).requires_grad_()
        mask = torch.tensor(inputs["completion_mask"]) * torch.tensor(inputs.get("tool_mask", 1))
        self.is_rloo = case["trainer"] == "RLOOTrainer"
        if self.is_rloo:
            config.update(loss_type="grpo", importance_sampling_level="trajectory")
            sums = inputs["old_logps"]  # which tokens they are of does not matter: only their sum does
            old = self.tensor([[value] + [0.0] * (mask.shape[1] - 1) for value in sums])
        else:
            old = self.optional(inputs, "old_per_token_logps")
        ratios = self.optional(inputs, "importance_sampling_ratio")
        # They were recorded without the correction unless they say otherwise, although it is on by default.
        config.setdefault("use_bias_correction_kl", False)
        self.options = quiet_options(**config, vllm_importance_sampling_mode="token_mask")
        self.inputs = PolicyLossInputs(
            logps_BT=self.logps,
            advantages_BT=self.tensor(inputs["advantages"]),
            mask_BT=mask,
            old_logps_BT=old,
            ref_logps_BT=self.optional(inputs, "ref_per_token_logps"),
            rollout_logps_BT=self.optional(inputs, "sampling_per_token_logps"),
            engine_ratios_BT=ratios,
            entropies_BT=self.entropies,
        )

    def tensor(self, values) -> torch.Tensor:
        return torch.tensor(values, dtype=self.dtype)

    def optional(self, inputs: dict, name: str) -> torch.Tensor | None:
        return self.tensor(inputs[name]) if name in inputs else None

    def scalar(self, term) -> torch.Tensor:
        """One micro-batch's part of the loss: means of micro-batches are averaged, token counts are those given."""
        accumulation = 1 if self.is_eval or self.is_rloo else self.accumulation
        if term.unit == "tokens" and term.name == "policy":
            share = 1 if self.is_eval else self.accumulation / self.steps_per_generation
            return term.weight * term.total / (self.num_items_in_batch * share)
        return term.weight * term.total / term.count / accumulation

    def loss(self):
        threshold = entropy_threshold(self.entropies[self.inputs.mask_BT.bool()], self.options.top_entropy_quantile)
        loss = policy_loss(self.inputs, self.options, threshold)
        terms = aggregate(loss, self.options)
        return loss, {term.name: self.scalar(term) for term in terms}

    def close(self, actual, expected) -> None:
        actual = torch.as_tensor(actual).detach().double()
        torch.testing.assert_close(actual, torch.tensor(expected).double(), rtol=self.tolerance, atol=self.tolerance)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "vespo_vllm_token_zero"])
def test_reference_figures(name):
    case, outputs = Case(LOSSES[name]), LOSSES[name]["outputs"]
    loss, parts = case.loss()
    total = sum(parts.values())
    gradients = torch.autograd.grad(total, [case.logps, case.entropies], materialize_grads=True)
    case.close(total, outputs["loss"])
    case.close(gradients[0], outputs["grad_per_token_logps"])
    if "grad_entropies" in outputs:
        case.close(gradients[1], outputs["grad_entropies"])

    expected = dict(outputs["metrics"])
    metrics = policy_metrics(loss, case.options)
    if "policy_loss" in expected:
        case.close(parts["policy"], expected.pop("policy_loss"))
        assert expected.pop("entropy_coef") == case.options.entropy_coef
    actual = {name: float(total / count) for name, (total, count) in metrics.means.items()}
    actual |= {name: float(value) for name, value in (metrics.minima | metrics.maxima).items()}
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_token_that_the_engine_correction_masks_takes_no_other_with_it():
    """The recorded figures lose the gradient of the whole sequence; ours is that of its other tokens."""
    case, outputs = Case(LOSSES["vespo_vllm_token_zero"]), LOSSES["vespo_vllm_token_zero"]["outputs"]
    expected = torch.tensor(outputs["grad_per_token_logps"]).double()
    ratios = case.inputs.engine_ratios_BT
    assert ratios[0, 0] == 0
    assert expected[0].abs().max() < 1e-20
    (gradient,) = torch.autograd.grad(case.loss()[1]["policy"], case.logps)
    case.close(gradient[1:], expected[1:].tolist())
    unmasked = replace(
        case.inputs,
        engine_ratios_BT=ratios.clone().index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1.0).double()),
    )
    loss = aggregate(policy_loss(unmasked, case.options), case.options)
    (with_ratio_one,) = torch.autograd.grad(case.scalar(loss[0]), case.logps)
    assert gradient[0, 0] == 0
    case.close(gradient[0, 1:], with_ratio_one[0, 1:].tolist())
    assert gradient[0, 1:].abs().min() > 1e-5


def test_the_reference_has_every_loss_and_level():
    found = {
        (case["config"].get("loss_type"), case["config"].get("importance_sampling_level")) for case in LOSSES.values()
    }
    assert {name for name, _ in found if name} == set(POLICY_LOSSES)
    assert tuple(POLICY_LOSSES) == POLICY_LOSS_TYPES
    for name in POLICY_LOSS_TYPES:
        assert (name, "token") in found and (name, "sequence") in found


# ---- Derivatives and limits ----


def random_inputs(rows: int = 4, tokens: int = 6, seed: int = 0, dtype=torch.float64, spread: float = 0.5):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    lengths[0] = tokens
    logps = -numbers(rows, tokens).abs() - 0.1
    return PolicyLossInputs(
        logps_BT=logps,
        advantages_BT=numbers(rows),
        mask_BT=torch.arange(tokens) < lengths[:, None],
        old_logps_BT=logps + spread * numbers(rows, tokens),
        ref_logps_BT=logps + spread * numbers(rows, tokens),
        rollout_logps_BT=logps + spread * numbers(rows, tokens),
        engine_ratios_BT=numbers(rows, tokens).exp(),
        entropies_BT=numbers(rows, tokens).abs(),
    )


def rows_of(inputs: PolicyLossInputs, piece: slice) -> PolicyLossInputs:
    return PolicyLossInputs(*(getattr(inputs, field.name)[piece] for field in fields(inputs)))


def total_of(inputs: PolicyLossInputs, options: PolicyLossOptions, threshold=None) -> torch.Tensor:
    terms = aggregate(policy_loss(inputs, options, threshold), options)
    return sum(term.weight * term.total / term.count for term in terms)


EVERYTHING = {"beta": 0.1, "off_policy_mask_threshold": 0.1, "top_entropy_quantile": 0.7, "entropy_coef": 0.03}


@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
@pytest.mark.parametrize("loss_type", POLICY_LOSS_TYPES)
def test_derivatives(loss_type, level):
    """Of everything at once where the loss is differentiable; weights that are held constant have theirs below."""
    options = quiet_options(
        loss_type=loss_type, importance_sampling_level=level, delta=1.7, epsilon_high=0.3, **EVERYTHING
    )
    inputs = random_inputs(spread=0.3)

    def total(logps, entropies):
        changed = replace(inputs, logps_BT=logps, entropies_BT=entropies)
        if loss_type in ("cispo", "vespo"):
            # Their weights are constants: take them from the unchanged inputs, so that they are so for gradcheck too.
            changed = replace(changed, old_logps_BT=inputs.old_logps_BT + logps.detach() - inputs.logps_BT)
            return total_of(changed, replace_quietly(options, beta=0.0), 0.4)
        return total_of(changed, options, 0.4)

    arguments = (inputs.logps_BT.clone().requires_grad_(), inputs.entropies_BT.clone().requires_grad_())
    assert torch.autograd.gradcheck(total, arguments, eps=1e-7)


def replace_quietly(options: PolicyLossOptions, **changes) -> PolicyLossOptions:
    return quiet_options(**{**{field.name: getattr(options, field.name) for field in fields(options)}, **changes})


def test_constant_weights_have_no_gradient():
    """CISPO and VESPO move log-probs by their weight alone."""
    inputs = random_inputs()
    for loss_type in ("cispo", "vespo"):
        options = quiet_options(loss_type=loss_type, epsilon_high=1.2)
        logps = inputs.logps_BT.clone().requires_grad_()
        loss = policy_loss(replace(inputs, logps_BT=logps, engine_ratios_BT=None), options)
        (gradient,) = torch.autograd.grad(loss.losses_BT.sum(), logps)
        torch.testing.assert_close(gradient * logps, loss.losses_BT)


FAR = [1e3, -1e3, math.inf, -math.inf, 0.0, 25.0, -25.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
@pytest.mark.parametrize("loss_type", POLICY_LOSS_TYPES)
def test_far_from_the_old_policy_everything_stays_finite(loss_type, level, dtype):
    options = quiet_options(
        loss_type=loss_type, importance_sampling_level=level, beta=0.1, off_policy_mask_threshold=1e9
    )
    far = torch.tensor(FAR)
    # Log-ratios of ±1e3 and ±inf, by the policy's log-prob or the old one's, alone in a row and together.
    logps = torch.cat([far.clamp(max=0)[:, None].repeat(1, 2), far.clamp(max=0)[None].repeat(7, 1)[:, :2]])
    old = torch.cat([-far.clamp(min=0)[:, None].repeat(1, 2), -far.clamp(min=0)[None].repeat(7, 1)[:, :2]])
    for sign in (1.0, -1.0):
        for ref in (old, logps, torch.zeros_like(old)):
            leaf = logps.to(dtype).requires_grad_()
            inputs = PolicyLossInputs(leaf, torch.full((14,), sign), torch.ones(14, 2), old.to(dtype), ref.to(dtype))
            loss = policy_loss(inputs, options)
            (gradient,) = torch.autograd.grad(loss.losses_BT.sum(), leaf)
            assert loss.losses_BT.isfinite().all()
            assert gradient.isfinite().all() or dtype == torch.float16  # its range ends at 65504
            assert not gradient.isnan().any()


def test_a_broken_policy_is_not_hidden():
    inputs = random_inputs()
    broken = inputs.logps_BT.clone()
    broken[0, 0] = NAN
    for loss_type in POLICY_LOSS_TYPES:
        options = quiet_options(loss_type=loss_type)
        assert total_of(replace(inputs, logps_BT=broken), options).isnan()


@pytest.mark.parametrize("loss_type", POLICY_LOSS_TYPES)
def test_what_is_masked_does_not_count(loss_type):
    """Not even NaN; and its gradient is 0."""
    options = quiet_options(loss_type=loss_type, **EVERYTHING)
    inputs = random_inputs()
    outside = ~inputs.mask_BT
    dirty = {
        name: getattr(inputs, name).masked_fill(outside, NAN)
        for name in ("logps_BT", "old_logps_BT", "ref_logps_BT", "rollout_logps_BT", "entropies_BT")
    }
    logps = dirty["logps_BT"].requires_grad_()
    loss = total_of(replace(inputs, **{**dirty, "logps_BT": logps}), options, 0.4)
    assert torch.equal(loss, total_of(inputs, options, 0.4))
    (gradient,) = torch.autograd.grad(loss, logps)
    assert (gradient[outside] == 0).all()
    assert gradient[inputs.mask_BT].isfinite().all()


def test_on_policy_the_gradient_is_that_of_reinforce():
    """At ratio 1, each loss moves a token by its advantage alone (VESPO's weight is 1 there too)."""
    inputs = random_inputs()
    for loss_type in POLICY_LOSS_TYPES:
        options = quiet_options(loss_type=loss_type, epsilon_high=2.0 if loss_type == "cispo" else None)
        logps = inputs.logps_BT.clone().requires_grad_()
        on_policy = PolicyLossInputs(logps, inputs.advantages_BT, inputs.mask_BT)
        (gradient,) = torch.autograd.grad(policy_loss(on_policy, options).losses_BT.sum(), logps)
        torch.testing.assert_close(gradient, -(inputs.advantages_BT[:, None] * inputs.mask_BT))


def test_clipping_takes_the_gradient_away_where_the_policy_went_far_enough():
    options = PolicyLossOptions(epsilon=0.2, epsilon_high=0.4)
    ratios = torch.tensor([[0.7, 0.9, 1.3, 1.5]], dtype=torch.float64).repeat(2, 1)
    logps = ratios.log().requires_grad_()
    inputs = PolicyLossInputs(logps, torch.tensor([1.0, -1.0]), torch.ones(2, 4), torch.zeros(2, 4))
    loss = policy_loss(inputs, options)
    (gradient,) = torch.autograd.grad(loss.losses_BT.sum(), logps)
    assert (gradient == 0).tolist() == [[False, False, False, True], [True, False, False, False]]
    metrics = policy_metrics(loss, options)
    shares = {name: float(total / count) for name, (total, count) in metrics.means.items()}
    assert shares == {"clip_ratio/low_mean": 0.125, "clip_ratio/high_mean": 0.125, "clip_ratio/region_mean": 0.25}
    assert float(metrics.maxima["clip_ratio/high_max"]) == 0.25
    bounded = policy_loss(inputs, replace(options, delta=1.45)).losses_BT
    assert bounded[1].tolist() == pytest.approx([0.8, 0.9, 1.3, 1.45])
    below = replace(options, delta=1.35)  # the ratio that metrics look at never leaves the region then
    metrics = policy_metrics(policy_loss(inputs, below), below)
    assert float(metrics.means["clip_ratio/high_mean"][0]) == 0


def test_bias_correction_makes_the_kl_gradient_unbiased():
    """Over all tokens that the old policy may sample, ratio · k3 has the gradient of KL(π ‖ π_ref) itself."""
    generator = torch.Generator().manual_seed(0)
    logits, old, ref = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logps, old, ref = logits.log_softmax(0), old.log_softmax(0), ref.log_softmax(0)
    exact = (logps.exp() * (logps - ref)).sum()
    for corrected in (True, False):
        options = PolicyLossOptions(beta=1.0, use_bias_correction_kl=corrected)
        column = [values[:, None] for values in (logps, torch.zeros(5), torch.ones(5), old, ref)]
        estimate = (policy_loss(PolicyLossInputs(*column), options).losses_BT[:, 0] * old.exp()).sum()
        agree = torch.allclose(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (estimate, exact)))
        assert agree == corrected


@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
def test_advantages_in_every_shape(level):
    inputs, options = random_inputs(), quiet_options(importance_sampling_level=level)
    column = inputs.advantages_BT[:, None]
    logps = inputs.logps_BT.clone().requires_grad_()

    def loss_and_gradient(advantages):
        loss = total_of(replace(inputs, advantages_BT=advantages, logps_BT=logps), options)
        return loss.detach(), torch.autograd.grad(loss, logps)[0]

    expected = loss_and_gradient(inputs.advantages_BT)
    for shaped in (column, column.expand(-1, 6), column.expand(-1, 6).masked_fill(~inputs.mask_BT, NAN)):
        torch.testing.assert_close(loss_and_gradient(shaped), expected)


def test_vespo_weights_by_hand():
    logps = torch.tensor([[-25.0, 15.0], [1.0, -0.5], [1.0, -0.5], [0.0, -40.0], [20.0, 20.0]], dtype=torch.float64)
    inputs = PolicyLossInputs(logps, torch.tensor([1.0, 0.0, -1.0, -1.0, 1.0]), torch.ones(5, 2), torch.zeros(5, 2))
    options = PolicyLossOptions(loss_type="vespo", vespo_lambda_pos=1.5)
    phi = policy.vespo_weights(policy_loss(inputs, options).step, options)[:, 0]
    w = [-5.0, 0.5, 0.5, math.log(1e-8), 20.0]  # a log-ratio counts from -20 to 20
    k_and_lambda = [(2.0, 1.5), (2.0, 1.5), (3.0, 2.0), (3.0, 2.0), (2.0, 1.5)]
    expected = [math.exp(decay + k * x - decay * math.exp(x)) for x, (k, decay) in zip(w, k_and_lambda, strict=True)]
    assert phi.tolist() == pytest.approx(expected, rel=1e-9)
    overflowing = PolicyLossOptions(loss_type="vespo", vespo_k_pos=100.0, vespo_lambda_pos=0.0)
    assert policy.vespo_weights(policy_loss(inputs, overflowing).step, overflowing)[4, 0] == 0


# ---- Masks and corrections ----


def test_off_policy_mask():
    options = PolicyLossOptions(off_policy_mask_threshold=0.5)
    logps = torch.tensor([[-1.0, -1.0], [-2.0, -1.0], [-3.0, -1.0], [-3.0, -1.0]])
    inputs = PolicyLossInputs(logps, torch.tensor([-1.0, -1.0, -1.0, 1.0]), torch.ones(4, 2), torch.full((4, 2), -1.0))
    kept = policy_loss(inputs, options).losses_BT.abs().sum(-1) > 0
    assert kept.tolist() == [True, True, False, True]
    # The engine's log-probs go first; one that is missing counts as no change.
    engine = torch.tensor([[-1.0, -1.0], [-0.5, -1.0], [NAN, -1.0], [math.inf, -math.inf]])
    kept = policy_loss(replace(inputs, rollout_logps_BT=engine), options).losses_BT.abs().sum(-1) > 0
    assert kept.tolist() == [True, False, True, True]
    on_policy = replace(inputs, old_logps_BT=None)
    assert (policy_loss(on_policy, options).losses_BT != 0).all()


def test_masks_leave_denominators_and_the_kl_term_alone():
    inputs = replace(random_inputs(), engine_ratios_BT=None)
    plain, masked = PolicyLossOptions(beta=0.1), PolicyLossOptions(beta=0.1, top_entropy_quantile=0.5)
    whole, cut = policy_loss(inputs, plain), policy_loss(inputs, masked, 1e9)
    torch.testing.assert_close(cut.losses_BT, 0.1 * whole.kl_BT)
    assert [term.count for term in aggregate(whole, plain)] == [term.count for term in aggregate(cut, masked)]


def test_missing_inputs_are_named():
    inputs = PolicyLossInputs(torch.zeros(1, 2), torch.zeros(1), torch.ones(1, 2))
    cases = [
        ({"beta": 0.1}, "ref_logps_BT"),
        ({"top_entropy_quantile": 0.5}, "`top_entropy_quantile` needs `entropies_BT`"),
        ({"entropy_coef": 0.5}, "`entropy_coef` needs `entropies_BT`"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            policy_loss(inputs, PolicyLossOptions(**settings))
    inputs = replace(inputs, entropies_BT=torch.zeros(1, 2))
    with pytest.raises(ValueError, match=re.escape("trl.losses.entropy.entropy_threshold")):
        policy_loss(inputs, PolicyLossOptions(top_entropy_quantile=0.5))
    options = PolicyLossOptions(use_adaptive_entropy=True)
    with pytest.raises(ValueError, match="EntropyController"):
        aggregate(policy_loss(inputs, options), options)


# ---- Batches and their sums ----


@pytest.mark.parametrize("level", ["token", "sequence", "trajectory"])
@pytest.mark.parametrize("loss_type", [name for name in POLICY_LOSS_TYPES if name != "bnpo"])
def test_cutting_a_batch_changes_nothing(loss_type, level):
    options = quiet_options(
        loss_type=loss_type, importance_sampling_level=level, max_completion_length=9, **EVERYTHING
    )
    inputs = random_inputs(7)
    whole_loss = policy_loss(inputs, options, 0.5)
    whole = aggregate(whole_loss, options)
    losses = [policy_loss(rows_of(inputs, piece), options, 0.5) for piece in (slice(0, 1), slice(1, 5), slice(5, 7))]
    for term, *parts in zip(whole, *(aggregate(loss, options) for loss in losses), strict=True):
        torch.testing.assert_close(term.total, sum(part.total for part in parts))
        assert int(term.count) == sum(int(part.count) for part in parts) > 0
        assert {(part.name, part.unit, part.weight) for part in parts} == {(term.name, term.unit, term.weight)}
    means = policy_metrics(whole_loss, options).means
    for name, (total, count) in means.items():
        parts = [policy_metrics(loss, options).means[name] for loss in losses]
        torch.testing.assert_close(total, sum(part[0] for part in parts))
        assert int(count) == sum(int(part[1]) for part in parts)


def test_bnpo_is_a_mean_of_micro_batches():
    inputs, options = random_inputs(4), PolicyLossOptions(loss_type="bnpo")
    pieces = [rows_of(inputs, piece) for piece in (slice(0, 1), slice(1, 4))]
    terms = [aggregate(policy_loss(piece, options), options)[0] for piece in pieces]
    losses = [policy_loss(piece, options).losses_BT.sum() / piece.mask_BT.sum() for piece in pieces]
    torch.testing.assert_close(torch.stack([term.total for term in terms]), torch.stack(losses))
    assert [int(term.count) for term in terms] == [1, 1]


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", (2 + 4) / 2 / 2),  # rows of 1 and 3 tokens, with losses 1; 1, 2, 3 below: means 1 and 2
        ("bnpo", 7 / 4),
        ("dr_grpo", 7 / (2 * 10)),
        ("dapo", 7 / 4),
        ("luspo", 7 / 2),
    ],
)
def test_averages_by_hand(loss_type, expected):
    options = quiet_options(loss_type=loss_type, importance_sampling_level="token", max_completion_length=10)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    token_advantages = torch.tensor([[-1.0, -9, -9], [-1, -2, -3]])
    inputs = PolicyLossInputs(torch.zeros(2, 3), token_advantages, mask)
    loss = policy_loss(inputs, options)
    (term,) = aggregate(loss, options)
    if loss_type == "grpo":
        expected = (1 + 2) / 2
    assert float(term.total / term.count) == pytest.approx(expected)
    assert int(count_units(mask, options)[term.unit]) == int(term.count)


def test_rows_without_tokens_count_as_zero():
    inputs = random_inputs(3)
    mask = inputs.mask_BT.clone()
    mask[1] = False
    for loss_type in POLICY_LOSS_TYPES:
        options = quiet_options(loss_type=loss_type, max_completion_length=6)
        loss = policy_loss(replace(inputs, mask_BT=mask), options)
        (term,) = aggregate(loss, options)
        kept = rows_of(replace(inputs, mask_BT=mask), slice(0, 3, 2))
        (other,) = aggregate(policy_loss(kept, options), options)
        torch.testing.assert_close(term.total, other.total)
        empty = replace(inputs, mask_BT=torch.zeros_like(mask))
        (nothing,) = aggregate(policy_loss(empty, options), options)
        assert float(nothing.total) == 0


def test_the_entropy_bonus_follows_the_coefficient():
    inputs = random_inputs()
    options = PolicyLossOptions(use_adaptive_entropy=True)
    loss = policy_loss(inputs, options)
    assert [term.name for term in aggregate(loss, options, entropy_coef=0.0)] == ["policy"]
    bonus = aggregate(loss, options, entropy_coef=0.2)[1]
    assert (bonus.unit, bonus.weight) == ("tokens", 0.2)
    torch.testing.assert_close(bonus.total, -inputs.entropies_BT[inputs.mask_BT].sum())


# ---- The page ----


def test_the_page_has_every_name_and_paper():
    for module in (policy, entropy, engine_correction, advantages):
        text = Path(module.__file__).read_text(encoding="utf-8")
        for paper in re.findall(r"huggingface.co/papers/(\d+\.\d+)", text):
            assert f"huggingface.co/papers/{paper}" in PAGE, paper
    settings = [field.name for field in fields(PolicyLossOptions)]
    for name in (*POLICY_LOSS_TYPES, *IMPORTANCE_SAMPLING_LEVELS, *ENGINE_CORRECTION_MODES, *settings):
        assert re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", PAGE), name
    for function in POLICY_LOSSES.values():
        assert re.search(r"papers/\d+\.\d+", function.__doc__), function
