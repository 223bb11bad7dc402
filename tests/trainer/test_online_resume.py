"""
GRPO and RLOO, stopped and resumed: the run that was never stopped, bit for bit, with completions that are really sampled.

A checkpoint between two generations holds the completions that are still to be trained on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers.trainer_utils import get_last_checkpoint

from .online_helpers import (
    PROMPTS,
    QUIET,
    build_policy,
    dataset,
    low_ids,
    make_online_trainer,
    quick_garbage_collection,
    short,
)
from .test_resume import weights_of

ROOT = Path(__file__).parents[2]
STEPS = 7
ROWS = [*PROMPTS, "ugly", "deep blue"]
TIMINGS = ("runtime", "per_second", "total_flos", "step_time", "latency_s")
# A generation has two prompts, and 5 rows make an epoch of two generations; in every fourth step an epoch ends.
TWO_STEPS = {"steps_per_generation": 2, "gradient_accumulation_steps": 1}
VARIANTS = {
    # Four micro-batches, whose order is drawn.
    "grpo": ("grpo", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "grpo_two_steps": ("grpo", TWO_STEPS),
    "grpo_two_iterations": ("grpo", {"num_iterations": 2, "loss_type": "grpo"}),
    "grpo_four_steps": ("grpo", {**TWO_STEPS, "num_iterations": 2, "beta": 0.1, "balance_micro_batches": True}),
    # A generation has three prompts and three micro-batches, a step two of these; 8 rows make an epoch.
    "grpo_across": ("grpo", {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "rows": 8}),
    "grpo_synced": (
        "grpo",
        {**TWO_STEPS, "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5},
    ),
    "grpo_adaptive": (
        "grpo",
        {
            **TWO_STEPS, "use_adaptive_entropy": True, "entropy_target": 6.0, "entropy_coef": 0.3,
            "entropy_coef_delta": 0.1, "top_entropy_quantile": 0.6, "logging_steps": 3,
        },
    ),
    "grpo_lora": ("grpo", {**TWO_STEPS, "beta": 0.1, "peft_config": {"lora_dropout": 0.2}}),
    "grpo_stream": ("grpo", {**TWO_STEPS, "stream": True}),
    "grpo_evaluated": ("grpo", {**TWO_STEPS, "eval_strategy": "steps", "eval_steps": 1}),
    "grpo_packed": ("grpo", {**TWO_STEPS, "layout": "packed", "gradient_checkpointing": True}),
    "rloo": ("rloo", {"num_iterations": 2, "beta": 0.1}),
    "rloo_stream": ("rloo", {**TWO_STEPS, "beta": 0.1, "stream": True, "shuffle_dataset": False}),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_garbage_collection():
        yield


def make_trainer(output_dir, variant: str, **settings):
    method, own = VARIANTS[variant]
    settings = {
        **QUIET,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_eval_batch_size": 4,
        "model": build_policy(attention_dropout=0.2),  # so that a step depends on the state of the random numbers
        "rows": 5,
        "stream": False,
        **own,
        **settings,
    }
    settings["model"].generation_config.eos_token_id = list(range(100))  # so that completions end early
    rows = [{"prompt": prompt} for prompt in ROWS[: settings.pop("rows")]]
    if settings.pop("stream"):
        settings["train_dataset"] = IterableDataset.from_generator(lambda: iter(rows))
    settings.setdefault("train_dataset", dataset(row["prompt"] for row in rows))
    if "eval_strategy" in settings:
        settings["eval_dataset"] = dataset(ROWS[:2])
    if "peft_config" in settings:
        torch.manual_seed(3)  # of the adapter's first weights
        targets = ["q_proj", "v_proj", "down_proj"]
        settings["peft_config"] = LoraConfig(r=4, target_modules=targets, **settings["peft_config"])
    trainer = make_online_trainer(method, output_dir, [low_ids, short], **settings)
    trainer.sampled = record_completions(trainer)
    trainer.create_model_card = lambda *args, **kwargs: None  # with its curves it takes longer than the steps
    return trainer


def record_completions(trainer) -> dict[int, list]:
    """What a training samples, by step: the micro-batches of each generation, a completion a list of tokens."""
    sampled: dict[int, list] = {}
    generate = trainer.make_training_batch

    def recorded(model, rows):
        batches = generate(model, rows)
        if trainer.mode == "train":
            sampled.setdefault(trainer.state.global_step, []).append(
                [row for batch in batches for row in (batch["input_ids"] * batch["attention_mask"]).tolist()]
            )
        return batches

    trainer.make_training_batch = recorded
    return sampled


def log_of(trainer) -> list[dict]:
    """All that was logged, evaluations too, the values that a clock made left out."""
    return [
        {key: value for key, value in entry.items() if not key.endswith(TIMINGS)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]


def assert_same_end(trainer, expected, after: int = 0) -> None:
    log, sampled, weights = expected
    assert trainer.state.global_step == STEPS
    assert trainer.sampled == {step: batches for step, batches in sampled.items() if step >= after}
    resumed = log_of(trainer)
    assert len(resumed) == len(log)
    for entry, expected_entry in zip(resumed, log, strict=True):
        assert entry == expected_entry
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, weights[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder of the whole run of a variant, with a checkpoint of every step, and what it logged, sampled and learnt."""
    runs = {}

    def get(variant: str):
        if variant not in runs:
            folder = tmp_path_factory.mktemp(variant)
            trainer = make_trainer(folder, variant)
            trainer.train()
            runs[variant] = folder, (log_of(trainer), trainer.sampled, weights_of(trainer))
        return runs[variant]

    return get


