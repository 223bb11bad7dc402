"""
The same data, seed and model give the same training, however a step is cut and laid out.

Every case is held against a plain loop that sees one document at a time and knows nothing of batches, padding, packing
or chunks.
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
from torch.nn.functional import log_softmax

from trl import SFTConfig, SFTTrainer

from ..conftest import build_model, build_tokenizer

TOLERANCE = 1e-5
LEARNING_RATE = 1e-2
# Adam divides a gradient by its own size, so a gradient of 1e-9 with rounding noise of 1e-9 would move a weight by the
# whole learning rate in either direction. With this epsilon such gradients move nothing, and weights can be compared.
ADAM_EPSILON = 1e-3
SEED = 11
ROOT = Path(__file__).parents[2]


def make_rows(count: int, shortest: int, longest: int, vocab_size: int = 400) -> list[dict]:
    """Tokenized rows of uneven length, each with its first part untrained, as after a prompt."""
    rng = random.Random(count)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(4, vocab_size) for _ in range(rng.randint(shortest, longest))]
        prompt = rng.randint(0, len(ids) // 2)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


ROWS = make_rows(12, shortest=4, longest=30)
LAYOUTS = {
    "padded": {"max_length": None},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 48},
}
# (rows per micro-batch, micro-batches per step): whole batch, even cut, one row at a time, and a shorter last one.
CUTS = [(12, 1), (4, 3), (1, 12), (5, 3)]


def build_lora_model():
    model = get_peft_model(
        build_model(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        if parameter.requires_grad:  # LoRA's second factor starts at zero: give both a gradient from the first step
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


# ---- The plain loop ----


def document_loss(model, document: dict, loss_type: str) -> tuple[torch.Tensor, int]:
    ids, labels = torch.tensor([document["input_ids"]]), torch.tensor(document["labels"])[1:]
    trained = labels != -100
    if not trained.any():
        return torch.zeros(()), 0
    logps = log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], dim=-1)[trained]
    logps = logps.gather(-1, labels[trained, None])
    weights = logps.detach().exp() if loss_type == "dft" else 1.0
    return -(weights * logps).sum(), int(trained.sum())


def plain_training(steps: list[list[dict]], model=None, loss_type: str = "nll") -> tuple[list[float], dict]:
    """Train on `steps`, each a list of documents; returns the losses and the trained weights."""
    model = build_model() if model is None else model
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, eps=ADAM_EPSILON, weight_decay=0.0)
    losses = []
    for documents in steps:
        results = [document_loss(model, document, loss_type) for document in documents]
        loss = sum(loss for loss, _ in results) / sum(count for _, count in results)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, trained_weights(model)


def trained_weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


# ---- The trainer ----


def make_trainer(output_dir, rows: list[dict], model=None, **settings) -> SFTTrainer:
    settings = {
        "output_dir": str(output_dir),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": SEED,
        "num_train_epochs": 3,
        "learning_rate": LEARNING_RATE,
        "adam_epsilon": ADAM_EPSILON,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **settings,
    }
    tokenizer = settings.pop("processing_class", None) or build_tokenizer()
    eval_rows = settings.pop("eval_rows", None)
    return SFTTrainer(
        model=build_model() if model is None else model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=tokenizer,
    )


def train(output_dir, rows: list[dict], model=None, **settings) -> tuple[list[float], dict]:
    trainer = make_trainer(output_dir, rows, model, **settings)
    trainer.train()
    return step_losses(trainer), trained_weights(trainer.model)


def step_losses(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_training(actual: tuple[list[float], dict], expected: tuple[list[float], dict]) -> None:
    losses, weights = actual
    expected_losses, expected_weights = expected
    assert losses == pytest.approx(expected_losses, abs=TOLERANCE)
    assert losses[-1] < losses[0] - 0.01, "the runs agree, but nothing was learnt"
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], atol=TOLERANCE, rtol=0, msg=name)


def set_chunk_size(monkeypatch, size: int) -> None:
    for module in ("head", "scoring"):
        monkeypatch.setattr(f"trl.ops.{module}.default_chunk_size", lambda vocab_size, device: size)


@pytest.fixture(scope="module")
def expected():
    """Three steps, each over all rows."""
    return plain_training([ROWS] * 3)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("cut", CUTS, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuts_and_layouts_agree(tmp_path, expected, layout, cut, checkpointing):
    """Micro-batch × accumulation, padding or packing, activations kept or recomputed: the same training."""
    batch_size, accumulation = cut
    actual = train(
        tmp_path,
        ROWS,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        **LAYOUTS[layout],
    )
    assert_same_training(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eager_attention_agrees(tmp_path, expected, layout):
    """Packed documents stay apart under eager attention too; the other cases use sdpa."""
    model = build_model()
    model.set_attn_implementation("eager")
    actual = train(
        tmp_path, ROWS, model, per_device_train_batch_size=4, gradient_accumulation_steps=3, **LAYOUTS[layout]
    )
    assert_same_training(actual, expected)


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunk_sizes_agree(tmp_path, expected, monkeypatch, layout, size):
    """How many tokens are projected to the vocabulary at a time does not show."""
    set_chunk_size(monkeypatch, size)
    actual = train(tmp_path, ROWS, per_device_train_batch_size=4, gradient_accumulation_steps=3, **LAYOUTS[layout])
    assert_same_training(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_over_parts_of_the_data(tmp_path, layout):
    """Steps of several rows in random order, the last of an epoch short; the plain loop gets the same documents."""
    trainer = make_trainer(
        tmp_path,
        make_rows(22, shortest=4, longest=30),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        data_seed=5,
        num_train_epochs=2,
        **LAYOUTS[layout],
    )
    prepared = list(trainer.train_dataset)
    trainer.train()

    steps = []
    for epoch in range(2):
        order = torch.randperm(len(prepared), generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        for start in range(0, len(order), 4):
            steps.append([doc for i in order[start : start + 4] for doc in split_documents(prepared[i])])
    expected_losses, expected_weights = plain_training(steps)
    assert len(steps) > 4
    assert step_losses(trainer) == pytest.approx(expected_losses, abs=TOLERANCE)
    for name, weight in trained_weights(trainer.model).items():
        torch.testing.assert_close(weight, expected_weights[name], atol=TOLERANCE, rtol=0, msg=name)


def split_documents(row: dict) -> list[dict]:
    """The documents of a packed row; a row that is not packed is one document."""
    documents, start = [], 0
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        stop = start + length
        documents.append({"input_ids": row["input_ids"][start:stop], "labels": row["labels"][start:stop]})
        start = stop
    return documents


@pytest.mark.parametrize("cut", CUTS[1:3], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_truncated_rows(tmp_path, packing, cut):
    """`max_length` cuts a row at the same place in every layout; a row left without a trained token drops out."""
    batch_size, accumulation = cut
    limit = 16
    short = [{name: values[:limit] for name, values in row.items()} for row in ROWS]
    unlabelled = {"input_ids": list(range(10, 30)), "labels": [-100] * 18 + [28, 29]}
    actual = train(
        tmp_path,
        [*ROWS, unlabelled],
        max_length=limit,
        packing=packing,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation + 1,
    )
    assert any(len(row["input_ids"]) > limit for row in ROWS)
    assert_same_training(actual, plain_training([short] * 3))


@pytest.mark.parametrize("cut", CUTS[1:3], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora(tmp_path, layout, cut):
    batch_size, accumulation = cut
    actual = train(
        tmp_path,
        ROWS,
        build_lora_model(),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=batch_size == 1,
        **LAYOUTS[layout],
    )
    assert_same_training(actual, plain_training([ROWS] * 3, build_lora_model()))


@pytest.mark.parametrize("cut", CUTS[1:3], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dft(tmp_path, monkeypatch, layout, cut):
    set_chunk_size(monkeypatch, 7)
    batch_size, accumulation = cut
    losses, weights = train(
        tmp_path,
        ROWS,
        loss_type="dft",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **LAYOUTS[layout],
    )
    expected_losses, expected_weights = plain_training([ROWS] * 3, loss_type="dft")
    assert losses == pytest.approx(expected_losses, abs=TOLERANCE)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], atol=TOLERANCE, rtol=0, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_micro_batch_without_trained_token_in_a_step_that_has_some(tmp_path, layout):
    """Such a row adds nothing to the sum and nothing to the count."""
    unlabelled = {"input_ids": list(range(10, 30)), "labels": [-100] * 20}
    settings = {**LAYOUTS[layout], "dataset_kwargs": {"skip_prepare_dataset": True}}
    rows = [*ROWS, unlabelled]
    if layout == "packed":
        rows = [{**row, "seq_lengths": [len(row["input_ids"])]} for row in rows]
    actual = train(tmp_path, rows, per_device_train_batch_size=1, gradient_accumulation_steps=13, **settings)
    assert_same_training(actual, plain_training([ROWS] * 3))


# Flex attention is compiled, which takes a while, and has no backward pass on a CPU.
@pytest.mark.parametrize("attention", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_loss_is_the_same(tmp_path, layout, attention):
    """The mean over all trained tokens of the evaluation data, for any batch size and layout."""
    with torch.no_grad():
        results = [document_loss(build_model(), row, "nll") for row in ROWS]
    expected = sum(loss.item() for loss, _ in results) / sum(count for _, count in results)
    model = build_model()
    model.set_attn_implementation(attention)
    for batch_size in (1, 5, 12):
        trainer = make_trainer(
            tmp_path, ROWS, model, eval_rows=ROWS, per_device_eval_batch_size=batch_size, **LAYOUTS[layout]
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=TOLERANCE)


def test_a_step_with_no_trained_token_is_an_error_that_names_the_rows(tmp_path):
    """Never a loss of 0, which would look like success."""
    tokenizer = build_tokenizer()
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in ("the sky is blue", "the sea is deep")]
    rows = [{**row, "labels": [-100] * len(row["input_ids"])} for row in rows]
    trainer = make_trainer(
        tmp_path,
        rows,
        per_device_train_batch_size=2,
        dataset_kwargs={"skip_prepare_dataset": True},
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match=r"(?s)step 1.*(the sky is blue.*the sea is deep|the sea.*the sky)"):
        trainer.train()
    assert step_losses(trainer) == []


def test_data_without_any_trained_token_is_refused_at_once(tmp_path):
    rows = [{"input_ids": row["input_ids"], "labels": [-100] * len(row["input_ids"])} for row in ROWS]
    with pytest.raises(ValueError, match="(?i)train"):
        make_trainer(tmp_path, rows, max_length=64)


# ---- Two processes ----

WORKER = """
import json, sys
import torch
from tests.trainer.test_invariants import LAYOUTS, ROWS, make_trainer, step_losses, trained_weights

