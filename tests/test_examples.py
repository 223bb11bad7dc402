"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl
from trl import SFTConfig, SFTTrainer

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_script(path: str, monkeypatch):
    """Import a script as Python would run it: with its own folder first on the path."""
    script = EXAMPLES / path
    monkeypatch.syspath_prepend(str(script.parent))
    spec = importlib.util.spec_from_file_location(f"example_{script.parent.name}_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


# ---- The demo's pieces ----


@pytest.fixture
def tasks(monkeypatch):
    return load_script("demo/tasks.py", monkeypatch)


@pytest.fixture
def tiny(monkeypatch):
    return load_script("demo/tiny_model.py", monkeypatch)


def solve(kind: str, question: str) -> str:
    """The answer, worked out from the question's text alone."""
    numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in question).split()]
    if kind == "add":
        return str(sum(numbers))
    if kind == "count":
        return str(numbers[1:].count(numbers[0]))
    return " ".join(map(str, sorted(numbers) if kind == "sort" else numbers[::-1]))


def test_tasks_are_right_and_held_out(tasks):
    train, test = tasks.make_dataset(2000), tasks.make_dataset(200, held_out=True)
    questions = [row["prompt"][0]["content"] for row in [*train, *test]]
    assert len(set(questions)) == 2200
    assert {row["kind"] for row in test} == set(tasks.MAKERS)
    for row, question in zip([*train, *test], questions, strict=True):
        assert row["answer"] == solve(row["kind"], question), question
        assert row["completion"] == [{"role": "assistant", "content": row["answer"]}]
    other_seed = tasks.make_dataset(2000, seed=1)
    assert not {row["prompt"][0]["content"] for row in other_seed} & set(questions[2000:])
    assert other_seed[0] != train[0]
    assert tasks.make_dataset(50)[:] == train[:50]


def test_careless_demonstrations(tasks):
    """As many as asked for are wrong, all in the same way; questions and answers stay as they are."""
    careful, careless = tasks.make_dataset(2000), tasks.make_dataset(2000, careless=0.3)
    assert careless["answer"] == careful["answer"]
    assert careless["prompt"] == careful["prompt"]
    wrong = [row for row in careless if row["completion"][0]["content"] != row["answer"]]
    assert len(wrong) / 2000 == pytest.approx(0.3, abs=0.04)
    assert {row["kind"] for row in wrong} == set(tasks.MAKERS)
    for row in wrong:
        written, answer = row["completion"][0]["content"], row["answer"]
        assert written == answer[:-2] if " " in answer else int(written) == int(answer) + 1


