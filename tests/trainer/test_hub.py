"""
Pushing to the Hub, for real: a trainer pushes over HTTP to a server on loopback, and what arrived is loaded back.

`huggingface_hub` reads its environment when it is imported, so the trainings run in one worker process that was
started with the server's address; the server, and the faults it is told to make, live in the test process.
"""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import build_model, build_tokenizer
from tests.hub_server import HubServer

WAITS_S = (0.01, 0.01)


# ---- In the worker process ----


def start_worker() -> None:
    from huggingface_hub.utils import _http

    # The client's own backoff sleeps up to 23 s per request.
    _http.time = SimpleNamespace(sleep=lambda seconds: time.sleep(0.005), monotonic=time.monotonic, time=time.time)


class Messages(logging.Handler):
    """Collects what the trainer logs."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def build_trainer(output_dir: str, adapter: bool = False, **settings):
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from trl.trainer.hub import HubPushMixin

    class PushingTrainer(HubPushMixin, Trainer):
        hub_retry_delays_s = WAITS_S

    model = build_model()
    if adapter:
        from peft import LoraConfig, get_peft_model

        model.config._name_or_path = "tester/base"  # an adapter's card names its base
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 400, (8, 6), generator=generator).tolist()
    settings = {"push_to_hub": True, "hub_token": "hf_writer", "max_steps": 4, "save_steps": 2, **settings}
    args = TrainingArguments(
        output_dir, use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=2, **settings
    )
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    return PushingTrainer(model, args, train_dataset=dataset, processing_class=build_tokenizer())


def build_sft_trainer(output_dir: str, adapter: bool = False, **settings):
    from datasets import Dataset

    from trl import SFTConfig, SFTTrainer

    peft_config = None
    if adapter:
        from peft import LoraConfig

        peft_config = LoraConfig(task_type="CAUSAL_LM")
    settings = {"push_to_hub": True, "hub_token": "hf_writer", "max_steps": 4, "save_steps": 2, **settings}
    args = SFTConfig(
        output_dir, use_cpu=True, report_to=[], disable_tqdm=True, bf16=False, logging_steps=1, **settings
    )
    rows = [{"prompt": f"what is {i}?", "completion": f" the answer is {i}."} for i in range(8)]
    dataset = Dataset.from_list(rows)
    base = str(Path(output_dir).parent / "base")  # a local base model, which no card may name
    build_model().save_pretrained(base)
    return SFTTrainer(base, args, train_dataset=dataset, processing_class=build_tokenizer(), peft_config=peft_config)


def run(output_dir: str, actions: list[str], attributes: dict | None = None, sft: bool = False, **settings) -> dict:
    """
    Build a trainer and carry out `actions` on it ("train", "save", "push", "push_later"); everything that tests look at.
    """
    from trl.trainer import hub

    messages = Messages()
    hub.logger.addHandler(messages)
    result = {"messages": messages.texts, "error": None}
    start = time.monotonic()
    try:
        trainer = (build_sft_trainer if sft else build_trainer)(output_dir, **settings)
        for name, value in (attributes or {}).items():
            setattr(trainer, name, value)
        for action in actions:
            if action == "train":
                trainer.train()
            elif action == "save":
                trainer.save_model()
            elif action == "push":
                result["commit"] = trainer.push_to_hub(tags="tiny").commit_message
            elif action == "push_later":
                future = trainer.push_to_hub(blocking=False)
                result["commit"] = future.result(timeout=60).commit_message
        result["steps"] = trainer.state.global_step
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    finally:
        hub.logger.removeHandler(messages)
    result["seconds"] = time.monotonic() - start
    return result


def load_back(repo_id: str, local: str, cache: str, revision: str = "main", adapter: bool = False) -> dict:
    """Load a pushed model through the Hub's API and compare it with the local one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"revision": revision, "cache_dir": cache, "token": "hf_writer"}
    if adapter:
        from peft import PeftModel

        pushed = PeftModel.from_pretrained(build_model(), repo_id, **options)
        expected = PeftModel.from_pretrained(build_model(), local)
    else:
        pushed = AutoModelForCausalLM.from_pretrained(repo_id, **options)
        expected = AutoModelForCausalLM.from_pretrained(local)
    tokenizer = AutoTokenizer.from_pretrained(repo_id, **options)
    text = "what is 12 plus 30?"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        same = torch.equal(pushed(ids).logits, expected(ids).logits)
    start = build_model()
    moved = adapter or not torch.equal(pushed.lm_head.weight, start.lm_head.weight)
    return {"same": same, "moved": moved, "tokenizer": tokenizer(text) == build_tokenizer()(text)}


