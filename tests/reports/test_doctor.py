import math
import random
import types

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tests.callbacks.helpers import make_trainer
from tests.conftest import build_model
from tests.trainer.preference_helpers import make_dpo_trainer, make_kto_trainer, make_pairs, make_unpaired
from trl.losses.preference_options import PREFERENCE_LOSS_TYPES
from trl.reports.doctor import DoctorCallback, install_doctor
from trl.reports.doctor_rules import (
    AccuracyStuck,
    ChosenCollapse,
    GradNormSpike,
    MarginsExploding,
    Rule,
    default_rules,
)

DPO = {
    "beta": 0.1,
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "use_weighting": False,
    "ld_alpha": None,
}
KTO = {"beta": 0.1, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0}


class Run:
    """A trainer's logging around a doctor: feed it logs, and it tells which rules warned, and which marked the log."""

    def __init__(self, caplog, max_steps=1000, doctor=None, main=True, model=None, **settings):
        self.args = types.SimpleNamespace(bf16=False, fp16=False, tf32=None, max_grad_norm=1.0)
        self.args.__dict__.update(settings)
        self.args.get_warmup_steps = lambda max_steps: settings.get("warmup_steps", 0)
        self.state = TrainerState(max_steps=max_steps, is_world_process_zero=main)
        self.doctor = doctor or DoctorCallback()
        self.caplog, self.model = caplog, model
        self.expected_failures = []

    def log(self, step, **values):
        """One training log; `prefix` makes it an evaluation's. Returns the names of the rules that warned."""
        return self.feed(step, {"loss": 0.5, **{key.replace("__", "/"): value for key, value in values.items()}})

    def feed(self, step, logs):
        self.caplog.clear()
        self.state.global_step = step
        self.state.log_history.append({**logs, "step": step})
        self.logs = logs
        self.doctor.on_log(self.args, self.state, TrainerControl(), logs=logs, model=self.model)
        self.messages = [record.getMessage() for record in self.caplog.records]
        failed = [message for message in self.messages if not message.startswith("Step ")]
        assert failed == self.expected_failures
        return [message.split(", ")[1].split(":")[0] for message in self.messages if message not in failed]

    @property
    def marks(self):
        """Rules that the newest log carries; the trackers' copy and the history agree."""
        marked = {key for key in self.logs if "doctor/" in key}
        assert marked == {key for key in self.state.log_history[-1] if "doctor/" in key}
        return marked


# ---- NaN and infinity ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["loss", "grad_norm", "rewards/chosen"])
def test_not_finite(caplog, key, value):
    run = Run(caplog)
    assert run.log(1, grad_norm=1.0) == []
    assert run.feed(2, {"loss": 0.5, key: value}) == ["not_finite"]
    assert f"{key} = {value}" in run.messages[0] and run.messages[0].startswith("Step 2, ")
    assert "What it usually means" in run.messages[0] and "What to try" in run.messages[0]
    assert run.marks == {"doctor/not_finite"} and run.logs["doctor/not_finite"] == 1.0


def test_not_finite_in_an_evaluation_and_elsewhere(caplog):
    run = Run(caplog)
    assert run.feed(5, {"eval_math_loss": math.nan, "eval_math_runtime": 1.0}) == ["not_finite"]
    assert run.marks == {"eval_math_doctor/not_finite"}
    assert run.feed(6, {"my_metric": math.nan}) == ["not_finite"]
    assert run.feed(7, {"my_metric": math.nan}) == []  # the same episode
    assert run.marks == {"doctor/not_finite"}
    assert run.feed(8, {"train_loss": math.nan, "train_runtime": 1.0}) == []  # the summary says nothing new
    assert run.marks == set()
    assert run.feed(8, {"loss": 1.0, "note": "text", "flag": True, "nothing": None}) == []


def test_fp16_may_overflow_while_it_looks_for_its_scale(caplog):
    run = Run(caplog, fp16=True)
    for step in range(1, 5):
        assert run.log(step, grad_norm=math.inf) == []
    assert run.log(5, grad_norm=math.inf) == ["not_finite"]
    run = Run(caplog, fp16=True)
    for step in range(1, 20):
        assert run.log(step, grad_norm=math.inf if step % 5 == 0 else 1.0) == []
    run = Run(caplog, fp16=True)
    assert run.log(1, loss=math.nan, grad_norm=math.inf) == ["not_finite"]
    assert "grad_norm" not in run.messages[0].splitlines()[0]


