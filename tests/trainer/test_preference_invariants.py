"""
DPO and KTO: the same data, seed and model give the same training, however a step is cut and laid out.

Every case is held against a plain loop that sees one completion at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

from ..conftest import build_model
from .preference_helpers import build_lora_model, make_dpo_trainer, make_kto_trainer, make_pairs, make_unpaired
from .test_invariants import (
    ADAM_EPSILON,
    LEARNING_RATE,
    assert_same_training,
    set_chunk_size,
    step_losses,
    trained_weights,
)

BETA = 0.5
STEPS = 3
ROOT = Path(__file__).parents[2]
PAIRS = make_pairs(6, seed=2)
ROWS = make_unpaired(6, seed=2)
LAYOUTS = ["padded", "packed", "shared_prefix", "auto"]
# (rows per micro-batch, micro-batches per step): all, even cuts, and a shorter last one.
DPO_CUTS = [(6, 1), (2, 3), (1, 6), (4, 2)]
KTO_CUTS = [(6, 1), (2, 3), (3, 2), (4, 2)]
SETTINGS = {
    "num_train_epochs": STEPS,
    "learning_rate": LEARNING_RATE,
    "adam_epsilon": ADAM_EPSILON,
    "lr_scheduler_type": "constant",
    "beta": BETA,
    "train_sampling_strategy": "sequential",
}


# ---- The plain loops ----


def logps(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + completion])
    values = log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], dim=-1)
    return values.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def dpo_loss(model, reference) -> torch.Tensor:
    losses = []
    for pair in PAIRS:
        with torch.no_grad():
            ref = [logps(reference, pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids")]
        policy = [logps(model, pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids")]
        losses.append(-logsigmoid(BETA * ((policy[0] - ref[0]) - (policy[1] - ref[1]))))
    return torch.stack(losses).mean()


def kto_loss(model, reference) -> torch.Tensor:
    with torch.no_grad():
        drifts = [
            logps(model, row["prompt_ids"], other["completion_ids"])
            - logps(reference, row["prompt_ids"], other["completion_ids"])
            for row, other in zip(ROWS, [ROWS[-1], *ROWS[:-1]], strict=True)
        ]
    kl = torch.stack(drifts).mean().clamp(min=0)
    losses = []
    for row in ROWS:
        with torch.no_grad():
            ref = logps(reference, row["prompt_ids"], row["completion_ids"])
        ratio = logps(model, row["prompt_ids"], row["completion_ids"]) - ref
        losses.append(1 - torch.sigmoid(BETA * (ratio - kl if row["label"] else kl - ratio)))
    return torch.stack(losses).mean()


def plain_training(loss_of, model=None) -> tuple[list[float], dict]:
    model, reference = model or build_model(), build_model()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, eps=ADAM_EPSILON, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, reference)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, trained_weights(model)


@pytest.fixture(scope="module")
def expected_dpo():
    return plain_training(dpo_loss)


@pytest.fixture(scope="module")
def expected_kto():
    return plain_training(kto_loss)


def train_dpo(output_dir, **settings):
    trainer = make_dpo_trainer(output_dir, PAIRS, **{**SETTINGS, **settings})
    trainer.train()
    return step_losses(trainer), trained_weights(trainer.model)


def train_kto(output_dir, **settings):
    trainer = make_kto_trainer(output_dir, ROWS, **{**SETTINGS, **settings})
    trainer.train()
    return step_losses(trainer), trained_weights(trainer.model)


# ---- One process ----


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("cut", DPO_CUTS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dpo_cuts_and_layouts_agree(tmp_path, expected_dpo, layout, cut, checkpointing):
    actual = train_dpo(
        tmp_path,
        layout=layout,
        per_device_train_batch_size=cut[0],
        gradient_accumulation_steps=cut[1],
        gradient_checkpointing=checkpointing,
    )
    assert_same_training(actual, expected_dpo)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("cut", KTO_CUTS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kto_cuts_and_layouts_agree(tmp_path, expected_kto, layout, cut, checkpointing):
    actual = train_kto(
        tmp_path,
        layout=layout,
        per_device_train_batch_size=cut[0],
        gradient_accumulation_steps=cut[1],
        gradient_checkpointing=checkpointing,
    )
    assert_same_training(actual, expected_kto)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunk_sizes_agree(tmp_path, expected_dpo, expected_kto, monkeypatch, layout, size):
    set_chunk_size(monkeypatch, size)
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert_same_training(train_dpo(tmp_path / "dpo", layout=layout, **cut), expected_dpo)
    assert_same_training(train_kto(tmp_path / "kto", layout=layout, **cut), expected_kto)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_precomputed_and_padding_free_agree(tmp_path, expected_dpo, layout):
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "precompute_ref_log_probs": True}
    settings = {"padding_free": True} if layout == "packed" else {"layout": layout}
    assert_same_training(train_dpo(tmp_path, **settings, **cut), expected_dpo)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_agree(tmp_path, layout, attention):
    """An adapter that came along, whose frozen copy is the reference: the first loss is ln 2, and layouts agree."""

    def run(layout: str):
        model = build_lora_model()
        model.set_attn_implementation(attention)
        return train_dpo(
            tmp_path / layout, model=model, layout=layout, per_device_train_batch_size=2,
            gradient_accumulation_steps=3, gradient_checkpointing=True,
        )  # fmt: skip

    assert_same_training(run(layout), run("padded"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncated_rows_agree(tmp_path, layout):
    """Rows cut at `max_length`, from either end."""
    for mode in ("keep_start", "keep_end"):

        def run(layout: str, mode: str = mode):
            with pytest.warns(FutureWarning) if mode == "keep_end" else _nothing():
                return train_dpo(
                    tmp_path / layout / mode, layout=layout, max_length=12, truncation_mode=mode,
                    per_device_train_batch_size=3,
                )  # fmt: skip

        assert_same_training(run(layout), run("padded"))


def _nothing():
    import contextlib

    return contextlib.nullcontext()


# ---- Two processes ----

WORKER = """
import json, sys
from pathlib import Path
import torch
from tests.trainer.test_preference_invariants import SETTINGS, PAIRS, ROWS, make_dpo_trainer, make_kto_trainer, step_losses, trained_weights
from datasets import Dataset

