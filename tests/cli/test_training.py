"""`trl <method>` and `trl preview <method>` for real, on a tiny model."""

import json
import os
import subprocess
import sys

import pytest

from trl.cli import main


@pytest.fixture
def rows_file(tmp_path):
    rows = [{"prompt": f"what is {i} plus 1? ", "completion": f"the answer is {i + 1}."} for i in range(16)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def config(tmp_path, tiny_model_path, rows_file):
    settings = {
        "model_name_or_path": tiny_model_path,
        "dataset_name": rows_file,
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "num_processes": 1,
        "env": {"HF_HUB_OFFLINE": 1, "TOKENIZERS_PARALLELISM": "false"},
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    return str(file)


def test_sft_end_to_end(config, tmp_path, capfd, monkeypatch):
    """From the command line through Accelerate to a model that plain Transformers loads; the flag beats the file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["sft", "--config", config, "--max_steps", "3", "--save_strategy", "no"]) == 0
    printed = capfd.readouterr().out
    output = tmp_path / "out"
    assert "Training is complete." in printed
    assert f"The model is saved in {output}" in printed
    assert printed.count("'loss'") == 3
    AutoTokenizer.from_pretrained(output)
    AutoModelForCausalLM.from_pretrained(output)


def test_a_failing_script_fails_the_command(config, capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["sft", "--config", config, "--dataset_train_split", "trian"]) == 1
    error = capfd.readouterr().err
    assert "no split 'trian'" in error
    assert "Did you mean `train`" in error
    assert "CalledProcessError" not in error  # the launcher's own traceback says nothing


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "epoch"), [("1", "0.25"), ("2", "0.5")])
def test_cpu_processes(config, tmp_path, processes, epoch):
    """Two CPU processes are two: Accelerate's launcher alone would run one and say nothing."""
    options = ["--config", config, "--cpu", "--num_processes", processes, "--main_process_port", "0"]
    result = subprocess.run(
        [sys.executable, "-m", "trl.cli", "sft", *options, "--bf16", "false"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"'epoch': '{epoch}'" in result.stdout  # one step: of 16 rows, each process takes 4
    assert result.stdout.count("Training is complete.") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_preview(config, capsys):
    """The tokens of the first rows, context apart from trained, without a model."""
    assert main(["preview", "sft", "--config", config, "--num_examples", "2", "--color", "always"]) == 0
    output = capsys.readouterr().out
    assert output.count("── row") == 2
    assert "\033[" in output


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs_file(tmp_path):
    rows = [
        {"prompt": f"what is {i} plus 1? ", "chosen": f"the answer is {i + 1}.", "rejected": f"the sky is {i}."}
        for i in range(16)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def labelled_file(tmp_path):
    rows = [
        {"prompt": f"what is {i} plus 1? ", "completion": f"the answer is {i + i % 2}.", "label": bool(i % 2)}
        for i in range(16)
    ]
    return write_rows(tmp_path / "labelled.jsonl", rows)


@pytest.mark.parametrize("method", ["dpo", "kto", "reward"])
def test_methods_on_pairs_end_to_end(config, pairs_file, tmp_path, capfd, monkeypatch, method):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([method, "--config", config, "--dataset_name", pairs_file, "--save_strategy", "no"]) == 0
    printed = capfd.readouterr().out
    assert "Training is complete." in printed
    assert "'loss'" in printed
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("method", ["dpo", "kto", "reward"])
def test_preview_of_pairs(config, pairs_file, capsys, method):
    flags = ["--config", config, "--dataset_name", pairs_file, "--num_examples", "2"]
    assert main(["preview", method, *flags]) == 0
    output = capsys.readouterr().out
    assert output.count("── row") == 2
    assert "answer is 1." in output.split("⟦")[2]  # the first is in the legend
    assert "sky is 0." in output.split("⟪")[2]


def test_preview_of_labelled_answers(config, labelled_file, capsys):
    flags = ["--config", config, "--dataset_name", labelled_file, "--num_examples", "2"]
    assert main(["preview", "kto", *flags]) == 0
    output = capsys.readouterr().out
    assert output.index("label False") < output.index("label True")


def test_preview_shows_what_is_cut(config, capsys):
    assert main(["preview", "sft", "--config", config, "--num_examples", "1", "--max_length", "8"]) == 0
    plain = capsys.readouterr().out
    assert "\033[" not in plain
    assert "0 cut" not in plain


def test_preview_loads_no_weights(config, tiny_model_path, monkeypatch):
    from transformers import PreTrainedModel

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", load)
    assert main(["preview", "sft", "--config", config]) == 0


def test_preview_ignores_what_is_for_the_launcher(config, capsys):
    assert main(["preview", "sft", "--config", config, "--num_processes", "2", "--accelerate_config", "zero3"]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [(["ppp"], "followed by a method: sft"), (["sft", "--config", "no.yaml"], "no config file")],
)
def test_preview_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        main(["preview", *args])


def test_preview_needs_a_model(rows_file):
    with pytest.raises(ValueError, match="--model_name_or_path"):
        main(["preview", "sft", "--dataset_name", rows_file])