def resume(output_dir, variant: str, checkpoint: str | bool, **settings):
    trainer = make_trainer(output_dir, variant, **settings)
    torch.rand(1000)  # a new process is in another state: it has to come from the checkpoint
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


# ---- Stopped between two steps ----


def test_the_runs_are_what_they_are_meant_to_be(uninterrupted):
    """Completions of different lengths, other ones each time, as many generations as the settings say."""
    first_steps = {
        "grpo": [0, 1, 2, 3, 4, 5, 6],
        "grpo_two_steps": [0, 2, 4, 6],
        "grpo_two_iterations": [0, 2, 4, 6],
        "grpo_four_steps": [0, 4],
        "grpo_across": [0, 1, 3, 4, 6],
        "rloo": [0, 2, 4, 6],
    }
    for variant, steps in first_steps.items():
        _, (log, sampled, _) = uninterrupted(variant)
        assert list(sampled) == steps, variant
        generations = [tuple(map(tuple, batch)) for batches in sampled.values() for batch in batches]
        assert len(set(generations)) == len(generations)
        assert log[0]["completions/min_length"] < log[0]["completions/max_length"]
        assert len({entry["loss"] for entry in log}) == len(log)
    folder, _ = uninterrupted("grpo_two_steps")
    saved = [(folder / f"checkpoint-{step}" / "rollouts_0.safetensors").is_file() for step in range(1, STEPS + 1)]
    assert saved == [True, False, True, False, True, False, True], "only between the steps of a generation"


CASES = [("grpo_two_steps", step) for step in range(1, STEPS)]
CASES += [(variant, step) for variant in VARIANTS if variant != "grpo_two_steps" for step in (3, 4)]
CASES += [("grpo_adaptive", 5)]  # between two logs, after a generation


@pytest.mark.parametrize(("variant", "step"), CASES)
def test_resume_from_any_step(tmp_path, uninterrupted, variant, step):
    folder, expected = uninterrupted(variant)
    trainer = resume(tmp_path, variant, str(folder / f"checkpoint-{step}"), save_strategy="no")
    assert_same_end(trainer, expected, after=step)


def test_resumed_twice(tmp_path, uninterrupted):
    """The second time in a run that was resumed, and whose checkpoint was written in the middle of a generation."""
    folder, expected = uninterrupted("grpo_four_steps")
    shutil.copytree(folder / "checkpoint-1", tmp_path / "checkpoint-1")
    first = resume(tmp_path, "grpo_four_steps", True)
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    assert_same_end(first, expected, after=1)
    assert_same_end(resume(tmp_path, "grpo_four_steps", True, save_strategy="no"), expected, after=STEPS - 1)


def test_an_evaluation_changes_nothing(uninterrupted):
    """Its completions come from random numbers of their own."""
    _, (log, sampled, weights) = uninterrupted("grpo_evaluated")
    _, (plain_log, plain_sampled, plain_weights) = uninterrupted("grpo_two_steps")
    assert [entry for entry in log if "loss" in entry] == plain_log
    assert sampled == plain_sampled
    assert all(torch.equal(weights[name], plain_weights[name]) for name in weights)
    rewards = [entry["eval_reward"] for entry in log if "eval_reward" in entry]
    assert len(rewards) == STEPS
    assert len(set(rewards)) > 1


# ---- What is missing, or does not fit ----


