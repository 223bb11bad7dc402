"""
A run that was stopped, at whatever moment and however rudely, and resumed is the run that was never stopped.

Losses are compared bit for bit, weights with `torch.equal`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

import trl.trainer.checkpointing
from trl import SFTConfig, SFTTrainer

from ..conftest import build_model, build_tokenizer

ROOT = Path(__file__).parents[2]
STEPS = 7  # of 2 × 2 rows; 10 rows make an epoch of 3 steps, the last one short: the run ends inside the third
WORDS = ["the sky is blue", "the sea is deep", "what is 12 plus 30?", "sort 3, 1, 2:", "hello world, how are you?"]
TEXTS = [" ".join([WORDS[i % 5]] * (1 + i % 3)) + f" {i}" for i in range(10)]

VARIANTS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 32, "per_device_train_batch_size": 1, "shuffle_dataset": True},
    "lora": {"peft_config": LoraConfig(r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"])},
    "stream": {"stream": True},
    "averaged_logs": {"logging_steps": 3},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


def make_trainer(output_dir, stream: bool = False, peft_config=None, callbacks=None, **settings) -> SFTTrainer:
    settings = {
        "output_dir": str(output_dir),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **settings,
    }
    rows = [{"text": text} for text in TEXTS]
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)
    return SFTTrainer(
        model=build_model(attention_dropout=0.2),  # so that a step depends on the state of the random numbers
        args=SFTConfig(**settings),
        train_dataset=dataset,
        processing_class=build_tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


TIMINGS = ("runtime", "per_second", "total_flos", "step_time")


def log_of(trainer: SFTTrainer) -> dict[int, dict]:
    """The training log by step, the values that a clock made left out."""
    return {
        entry["step"]: {key: value for key, value in entry.items() if not key.endswith(TIMINGS)}
        for entry in trainer.state.log_history
        if "loss" in entry
    }


def weights_of(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def resume(output_dir, checkpoint: str | bool, **settings) -> SFTTrainer:
    trainer = make_trainer(output_dir, **settings)
    torch.rand(1000), random.random()  # a new process is in another state: it has to come from the checkpoint
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def assert_same_end(trainer: SFTTrainer, expected: tuple[dict, dict], after: int = 0) -> None:
    log, weights = expected
    assert trainer.state.global_step == STEPS
    resumed_log = log_of(trainer)
    assert resumed_log.keys() == log.keys()
    for step in log:
        if step > after:
            assert resumed_log[step] == log[step], step
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, weights[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder, log and weights of the whole run of a variant, with a checkpoint of every step."""
    runs = {}

    def get(variant: str):
        if variant not in runs:
            folder = tmp_path_factory.mktemp(variant)
            trainer = make_trainer(folder, **VARIANTS[variant])
            trainer.train()
            runs[variant] = folder, log_of(trainer), weights_of(trainer)
        return runs[variant]

    return get


@pytest.fixture
def expected(uninterrupted):
    _, log, weights = uninterrupted("padded")
    return log, weights


# ---- Stopped between two steps ----


@pytest.mark.parametrize(
    ("variant", "step"),
    [("padded", step) for step in range(1, STEPS)]
    + [(variant, step) for variant in VARIANTS if variant != "padded" for step in (2, 4)],
)
def test_resume_from_any_step(tmp_path, uninterrupted, variant, step):
    folder, log, weights = uninterrupted(variant)
    trainer = resume(tmp_path, str(folder / f"checkpoint-{step}"), save_strategy="no", **VARIANTS[variant])
    assert_same_end(trainer, (log, weights), after=step)


def test_the_run_depends_on_what_is_restored(tmp_path, uninterrupted):
    """The comparison above can fail: without the checkpoint's random numbers the run goes another way."""
    folder, log, _ = uninterrupted("padded")
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(folder / "checkpoint-3", checkpoint)
    (checkpoint / "rng_state.pth").unlink()
    trainer = resume(tmp_path / "out", str(checkpoint), save_strategy="no")
    assert log_of(trainer)[5]["loss"] != log[5]["loss"]


