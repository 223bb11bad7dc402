"""The doctor's rules for runs that sample completions and learn from rewards."""

import math
import random
import statistics

import numpy as np
import pytest
from datasets import Dataset
from transformers import TrainerState

from tests.conftest import build_model
from tests.reports.test_doctor import Run
from tests.reports.test_doctor import warnings_of as warnings_of_doctor
from trl.reports.doctor import DoctorCallback
from trl.reports.doctor_online_rules import KLDrift, online_rules
from trl.reports.doctor_reward_rules import LengthHacking, SlowReward, ZeroStdGroups
from trl.reports.run_log import rises
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

GRPO = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "beta": 0.04,
    "num_generations": 8,
    "generation_batch_size": 64,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 4,
    "num_iterations": 1,
    "max_completion_length": 512,
    "mask_truncated_completions": False,
}
RLOO = {**GRPO, "num_generations": 2, "beta": 0.05}
del RLOO["loss_type"], RLOO["importance_sampling_level"]


def usual(step, **changes):
    """A log in the middle of a healthy run with two sources; deterministic noise."""
    noise = random.Random(step).gauss
    accuracy = 0.4 + 0.02 * noise(0, 1)
    log = {
        "loss": 0.01 * noise(0, 1),
        "grad_norm": 0.3,
        "reward": accuracy + 0.9,
        "reward_std": 0.5,
        "frac_reward_zero_std": 0.3,
        "entropy": 0.8 + 0.02 * noise(0, 1),
        "kl": 0.05 + 0.002 * noise(0, 1),
        "clip_ratio/region_mean": 0.01,
        "completions/mean_length": 200 + 5 * noise(0, 1),
        "completions/clipped_ratio": 0.05,
        "step_time": 10.0,
    }
    for name, mean, std in (("accuracy", accuracy, 0.49), ("form", 0.9 + 0.01 * noise(0, 1), 0.3)):
        figures = {"mean": mean, "std": std, "none_rate": 0.0, "error_rate": 0.0, "latency_s": 0.2}
        log |= {f"rewards/{name}/{figure}": value for figure, value in figures.items()}
    log |= changes
    return {key: value for key, value in log.items() if value is not None}


def warnings_of(run, steps, logs):
    """Rule -> step of its first warning, for the logs that a function of the step gives."""
    found = {}
    for step in steps:
        for rule in run.feed(step, logs(step)):
            found.setdefault(rule, step)
    return found


def constant(**changes):
    changes = {key.replace("__", "/"): value for key, value in changes.items()}
    return lambda step: usual(step, **changes)


def after(start, **changes):
    ill = constant(**changes)
    return lambda step: ill(step) if step >= start else usual(step)


# ---- Healthy runs ----


def learning(steps, every, groups, size, seed, last=0.9):
    """
    Logs of a run that learns: the reward of sampled groups rises from 0.1, entropy falls from 2.0 to 0.8, completions
    get half as long again. Prompts differ in how hard they are.
    """
    generator = np.random.default_rng(seed)
    for start in range(0, steps, every):
        batches = []
        for step in range(start, start + every):
            part = step / steps
            solved = 0.1 + (last - 0.1) * (1 - math.exp(-4 * part)) / (1 - math.exp(-4))
            prompts = generator.beta(3 * solved, 3 * (1 - solved), groups)
            rewards = (generator.random((groups, size)) < prompts[:, None]).astype(float)
            batches.append(
                {
                    "reward": rewards.mean(),
                    "reward_std": rewards.std(ddof=1),
                    "frac_reward_zero_std": (rewards.std(1) == 0).mean(),
                    "entropy": (2.0 - 1.2 * part) * math.exp(generator.normal(0, 0.1)),
                    "kl": 0.1 * part * math.exp(generator.normal(0, 0.5)),
                    "clip_ratio/region_mean": 0.01 * generator.random(),
                    "completions/mean_length": 200 * (1 + 0.5 * part) * math.exp(generator.normal(0, 0.1)),
                    "completions/clipped_ratio": 0.1 * generator.random(),
                    "sampling/sampling_logp_difference/mean": 0.02 * math.exp(generator.normal(0, 0.3)),
                    "sampling/sampling_logp_difference/max": 2.0 * math.exp(generator.normal(0, 0.5)),
                    "sampling/importance_sampling_ratio/mean": 1 + generator.normal(0, 0.05),
                    "step_time": 8.0,
                    "grad_norm": 0.2 * math.exp(generator.normal(0, 0.3)),
                    "rewards/accuracy/mean": rewards.mean(),
                    "rewards/accuracy/std": rewards.std(ddof=1),
                    "rewards/accuracy/none_rate": 0.0,
                    "rewards/accuracy/error_rate": 0.0,
                    "rewards/accuracy/latency_s": 0.5,
                }
            )
        log = {key: float(np.mean([batch[key] for batch in batches])) for key in batches[0]}
        yield start + every, {"loss": 0.0, **log}