def test_tiny_tokenizer_round_trip(tiny):
    tokenizer = tiny.build_tokenizer([f"What is {i} + {i + 30}?" for i in range(60)])
    for text in ("Sort these digits: 7 2 9 4", "What is 37 + 58?", "never seen: ß 漢\n  twice"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize(" 37") == ["Ġ3", "7"]
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7 2"}, {"role": "assistant", "content": "2 7"}],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    trained = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(trained) == "2 7<|im_end|>"


def test_replies_do_not_depend_on_the_batch(tiny):
    tokenizer = tiny.build_tokenizer(["a b c"])
    model = tiny.build_model(tokenizer, hidden_size=32, num_layers=1)
    prompts = [[{"role": "user", "content": "x" * length}] for length in (1, 9, 4)]
    alone = [tiny.generate_replies(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert tiny.generate_replies(model, tokenizer, prompts, max_new_tokens=6) == alone
    assert any(alone)


def test_demo_runs(tmp_path, monkeypatch, capsys):
    demo = load_script("demo/demo.py", monkeypatch)
    # Some replies of an untrained model count as right, so that there is an accuracy to agree on.
    monkeypatch.setattr(demo, "is_correct", lambda reply, answer: sum(map(ord, reply[:1] + answer)) % 3 == 0)
    curves, draw = {}, demo.draw_accuracy
    monkeypatch.setattr(demo, "draw_accuracy", lambda given, path: (curves.update(given), draw(given, path))[1])
    output = tmp_path / "out"
    arguments = {"output_dir": output, "train_rows": 64, "held_out_rows": 8, "sft_steps": 2, "grpo_steps": 1}
    result = demo.main(as_flags(arguments))
    for accuracy in result.values():
        assert accuracy.keys() == {"sort", "reverse", "count", "add", "all"}
    assert result["GRPO"]["all"] not in (0, 0.5, 1)  # neither all nor as many as are wrong
    # The curve goes from what was measured before a phase to what was after, whoever measured.
    assert [count for count, _ in curves["SFT"]] == [0, 32, 64]
    assert [count for count, _ in curves["GRPO"]] == [0, 256]
    ends = {phase: (points[0][1], points[-1][1]) for phase, points in curves.items()}
    assert ends["SFT"] == (result["untrained"]["all"], result["SFT"]["all"])
    assert ends["GRPO"] == (result["SFT"]["all"], result["GRPO"]["all"])
    for picture in ("accuracy.png", "sft/training_curves.png", "grpo/training_curves.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    for phase in ("sft", "grpo"):
        assert AutoTokenizer.from_pretrained(output / phase).chat_template
        assert AutoModelForCausalLM.from_pretrained(output / phase).num_parameters() < 3_000_000
    printed = capsys.readouterr().out
    for expected in ("untrained", "after SFT", "after GRPO", "reward", str(output), "accuracy.png"):
        assert expected in printed


@pytest.mark.slow
def test_demo_learns_twice_in_six_minutes(tmp_path):
    """Within six minutes of two cores: fine-tuning learns the tasks with their mistakes, rewards take these away."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # As a user runs it: how threads wait is set before torch loads.
    command = [sys.executable, str(EXAMPLES / "demo" / "demo.py"), "--output_dir", str(tmp_path / "out")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of all threads: a busy machine changes little of it
    assert after.ru_utime - before.ru_utime < 2 * 360
    line = next(line for line in printed.splitlines() if line.split()[:1] == ["all"])
    untrained, fine_tuned, rewarded = (float(value.rstrip("%")) for value in line.split()[1:])
    assert untrained < 5
    assert fine_tuned > 20
    assert rewarded > fine_tuned + 10


# ---- The minimal twins ----


@pytest.fixture
def minimal(monkeypatch):
    return load_script("minimal/sft.py", monkeypatch)


def as_flags(options: dict) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def quiet_run(output_dir: Path, batch_size: int, accumulation: int) -> dict:
    """Settings of a trainer as the minimal scripts train: two epochs in float32, every step logged."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 2,
        "seed": 3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def logged_losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def make_chats(count: int) -> list[dict]:
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        numbers = [str(rng.randrange(100)) for _ in range(rng.randint(1, 6))]
        rows.append(
            {
                "prompt": [{"role": "user", "content": "sort the list " + ", ".join(numbers)}],
                "completion": [{"role": "assistant", "content": ", ".join(sorted(numbers, key=int))}],
            }
        )
    return rows


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("form", ["prompt and completion", "messages"])
def test_minimal_gives_the_trainers_losses(
    tmp_path, monkeypatch, minimal, tiny_model_path, form, batch_size, accumulation
):
    """The short script and the trainer are the same method: losses of every step agree, and so do the weights."""
    rows, settings = make_chats(19), {}
    if form == "messages":
        rows = [{"messages": row["prompt"] + row["completion"]} for row in rows]
        settings["assistant_only_loss"] = True
        # The template ends a turn with a line break, outside the generation markers; `encode` knows no markers.
        template = AutoTokenizer.from_pretrained(tiny_model_path).chat_template
        tokenizer = AutoTokenizer.from_pretrained(
            tiny_model_path, chat_template=template.replace("{{ '\n' }}{% endfor %}", "{% endfor %}")
        )
        assert tokenizer.chat_template != template
        model_path = str(tmp_path / "model")
        AutoModelForCausalLM.from_pretrained(tiny_model_path).save_pretrained(model_path)
        tokenizer.save_pretrained(model_path)
    else:
        model_path = tiny_model_path
    train_rows, held_out = rows[:14], rows[14:]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"learning_rate": 1e-2, "max_length": 48, "weight_decay": 0.1, "warmup_steps": 2}

    options = {
        "model": model_path,
        "data": data,
        "output": tmp_path / "minimal",
        "batch_size": batch_size,
        "accumulation": accumulation,
        "epochs": 2,
        "eval_rows": len(held_out),
        "seed": 3,
        **shared,
    }
    result = minimal.main(as_flags(options))

    trainer = SFTTrainer(
        model=model_path,
        args=SFTConfig(**quiet_run(tmp_path / "trainer", batch_size, accumulation), **shared, **settings),
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out),
    )
    trainer.train()
    losses = logged_losses(trainer)
    assert len(losses) == 2 * -(-14 // (batch_size * accumulation))
    assert result["losses"] == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.3
    assert result["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "minimal").state_dict()
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, atol=2e-4, rtol=0, msg=name)


def test_minimal_standin_learns(tmp_path, monkeypatch, minimal):
    """Without arguments it needs no download; a few steps already lower the loss."""
    monkeypatch.chdir(tmp_path)
    rows = minimal.make_standin_rows
    monkeypatch.setattr(minimal, "make_standin_rows", lambda: rows()[:700])
    result = minimal.main([])
    assert result["losses"][-1] < 0.7 * result["losses"][0]
    assert AutoModelForCausalLM.from_pretrained("sft_output").num_parameters() < 3_000_000
    assert AutoTokenizer.from_pretrained("sft_output").chat_template


def test_minimal_masks_everything_but_the_assistant(minimal, monkeypatch):
    _, tokenizer = load_script("minimal/common.py", monkeypatch).build_standin()
    row = {
        "messages": [
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "ba"},
            {"role": "user", "content": "cd"},
            {"role": "assistant", "content": "dc"},
        ]
    }
    ids, labels = minimal.encode(tokenizer, row, max_length=100)
    assert tokenizer.decode(ids) == "u:ab</s>a:ba</s>u:cd</s>a:dc</s>"
    assert tokenizer.decode([label for label in labels if label != -100]) == "ba</s>dc</s>"
    assert minimal.encode(tokenizer, row, max_length=5) == (ids[:5], [-100] * 5)


def make_preferences(method: str, count: int) -> list[dict]:
    """Of the sorted list and the list as it was, the first is better; for KTO one of them, with its label."""
    rows = []
    for number, chat in enumerate(make_chats(count)):
        question = chat["prompt"][0]["content"]
        worse = [{"role": "assistant", "content": question.removeprefix("sort the list ") + ", and so on"}]
        if method == "dpo":
            rows.append({"prompt": chat["prompt"], "chosen": chat["completion"], "rejected": worse})
        else:
            liked = number % 3 != 0
            rows.append(
                {"prompt": chat["prompt"], "completion": chat["completion"] if liked else worse, "label": liked}
            )
    return rows


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_minimal_preference_scripts_give_the_trainers_losses(
    tmp_path, monkeypatch, tiny_model_path, method, batch_size, accumulation
):
    """14 rows: the last step of an epoch, and its last micro-batch, are shorter. Some rows are cut at `max_length`."""
    minimal = load_script(f"minimal/{method}.py", monkeypatch)
    rows = make_preferences(method, 19)
    train_rows, held_out = rows[:14], rows[14:]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"learning_rate": 1e-2, "max_length": 72, "weight_decay": 0.1, "warmup_steps": 2, "beta": 0.2}
    if method == "kto":
        shared |= {"desirable_weight": 0.6, "undesirable_weight": 1.2}
    options = {"model": tiny_model_path, "data": data, "output": tmp_path / "minimal", "eval_rows": len(held_out)}
    settings = {"batch_size": batch_size, "accumulation": accumulation, "epochs": 2, "seed": 3}
    result = minimal.main(as_flags({**options, **settings, **shared}))

    config, trainer_class = getattr(trl, f"{method.upper()}Config"), getattr(trl, f"{method.upper()}Trainer")
    trainer = trainer_class(
        model=tiny_model_path,
        args=config(**quiet_run(tmp_path / "trainer", batch_size, accumulation), **shared),
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out),
    )
    trainer.train()
    losses = logged_losses(trainer)
    assert len(losses) == 2 * -(-14 // (batch_size * accumulation))
    assert result["losses"] == pytest.approx(losses, abs=1e-5)
    assert min(losses[2:]) < losses[0] - 0.05
    evaluation = trainer.evaluate()
    assert result["eval_loss"] == pytest.approx(evaluation["eval_loss"], abs=1e-4)
    metric = {"dpo": ("eval_accuracy", "eval_rewards/accuracies"), "kto": ("eval_margin", "eval_rewards/margins")}
    ours, theirs = metric[method]
    assert result[ours] == pytest.approx(evaluation[theirs], abs=1e-3)


@pytest.mark.parametrize(("method", "metric", "least"), [("dpo", "eval_accuracy", 0.9), ("kto", "eval_margin", 1.0)])
def test_minimal_preference_standins_learn(tmp_path, monkeypatch, method, metric, least):
    monkeypatch.chdir(tmp_path)
    minimal = load_script(f"minimal/{method}.py", monkeypatch)
    rows = minimal.make_standin_rows
    monkeypatch.setattr(minimal, "make_standin_rows", lambda: rows()[:700])
    result = minimal.main(["--learning_rate", "2e-3", "--output", "trained"])
    assert result[metric] > least
    assert AutoModelForCausalLM.from_pretrained("trained").num_parameters() < 3_000_000


@pytest.mark.parametrize("name", sorted(path.name for path in (EXAMPLES / "minimal").glob("*.py")))
def test_minimal_is_short(name):
    """At most 250 lines that can be read in one go, and no import of the library that they explain."""
    source = (EXAMPLES / "minimal" / name).read_text()
    assert len(source.splitlines()) < 250
    assert "import trl" not in source
    assert "from trl" not in source