def test_stop_twice(tmp_path, expected):
    """Each time at another step, the second time in a resumed run."""

    class StopAt(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == self.step

    make_trainer(tmp_path, callbacks=[StopAt(2)]).train()
    first = resume(tmp_path, True, callbacks=[StopAt(5)])
    assert first.state.global_step == 5
    assert_same_end(resume(tmp_path, True), expected)


# ---- Stopped while a checkpoint is written ----


class Killed(BaseException):
    """Not an Exception, so that nothing on the way handles it."""


def die_at(monkeypatch, owner, name: str, step: int, folder) -> None:
    """Let `owner.name` never be reached while the checkpoint of `step` is written."""
    real = getattr(owner, name)

    def dying(*args, **kwargs):
        written = [*folder.glob(f"*/checkpoint-{step}"), *folder.glob(f"checkpoint-{step}")]
        if written:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (SFTTrainer, "_save_optimizer_and_scheduler"),
        (SFTTrainer, "_save_rng_state"),
        (torch, "save"),
        (trl.trainer.checkpointing.json, "dump"),
        (trl.trainer.checkpointing.os, "replace"),
    ],
    ids=["weights written", "optimizer written", "in torch.save", "state written", "all written, not published"],
)
def test_killed_while_saving(tmp_path, monkeypatch, expected, owner, name):
    with monkeypatch.context() as patch:
        die_at(patch, owner, name, step=4, folder=tmp_path)
        with pytest.raises(Killed):
            make_trainer(tmp_path).train()
    assert Path(get_last_checkpoint(tmp_path)).name == "checkpoint-3"
    trainer = resume(tmp_path, True)
    assert_same_end(trainer, expected)
    assert get_last_checkpoint(tmp_path).endswith(f"checkpoint-{STEPS}")
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == [
        f"checkpoint-{i}" for i in range(1, STEPS + 1)
    ]


def test_killed_while_removing_old_checkpoints(tmp_path, monkeypatch, expected):
    """With `save_total_limit=1` the new checkpoint stands before the old one goes."""

    def half_removed(path, *args, **kwargs):
        if path.endswith("checkpoint-3"):
            (Path(path) / "trainer_state.json").unlink()
            raise Killed
        remove(path, *args, **kwargs)

    remove = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half_removed)
        with pytest.raises(Killed):
            make_trainer(tmp_path, save_total_limit=1).train()
    assert_same_end(resume(tmp_path, True, save_total_limit=1), expected)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


@pytest.mark.parametrize("missing", ["trainer_state.json", "optimizer.pt", "model.safetensors"])
def test_an_incomplete_folder_is_not_picked(tmp_path, uninterrupted, expected, missing):
    """Left by another tool, or by a copy that was cut: the last whole checkpoint is taken, and the user told."""
    folder, _, _ = uninterrupted("padded")
    for step in (2, 4):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-4" / missing).unlink()
    starts = []

    class Record(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            starts.append(state.global_step)

    trainer = resume(tmp_path, True, callbacks=[Record()])
    assert starts == [2]
    assert_same_end(trainer, expected)


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="checkpoint-9"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


# ---- SIGKILL ----

WORKER = """
import io, os, signal, sys
import safetensors.torch, torch, transformers.modeling_utils
from transformers import TrainerCallback
from tests.trainer.test_resume import make_trainer

moment, output_dir = sys.argv[1:]
now = {"step": 0}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Watch(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        now["step"] = state.global_step + 1

    def on_substep_end(self, args, state, control, **kwargs):
        if moment == "inside a step" and now["step"] == 5:
            die()

torch_save, safe_save = torch.save, transformers.modeling_utils.safe_save_file

def save_half(value, path, *args, **kwargs):
    if moment == "inside optimizer.pt" and now["step"] == 5 and str(path).endswith("optimizer.pt"):
        buffer = io.BytesIO()
        torch_save(value, buffer)
        with open(path, "wb") as file:
            file.write(buffer.getvalue()[: buffer.tell() // 2])
        die()
    torch_save(value, path, *args, **kwargs)

def safe_save_half(tensors, path, *args, **kwargs):
    if moment == "inside the weights" and now["step"] == 5:
        content = safetensors.torch.save(tensors)
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        die()
    safe_save(tensors, path, *args, **kwargs)

torch.save = save_half
transformers.modeling_utils.safe_save_file = safe_save_half
make_trainer(output_dir, callbacks=[Watch()]).train()
"""
MOMENTS = ["inside a step", "inside optimizer.pt", "inside the weights"]


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    """One process for each moment, which kills itself there."""
    script = tmp_path_factory.mktemp("worker") / "worker.py"
    script.write_text(WORKER)
    # As many threads as here: another number sums in another order, and the last bit of a gradient differs.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    folders = {moment: tmp_path_factory.mktemp("killed") for moment in MOMENTS}
    processes = {
        moment: subprocess.Popen(
            [sys.executable, str(script), moment, str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for moment, folder in folders.items()
    }
    for process in processes.values():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, errors[-4000:]
    return folders


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigkill(killed_runs, expected, moment):
    folder = killed_runs[moment]
    assert Path(get_last_checkpoint(folder)).name == "checkpoint-4"
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert_same_end(resume(folder, True), expected)