@pytest.mark.parametrize(
    ("settings", "steps", "every", "groups", "size"),
    [
        (GRPO, 400, 1, 8, 8),
        (GRPO, 400, 1, 1, 8),
        (GRPO, 2000, 10, 4, 16),
        (GRPO, 30, 1, 2, 4),
        (GRPO, 60, 1, 1, 2),
        (RLOO, 400, 1, 2, 2),
        (RLOO, 1000, 10, 32, 2),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_learns_is_silent(caplog, settings, steps, every, groups, size, seed):
    settings = {**settings, "num_generations": size, "generation_batch_size": groups * size}
    run = Run(caplog, max_steps=steps, **settings)
    for step, log in learning(steps, every, groups, size, seed):
        assert run.feed(step, log) == [], run.messages


def test_usual_logs_are_silent(caplog):
    for settings in (GRPO, RLOO, {**GRPO, "beta": 0.0}, {}):
        assert warnings_of(Run(caplog, max_steps=300, **settings), range(1, 301), usual) == {}


def test_other_trainers_log_some_of_the_names(caplog):
    """Supervised training has an entropy too, KTO a KL divergence."""
    run = Run(caplog, max_steps=300, beta=0.1, loss_type="kto")
    log = {"loss": 0.4, "entropy": 0.001, "kl": 9.0, "reward": 1.0, "rewards/chosen": 0.1, "rewards/margins": 0.2}
    assert warnings_of(run, range(1, 301), lambda step: dict(log)) == {}


def test_rises():
    assert rises([0, 0, 0, 1, 1, 1]) and not rises([1, 1, 1, 0, 0, 0])
    assert not rises([1.0] * 10) and not rises([0, 1, 0]) and not rises([])
    noise = [random.Random(seed).gauss(0, 1) for seed in range(40)]
    assert rises([value + 0.1 * number for number, value in enumerate(noise)])
    generator = np.random.default_rng(0)
    false = statistics.mean(rises(generator.normal(size=20)) for _ in range(400))
    assert 0.005 < false < 0.06  # one side of two standard errors


# ---- Groups without a difference ----


@pytest.mark.parametrize(
    ("size", "share", "found"),
    [(8, 0.86, True), (8, 0.84, False), (2, 0.97, True), (2, 0.95, False), (16, 0.86, True), (16, 0.84, False)],
)
def test_zero_std_groups(caplog, size, share, found):
    run = Run(caplog, max_steps=400, **{**GRPO, "num_generations": size, "generation_batch_size": 8 * size})
    warned = warnings_of(run, range(1, 200), constant(frac_reward_zero_std=share))
    assert warned == ({"zero_std_groups": 50} if found else {})


def test_zero_std_groups_wait_for_enough_of_them(caplog):
    """One pair for each step: 50 that agree are no wonder; and several steps train on one generation."""
    settings = {**RLOO, "generation_batch_size": 2}
    run = Run(caplog, max_steps=400, **settings)
    assert warnings_of(run, range(1, 400), constant(frac_reward_zero_std=1.0)) == {"zero_std_groups": 128}
    run = Run(caplog, max_steps=400, **{**settings, "num_iterations": 2})
    assert warnings_of(run, range(1, 400), constant(frac_reward_zero_std=1.0)) == {"zero_std_groups": 256}
    run = Run(caplog, max_steps=4000, **GRPO)  # a tenth of the run
    assert warnings_of(run, range(10, 600, 10), constant(frac_reward_zero_std=1.0)) == {"zero_std_groups": 400}


def where(caplog, logs):
    run = Run(caplog, max_steps=400, **GRPO)
    for step in range(1, 200):
        if "zero_std_groups" in run.feed(step, logs(step)):
            return run.messages[0].splitlines()[0]
    return None


def test_zero_std_groups_say_where_the_reward_is(caplog):
    def ends_at(level, spread):
        def logs(step):
            mean, std, share = (0.5, 0.5, 0.2) if step < 60 else (level, spread, 0.95)
            return usual(step, reward=mean + 0.001 * (step % 3), reward_std=std, frac_reward_zero_std=share)

        return logs

    assert "too easy by now" in where(caplog, ends_at(0.99, 0.1))
    assert "too hard" in where(caplog, ends_at(0.01, 0.1))
    assert "some always solved, others never" in where(caplog, ends_at(0.5, 0.5))
    never = constant(frac_reward_zero_std=1.0, reward=0.0, reward_std=0.0)
    assert "has been 0 all along" in where(caplog, never)
    assert where(caplog, constant(frac_reward_zero_std=1.0, reward=0.3, reward_std=0.0)).endswith("reward is 0.3.")
    bare = constant(frac_reward_zero_std=1.0, reward=None, reward_std=None)
    assert where(caplog, bare).endswith("steps 1 to 50 (50 logs).")


# ---- A reward at its top ----


def rising_to(level, std, at=100):
    def logs(step):
        part = min(step / at, 1)
        share = 0.3 if part < 1 else 1.0
        noisy = usual(step)
        now = 0.4 + part * (level - 0.4)
        return noisy | {"reward": now, "reward_std": std if part == 1 else 0.5, "frac_reward_zero_std": share}

    return logs


def test_reward_saturated(caplog):
    run = Run(caplog, max_steps=300, **GRPO)
    assert warnings_of(run, range(1, 147), rising_to(2.0, 0.0)) == {}
    assert run.feed(147, rising_to(2.0, 0.0)(147)) == ["reward_saturated"]  # two batches before the top weigh little
    seen = "reward 2 with a standard deviation of 0.02 over steps 98 to 147 (50 logs); it has been as low as 0.416"
    assert seen in run.messages[0]


@pytest.mark.parametrize(("std", "rule"), [(0.024, "reward_saturated"), (0.026, "zero_std_groups")])
def test_not_quite_saturated(caplog, std, rule):
    """A twentieth of the largest deviation, which is 0.5."""
    run = Run(caplog, max_steps=300, **GRPO)
    assert set(warnings_of(run, range(1, 301), rising_to(2.0, std))) == {rule}


def test_a_reward_that_fell_to_one_value_is_not_saturated(caplog):
    run = Run(caplog, max_steps=300, **GRPO)
    assert set(warnings_of(run, range(1, 301), rising_to(0.0, 0.0))) == {"zero_std_groups"}


def test_a_reward_that_is_the_same_for_all_below_its_top_is_not_saturated(caplog):
    run = Run(caplog, max_steps=300, **GRPO)
    warned = warnings_of(run, range(1, 301), lambda step: rising_to(2.0 if step < 110 else 1.8, 0.0)(step))
    assert set(warned) == {"zero_std_groups"}


# ---- Sources that fail, say nothing, or take long ----


def test_reward_errors(caplog):
    run = Run(caplog, **GRPO)
    assert run.feed(1, usual(1)) == []
    assert run.feed(2, usual(2, **{"rewards/form/error_rate": 0.01})) == ["reward_errors"]
    assert "form failed for 1.0% of completions" in run.messages[0]
    logs = {"eval_loss": 0.0, "eval_runtime": 1.0, "eval_rewards/a/b/error_rate": 0.5, "eval_rewards/a/b/mean": 0.0}
    assert run.feed(3, logs) == ["reward_errors"]
    assert "a/b failed for 50.0%" in run.messages[0] and run.marks == {"eval_doctor/reward_errors"}


def test_dead_reward(caplog):
    run = Run(caplog, max_steps=400, **GRPO)
    dead = constant(rewards__form__mean=0.1, rewards__form__std=1e-9)
    assert warnings_of(run, range(1, 200), dead) == {"dead_reward": 100}
    run = Run(caplog, max_steps=400, **GRPO)
    silent = constant(rewards__form__mean=None, rewards__form__std=None, rewards__form__none_rate=1.0)
    assert warnings_of(run, range(1, 200), silent) == {"dead_reward": 100}
    # An old value that was lower was learnt from; one that was higher was lost.
    zero, one = ({"rewards__form__mean": value, "rewards__form__std": 0.0} for value in (0.0, 1.0))
    assert warnings_of(Run(caplog, max_steps=400, **GRPO), range(1, 300), after(101, **one)) == {}
    assert warnings_of(Run(caplog, max_steps=400, **GRPO), range(1, 300), after(101, **zero)) == {"dead_reward": 200}


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards__form__mean": 0.1, "rewards__form__std": 0.01},
        {"rewards__form__std": 0.0},  # differs from batch to batch
        {"rewards__form__none_rate": 0.99},
        {"rewards__form__mean": 0.1, "rewards__form__std": 0.0, "rewards__accuracy__std": 0.0},  # nobody tells apart
    ],
)
def test_a_source_that_speaks_now_and_then_is_not_dead(caplog, changes):
    assert warnings_of(Run(caplog, max_steps=400, **GRPO), range(1, 300), constant(**changes)) == {}