# ---- Gradient norms ----


def healthy_norms(count, seed=0, spread=0.3, level=2.0):
    generator = random.Random(seed)
    return [level * math.exp(spread * generator.gauss(0, 1)) for _ in range(count)]


def test_a_gradient_spike_is_named_with_its_numbers(caplog):
    run = Run(caplog)
    for step, norm in enumerate(healthy_norms(30), start=1):
        assert run.log(step, grad_norm=norm) == []
    assert run.log(31, grad_norm=60.0) == ["grad_norm_spike"]
    assert "gradient norm 60" in run.messages[0] and "of the last 30 logs" in run.messages[0]
    assert run.log(32, grad_norm=math.inf) == ["not_finite"] and run.marks == {"doctor/not_finite"}
    assert run.log(33, grad_norm=2.0) == [] and run.marks == set()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.01, 0.3, 0.8])
def test_uneven_gradients_are_no_spikes(caplog, seed, spread):
    run = Run(caplog)
    for step, norm in enumerate(healthy_norms(1000, seed, spread), start=1):
        assert run.log(step, grad_norm=norm) == []


def test_even_gradients_are_not_judged_by_their_noise(caplog):
    run = Run(caplog)
    for step in range(1, 50):
        assert run.log(step, grad_norm=2.0 if step % 2 else 2.001) == []
    assert run.log(50, grad_norm=5.0) == []


def test_a_trend_is_no_spike(caplog):
    """Thousandfold over the run, up or down."""
    for sign in (1, -1):
        run = Run(caplog)
        for step in range(1, 400):
            assert run.log(step, grad_norm=50 * 10 ** (sign * 3 * step / 400)) == []


def test_a_first_step_or_an_unclipped_norm_is_no_spike(caplog):
    run = Run(caplog)
    for step in range(1, 40):
        assert run.log(step, grad_norm=1000.0 if step == 1 else 0.001) == []
    assert run.log(40, grad_norm=0.9) == []  # 900 times the median, and below `max_grad_norm`
    assert run.log(41, grad_norm=1.1) == ["grad_norm_spike"]


def test_too_few_norms_are_not_judged(caplog):
    run = Run(caplog)
    for step in range(1, 21):
        assert run.log(step, grad_norm=1.0 if step < 20 else 1000.0) == []
    assert run.log(21, grad_norm=1000.0) == ["grad_norm_spike"]  # one spike before does not hide it


# ---- The first loss ----


@pytest.mark.parametrize("loss_type", sorted(set(PREFERENCE_LOSS_TYPES) - {"sft", "exo_pair"}))
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_first_loss_of_each_kind(caplog, loss_type, beta):
    expected = {
        "hinge": 1.0,
        "ipo": (1 / (2 * beta)) ** 2,
        "nca_pair": 2 * math.log(2),
        "bco_pair": 2 * math.log(2),
        "sppo_hard": 2 * (0.5 / beta) ** 2,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": 0.5 * math.log(2) + 0.5,
    }.get(loss_type, math.log(2))
    settings = {**DPO, "loss_type": [loss_type], "beta": beta}
    doctor = DoctorCallback(starts_at_reference=True)
    model = build_model()
    assert Run(caplog, doctor=doctor, model=model, **settings).log(1, loss=expected) == []
    run = Run(caplog, doctor=doctor, model=model, **settings)
    assert run.log(1, loss=0.8 * expected) == ["first_loss"]
    assert f"{expected:.6f}" in run.messages[0]