method, layout, batch_size, accumulation, output_dir, sharded = sys.argv[1:]
if sharded == "fsdp2":
    # Accelerate leaves CPU processes out of FSDP, so they go by another name.
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    plain_init = PartialState.__init__

    def init(self, *args, **kwargs):
        plain_init(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init
    SETTINGS |= {"fsdp": "full_shard auto_wrap", "fsdp_config": {
        "version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT",
    }}
make, rows = {"dpo": (make_dpo_trainer, PAIRS), "kto": (make_kto_trainer, ROWS)}[method]
trainer = make(
    output_dir, rows, layout=layout, per_device_train_batch_size=int(batch_size),
    gradient_accumulation_steps=int(accumulation), per_device_eval_batch_size=2, ddp_backend="gloo",
    eval_dataset=Dataset.from_list(rows[:5]), **SETTINGS,
)
trainer.train()
process = trainer.accelerator.process_index
weights = trained_weights(trainer.accelerator.unwrap_model(trainer.model))
assert all(hasattr(value, "full_tensor") == (sharded == "fsdp2") for value in weights.values())
weights = {name: value.full_tensor() if sharded == "fsdp2" else value for name, value in weights.items()}
torch.save(weights, f"{output_dir}/weights_{process}.pt")
metrics = trainer.evaluate()
if process == 0:
    Path(output_dir, "result.json").write_text(json.dumps({
        "processes": trainer.accelerator.num_processes, "losses": step_losses(trainer), "eval": metrics,
    }))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "layout", "cut", "sharded"),
    [
        ("dpo", "padded", (3, 1), "no"),
        ("dpo", "shared_prefix", (1, 3), "no"),
        ("dpo", "auto", (3, 1), "fsdp2"),
        ("kto", "auto", (3, 1), "no"),
        ("kto", "auto", (3, 1), "fsdp2"),
    ],
)
def test_two_processes_agree(tmp_path, expected_dpo, expected_kto, method, layout, cut, sharded):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    finished = subprocess.run(
        [*command, method, layout, *map(str, cut), str(tmp_path), sharded],
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
    expected = expected_dpo if method == "dpo" else expected_kto
    for process in range(2):
        weights = torch.load(tmp_path / f"weights_{process}.pt", weights_only=True)
        assert_same_training((result["losses"], weights), expected)
    if method == "dpo":  # five pairs over two processes of two: one is filled up, and does not count
        model = build_model()
        model.load_state_dict(weights, strict=False)
        trainer = make_dpo_trainer(tmp_path / "one", PAIRS[:5], model=model, ref_model=build_model(), **SETTINGS)
        one = trainer.evaluate(trainer.train_dataset)
        for key in ("eval_loss", "eval_rewards/accuracies", "eval_logps/chosen", "eval_entropy"):
            assert result["eval"][key] == pytest.approx(one[key], abs=1e-4), key