def wait_for_threads(seconds: float) -> list[str]:
    """Names of the uploading threads that are still running after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        running = [
            t.name for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor") or t.name == "hub-push"
        ]
        if not running:
            break
        time.sleep(0.1)
    reset_client()
    return running


def reset_client() -> None:
    from huggingface_hub.utils import close_session

    close_session()  # the time limit of this test is not the next one's


def read_token(path: str) -> str | None:
    import torch

    return torch.load(path, weights_only=False).hub_token


# ---- In the test process ----


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    return hub.environment(str(tmp_path_factory.mktemp("hf_home")))


@pytest.fixture(scope="module")
def worker(hub, environment):
    with hub.worker(environment, start_worker) as call:
        yield call


@pytest.fixture
def train(worker, hub, tmp_path):
    """Run a trainer that pushes to `tester/run` of a Hub without other repositories."""
    hub.heal()
    hub.repos.clear()
    hub.large_files.clear()
    hub.requests.clear()
    yield lambda *actions, **options: worker(run, str(tmp_path / "run"), list(actions), **options)
    hub.heal()


def commits(hub, branch: str = "main") -> list[str]:
    return hub.repo("tester/run").messages(branch)[1:]  # the first one makes the repository


MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training_args.bin"}
RESUME_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def test_push_at_the_end_loads_back(train, worker, hub, tmp_path):
    """`hub_strategy="end"`: nothing during training; then the model, its tokenizer and card arrive."""
    result = train("train", "push", hub_strategy="end")
    assert result["error"] is None
    assert commits(hub) == ["End of training"]
    files = hub.repo("tester/run").files()
    assert MODEL_FILES | {"README.md"} <= set(files)
    assert not any(name.startswith(("checkpoint-", "_")) for name in files)
    assert "tiny" in files["README.md"].decode()
    loaded = worker(load_back, "tester/run", str(tmp_path / "run"), str(tmp_path / "cache"))
    assert loaded == {"same": True, "moved": True, "tokenizer": True}


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4"}),
    ],
)
def test_strategies(train, worker, hub, tmp_path, strategy, folders):
    """Each checkpoint replaces the model at the root; resumable folders come with the strategies that promise them."""
    result = train("train", hub_strategy=strategy, hub_always_push=True)
    assert result["error"] is None
    assert [message for message in result["messages"] if "failed" in message] == []
    extra = ["{}, checkpoint"] if folders else []
    expected = [text.format(f"Training in progress, step {step}") for step in (2, 4) for text in ["{}", *extra]]
    assert commits(hub) == expected
    files = hub.repo("tester/run").files()
    assert {name.split("/")[0] for name in files if "/" in name} == folders
    assert set(files) >= MODEL_FILES
    assert not RESUME_FILES & set(files)
    for folder in folders:
        local = tmp_path / "run" / folder.replace("last-checkpoint", "checkpoint-4")
        there = {
            name.removeprefix(f"{folder}/"): data for name, data in files.items() if name.startswith(f"{folder}/")
        }
        assert there == {path.name: path.read_bytes() for path in local.iterdir() if path.name != "README.md"}
        assert set(there) >= RESUME_FILES
    loaded = worker(load_back, "tester/run", str(tmp_path / "run" / "checkpoint-4"), str(tmp_path / "cache"))
    assert loaded["same"]
    assert not (tmp_path / "run" / "_hub_push").exists() or not any((tmp_path / "run" / "_hub_push").iterdir())


def test_adapter(train, worker, hub, tmp_path):
    """Of a PEFT model only the adapter is pushed, and it loads on top of the base model."""
    result = train("train", "push", adapter=True, hub_strategy="every_save")
    assert result["error"] is None
    files = set(hub.repo("tester/run").files())
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "model.safetensors" not in files
    loaded = worker(load_back, "tester/run", str(tmp_path / "run"), str(tmp_path / "cache"), adapter=True)
    assert loaded["same"]
    assert loaded["tokenizer"]


def test_revision_and_private(train, worker, hub, tmp_path):
    """`hub_revision` is made where it does not exist; `hub_private_repo` is honoured."""
    result = train("train", "push", hub_strategy="every_save", hub_revision="trial", hub_private_repo=True)
    assert result["error"] is None
    assert hub.repo("tester/run").private
    assert commits(hub) == []
    assert commits(hub, "trial")[0] == "Training in progress, step 2"
    assert commits(hub, "trial")[-1] == "End of training"
    assert worker(load_back, "tester/run", str(tmp_path / "run"), str(tmp_path / "cache"), revision="trial")["same"]


def test_save_model_pushes(train, hub):
    """With `push_to_hub=True`, saving also pushes."""
    assert train("train", "save", hub_strategy="end")["error"] is None
    assert commits(hub) == ["Model save"]


def test_push_without_waiting(train, hub):
    """`blocking=False` gives a future of the commit."""
    assert train("train", "push_later", hub_strategy="end")["commit"] == "End of training"
    assert commits(hub) == ["End of training"]


def test_a_push_outlives_the_script(train, hub, environment, tmp_path):
    """The process does not end before a push that nobody waits for."""
    hub.fail("PUT /_lfs/", "slow", seconds=1.0)
    script = f"""
