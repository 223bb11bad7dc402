"""Losses on pairs: the recorded figures, their derivatives, their limits, and which settings are refused."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import load_reference
from trl.losses import preference, reward, unpaired
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
PAGE = (Path(__file__).parents[2] / "docs" / "preference_losses.md").read_text(encoding="utf-8")
SMOOTHED = {"exo_pair": 0.1, "robust": 0.1}  # label smoothing of the losses that want one
COMBINATIONS = [
    (name, divergence)
    for name in PREFERENCE_LOSS_TYPES
    for divergence in F_DIVERGENCE_TYPES
    if divergence == "reverse_kl" or name in LOSSES_OF_ANY_DIVERGENCE
]
# Its square of an exponential leaves float32's range.
UNBOUNDED = [("ipo", "forward_kl"), ("ipo", "alpha_divergence")]
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


# ---- Derivatives and limits ----


def with_policy(inputs: PreferenceLossInputs, chosen_B, rejected_B) -> PreferenceLossInputs:
    """The inputs with these log-probs of the policy; the likelihood term follows the chosen ones."""
    return replace(inputs, policy=PairLogps(chosen_B, rejected_B), chosen_nll_B=-chosen_B)


@pytest.mark.parametrize(("name", "divergence"), COMBINATIONS)
def test_derivatives(name, divergence):
    options = options_for(name, f_divergence_type=divergence, use_weighting=name in OF_PAIRS, beta=0.3)
    inputs = random_inputs(scale=1.0)

    def total(chosen_B, rejected_B):
        return preference_loss(with_policy(inputs, chosen_B, rejected_B), options)[0].total

    policy = (inputs.policy.chosen_B.requires_grad_(), inputs.policy.rejected_B.requires_grad_())
    assert torch.autograd.gradcheck(total, policy)


@pytest.mark.parametrize(("name", "divergence"), [case for case in COMBINATIONS if case not in UNBOUNDED])
def test_far_from_the_reference_everything_stays_finite(name, divergence):
    far = torch.tensor([1e4, -1e4, 1e4, -1e4, 1e4, -1e4, 0.0, 0.0])
    chosen = far.clone().requires_grad_()
    rejected = torch.tensor([-1e4, 1e4, 1e4, -1e4, 0.0, 0.0, 1e4, -1e4], requires_grad=True)
    zeros = torch.zeros(8)
    lengths = torch.arange(8)  # an empty completion among them
    inputs = PreferenceLossInputs(PairLogps(chosen, rejected), PairLogps(zeros, zeros), lengths, lengths)
    inputs = with_policy(inputs, chosen, rejected)
    values = PREFERENCE_LOSSES[name](inputs, options_for(name, f_divergence_type=divergence))
    gradients = torch.autograd.grad(values.sum(), (chosen, rejected), materialize_grads=True)
    assert values.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_discopop_is_finite_for_high_temperatures():
    inputs = with_policy(random_inputs(2), torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]))
    assert PREFERENCE_LOSSES["discopop"](inputs, options_for("discopop", discopop_tau=5.0)).isfinite().all()


@pytest.mark.parametrize("divergence", F_DIVERGENCE_TYPES)
def test_a_fresh_policy_has_a_loss_of_ln_2(divergence):
    inputs = random_inputs()
    inputs = replace(inputs, reference=inputs.policy)
    (term,) = preference_loss(inputs, options_for("sigmoid", f_divergence_type=divergence))
    assert float(term.total) / 5 == pytest.approx(math.log(2), abs=1e-12)


# ---- What the formulas promise ----


def test_robust_is_unbiased_under_flipped_preferences():
    inputs, smoothing = random_inputs(), 0.2
    flipped = replace(
        inputs,
        policy=PairLogps(inputs.policy.rejected_B, inputs.policy.chosen_B),
        reference=PairLogps(inputs.reference.rejected_B, inputs.reference.chosen_B),
    )
    options = options_for("robust", label_smoothing=smoothing)
    robust = PREFERENCE_LOSSES["robust"]
    expected = (1 - smoothing) * robust(inputs, options) + smoothing * robust(flipped, options)
    torch.testing.assert_close(expected, PREFERENCE_LOSSES["sigmoid"](inputs, options))


def test_exo_is_zero_where_the_policy_holds_the_smoothed_preference():
    epsilon, beta = 0.2, 0.1
    margin = torch.tensor([math.log((1 - epsilon) / epsilon) / beta], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    inputs = PreferenceLossInputs(PairLogps(margin, zero), PairLogps(zero, zero), zero + 3, zero + 3)
    options = options_for("exo_pair", label_smoothing=epsilon)
    assert float(PREFERENCE_LOSSES["exo_pair"](inputs, options)) == pytest.approx(0, abs=1e-12)
    further = replace(inputs, policy=PairLogps(margin + 1, zero))
    assert float(PREFERENCE_LOSSES["exo_pair"](further, options)) > 1e-5


def test_aot_compares_quantiles():
    inputs, options = random_inputs(), options_for("aot_unpaired", label_smoothing=0.1, beta=0.5)
    shuffled = torch.tensor([3, 1, 4, 0, 2])
    other = replace(
        inputs,
        policy=PairLogps(inputs.policy.chosen_B[shuffled], inputs.policy.rejected_B),
        reference=PairLogps(inputs.reference.chosen_B[shuffled], inputs.reference.rejected_B),
    )
    for name, equal in (("aot_unpaired", True), ("sigmoid", False)):
        difference = PREFERENCE_LOSSES[name](inputs, options).sum() - PREFERENCE_LOSSES[name](other, options).sum()
        assert (abs(float(difference)) < 1e-12) == equal
    logratios = inputs.logratios
    margins = 0.5 * (logratios.chosen_B.sort().values - logratios.rejected_B.sort().values)
    expected = 0.9 * F.softplus(-margins) + 0.1 * F.softplus(margins)
    torch.testing.assert_close(PREFERENCE_LOSSES["aot_unpaired"](inputs, options), expected)


@pytest.mark.parametrize(
    ("alpha", "same"), [(0.0, "forward_kl"), (1.0, "reverse_kl"), (1 + 5e-7, "reverse_kl"), (1 - 2e-6, "reverse_kl")]
)
def test_alpha_divergence_has_the_kl_divergences_at_its_ends(alpha, same):
    logratios = torch.linspace(-3, 3, 7)
    actual, expected = F_DIVERGENCES["alpha_divergence"](logratios, alpha), F_DIVERGENCES[same](logratios, alpha)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (actual is logratios) == (abs(alpha - 1) < 1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_divergence"])
def test_scores_keep_their_digits_next_to_the_reference(divergence):
    logratios = torch.tensor([1e-6, -1e-6])  # the first steps; every score is then about the log-ratio
    torch.testing.assert_close(F_DIVERGENCES[divergence](logratios, 0.5), logratios, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 11), (torch.bfloat16, 80), (torch.float32, 80)])
def test_exponents_are_cut(dtype, bound):
    scores = F_DIVERGENCES["alpha_divergence"](torch.tensor([-1000.0, 0.0], dtype=dtype), 0.5)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([(math.exp(bound) - 1) / -0.5, 0.0]))
    assert F_DIVERGENCES["forward_kl"](torch.tensor([-1000.0], dtype=dtype), 0.5).isfinite().all()


def test_js_divergence_is_bounded_above():
    scores = F_DIVERGENCES["js_divergence"](torch.tensor([-1e4, 0.0, 1e4]), 0.5)
    torch.testing.assert_close(scores, torch.tensor([math.log(2) - 1e4, 0.0, math.log(2)]))


@pytest.mark.parametrize("name", [name for name in PREFERENCE_LOSS_TYPES if name != "sft"])
def test_the_page_tells_the_loss_at_the_start(name):
    inputs = random_inputs()
    inputs = replace(inputs, reference=inputs.policy)
    options = options_for(name, label_smoothing=0.001 if name == "exo_pair" else 0.0)
    (term,) = preference_loss(inputs, options)
    (row,) = [line.split(" | ") for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    told = re.findall(r"\d+(?:\.\d+)?", row[2].partition(" (")[0])[-1]
    assert float(told) == pytest.approx(float(term.total) / 5, abs=6e-4)


def test_the_page_has_every_loss_and_paper():
    for module in (preference, unpaired, reward):
        for paper in re.findall(
            r"huggingface.co/papers/(\d+\.\d+)", Path(module.__file__).read_text(encoding="utf-8")
        ):
            assert f"huggingface.co/papers/{paper}" in PAGE, paper
    for name in (*PREFERENCE_LOSS_TYPES, *F_DIVERGENCE_TYPES, *unpaired.UNPAIRED_LOSSES):
        assert f"`{name}`" in PAGE, name
    for registry in (PREFERENCE_LOSSES, F_DIVERGENCES, unpaired.UNPAIRED_LOSSES):
        for name, function in registry.items():
            assert name == "reverse_kl" or re.search(r"papers/\d+\.\d+", function.__doc__), name


# ---- Batches and their sums ----


@pytest.mark.parametrize("weighted", [False, True])
def test_cutting_a_batch_changes_nothing(weighted):
    inputs = random_inputs(7)
    options = options_for(*OF_PAIRS, label_smoothing=0.1, use_weighting=weighted, loss_weights=range(1, 14))
    whole = preference_loss(inputs, options)
    pieces = [preference_loss(rows(inputs, piece), options) for piece in (slice(0, 1), slice(1, 5), slice(5, 7))]
    for term, *parts in zip(whole, *pieces, strict=True):
        torch.testing.assert_close(term.total, sum(part.total for part in parts))
        assert {(part.unit, part.weight) for part in parts} == {(term.unit, term.weight)}
    assert [term.unit for term in whole] == ["chosen_tokens" if n == "sft" else "pairs" for n in OF_PAIRS]
    assert [term.weight for term in whole] == list(range(1, 14))


@pytest.mark.parametrize("name", LOSSES_OF_SORTED_BATCHES)
def test_sorting_losses_depend_on_the_cut(name):
    inputs, options = random_inputs(6), options_for(name)
    halves = [preference_loss(rows(inputs, piece), options)[0].total for piece in (slice(0, 3), slice(3, 6))]
    assert abs(float(preference_loss(inputs, options)[0].total - sum(halves))) > 1e-4


@pytest.mark.parametrize("name", OF_PAIRS)
def test_weights_multiply_each_pair(name):
    inputs = random_inputs()
    chosen = inputs.policy.chosen_B.requires_grad_()
    inputs = with_policy(inputs, chosen, inputs.policy.rejected_B)
    (term,) = preference_loss(inputs, options_for(name, use_weighting=True))
    values = PREFERENCE_LOSSES[name](inputs, options_for(name))
    torch.testing.assert_close(term.total, (values * inputs.weights_B).sum())
    expected = torch.autograd.grad(values, chosen, grad_outputs=inputs.weights_B, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(term.total, chosen), expected)


def test_missing_inputs_are_named():
    inputs = replace(random_inputs(), chosen_nll_B=None, weights_B=None)
    with pytest.raises(ValueError, match="chosen_nll_B"):
        preference_loss(inputs, options_for("sft"))
    with pytest.raises(ValueError, match="wpo_weights"):
        preference_loss(inputs, options_for("sigmoid", use_weighting=True))


# ---- From tokens to pairs ----

LOGPS = torch.tensor([[-1.0, -2, -3, -4], [-5, -6, -7, -8], [-1, -1, -2, -3], [-1, -2, -4, -8]])
MASK = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("ld_alpha", "chosen", "rejected"),
    [
        (None, [-9, -7], [-2, -14]),
        (1.0, [-9, -7], [-2, -14]),
        (0.5, [-7, -7], [-2, -8]),
        (0.0, [-5, -7], [-2, -2]),
    ],
)
def test_sums_of_pairs(ld_alpha, chosen, rejected):
    pairs = sum_pair_logps(LOGPS, MASK, ld_alpha)
    assert pairs.chosen_B.tolist() == chosen
    assert pairs.rejected_B.tolist() == rejected


def test_what_is_masked_does_not_count():
    broken = LOGPS.masked_fill(MASK == 0, float("nan"))
    for ld_alpha in (None, 0.5):
        expected, actual = sum_pair_logps(LOGPS, MASK, ld_alpha), sum_pair_logps(broken, MASK.bool(), ld_alpha)
        assert torch.equal(actual.chosen_B, expected.chosen_B)
        assert torch.equal(actual.rejected_B, expected.rejected_B)
    assert torch.equal(wpo_weights(broken, broken, MASK), torch.ones(2))


def test_half_types_are_summed_in_float32():
    logps = torch.full((2, 4096), -1.0078125, dtype=torch.bfloat16)
    pairs = sum_pair_logps(logps, torch.ones_like(logps))
    assert pairs.chosen_B.dtype == torch.float32
    assert pairs.chosen_B.item() == -4128.0


def test_weights_of_a_policy_that_meets_its_own_text():
    """With one distribution everywhere, a text that is as probable as it expects has weight 1, others by their excess."""
    log_sum_sq_probs = torch.tensor([[-2.0, -1.0, 9.0]]).repeat(4, 1)
    logps = torch.tensor([[-2.0, -1.0, 9.0], [-1.0, -1.0, 9.0], [-1.5, -1.5, 9.0], [-2.0, -3.0, 9.0]])
    logps.requires_grad_()
    mask = torch.tensor([[1, 1, 0]]).repeat(4, 1)
    weights = wpo_weights(logps, log_sum_sq_probs, mask)
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(0.5 - 1.0)]))
    assert not weights.requires_grad
    assert wpo_weights(logps, log_sum_sq_probs, mask * 0).tolist() == [1, 1]  # empty completions


def test_pairs_are_an_even_number_of_rows():
    for function in (sum_pair_logps, lambda logps, mask: wpo_weights(logps, logps, mask)):
        with pytest.raises(ValueError, match="even number of rows, the chosen ones first. Found 3"):
            function(LOGPS[:3], MASK[:3])


# ---- Settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sigmod"}, "Did you mean 'sigmoid'"),
        ({"loss_type": ["sigmoid", "apo-zero"]}, "Found 'apo-zero'. Did you mean 'apo_zero'"),
        ({"loss_type": []}, "empty"),
        ({"loss_type": None}, "`loss_type` is a list"),
        ({"loss_type": ["sigmoid", 3]}, "Found 3"),
        ({"loss_weights": 0.5}, "`loss_weights` is a list"),
        ({"loss_weights": ["0.5"]}, "Found '0.5'"),
        ({"beta": "0.1"}, "`beta` is a number above 0. Found '0.1'"),
        ({"label_smoothing": None}, "label_smoothing"),
        ({"f_divergence_type": "reversed_kl"}, "Did you mean 'reverse_kl'"),
        ({"loss_weights": [1.0, 2.0]}, r"2 entries \[1.0, 2.0\] for 1 loss types"),
        ({"loss_weights": [float("nan")]}, "finite"),
        ({"beta": 0.0}, "`beta` is a number above 0. Found 0.0"),
        ({"beta": -0.1}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"beta": float("inf")}, "beta"),
        ({"discopop_tau": 0.0}, "discopop_tau"),
        ({"f_alpha_divergence_coef": float("nan")}, "f_alpha_divergence_coef"),
        ({"ld_alpha": -0.1}, "`ld_alpha` is a number from 0 to 1, or None. Found -0.1"),
        ({"ld_alpha": 1.1}, "ld_alpha"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": 1.1, "loss_type": "robust"}, "label_smoothing"),
        ({"label_smoothing": 0.5, "loss_type": "robust"}, "divides by zero"),
        ({"label_smoothing": 0.0, "loss_type": "exo_pair"}, "1e-3"),
        ({"label_smoothing": 1.0, "loss_type": "exo_pair"}, "logarithm"),
        *(
            ({"loss_type": ["sigmoid", name], "f_divergence_type": "js_divergence"}, f"not defined for {name}")
            for name in PREFERENCE_LOSS_TYPES
            if name not in LOSSES_OF_ANY_DIVERGENCE
        ),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLossOptions(**settings)


@pytest.mark.parametrize("name", LOSSES_OF_SORTED_BATCHES)
def test_sorted_batches_take_no_weights(name):
    with pytest.raises(NotImplementedError, match=name):
        PreferenceLossOptions(loss_type=["sigmoid", name], use_weighting=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "robust", "label_smoothing": 0.6}, "most preferences are the wrong way round"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "changes nothing"),
    ],
)
def test_doubtful_settings_warn(settings, message):
    with pytest.warns(UserWarning, match=message) as records:
        PreferenceLossOptions(**settings)
    assert [record.filename for record in records] == [__file__]  # where the settings were made


def test_good_settings_are_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in PREFERENCE_LOSS_TYPES:
            options_for(name, ld_alpha=0.0)
            options_for(name, ld_alpha=1.0)
        options_for("robust", label_smoothing=0.49)
        for name in LOSSES_OF_ANY_DIVERGENCE:
            options_for(name, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.0)


def test_settings_off_a_config():
    class Config:
        beta, loss_type, loss_weights, label_smoothing = 0.2, ["sigmoid", "sft"], [1.0, 0.5], 0.0
        f_divergence_type, f_alpha_divergence_coef, discopop_tau = "reverse_kl", 0.5, 0.05
        use_weighting, ld_alpha, learning_rate = False, None, 1e-6

    options = PreferenceLossOptions.of(Config(), ld_alpha=0.5)
    assert options == PreferenceLossOptions(
        beta=0.2, loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.5), ld_alpha=0.5
    )
    assert options.weights == (1.0, 0.5)
    assert PreferenceLossOptions(loss_type=["ipo", "sft"]).weights == (1.0, 1.0)


def test_settings_are_checked_without_torch():
    code = "import sys, trl.losses.preference_options as o; o.PreferenceLossOptions(); print('torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert finished.stdout.strip() == "False"