def test_first_loss_of_kto_and_of_a_mixture(caplog):
    doctor, model = DoctorCallback(starts_at_reference=True), build_model()
    assert Run(caplog, doctor=doctor, model=model, **KTO).log(1, loss=0.5, kl=0.0) == []
    assert Run(caplog, doctor=doctor, model=model, **KTO).log(1, loss=0.6, kl=0.0) == ["first_loss"]
    unequal = {**KTO, "desirable_weight": 2.0}
    assert Run(caplog, doctor=doctor, model=model, **unequal).log(1, loss=0.6) == []
    mixture = {**DPO, "loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]}
    assert Run(caplog, doctor=doctor, model=model, **mixture).log(1, loss=1.2 * math.log(2)) == []
    assert Run(caplog, doctor=doctor, model=model, **mixture).log(1, loss=2 * math.log(2)) == ["first_loss"]


@pytest.mark.parametrize(
    "settings",
    [{"loss_type": ["sigmoid", "sft"]}, {"use_weighting": True}, {"loss_type": "nll"}, {"loss_type": "dft"}, {}],
)
def test_a_first_loss_that_depends_on_the_data_is_left_alone(caplog, settings):
    settings = {**DPO, **settings} if settings else {}
    doctor = DoctorCallback(starts_at_reference=True)
    run = Run(caplog, doctor=doctor, model=build_model(), **settings)
    assert run.log(1, loss=3.0, rewards__chosen=0.0, rewards__rejected=0.0) == []


def test_a_moe_auxiliary_loss_comes_on_top(caplog):
    doctor = DoctorCallback(starts_at_reference=True)
    assert Run(caplog, doctor=doctor, model=build_model(), **DPO).log(1, loss=0.9, aux_loss=2.0) == []


def test_first_rewards_of_a_policy_that_is_not_its_reference(caplog):
    """Dropout: both answers lose alike, so the loss is near ln 2 all the same."""
    doctor = DoctorCallback(starts_at_reference=True)
    run = Run(caplog, doctor=doctor, model=build_model(), **DPO)
    assert run.log(1, loss=0.694, rewards__chosen=-0.8, rewards__rejected=-0.81, logps__chosen=-90.0) == ["first_loss"]
    assert "8 nats per completion" in run.messages[0]


def test_half_precision_is_given_more_room(caplog):
    values = {"loss": 0.71, "rewards__chosen": 0.04, "rewards__rejected": -0.05, "logps__chosen": -80.0}
    doctor = DoctorCallback(starts_at_reference=True)
    assert Run(caplog, doctor=doctor, model=build_model(), **DPO).log(1, **values) == ["first_loss"]
    assert Run(caplog, doctor=doctor, model=build_model().bfloat16(), **DPO).log(1, **values) == []
    assert Run(caplog, doctor=doctor, model=build_model(), bf16=True, **DPO).log(1, **values) == []
    assert Run(caplog, doctor=doctor, model=build_model().bfloat16(), **DPO).log(1, loss=1.0) == ["first_loss"]
    values = {"loss": 0.7, "rewards__chosen": 0.3, "rewards__rejected": -0.3}
    half = {**DPO, "bf16": True}
    assert Run(caplog, doctor=doctor, model=build_model(), **half).log(1, **values, logps__chosen=-900.0) == []
    assert Run(caplog, doctor=doctor, model=build_model(), **half).log(1, **values) == ["first_loss"]


def test_only_a_fresh_run_with_its_own_reference_is_judged(caplog):
    run = Run(caplog, model=build_model(), **DPO)
    assert run.log(1, loss=0.3) == []  # another model is the reference
    doctor = DoctorCallback(starts_at_reference=True)
    run = Run(caplog, doctor=doctor, model=build_model(), **DPO)
    run.state.log_history.append({"loss": 0.69, "step": 1})  # before it was stopped
    assert run.log(2, loss=3.0) == []


def test_a_first_log_of_several_steps_may_be_lower(caplog):
    doctor = DoctorCallback(starts_at_reference=True)
    assert Run(caplog, doctor=doctor, **DPO).log(10, loss=0.4, rewards__chosen=0.5) == []
    run = Run(caplog, doctor=doctor, **DPO)
    assert run.log(10, loss=1.3) == ["first_loss"]
    assert "over the first 10 steps" in run.messages[0]


def test_an_evaluation_before_training_is_a_first_loss(caplog):
    doctor = DoctorCallback(starts_at_reference=True)
    run = Run(caplog, doctor=doctor, model=build_model(), **DPO)
    assert run.feed(0, {"eval_loss": math.log(2), "eval_runtime": 1.0}) == []
    assert run.feed(0, {"eval_loss": 0.5, "eval_runtime": 1.0}) == ["first_loss"]
    assert run.marks == {"eval_doctor/first_loss"}
    run = Run(caplog, doctor=doctor, model=build_model(), **DPO)
    assert run.feed(1, {"eval_loss": 0.3, "eval_runtime": 1.0}) == []
    assert run.feed(5, {"eval_loss": 3.0, "eval_runtime": 1.0}) == []


# ---- Accuracy ----


def accuracies(run, values, start=1, every=10, **more):
    """Feed accuracies; the step and rules of the first warning."""
    for number, value in enumerate(values):
        warned = run.feed(start + number * every, {"loss": 0.6, "rewards/accuracies": value, **more})
        if warned:
            return start + number * every, warned
    return None


def coin(count, pairs, probability=0.5, seed=0):
    generator = random.Random(seed)
    return [sum(generator.random() < probability for _ in range(pairs)) / pairs for _ in range(count)]


def test_accuracy_stuck_at_one_half(caplog):
    run = Run(caplog, max_steps=1000, **DPO)
    step, warned = accuracies(run, coin(60, 640))
    assert warned == ["accuracy_stuck"] and step == 191  # the twentieth log
    assert "rewards/accuracies 0.499 ± 0.007 over steps 101 to 191 (10 logs)" in run.messages[0]


def test_accuracy_is_given_time(caplog):
    """A tenth of the run, and all of it after the warm-up."""
    assert accuracies(Run(caplog, max_steps=4000, **DPO), coin(80, 640), start=10)[0] == 400
    assert accuracies(Run(caplog, max_steps=1000, warmup_steps=300, **DPO), coin(80, 640), start=10)[0] == 500
    assert accuracies(Run(caplog, max_steps=4000, warmup_steps=295, **DPO), coin(80, 640), start=10)[0] == 700
    assert accuracies(Run(caplog, max_steps=150, **DPO), coin(150, 640), every=1)[0] == 100
    assert accuracies(Run(caplog, max_steps=90, **DPO), coin(90, 640), every=1) is None


@pytest.mark.parametrize("seed", range(5))
def test_learning_slowly_is_not_stuck(caplog, seed):
    generator = random.Random(seed)
    rising = [0.5 + 0.2 * min(step / 300, 1) + generator.gauss(0, 0.06) for step in range(0, 1000, 10)]
    assert accuracies(Run(caplog, max_steps=1000, **DPO), rising) is None


def test_few_pairs_say_little(caplog):
    """Logs of two pairs each, with a true accuracy of 0.65."""
    for seed in range(5):
        assert accuracies(Run(caplog, max_steps=400, **DPO), coin(400, 2, 0.65, seed), every=1) is None


def test_accuracy_of_the_reward_trainer(caplog):
    more = {"accuracy": 0.5, "margin": 0.01, "mean_reward": 0.1}
    run = Run(caplog)
    assert any(run.feed(step, {"loss": 0.7, **more}) for step in range(1, 120))
    run = Run(caplog)  # a metric that happens to have the name
    assert not any(run.feed(step, {"loss": 0.7, "accuracy": 0.5}) for step in range(1, 120))


def test_sft_alone_does_not_rank(caplog):
    assert accuracies(Run(caplog, **{**DPO, "loss_type": ["sft"]}), coin(60, 640)) is None


# ---- Margins ----


def test_margins_exploding(caplog):
    run = Run(caplog, **DPO)
    for step in range(1, 20):
        assert run.log(step, rewards__margins=float(step)) == []
    assert run.log(20, rewards__margins=90.0) == []  # one pair is not the run
    assert run.log(21, rewards__margins=21.0) == ["margins_exploding"]
    assert "rewards/margins 21" in run.messages[0]


def test_margins_of_a_reward_model_and_of_evaluations(caplog):
    run = Run(caplog)
    warned = [run.log(step, accuracy=1.0, margin=30.0, mean_reward=1.0) for step in range(1, 5)]
    assert warned == [[], [], ["margins_exploding"], []]
    run = Run(caplog, **DPO)
    logs = {"eval_loss": 0.0, "eval_runtime": 1.0, "eval_rewards/margins": 30.0}
    assert [run.feed(step, dict(logs)) for step in range(1, 4)] == [[], [], ["margins_exploding"]]
    assert "eval_rewards/margins" in run.messages[0]


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_margins_of_mean_log_ratios_grow_with_the_length(caplog, loss_type):
    run = Run(caplog, **{**DPO, "loss_type": [loss_type]})
    assert not any(run.log(step, rewards__margins=100.0) for step in range(1, 20))


# ---- Chosen log-probs ----


def pairs(run, steps, chosen_nats, margin, seed=0):
    """Logs of answers of very different lengths, their log-ratios as given by functions of the step."""
    generator = random.Random(seed)
    warned = []
    for step in steps:
        reference = -200 + generator.gauss(0, 60)
        ratio = chosen_nats(step)
        values = {"rewards/chosen": 0.1 * ratio, "logps/chosen": reference + ratio, "rewards/margins": margin(step)}
        warned.append((step, run.feed(step, {"loss": 0.3, **values})))
    return [(step, rules) for step, rules in warned if rules]


def test_chosen_collapse(caplog):
    run = Run(caplog, **DPO)
    warned = pairs(run, range(1, 100), lambda step: -2.0 * step, lambda step: 0.1 * step)
    assert [rules for _, rules in warned] == [["chosen_collapse"]]
    assert 45 <= warned[0][0] <= 75  # 100 nats of about 200
    assert run.marks == {"doctor/chosen_collapse"}


def test_healthy_dpo_lowers_the_chosen_a_little(caplog):
    """Rewards of -1 to -4 on the chosen side are common."""
    for seed in range(5):
        assert not pairs(Run(caplog, **DPO), range(1, 200), lambda step: -0.2 * step, lambda step: 0.02 * step, seed)


def test_a_drop_without_growing_margins_is_another_matter(caplog):
    assert not pairs(Run(caplog, **DPO), range(1, 100), lambda step: -2.0 * step, lambda step: 0.5 - 0.001 * step)


def test_short_answers_may_move_by_a_nat(caplog):
    """One-word answers: from 1.2 nats to 2.2."""
    run = Run(caplog, **DPO)
    for step in range(1, 50):
        values = {"rewards__chosen": -0.1, "logps__chosen": -2.2, "rewards__margins": 0.1 * step}
        assert run.log(step, **values) == []


# ---- KTO's KL ----


def test_kl_at_its_clamp(caplog):
    run = Run(caplog, max_steps=1000, **KTO)
    warned = {step: run.log(step, kl=0.0, rewards__chosen=0.3, rewards__rejected=-0.4) for step in range(5, 400, 5)}
    assert [step for step, rules in warned.items() if rules] == [100]
    assert warned[100] == ["kl_clamped"]


@pytest.mark.parametrize(
    ("settings", "kl", "reward"),
    [
        (KTO, lambda step: 0.001 if step % 100 == 0 else 0.0, 0.3),  # not all the time
        (KTO, lambda step: 0.0, 0.001),  # the policy has not moved yet
        ({**KTO, "loss_type": "apo_zero_unpaired"}, lambda step: 0.0, 0.3),
        ({"beta": 0.0, "loss_type": "grpo"}, lambda step: 0.0, 0.3),
    ],
)
def test_kl_that_is_not_clamped(caplog, settings, kl, reward):
    run = Run(caplog, max_steps=1000, **settings)
    assert not any(run.log(step, kl=kl(step), rewards__chosen=reward) for step in range(5, 400, 5))


# ---- Episodes ----


def test_an_episode_warns_once_and_is_armed_again(caplog):
    run = Run(caplog, doctor=DoctorCallback(calm_logs=3), **DPO)
    big, small = {"rewards__margins": 30.0}, {"rewards__margins": 1.0}
    warned = [run.log(step, **big) for step in range(1, 6)]
    assert warned == [[], [], ["margins_exploding"], [], []]
    assert run.marks == {"doctor/margins_exploding"}
    assert run.log(6, **small) == [] and run.log(7, **small) == [] and run.marks == set()
    # Too short a calm: still the episode.
    assert run.log(8, **big) == [] and run.log(9, **big) == [] and run.marks == {"doctor/margins_exploding"}
    for step in range(10, 14):
        assert run.log(step, **small) == []
    assert [run.log(step, **big) for step in (14, 15)] == [[], ["margins_exploding"]]


def test_evaluations_do_not_end_an_episode_of_training(caplog):
    run = Run(caplog, doctor=DoctorCallback(calm_logs=3))
    assert run.log(1, loss=math.nan) == ["not_finite"]
    for _ in range(5):
        assert run.feed(1, {"eval_loss": 1.0, "eval_runtime": 1.0}) == []
    assert run.log(2, loss=math.nan) == []


def test_other_processes_mark_but_do_not_warn(caplog):
    run = Run(caplog, main=False)
    assert run.log(1, loss=math.nan) == []
    assert run.marks == {"doctor/not_finite"}


def test_a_resumed_run_warns_like_the_whole_one(caplog, tmp_path):
    def logs(step):
        return {"loss": 0.3, "rewards/margins": 30.0 if step % 40 > 20 else 1.0, "grad_norm": healthy_norms(200)[step]}

    whole = Run(caplog, **DPO)
    expected = {step: whole.feed(step, logs(step)) for step in range(1, 120)}
    assert sum(map(bool, expected.values())) == 3
    for stop in (15, 25, 44, 63):
        run = Run(caplog, **DPO)
        found = {step: run.feed(step, logs(step)) for step in range(1, stop)}
        run.state.save_to_json(str(tmp_path / "state.json"))
        resumed = Run(caplog, **DPO)
        resumed.state = TrainerState.load_from_json(str(tmp_path / "state.json"))
        found |= {step: resumed.feed(step, logs(step)) for step in range(stop, 120)}
        assert found == expected
        assert resumed.state.log_history == whole.state.log_history


# ---- Settings ----


def test_thresholds_and_rules_of_ones_own(caplog):
    class LossRises(Rule):
        name, meaning, advice = "loss_rises", "It is too fast.", "Slow down."

        def check(self, log):
            losses = log.recent("loss", 2)
            return f"{losses[-1]}" if losses[-1] > losses[0] else None

    run = Run(caplog, doctor=DoctorCallback([MarginsExploding(limit=3.0, logs=1), LossRises()]), **DPO)
    assert run.log(1, rewards__margins=2.0) == []
    assert run.log(2, rewards__margins=4.0, loss=0.6) == ["margins_exploding", "loss_rises"]
    run = Run(caplog, doctor=DoctorCallback(without=["not_finite"]))
    assert run.log(1, loss=math.nan) == []
    with pytest.raises(ValueError, match="no rule: sppeed. The rules are not_finite"):
        DoctorCallback(without=["sppeed"])


def test_a_rule_that_fails_does_not_end_the_run(caplog):
    class Fails(Rule):
        name = "fails"

        def check(self, log):
            raise KeyError("loss")

    run = Run(caplog, doctor=DoctorCallback([Fails()]))
    run.expected_failures = ["Rule 'fails' failed and is left out from now on: KeyError: 'loss'"]
    assert run.log(1, loss=math.nan) == ["not_finite"]
    run.expected_failures = []
    assert run.log(2) == []


def test_rules_are_complete():
    for rule in default_rules():
        assert rule.name and rule.meaning.endswith((".", ")")) and rule.advice.endswith((".", ")"))
        assert set(rule.kinds) <= {"train", "eval", "other"}
    assert len({rule.name for rule in default_rules()}) == len(default_rules()) == 19


# ---- In a trainer ----


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("trl.reports.doctor")]


