"""
The same pairs, seed and model give the same reward model, however a step is cut; and a run that was stopped and resumed
is the run that was never stopped.

Every cut is held against a plain loop that sees one answer at a time and knows nothing of batches or padding.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback

from trl import RewardTrainer

from .test_invariants import ADAM_EPSILON, CUTS, SEED, TOLERANCE, assert_same_training, trained_weights
from .test_resume import STEPS, assert_same_end, weights_of
from .test_resume import log_of as steps_of
from .test_reward_trainer import build_reward_model, log_of
from .test_reward_trainer import make_trainer as make_reward_trainer

ROOT = Path(__file__).parents[2]
LEARNING_RATE = 2e-3
CENTERING = 0.05


def make_rows(count: int) -> list[dict]:
    """Tokenized pairs of uneven length with uneven margins; the better answer has another vocabulary."""
    rng = random.Random(count)
    rows = []
    for _ in range(count):
        prompt = [rng.randrange(4, 400) for _ in range(rng.randint(1, 8))]
        chosen, rejected = (
            [rng.randrange(*span) for _ in range(rng.randint(2, 14))] for span in ((4, 250), (150, 400))
        )
        rows.append({"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "margin": rng.random()})
    return rows


ROWS = make_rows(12)


def build_lora_model():
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(build_reward_model(), config)
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # LoRA's second factor starts at zero: give both a gradient from the first step
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


# ---- The plain loop ----


def pair_loss(model, row: dict) -> torch.Tensor:
    chosen, rejected = (model(torch.tensor([row[side]])).logits.squeeze() for side in ("chosen_ids", "rejected_ids"))
    return -logsigmoid(chosen - rejected - row["margin"]) + CENTERING * (chosen + rejected) ** 2


def plain_training(steps: list[list[dict]], model=None) -> tuple[list[float], dict]:
    model = build_reward_model() if model is None else model
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, eps=ADAM_EPSILON, weight_decay=0.0)
    losses = []
    for rows in steps:
        loss = sum(pair_loss(model, row) for row in rows) / len(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, trained_weights(model)


# ---- The trainer ----


def make_trainer(output_dir, rows: list[dict], **settings) -> RewardTrainer:
    settings = {
        "seed": SEED,
        "max_steps": -1,
        "num_train_epochs": 3,
        "learning_rate": LEARNING_RATE,
        "adam_epsilon": ADAM_EPSILON,
        "lr_scheduler_type": "constant",
        "center_rewards_coefficient": CENTERING,
        **settings,
    }
    if settings.get("eval_dataset"):
        settings["eval_dataset"] = Dataset.from_list(settings["eval_dataset"])
    return make_reward_trainer(output_dir, data=Dataset.from_list(rows), **settings)


def train(output_dir, rows: list[dict], **settings) -> tuple[list[float], dict]:
    trainer = make_trainer(output_dir, rows, **settings)
    trainer.train()
    return log_of(trainer), trained_weights(trainer.model)


@pytest.fixture(scope="module")
def expected():
    """Three steps, each over all pairs."""
    return plain_training([ROWS] * 3)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("cut", CUTS, ids="{0[0]}x{0[1]}".format)
def test_cuts_agree(tmp_path, expected, cut, checkpointing):
    """Micro-batch × accumulation (the last micro-batch shorter), activations kept or recomputed: the same training."""
    actual = train(
        tmp_path,
        ROWS,
        per_device_train_batch_size=cut[0],
        gradient_accumulation_steps=cut[1],
        gradient_checkpointing=checkpointing,
    )
    assert_same_training(actual, expected)


@pytest.mark.parametrize("cut", CUTS[1:], ids="{0[0]}x{0[1]}".format)
def test_lora(tmp_path, cut):
    actual = train(
        tmp_path,
        ROWS,
        model=build_lora_model(),
        per_device_train_batch_size=cut[0],
        gradient_accumulation_steps=cut[1],
        gradient_checkpointing=cut[0] == 1,
    )
    assert_same_training(actual, plain_training([ROWS] * 3, build_lora_model()))


def test_eager_attention_agrees(tmp_path, expected):
    model = build_reward_model()
    model.set_attn_implementation("eager")
    actual = train(tmp_path, ROWS, model=model, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert_same_training(actual, expected)


def test_steps_over_parts_of_the_data(tmp_path):
    """Steps of several pairs in random order, the last of an epoch short."""
    rows = make_rows(11)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "data_seed": 5}
    losses, weights = train(tmp_path, rows, num_train_epochs=2, **settings)
    steps = []
    for epoch in range(2):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        steps += [[rows[i] for i in order[start : start + 4]] for start in range(0, len(order), 4)]
    expected_losses, expected_weights = plain_training(steps)
    assert losses == pytest.approx(expected_losses, abs=TOLERANCE)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], atol=TOLERANCE, rtol=0, msg=name)


# ---- Several processes ----

WORKER = """
import json, sys
import torch
from tests.trainer.test_reward_invariants import ROWS, log_of, make_trainer, trained_weights