from tests.trainer.test_hub import build_trainer
build_trainer({str(tmp_path / "run")!r}, hub_strategy="end").push_to_hub(blocking=False)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert commits(hub) == ["End of training"]


def test_push_decided_afterwards(train, hub):
    """`push_to_hub()` works for a trainer that was not told to push."""
    result = train("train", "push", push_to_hub=False, hub_token="hf_writer")
    assert result["error"] is None
    assert commits(hub) == ["End of training"]


def test_upload_in_parts(train, worker, hub, tmp_path):
    """Files above the server's part size arrive in parts."""
    hub.part_size = 100_000
    try:
        assert train("train", "push", hub_strategy="end")["error"] is None
    finally:
        hub.part_size = None
    assert any(re.search(r"PUT /_lfs/\w+/1", request) for request in hub.requests)
    assert worker(load_back, "tester/run", str(tmp_path / "run"), str(tmp_path / "cache"))["same"]


def test_the_token_stays_here(train, worker, hub, tmp_path):
    """`training_args.bin` is pushed, the token in the arguments is not, and the trainer still has it."""
    assert train("train", "push", hub_strategy="checkpoint", hub_always_push=True)["error"] is None
    pushed = hub.repo("tester/run").files()
    for name in ("training_args.bin", "last-checkpoint/training_args.bin"):
        path = tmp_path / "pushed.bin"
        path.write_bytes(pushed[name])
        assert worker(read_token, str(path)) is None
    assert not any(b"hf_writer" in content for content in pushed.values())


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_sft_trainer(train, worker, hub, tmp_path, adapter):
    """`SFTTrainer` pushes checkpoints while it trains, then the model with a card that tells of the run."""
    result = train("train", "push", sft=True, adapter=adapter, hub_strategy="checkpoint", hub_always_push=True)
    assert result["error"] is None
    assert [message for message in result["messages"] if "failed" in message] == []
    assert commits(hub)[0] == "Training in progress, step 2"
    assert commits(hub)[-1] == "End of training"
    files = hub.repo("tester/run").files()
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert {weights, f"last-checkpoint/{weights}", "last-checkpoint/optimizer.pt", "README.md"} <= set(files)
    card = files["README.md"].decode()
    assert all(word in card for word in ("tags:", "- sft", "- tiny", "generated_from_trainer"))
    assert not any(b"hf_writer" in content for content in files.values())
    loaded = worker(load_back, "tester/run", str(tmp_path / "run"), str(tmp_path / "cache"), adapter=adapter)
    assert loaded == {"same": True, "moved": True, "tokenizer": True}