class Seen(TrainerCallback):
    """What a tracker gets."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_real_training_is_silent(tokenizer, tmp_path, caplog):
    """On real logs of a small model that learns, with spikes of its own kind."""
    trainer = make_trainer(
        tokenizer, tmp_path, max_steps=120, learning_rate=3e-3, eval_strategy="steps", eval_steps=40
    )
    install_doctor(trainer.callback_handler)
    trainer.train()
    assert not warnings_of(caplog)
    assert not any("doctor/" in key for entry in trainer.state.log_history for key in entry)
    assert trainer.state.log_history[-1]["train_loss"] < trainer.state.log_history[0]["loss"]


def test_a_broken_weight_is_found_in_training(tokenizer, tmp_path, caplog):
    class Breaks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.lm_head.weight.data[0] = math.inf

    seen = Seen()
    trainer = make_trainer(tokenizer, tmp_path, [seen, Breaks()], logging_nan_inf_filter=False)
    install_doctor(trainer.callback_handler)
    trainer.train()
    warned = warnings_of(caplog)
    assert len(warned) == 1 and warned[0].startswith("Step 3, not_finite: loss = nan")
    training = [logs for logs in seen.logs if "loss" in logs]
    assert ["doctor/not_finite" in logs for logs in training] == [False, False, True, True]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["doctor/not_finite" in entry for entry in history] == [False, False, True, True]


def test_a_gradient_spike_is_found_in_training(tokenizer, tmp_path, caplog):
    class Spike(TrainerCallback):
        """Weights thrown off in the middle of the run."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 40:
                with torch.no_grad():
                    model.lm_head.weight.mul_(30)

    trainer = make_trainer(tokenizer, tmp_path, [Spike()], max_steps=42, learning_rate=1e-3)
    install_doctor(trainer.callback_handler)
    trainer.train()
    warned = warnings_of(caplog)
    assert len(warned) == 1 and warned[0].startswith("Step 41, grad_norm_spike")