def test_a_source_that_fails_for_all_is_told_once(caplog):
    fails = {"rewards__form__mean": None, "rewards__form__std": None, "rewards__form__none_rate": 1.0}
    run = Run(caplog, max_steps=400, **GRPO)
    warned = warnings_of(run, range(1, 300), constant(**fails, rewards__form__error_rate=1.0))
    assert warned == {"reward_errors": 1}


def test_slow_reward(caplog):
    def warned(latency, **settings):
        logs = constant(rewards__form__latency_s=latency)
        return warnings_of(Run(caplog, max_steps=400, **{**GRPO, **settings}), range(1, 20), logs)

    assert warned(5.1) == {"slow_reward": 5} and warned(4.9) == {}
    # One generation in four steps has to wait.
    assert warned(19.0, steps_per_generation=16) == {} and warned(21.0, steps_per_generation=16) == {"slow_reward": 5}
    quick = constant(rewards__form__latency_s=0.9, step_time=1.0)  # a second at least
    assert warnings_of(Run(caplog, **GRPO), range(1, 20), quick) == {}
    not_quick = constant(rewards__form__latency_s=1.1, step_time=1.0)
    assert warnings_of(Run(caplog, **GRPO), range(1, 20), not_quick) == {"slow_reward": 5}
    once = after(10, rewards__form__latency_s=9.0)
    assert warnings_of(Run(caplog, **GRPO), range(1, 20), once) == {"slow_reward": 12}  # three of five


