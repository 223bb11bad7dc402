"""Reading the file behind `--config`."""

import os

import pytest

from trl.scripts.config_file import apply_environment, load_config_file, pop_config_flag


@pytest.mark.parametrize("form", [["--config", "run.yaml"], ["--config=run.yaml"]])
def test_flag_is_taken_out_in_both_forms(form):
    assert pop_config_flag(["--lr", "1", *form, "--packing"]) == ("run.yaml", ["--lr", "1", "--packing"])


def test_without_the_flag_nothing_changes():
    assert pop_config_flag(["--configuration", "x"]) == (None, ["--configuration", "x"])


@pytest.mark.parametrize("args", [["--config"], ["--config", "--packing"], ["--config", "a", "--config=b"]])
def test_flag_needs_one_path(args):
    with pytest.raises(ValueError, match="--config"):
        pop_config_flag(args)


def test_numbers_and_words_are_read_as_meant(tmp_path):
    """YAML 1.1 takes `1e-5` for text."""
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-5\neps: 2.5E-8\nname: e5\nlist: [1e3, a]\n")
    assert load_config_file(file) == {"learning_rate": 1e-5, "eps": 2.5e-8, "name": "e5", "list": [1000.0, "a"]}


def test_empty_file_is_an_empty_config(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert load_config_file(tmp_path / "run.yaml") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must be a mapping.*Found a list"),
        ("just text\n", "must be a mapping.*Found a str"),
        ("a: [1\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "'seed' stands there twice"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config_file(file)


def test_missing_file_names_a_near_one(tmp_path):
    (tmp_path / "train.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match="no config file .*trian.yaml.* Did you mean `train.yaml`"):
        load_config_file(tmp_path / "trian.yaml")


def test_environment_is_set_and_taken_out(monkeypatch):
    monkeypatch.setenv("TRL_TEST_A", "before")
    monkeypatch.delenv("TRL_TEST_B", raising=False)
    rest = apply_environment({"env": {"TRL_TEST_A": 1, "TRL_TEST_B": True}, "seed": 3})
    assert rest == {"seed": 3}
    assert (os.environ["TRL_TEST_A"], os.environ["TRL_TEST_B"]) == ("1", "True")
    monkeypatch.delenv("TRL_TEST_B")


def test_environment_must_be_a_mapping():
    with pytest.raises(ValueError, match="`env`.*mapping"):
        apply_environment({"env": ["A=1"]})