def watch(trainer):
    install_doctor(trainer.callback_handler).starts_at_reference = True
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-2])
def test_preference_training_that_learns_is_silent(tmp_path, caplog, learning_rate):
    """The first loss is as expected; then the pairs are learnt."""
    history = watch(make_dpo_trainer(tmp_path, make_pairs(40), max_steps=30, learning_rate=learning_rate))
    assert not warnings_of(caplog)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[-2]["rewards/margins"] > 0.01


def test_unpaired_training_that_learns_is_silent(tmp_path, caplog):
    watch(make_kto_trainer(tmp_path, make_unpaired(40), max_steps=30, learning_rate=1e-3))
    assert not warnings_of(caplog)


def test_a_learning_rate_far_too_high_is_found(tmp_path, caplog):
    """Both answers fall to nothing; the loss falls too, and the accuracy is perfect."""
    history = watch(make_dpo_trainer(tmp_path, max_steps=30, learning_rate=0.3, layout="padded"))
    assert history[-2]["rewards/accuracies"] == 1 and history[-2]["loss"] < 0.01
    rules = [message.split(", ")[1].split(":")[0] for message in warnings_of(caplog)]
    assert rules[0] == "chosen_collapse" and set(rules) <= {"chosen_collapse", "margins_exploding"}


def test_dropout_at_the_start_is_found(tmp_path, caplog):
    """The policy drops out, the reference does not: `disable_dropout` is on by default for this."""
    model = build_model(attention_dropout=0.5)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # predictions that depend on what is attended to
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(50)
    watch(make_dpo_trainer(tmp_path, model=model, max_steps=1, learning_rate=0.0, disable_dropout=False))
    assert len(warnings_of(caplog)) == 1 and "first_loss" in warnings_of(caplog)[0]