# ---- Entropy ----


def entropies(now, begun=2.0, **more):
    """The entropy falls over 100 steps."""
    return lambda step: usual(step, entropy=begun + min(step / 100, 1) * (now - begun), **more)


@pytest.mark.parametrize(
    ("begun", "now", "found"),
    [(2.0, 0.19, True), (2.0, 0.21, False), (2.0, 0.8, False), (0.05, 0.009, True), (0.05, 0.011, False)],
)
def test_entropy_collapse(caplog, begun, now, found):
    run = Run(caplog, max_steps=300, **GRPO)
    assert set(warnings_of(run, range(1, 301), entropies(now, begun))) == ({"entropy_collapse"} if found else set())


def test_entropy_may_fall_while_the_reward_rises_or_when_all_is_solved(caplog):
    def rises_then_stays(std_at_the_end):
        def logs(step):
            part = min(step / 200, 1)
            reward = 0.1 + 0.85 * part + 0.02 * random.Random(step).gauss(0, 1)
            std = 0.5 if part < 1 else std_at_the_end
            return usual(step, reward=reward, reward_std=std, entropy=2 * math.exp(-step / 30) + 0.005)

        return logs

    solved = Run(caplog, max_steps=300, **GRPO)
    assert warnings_of(solved, range(1, 301), rises_then_stays(0.3)) == {}
    stuck = Run(caplog, max_steps=300, **GRPO)
    warned = warnings_of(stuck, range(1, 301), rises_then_stays(0.4))
    assert set(warned) == {"entropy_collapse"} and 215 < warned["entropy_collapse"] < 255


# ---- The policy and its reference ----