layout, batch_size, accumulation, evaluate_first, output = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
settings = dict(
    LAYOUTS[layout], per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
    per_device_eval_batch_size=batch_size,
)
eval_rows = ROWS[:int(sys.argv[6])]
trainer = make_trainer(output, ROWS, eval_rows=eval_rows, eval_packing=False, **settings)
if evaluate_first:
    trainer.evaluate()
trainer.train()
tokens = trainer.state.log_history[-2]["num_tokens"]
eval_loss = trainer.evaluate()["eval_loss"]
torch.save(trained_weights(trainer.model), f"{output}/weights_{trainer.args.process_index}.pt")
if trainer.is_world_process_zero():
    with open(f"{output}/result.json", "w") as file:
        json.dump({
            "losses": step_losses(trainer), "processes": trainer.accelerator.num_processes, "eval_loss": eval_loss,
            "tokens": tokens,
        }, file)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "cut", "evaluate_first", "eval_rows"),
    [
        ("padded", (2, 3), False, 12),
        # Evaluating prepares the model too, which must not keep it from being wrapped for training.
        ("padded", (6, 1), True, 12),
        # The last evaluation batch is filled up with rows that were seen already.
        ("padded", (2, 3), False, 10),
        ("padding_free", (3, 2), False, 12),
        ("padding_free", (3, 2), False, 7),
        ("packed", (1, 3), False, 12),
    ],
)
def test_two_processes_agree(tmp_path, expected, layout, cut, evaluate_first, eval_rows):
    """Two processes of half the rows each: the counts are over both, so the losses and weights are those of one."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*command, layout, *map(str, cut), str(int(evaluate_first)), str(tmp_path), str(eval_rows)],
        cwd=ROOT,
        env=environment,
        timeout=300,
        check=False,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processes"] == 2
    assert result["tokens"] == 3 * sum(len(row["input_ids"]) for row in ROWS)
    model = build_model()
    for process in range(2):
        weights = torch.load(tmp_path / f"weights_{process}.pt", weights_only=True)
        assert_same_training((result["losses"], weights), expected)
        model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        results = [document_loss(model, row, "nll") for row in ROWS[:eval_rows]]
    mean = sum(loss.item() for loss, _ in results) / sum(count for _, count in results)
    assert result["eval_loss"] == pytest.approx(mean, abs=2 * TOLERANCE)