@pytest.fixture
def checkpoint(tmp_path, uninterrupted):
    """A copy of a checkpoint in the middle of a generation."""
    folder, _ = uninterrupted("grpo_four_steps")
    return Path(shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2"))


def test_without_its_completions_a_generation_is_sampled_anew(tmp_path, uninterrupted, checkpoint):
    _, (log, sampled, _) = uninterrupted("grpo_four_steps")
    (checkpoint / "rollouts_0.safetensors").unlink()
    trainer = resume(tmp_path / "out", "grpo_four_steps", str(checkpoint), save_strategy="no")
    assert trainer.state.global_step == STEPS
    assert list(trainer.sampled) == [2, 4], "at once, and then when the next one is due"
    assert trainer.sampled[2] != sampled[0]
    prompts = [sorted({tuple(row[:2]) for row in batches[0]}) for batches in (sampled[0], trainer.sampled[2])]
    assert prompts[0] == prompts[1], "of the same prompts"
    assert log_of(trainer)[2]["loss"] != log[2]["loss"]


@pytest.mark.parametrize(
    ("changed", "steps"),
    [({"ignore_data_skip": True}, [2, 6]), ({"num_iterations": 1}, [2, 4, 6]), ({"num_iterations": 3}, [6])],
    ids=["data from its beginning", "fewer iterations", "more iterations"],
)
def test_generations_keep_to_the_data(tmp_path, checkpoint, changed, steps):
    """However a resumed run differs, it samples for the prompts that come, when they come."""
    trainer = make_trainer(tmp_path / "out", "grpo_four_steps", save_strategy="no", **changed)
    begin, prompts = trainer._begin_step, []

    def recorded(model, row_batches):
        prompts.append({row["prompt"] for rows in row_batches for row in rows})
        begin(model, row_batches)
        trained = trainer.processing_class.batch_decode(trainer.buffer.micro_batches[0]["input_ids"])
        assert all(any(text.startswith(prompt) for prompt in prompts[-1]) for text in trained)

    trainer._begin_step = recorded
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert len(prompts) == STEPS - 2
    assert list(trainer.sampled) == steps


def test_the_run_depends_on_the_random_numbers(tmp_path, uninterrupted, checkpoint):
    """The comparisons above can fail."""
    _, (log, sampled, _) = uninterrupted("grpo_four_steps")
    (checkpoint / "rng_state.pth").unlink()
    trainer = resume(tmp_path / "out", "grpo_four_steps", str(checkpoint), save_strategy="no")
    assert list(trainer.sampled) == [4]
    assert trainer.sampled[4] != sampled[4]
    assert log_of(trainer)[2]["loss"] != log[2]["loss"]


# ---- SIGKILL ----

WORKER = """
import os, signal, sys
import safetensors.torch
from transformers import TrainerCallback
import trl.trainer.rollout_batches as rollout_batches
from tests.trainer.test_online_resume import make_trainer

moment, output_dir = sys.argv[1:]
now = {"step": 0}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Watch(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        now["step"] = state.global_step + 1

    def on_substep_end(self, args, state, control, **kwargs):
        if moment == "inside a step" and now["step"] == 4:
            die()

def save_half(tensors, path, *args, **kwargs):
    content = safetensors.torch.save(tensors)
    half = now["step"] == 4 and moment == "inside the completions"
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2] if half else content)
    if half:
        die()

rollout_batches.save_file = save_half
variant = {"inside a step": "rloo", "inside the completions": "grpo_across"}[moment]
make_trainer(output_dir, variant, callbacks=[Watch()]).train()
"""


@pytest.mark.parametrize(
    ("moment", "variant"),
    [("inside the completions", "grpo_across"), pytest.param("inside a step", "rloo", marks=pytest.mark.slow)],
)
def test_sigkill(tmp_path, uninterrupted, moment, variant):
    _, expected = uninterrupted(variant)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    # As many threads as here: another number sums in another order, and the last bit of a gradient differs.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(
        [sys.executable, str(script), moment, str(tmp_path / "run")],
        cwd=ROOT, env=environment, timeout=300, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    assert Path(get_last_checkpoint(tmp_path / "run")).name == "checkpoint-3"
    assert json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    assert_same_end(resume(tmp_path / "run", variant, True), expected, after=3)


# ---- Two processes ----

DISTRIBUTED_WORKER = """
import json, sys
from pathlib import Path
import torch
from tests.trainer.test_online_resume import assert_same_end, log_of, resume, make_trainer, weights_of

variant, output_dir = sys.argv[1:]
settings = {"ddp_backend": "gloo", "per_device_train_batch_size": 2}
trainer = make_trainer(output_dir + "/whole", variant, **settings)
trainer.train()
expected = log_of(trainer), trainer.sampled, {n: w for n, w in weights_of(trainer).items()}
process, folder = trainer.accelerator.process_index, Path(output_dir, "whole", "checkpoint-5")
assert trainer.accelerator.num_processes == 2
assert all((folder / f"rollouts_{index}.safetensors").is_file() for index in range(2))
trainer = resume(output_dir + "/resumed", variant, str(folder), save_strategy="no", **settings)
assert_same_end(trainer, expected, after=5)

# One process has lost its completions: all sample anew, rather than one waiting for the others.
trainer.accelerator.wait_for_everyone()
if process == 0:
    (folder / "rollouts_1.safetensors").unlink()
trainer.accelerator.wait_for_everyone()
trainer = resume(output_dir + "/lost", variant, str(folder), save_strategy="no", **settings)
assert list(trainer.sampled)[0] == 5
weights = torch.cat([weight.flatten() for weight in weights_of(trainer).values()])
assert (trainer.accelerator.gather(weights[None])[0] == weights).all()
Path(output_dir, f"done_{process}").touch()
"""


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["grpo_four_steps", "grpo_across", "rloo"])
def test_two_processes(tmp_path, variant):
    script = tmp_path / "worker.py"
    script.write_text(DISTRIBUTED_WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*command, variant, str(tmp_path)],
        cwd=ROOT, env=environment, timeout=300, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert all((tmp_path / f"done_{process}").is_file() for process in range(2))