def test_kl_drift(caplog):
    def warned(logs, **settings):
        return warnings_of(Run(caplog, max_steps=300, **{**GRPO, **settings}), range(1, 301), logs)

    assert warned(constant(kl=1.1)) == {"kl_drift": 5} and warned(constant(kl=0.9)) == {}
    assert warned(constant(kl=1.1), beta=0.0) == {}
    assert warned(lambda step: usual(step, kl=30.0 if step % 3 == 0 else 0.1)) == {}  # outliers

    def run_away(step):
        return usual(step, kl=0.05 * math.exp(max(0, step - 150) / 25))

    found = warned(run_away)["kl_drift"]
    assert 190 < found <= 215  # long before it is 1, at 225
    assert warned(lambda step: usual(step, kl=0.05 * math.exp(step / 100))) == {}  # slowly
    assert warned(lambda step: usual(step, kl=min(0.9, 0.01 * step))) == {}  # slower and slower
    assert (
        warned(lambda step: usual(step, kl=min(0.28, 0.001 * 1.1**step))) == {}
    )  # from 0 up to a level, as it should


@pytest.mark.parametrize(
    ("settings", "key", "share", "found"),
    [
        (GRPO, "clip_ratio/region_mean", 0.11, True),
        (GRPO, "clip_ratio/region_mean", 0.09, False),
        ({**GRPO, "importance_sampling_level": "sequence"}, "clip_ratio/region_mean", 0.4, False),
        ({**GRPO, "importance_sampling_level": "sequence"}, "clip_ratio/region_mean", 0.51, True),
        ({**GRPO, "loss_type": "cispo"}, "cispo_clip_ratio", 0.11, True),
        (RLOO, "clip_ratio/region_mean", 0.51, True),
        (RLOO, "clip_ratio/region_mean", 0.49, False),
    ],
)
def test_clip_ratio(caplog, settings, key, share, found):
    run = Run(caplog, max_steps=300, **settings)
    assert warnings_of(run, range(1, 100), constant(**{key: share})) == ({"clip_ratio": 50} if found else {})


@pytest.mark.parametrize(
    ("key", "usual_value", "ill"),
    [
        ("sampling/sampling_logp_difference/mean", 0.09, 0.11),
        ("sampling/sampling_logp_difference/max", 9.0, 11.0),
        ("sampling/importance_sampling_ratio/mean", 0.51, 0.49),
        ("sampling/importance_sampling_ratio/mean", 1.9, 2.1),
    ],
)
def test_logp_mismatch(caplog, key, usual_value, ill):
    run = Run(caplog, **GRPO)
    assert warnings_of(run, range(1, 30), constant(**{key: usual_value})) == {}
    assert warnings_of(run, range(30, 31), constant(**{key: ill})) == {}  # once is nothing
    assert run.feed(31, usual(31, **{key: ill})) == ["logp_mismatch"]
    assert f"{key} {ill:.3g}" in run.messages[0]


# ---- Lengths ----


def test_truncated_completions(caplog):
    def warned(logs, **settings):
        return warnings_of(Run(caplog, max_steps=300, **{**GRPO, **settings}), range(1, 301), logs)

    assert warned(constant(completions__clipped_ratio=0.51)) == {"truncated_completions": 50}
    assert warned(constant(completions__clipped_ratio=0.49)) == {}

    def learns_to_stop(step):
        return usual(step, **{"completions/clipped_ratio": 0.95 * math.exp(-step / 100)})

    assert warned(learns_to_stop) == {}
    run = Run(caplog, **{**GRPO, "mask_truncated_completions": True}, max_steps=300)
    for step in range(1, 101):
        warned_now = run.feed(step, usual(step, **{"completions/clipped_ratio": 0.8}))
        assert warned_now == (["truncated_completions"] if step == 50 else [])
        if warned_now:
            assert "80% of completions were cut at 512 tokens" in run.messages[0]
            assert "leaves out of the loss" in run.messages[0]


def growing(factor, steps=300, **more):
    return lambda step: usual(step, **{"completions/mean_length": 50 * factor ** (step / steps), **more})


