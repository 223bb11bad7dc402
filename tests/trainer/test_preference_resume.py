"""DPO and KTO, stopped and resumed: the run that was never stopped, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers.trainer_utils import get_last_checkpoint

from ..conftest import build_model
from .preference_helpers import LORA, make_dpo_trainer, make_kto_trainer, make_pairs, make_unpaired
from .test_resume import assert_same_end, log_of, weights_of

ROOT = Path(__file__).parents[2]
STEPS = 7  # of 2 × 2 rows; 10 rows make an epoch of 3 steps, the last one short: the run ends inside the third
VARIANTS = {
    "dpo": ("dpo", {}),
    "dpo_lora": ("dpo", {"peft_config": LoraConfig(**LORA, lora_dropout=0.2)}),
    "dpo_precomputed": ("dpo", {"precompute_ref_log_probs": True, "layout": "shared_prefix"}),
    "dpo_synced": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "dpo_mixed": ("dpo", {"loss_type": ["sigmoid", "sft"], "logging_steps": 3, "layout": "packed"}),
    "kto": ("kto", {}),
    "kto_precomputed": ("kto", {"precompute_ref_log_probs": True}),
}


def make_trainer(output_dir, variant: str, **settings):
    method, own = VARIANTS[variant]
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "model": build_model(attention_dropout=0.2),  # so that a step depends on the state of the random numbers
        "disable_dropout": False,
        **own,
        **settings,
    }
    if method == "dpo":
        return make_dpo_trainer(output_dir, make_pairs(10), **settings)
    return make_kto_trainer(output_dir, make_unpaired(10), **settings)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder, log and weights of the whole run of a variant, with a checkpoint of every step."""
    runs = {}

    def get(variant: str):
        if variant not in runs:
            folder = tmp_path_factory.mktemp(variant)
            trainer = make_trainer(folder, variant)
            trainer.train()
            runs[variant] = folder, log_of(trainer), weights_of(trainer)
        return runs[variant]

    return get


@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_resume(tmp_path, uninterrupted, variant, step):
    folder, log, weights = uninterrupted(variant)
    trainer = make_trainer(tmp_path, variant, save_strategy="no")
    torch.rand(1000)  # a new process is in another state: it has to come from the checkpoint
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_same_end(trainer, (log, weights), after=step)


WORKER = """
import os, signal, sys
from transformers import TrainerCallback
from tests.trainer.test_preference_resume import make_trainer

variant, output_dir = sys.argv[1:]

class Die(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

make_trainer(output_dir, variant, callbacks=[Die()]).train()
"""


@pytest.mark.parametrize("variant", ["dpo_synced", "kto"])
def test_sigkill(tmp_path, uninterrupted, variant):
    _, log, weights = uninterrupted(variant)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    # As many threads as here: another number sums in another order, and the last bit of a gradient differs.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(
        [sys.executable, str(script), variant, str(tmp_path / "run")],
        cwd=ROOT, env=environment, timeout=300, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    assert Path(get_last_checkpoint(tmp_path / "run")).name == "checkpoint-4"
    trainer = make_trainer(tmp_path / "run", variant)
    trainer.train(resume_from_checkpoint=True)
    assert_same_end(trainer, (log, weights))
