"""Flags of a short run, for every training script."""

import json
import re
import sys

import pytest


@pytest.fixture
def make_flags(tmp_path, tiny_model_path):
    """Flags for two steps of the tiny model on `rows`, in a folder as people have it: one file per split."""

    def make(rows: list[dict]) -> list[str]:
        folder = tmp_path / "data"
        folder.mkdir()
        for split, part in (("train", rows), ("test", rows[:4])):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        return [
            *["--model_name_or_path", tiny_model_path, "--dataset_name", str(folder)],
            *["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--per_device_train_batch_size", "2"],
            *["--max_length", "64", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"],
        ]

    return make


# ---- Scripts that sample and learn from rewards ----

ONLINE_ROWS = [
    {"prompt": [{"role": "user", "content": f"what is {i} plus 1?"}], "solution": f"${i + 1}$", "wanted": "a e i"}
    for i in range(12)
]


@pytest.fixture
def make_online_flags(make_flags):
    """Flags for two steps, each of two groups of two short completions."""

    def make(rows: list[dict] = ONLINE_ROWS) -> list[str]:
        flags = make_flags(rows)
        at = flags.index("--max_length")
        return [
            *flags[:at],
            *flags[at + 2 :],
            *["--max_completion_length", "6", "--num_generations", "2", "--per_device_train_batch_size", "4"],
            *["--per_device_eval_batch_size", "4", "--learning_rate", "1e-2", "--bf16", "false", "--use_cpu"],
        ]

    return make


@pytest.fixture
def run_online_script(make_online_flags, capsys):
    """Runs a script with more flags, and returns what it logged."""

    def run(script, *more: str) -> list[dict[str, float]]:
        script.main(*script.make_parser().parse_args_and_config([*make_online_flags(), *more]))
        printed = capsys.readouterr().out
        assert "Training is complete." in printed
        entries = re.findall(r"^\{'.*\}$", printed, flags=re.MULTILINE)
        return [
            {key: float(value) for key, value in re.findall(r"'([^']+)': '?([-+.\deinfa]+)", line)} for line in entries
        ]

    return run


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    """A module of the user's in the working directory."""
    (tmp_path / "my_rewards.py").write_text(
        "def vowels(completions, wanted, **kwargs):\n"
        "    texts = [messages[-1]['content'] for messages in completions]\n"
        "    return [float(sum(text.count(letter) for letter in letters.split()))\n"
        "            for text, letters in zip(texts, wanted, strict=True)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "my_rewards.vowels"
    sys.modules.pop("my_rewards", None)