def test_sft_trainer_survives_a_failing_hub(train, hub, tmp_path):
    hub.fail("/commit/")
    result = train("train", sft=True, hub_strategy="every_save", attributes={"hub_retry_delays_s": (0.01,)})
    assert result["error"] is None
    assert result["steps"] == 4
    assert "failed after 2 attempts: the Hub answered 503" in result["messages"][-1]
    assert (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").is_file()


# ---- Failures ----


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [("/commit/", "status"), ("/commit/", "cut"), ("PUT /_lfs/", "cut"), ("/preupload/", "status")],
)
def test_passing_failure_is_retried(train, hub, pattern, kind):
    """A 503 or a cut connection once: the push succeeds all the same."""
    fault = hub.fail(pattern, kind, times=1)
    result = train("train", "push", hub_strategy="end")
    assert fault.hits == 1
    assert result["error"] is None
    assert commits(hub) == ["End of training"]


def push_by_hand(message: str, environment: dict[str, str]) -> None:
    """Run the command that a failure message gives."""
    command = re.search(r"^Push them with: (hf .+)$", message, re.MULTILINE).group(1)
    script = Path(sys.executable).with_name("hf")
    env = {**environment, "HF_TOKEN": "hf_writer"}
    done = subprocess.run(
        [str(script), *shlex.split(command)[1:]], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("pattern", "kind", "reason"),
    [("/commit/", "status", "the Hub answered 503"), ("PUT /_lfs/", "cut", "the connection failed")],
)
def test_lasting_failure_keeps_the_training(train, worker, hub, environment, tmp_path, pattern, kind, reason):
    """Every upload fails: training ends, its checkpoints are whole, and the message's command pushes one later."""
    fault = hub.fail(pattern, kind)
    result = train("train", hub_strategy="every_save", save_total_limit=2)
    assert result["error"] is None
    assert result["steps"] == 4
    assert fault.hits >= len(WAITS_S) + 1
    assert commits(hub) == []
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert {path.name for path in checkpoint.iterdir()} >= MODEL_FILES | RESUME_FILES
    message = result["messages"][-1]
    assert "Pushing checkpoint-" in message
    assert f"failed after {len(WAITS_S) + 1} attempts: {reason}" in message
    assert "Nothing is lost: the files are in" in message

    hub.heal()
    push_by_hand(message, environment)
    pushed = re.search(r"checkpoint-\d", message).group()
    local = str(tmp_path / "run" / pushed)
    assert worker(load_back, "tester/run", local, str(tmp_path / "cache")) == dict.fromkeys(
        ("same", "moved", "tokenizer"), True
    )


def test_explicit_push_raises_with_everything_saved(train, worker, hub, environment, tmp_path):
    """Whoever calls `push_to_hub()` gets an error; the model is in the output folder, and the command pushes it."""
    hub.fail("/commit/")
    result = train("train", "push", hub_strategy="end")
    assert result["error"].startswith("HubPushError: Pushing the model to tester/run failed after 3 attempts")
    assert (tmp_path / "run" / "README.md").exists()
    hub.heal()
    push_by_hand(result["error"], environment)
    files = set(hub.repo("tester/run").files())
    assert MODEL_FILES | {"README.md"} <= files
    assert not any(name.startswith("checkpoint-") for name in files)
    assert worker(load_back, "tester/run", str(tmp_path / "run"), str(tmp_path / "cache"))["same"]


def test_a_refused_card_is_named(train, hub):
    """The Hub's reason for refusing is in the message."""
    hub.fail("/api/validate-yaml", "status", status=400)
    result = train("train", "push", hub_strategy="end")
    assert "the Hub answered 400: Invalid metadata in README.md." in result["error"]
    assert sum("validate-yaml" in request for request in hub.requests) == 1