def test_length_explosion(caplog):
    def warned(logs, **settings):
        return warnings_of(Run(caplog, max_steps=300, **{**GRPO, **settings}), range(1, 301), logs)

    assert 140 < warned(growing(9))["length_explosion"] < 180  # three times at step 150
    assert warned(growing(2.8)) == {}
    assert warned(lambda step: usual(step, **{"completions/mean_length": 300 if step > 10 else 90})) == {}  # stays
    better = {step: 0.2 + 0.003 * step + 0.01 * random.Random(step).gauss(0, 1) for step in range(301)}
    assert warned(lambda step: growing(9)(step) | {"reward": better[step]}) == {}
    # Up to what is possible: from below two thirds of it, whatever the reward does.
    to_the_limit = {"max_completion_length": 128}
    assert warned(lambda step: growing(2.8)(step) | {"reward": better[step]}, **to_the_limit)["length_explosion"] > 230
    assert warned(constant(completions__mean_length=120.0), **to_the_limit) == {}


@pytest.mark.parametrize(("begun", "found"), [(79, True), (81, False)])
def test_growing_up_to_the_limit(caplog, begun, found):
    """By half at least."""
    run = Run(caplog, max_steps=300, **{**GRPO, "max_completion_length": 128})
    warned = warnings_of(
        run, range(1, 100), lambda step: usual(step, **{"completions/mean_length": 119 if step > 10 else begun})
    )
    assert warned == ({"length_explosion": 13} if found else {})


def hacked(follows=1.0, own=0.0, growth=2.0, accuracy_rises=0.0):
    """One source pays for length; the other is what counts."""

    def logs(step):
        noise = random.Random(step)
        length = 100 * (1 + (growth - 1) * step / 200) * math.exp(0.05 * noise.gauss(0, 1))
        # What both have in common is the trend; `own` is noise that only the source has.
        shown = follows * length + (1 - follows) * 100 * (1 + (growth - 1) * step / 200)
        paid = shown / 200 + own * noise.gauss(0, 1)
        accuracy = 0.4 + accuracy_rises * step / 200 + 0.02 * noise.gauss(0, 1)
        more = {"rewards/form/mean": paid, "rewards/accuracy/mean": accuracy, "reward": accuracy + paid}
        return usual(step, **{"completions/mean_length": length}, **more)

    return logs


@pytest.mark.parametrize(
    ("logs", "found"),
    [
        (hacked(), True),
        (hacked(own=0.01), True),
        (hacked(accuracy_rises=0.2), False),  # longer and better
        (hacked(growth=1.2), False),
        (hacked(follows=0.0, own=0.02), False),  # both grow, each for itself
        (lambda step: {k: v for k, v in hacked()(step).items() if not k.startswith("rewards/accuracy")}, False),
    ],
)
def test_length_hacking(caplog, logs, found):
    run = Run(caplog, max_steps=200, **GRPO)
    warned = warnings_of(run, range(1, 201), logs)
    assert set(warned) == ({"length_hacking"} if found else set())


def test_the_form_is_learnt_first(caplog):
    """Tags make completions longer, and the model learns to write them; accuracy comes later."""

    def logs(step):
        noise = random.Random(step)
        form = 1 / (1 + math.exp(-(step - 60) / 15))
        length = 100 * (1 + 0.5 * form) * math.exp(0.05 * noise.gauss(0, 1))
        means = {"rewards/form/mean": form + 0.02 * noise.gauss(0, 1), "rewards/accuracy/mean": 0.2}
        reward = sum(means.values())
        return usual(step, **{"completions/mean_length": length, "reward": reward, **means})

    assert warnings_of(Run(caplog, max_steps=200, **GRPO), range(1, 201), logs) == {}


# ---- In a trainer ----


