"""Arguments, datasets and messages that scripts share."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings

import pytest
from datasets import Dataset, DatasetDict

from trl import DatasetMixtureConfig, ScriptArguments, TrlParser, get_dataset, init_zero_verbose
from trl.scripts.utils import (
    DatasetConfig,
    get_git_commit_hash,
    load_script_dataset,
    read_script_arguments,
    select_split,
)


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(4)))
    return str(file)


# ---- Mixture ----


def test_entries_of_a_mixture_become_configs():
    mixture = DatasetMixtureConfig(datasets=[{"path": "a", "split": "test"}, DatasetConfig("b"), "c"])
    assert mixture.datasets == [DatasetConfig("a", split="test"), DatasetConfig("b"), DatasetConfig("c")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a", "colums": ["x"]}, "Unknown key `colums` in entry 0 of `datasets`. Did you mean `columns`"),
        ({"name": "a"}, "no `path`"),
        (3, "entry 0 is 3"),
    ],
)
def test_bad_entry_of_a_mixture(entry, message):
    with pytest.raises(ValueError, match=message):
        DatasetMixtureConfig(datasets=[entry])


def test_mixture_from_a_config_file(tmp_path, rows_file):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"datasets:\n  - path: json\n    data_files: {rows_file}\n  - path: {rows_file}\n    columns: [text]\n"
        "test_split_size: 0.25\n"
    )
    (mixture,) = TrlParser(DatasetMixtureConfig).parse_args_and_config(["--config", str(file)])
    assert [type(entry) for entry in mixture.datasets] == [DatasetConfig, DatasetConfig]
    dataset = get_dataset(mixture)
    assert {name: len(split) for name, split in dataset.items()} == {"train": 6, "test": 2}


def test_mixture_from_flags(rows_file):
    (mixture,) = TrlParser(DatasetMixtureConfig).parse_args_and_config(["--datasets", rows_file, rows_file])
    assert len(get_dataset(mixture)["train"]) == 8


# ---- The dataset of a script ----


def test_a_file_is_a_dataset(rows_file):
    dataset = load_script_dataset(ScriptArguments(dataset_name=rows_file), DatasetMixtureConfig())
    assert dataset["train"]["text"][:2] == ["row 0", "row 1"]


def test_mixture_goes_before_the_name(rows_file, caplog):
    mixture = DatasetMixtureConfig(datasets=[rows_file])
    with caplog.at_level(logging.WARNING):
        dataset = load_script_dataset(ScriptArguments(dataset_name="elsewhere"), mixture)
    assert len(dataset["train"]) == 4
    assert "elsewhere" in caplog.text


def test_no_dataset():
    with pytest.raises(ValueError, match=r"No dataset.*--dataset_name"):
        load_script_dataset(ScriptArguments(), DatasetMixtureConfig())


def test_select_split():
    rows = Dataset.from_dict({"text": ["a"]})
    dataset = DatasetDict({"train": rows, "validation": rows})
    assert select_split(dataset, "validation", "dataset_test_split") is dataset["validation"]
    assert select_split(rows, "train", "dataset_train_split") is rows
    with pytest.raises(ValueError, match=r"no split 'valdation'.*train, validation.*Did you mean `validation`"):
        select_split(dataset, "valdation", "dataset_test_split")
    with pytest.raises(ValueError, match=r"no splits.*eval_strategy no"):
        select_split(rows, "test", "dataset_test_split")


# ---- Reading the arguments of a script ----


def test_script_passes_over_keys_of_the_launcher(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name: x\nnum_processes: 2\naccelerate_config: zero2\nmulti_gpu: true\n")
    (arguments,) = read_script_arguments(TrlParser(ScriptArguments), ["--config", str(file)])
    assert arguments.dataset_name == "x"


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        ("datset_name: x\n", [], "Unknown key `datset_name`.*Did you mean `dataset_name`"),
        ("num_proceses: 2\n", [], "Unknown key `num_proceses`.*Did you mean `num_processes`"),
        ("", ["--datasetname", "x"], "Unknown argument `--datasetname`"),
        ("- 1\n", [], "must be a mapping"),
    ],
)
def test_script_says_what_is_wrong_and_exits(tmp_path, capsys, content, args, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit) as exit:
        read_script_arguments(TrlParser(ScriptArguments, prog="script"), [*args, "--config", str(file)])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert re.search(message, error)
    assert error.startswith("script: error:")


# ---- Messages ----


@pytest.mark.parametrize("with_rich", [True, False])
def test_init_zero_verbose(with_rich):
    """Errors only; warnings of Python become log records, which are then below the level shown."""
    code = f"""
import importlib.util, logging, sys, warnings
if not {with_rich}:
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *args: None if name == "rich" else find(name, *args)
from trl.scripts.utils import init_zero_verbose
init_zero_verbose()
print(type(logging.getLogger().handlers[0]).__name__)
warnings.warn("quiet please")
logging.warning("nor this")
logging.error("this one shows")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    output = result.stdout + result.stderr
    assert ("RichHandler" in output) == with_rich
    assert "this one shows" in output
    assert "quiet please" not in output
    assert "nor this" not in output


def test_init_zero_verbose_routes_warnings(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    records = []
    monkeypatch.setattr(logging, "warning", records.append)
    init_zero_verbose()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning("old way", FutureWarning, "file.py", 3)
    assert records == ["file.py:3: FutureWarning: old way"]


# ---- Git ----


def git(folder, *args):
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    environment = {**os.environ, **identity}
    return subprocess.run(
        ["git", *args], cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_commit_hash_is_of_the_packages_own_checkout(tmp_path, monkeypatch):
    for name in ("own_package", "foreign_package"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "own_package")
    git(tmp_path, "commit", "-q", "-m", "x")
    monkeypatch.syspath_prepend(tmp_path)
    assert get_git_commit_hash("own_package") == git(tmp_path, "rev-parse", "HEAD")
    assert get_git_commit_hash("foreign_package") is None  # lies in the repository, but is not of it
    assert get_git_commit_hash("no_such_package_anywhere") is None