def test_saving_does_not_raise(train, hub, tmp_path):
    """`save_model()` saved what it was asked to save, so a failing push is a message."""
    hub.fail("/commit/")
    result = train("train", "save", hub_strategy="end")
    assert result["error"] is None
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "Pushing the model to tester/run failed" in result["messages"][-1]


def test_a_silent_hub_does_not_hold_up_training(train, hub, tmp_path):
    """The Hub takes the commit and never answers: training ends after the limit, and says so."""
    hub.fail("/commit/", "hang")
    result = train("train", hub_strategy="every_save", attributes={"hub_wait_limit_s": 1.0})
    assert result["error"] is None
    assert result["seconds"] < 30
    assert "no end after 1 s" in result["messages"][-1]
    assert (tmp_path / "run" / "checkpoint-4" / "model.safetensors").exists()


def test_a_silent_hub_does_not_hold_up_the_end_of_the_process(train, worker, hub):
    """Threads that Python would join at exit give up too, although the Hub's client waits forever by default."""
    hub.fail("PUT /_lfs/", "hang")
    result = train("train", hub_strategy="every_save", attributes={"hub_wait_limit_s": 0.5, "hub_retry_delays_s": ()})
    assert result["error"] is None
    assert worker(wait_for_threads, 20) == []


def test_explicit_push_has_a_limit(train, hub):
    hub.fail("/commit/", "hang")
    result = train("train", "push", hub_strategy="end", attributes={"hub_wait_limit_s": 1.0})
    assert result["error"].startswith("HubPushError: Pushing the model to tester/run failed: no end after 1 s")
    assert result["seconds"] < 30


def test_slow_upload_of_a_rotated_checkpoint(train, hub):
    """`save_total_limit=1` deletes a checkpoint while it is being uploaded; what arrives is whole."""
    hub.fail("PUT /_lfs/", "slow", seconds=0.4, times=4)
    result = train("train", hub_strategy="all_checkpoints", hub_always_push=True, save_total_limit=1)
    assert [message for message in result["messages"] if "failed" in message] == []
    files = set(hub.repo("tester/run").files())
    for step in (2, 4):
        assert {f"checkpoint-{step}/{name}" for name in MODEL_FILES | RESUME_FILES} <= files


def test_a_running_push_is_not_doubled(train, hub):
    """Without `hub_always_push`, a checkpoint is passed over while the one before is still being pushed."""
    hub.fail("/commit/", "slow", seconds=1.5, times=1)
    result = train("train", hub_strategy="every_save")
    assert commits(hub) == ["Training in progress, step 2"]
    assert any("checkpoint-4 is not pushed" in message for message in result["messages"])


@pytest.mark.parametrize(
    ("token", "reason"), [("hf_wrong", "Log in with `hf auth login`"), ("hf_reader", "may not write there (403)")]
)
def test_a_bad_token_fails_before_training(train, hub, token, reason):
    """A token that cannot push is an error at construction, not after hours of training."""
    result = train("train", hub_token=token, hub_strategy="end")
    assert result["error"].startswith("HubPushError: Making the repository run on the Hub failed")
    assert reason in result["error"]
    assert "steps" not in result
    assert sum("/api/repos/create" in request for request in hub.requests) == 1  # trying again would not help


def test_a_token_that_expires_keeps_the_training(train, hub, tmp_path):
    hub.fail("/preupload/", "status", status=401)
    result = train("train", hub_strategy="checkpoint")
    assert result["error"] is None
    assert result["steps"] == 4
    assert "hf auth login" in result["messages"][-1]
    assert (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").exists()


def test_an_unreachable_hub_fails_before_training(train, hub):
    fault = hub.fail("/api/repos/create", "cut")
    result = train("train", hub_strategy="end")
    assert "the connection failed" in result["error"]
    assert "push_to_hub=False" in result["error"]
    assert fault.hits == len(WAITS_S) + 1