def train(trainer_class, config_class, tokenizer, tmp_path, reward_funcs, **settings):
    """A tiny model that learns to write what pays; the step and rule of each warning come from `caplog`."""
    args = config_class(
        str(tmp_path),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        gradient_checkpointing=False,
        **settings,
    )
    rows = Dataset.from_dict({"prompt": ["what is it", "tell me more", "and then"] * 8})
    trainer = trainer_class(build_model(), reward_funcs, args, rows, processing_class=tokenizer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def low_tokens(completion_ids, **kwargs):
    """The share of tokens from the lower half of the vocabulary."""
    return [sum(token < 256 for token in ids) / len(ids) for ids in completion_ids]


def never(completion_ids, **kwargs):
    return [0.0] * len(completion_ids)


def fails_later(completion_ids, trainer_state, **kwargs):
    if trainer_state.global_step >= 3:
        raise ConnectionError("the judge is gone")
    return [float(len(set(ids))) for ids in completion_ids]


def test_a_real_run_that_learns_with_a_dead_source(tokenizer, tmp_path, caplog):
    """It is silent about all that is well. A model with random weights does not end its answers."""
    settings = {"max_steps": 105, "learning_rate": 3e-3, "beta": 0.01}
    history = train(GRPOTrainer, GRPOConfig, tokenizer, tmp_path, [low_tokens, never], **settings)
    rewards = [entry["reward"] for entry in history]
    assert statistics.mean(rewards[-20:]) > statistics.mean(rewards[:20]) + 0.1
    found = {}
    for message in warnings_of_doctor(caplog):
        step, rule, seen = message.splitlines()[0].replace(": ", ", ", 1).split(", ", 2)
        found.setdefault(rule, (step, seen))
    assert {rule: step for rule, (step, _) in found.items()} == {
        "truncated_completions": "Step 50",
        "dead_reward": "Step 100",
    }
    assert "never gave 0 to every completion" in found["dead_reward"][1]


def test_a_learning_rate_far_too_high_is_found(tokenizer, tmp_path, caplog):
    """The reward rises fast, at the cost of all else."""
    settings = {"max_steps": 40, "learning_rate": 3e-2, "beta": 0.01}
    history = train(GRPOTrainer, GRPOConfig, tokenizer, tmp_path, [low_tokens], **settings)
    assert statistics.mean(entry["reward"] for entry in history[-5:]) > 0.75
    (message,) = warnings_of_doctor(caplog)
    assert "kl_drift: kl 1." in message


def test_errors_of_a_real_run(tokenizer, tmp_path, caplog):
    settings = {"max_steps": 6, "reward_on_error": "count"}
    history = train(RLOOTrainer, RLOOConfig, tokenizer, tmp_path, [low_tokens, fails_later], **settings)
    assert [entry.get("doctor/reward_errors") for entry in history] == [None] * 3 + [1.0] * 3
    (message,) = warnings_of_doctor(caplog)
    assert message.startswith("Step 4, reward_errors: fails_later failed for 100.0% of completions.")


# ---- As rules ----


def test_online_rules_are_complete():
    assert len({rule.name for rule in online_rules()}) == len(online_rules()) == 12
    for rule in online_rules():
        assert rule.meaning.endswith((".", ")")) and rule.advice.endswith((".", ")"))
        assert type(rule).__doc__.strip()


def test_thresholds_are_fields(caplog):
    doctor = DoctorCallback([KLDrift(limit=5.0), SlowReward(share=0.9), ZeroStdGroups(share=0.99, rate=0.0)])
    run = Run(caplog, max_steps=300, doctor=doctor, **GRPO)
    logs = constant(kl=1.1, rewards__form__latency_s=5.1, frac_reward_zero_std=0.9)
    assert warnings_of(run, range(1, 100), logs) == {}
    doctor = DoctorCallback(without=["kl_drift", "slow_reward", "zero_std_groups"])
    assert warnings_of(Run(caplog, doctor=doctor, **GRPO), range(1, 100), logs) == {}
    assert LengthHacking().growth > 1


def test_a_resumed_run_is_judged_alike(caplog, tmp_path):
    def logs(step):
        changes = {"frac_reward_zero_std": 1.0 if step > 60 else 0.2, "entropy": 2.0 if step < 50 else 0.1}
        return usual(step, **changes, **{"completions/mean_length": 50 * 9 ** (step / 200)})

    whole = Run(caplog, max_steps=200, **GRPO)
    expected = {step: whole.feed(step, logs(step)) for step in range(1, 201)}
    assert {rule for rules in expected.values() for rule in rules} == {
        "zero_std_groups",
        "entropy_collapse",
        "length_explosion",
    }
    for stop in (40, 95, 150):
        run = Run(caplog, max_steps=200, **GRPO)
        found = {step: run.feed(step, logs(step)) for step in range(1, stop)}
        run.state.save_to_json(str(tmp_path / "state.json"))
        resumed = Run(caplog, max_steps=200, **GRPO)
        resumed.state = TrainerState.load_from_json(str(tmp_path / "state.json"))
        found |= {step: resumed.feed(step, logs(step)) for step in range(stop, 201)}
        assert found == expected
        assert resumed.state.log_history == whole.state.log_history