batch_size, accumulation, eval_rows = map(int, sys.argv[1:4])
output = sys.argv[4]
settings = dict(
    per_device_train_batch_size=batch_size,
    gradient_accumulation_steps=accumulation,
    per_device_eval_batch_size=batch_size,
)
trainer = make_trainer(output, ROWS, eval_dataset=ROWS[:eval_rows], **settings)
trainer.train()
tokens = log_of(trainer, "num_tokens")[-1]
metrics = trainer.evaluate()
torch.save(trained_weights(trainer.model), f"{output}/weights_{trainer.args.process_index}.pt")
if trainer.is_world_process_zero():
    with open(f"{output}/result.json", "w") as file:
        json.dump({
            "losses": log_of(trainer), "processes": trainer.accelerator.num_processes, "tokens": tokens, **metrics
        }, file)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "eval_rows"), [((2, 3), 12), ((6, 1), 7), ((3, 2), 1)])
def test_two_processes_agree(tmp_path, expected, cut, eval_rows):
    """Two processes of half the rows each: the pairs are counted over both, and rows that fill a batch do not count."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    finished = subprocess.run(
        [*command, *map(str, cut), str(eval_rows), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processes"] == 2
    assert result["tokens"] == 3 * sum(len(row[side]) for row in ROWS for side in ("chosen_ids", "rejected_ids"))
    model = build_reward_model()
    for process in range(2):
        weights = torch.load(tmp_path / f"weights_{process}.pt", weights_only=True)
        assert_same_training((result["losses"], weights), expected)
        model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        mean = sum(pair_loss(model, row).item() for row in ROWS[:eval_rows]) / eval_rows
    assert result["eval_loss"] == pytest.approx(mean, abs=2 * TOLERANCE)
    assert 0 <= result["eval_accuracy"] * eval_rows == pytest.approx(round(result["eval_accuracy"] * eval_rows))


# ---- Resume ----

VARIANTS = {
    "full": {},
    "lora": {
        "peft_config": LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.2, target_modules=["q_proj", "v_proj"])
    },
    "averaged_logs": {"logging_steps": 3},
}


def make_resumable(output_dir, **settings) -> RewardTrainer:
    settings = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_dropout": False,
        **settings,
    }
    # Dropout, so that a step depends on the state of the random numbers.
    return make_trainer(output_dir, ROWS[:10], model=build_reward_model(attention_dropout=0.2), **settings)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    runs = {}

    def get(variant: str):
        if variant not in runs:
            folder = tmp_path_factory.mktemp(variant)
            trainer = make_resumable(folder, **VARIANTS[variant])
            trainer.train()
            runs[variant] = folder, steps_of(trainer), weights_of(trainer)
        return runs[variant]

    return get


def resume(output_dir, checkpoint: str | bool, **settings) -> RewardTrainer:
    trainer = make_resumable(output_dir, **settings)
    torch.rand(1000), random.random()  # a new process is in another state: it has to come from the checkpoint
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


@pytest.mark.parametrize(
    ("variant", "step"),
    [
        *(("full", step) for step in range(1, STEPS)),
        ("lora", 2),
        ("lora", 4),
        ("averaged_logs", 2),
        ("averaged_logs", 4),
    ],
)
def test_resume_from_any_step(tmp_path, uninterrupted, variant, step):
    """Losses, metrics and weights, bit for bit."""
    folder, log, weights = uninterrupted(variant)
    trainer = resume(tmp_path, str(folder / f"checkpoint-{step}"), save_strategy="no", **VARIANTS[variant])
    assert all({"accuracy", "margin", "num_tokens"} <= entry.keys() for entry in steps_of(trainer).values())
    assert_same_end(trainer, (log, weights), after=step)


def test_stopped_in_the_middle(tmp_path, uninterrupted):
    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    _, log, weights = uninterrupted("full")
    make_resumable(tmp_path, callbacks=[StopAt()]).train()
    assert_same_end(resume(tmp_path, True), (log, weights))