def test_the_doctor_is_first_once_and_can_go(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    doctor = install_doctor(trainer.callback_handler)
    assert trainer.callback_handler.callbacks[0] is doctor
    trainer.remove_callback(DoctorCallback)
    assert not any(isinstance(callback, DoctorCallback) for callback in trainer.callback_handler.callbacks)
    own = DoctorCallback([GradNormSpike(score=9.0), AccuracyStuck(ceiling=0.52), ChosenCollapse(nats=5.0)])
    trainer = make_trainer(tokenizer, tmp_path, [own])
    assert install_doctor(trainer.callback_handler) is own
    callbacks = trainer.callback_handler.callbacks
    assert callbacks[0] is own and sum(isinstance(callback, DoctorCallback) for callback in callbacks) == 1


def test_our_trainers_have_one(tmp_path, caplog):
    """Also where the user passes one; it is told whether the policy starts as the reference, and goes on on resuming."""
    own = DoctorCallback([MarginsExploding(limit=-math.inf, logs=1)])  # fires at every log
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "layout": "padded"}
    trainer = make_dpo_trainer(tmp_path, callbacks=[own], **settings)
    assert trainer.callback_handler.callbacks[0] is own and own.starts_at_reference
    trainer.train()
    assert [message.split(":")[0] for message in warnings_of(caplog)] == ["Step 1, margins_exploding"]
    caplog.clear()
    resumed = make_dpo_trainer(tmp_path, callbacks=[DoctorCallback(own.rules)], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not warnings_of(caplog)
    marks = [entry.get("doctor/margins_exploding") for entry in resumed.state.log_history if "loss" in entry]
    assert marks == [1.0] * 4
    other = make_dpo_trainer(tmp_path, ref_model=build_model(seed=1))
    assert type(other.callback_handler.callbacks[0]) is DoctorCallback and not other.doctor.starts_at_reference


def test_it_follows_plain_training_arguments(caplog, tmp_path):
    """Without a method's fields, no rule fails for want of one."""
    run = Run(caplog)
    run.args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    run.doctor.starts_at_reference = True
    values = {"kl": 0.0, "rewards__accuracies": 0.9, "rewards__margins": 1.0, "rewards__chosen": 0.1}
    assert run.log(1, **values, logps__chosen=-5.0) == []
