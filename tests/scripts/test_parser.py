"""Flags from dataclasses, defaults from a file: what a value resolves to, and what is refused."""

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import pytest
import yaml

from trl import TrlParser
from trl.scripts._hf_argparser import HfArg, HfArgumentParser, make_choice_type_function, string_to_bool


class Color(Enum):
    red = "red"
    blue = "blue"


@dataclass
class Args:
    needed: int
    learning_rate: float = 0.1
    steps: int = 5
    name: str = "plain"
    maybe_int: int | None = 7
    maybe_str: str | None = None
    maybe_flag: bool | None = None
    off: bool = False
    on: bool = True
    words: list[str] = field(default_factory=lambda: ["a"])
    maybe_words: list[str] | None = None
    numbers: list[float] | None = None
    options: dict[str, Any] | str | None = None
    size: int | str | None = "auto"
    mode: str = field(default="fast", metadata={"choices": ["fast", "slow", "no"]})
    kind: Literal["x", 2] = "x"
    color: Color | str = "red"
    weights: list[float | None] = field(default_factory=lambda: [1.0])
    hidden: int = field(default=3, init=False)


def parse(*args: str, config: dict | None = None, tmp_path=None) -> Args:
    if config is not None:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        args = (*args, "--config", str(file))
    (result,) = TrlParser(Args).parse_args_and_config(args)
    return result


# ---- Flags ----


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--learning_rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--learning-rate=1e-3"], "learning_rate", 1e-3),
        (["--maybe_int", "none"], "maybe_int", None),
        (["--maybe_int", "NULL"], "maybe_int", None),
        (["--maybe_str", "none"], "maybe_str", "none"),
        (["--maybe_flag"], "maybe_flag", True),
        (["--maybe_flag", "No"], "maybe_flag", False),
        (["--maybe_flag", "none"], "maybe_flag", None),
        (["--off"], "off", True),
        (["--off", "y"], "off", True),
        (["--off", "F"], "off", False),
        (["--on", "0"], "on", False),
        (["--no_on"], "on", False),
        (["--no-on"], "on", False),
        (["--words", "b", "c"], "words", ["b", "c"]),
        (["--maybe_words", "b"], "maybe_words", ["b"]),
        (["--maybe_words", "none"], "maybe_words", None),
        (["--numbers", "1", "2.5"], "numbers", [1.0, 2.5]),
        (["--weights", "0.5", "none"], "weights", [0.5, None]),
        (["--options", '{"a": 1}'], "options", '{"a": 1}'),
        (["--options", "none"], "options", None),
        (["--size", "8"], "size", "8"),
        (["--mode", "slow"], "mode", "slow"),
        (["--kind", "2"], "kind", 2),
        (["--color", "blue"], "color", "blue"),
    ],
)
def test_flag(args, name, value):
    assert getattr(parse("--needed", "1", *args), name) == value


def test_defaults_when_nothing_is_given():
    assert parse("--needed", "1") == Args(needed=1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--needed"),
        (["--needed", "one"], "invalid int value"),
        (["--needed", "1", "--mode", "slw"], "invalid choice"),
        (["--needed", "1", "--off", "perhaps"], "yes/no"),
        (["--needed", "1", "--options", "{a: 1}"], "options.*not JSON"),
        (["--needed", "1", "--options", "[1]"], "options.*JSON object"),
    ],
)
def test_bad_flag_exits_with_a_message(args, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(*args)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error.replace("\n", " "))
    assert len(error.splitlines()) <= 3  # the message, not the usage of all flags


def test_field_options_follow_metadata_and_init():
    @dataclass
    class Other:
        lr: float = HfArg(default=1.0, aliases=["-l", "--rate"], help="100% of it")

    parser = TrlParser((Args, Other))
    assert "--hidden" not in parser._option_string_actions
    assert parser.parse_args_and_config(["--needed", "1", "--rate", "3"])[1].lr == 3
    assert parser.parse_args_and_config(["--needed", "1", "-l", "4"])[1].lr == 4


def test_unions_without_text_are_refused():
    @dataclass
    class Bad:
        value: int | float = 1

    with pytest.raises(ValueError, match="value"):
        HfArgumentParser(Bad)


def test_annotations_that_cannot_be_resolved():
    @dataclass
    class Bad:
        value: "Nowhere" = 1  # noqa: F821

    with pytest.raises(RuntimeError, match="Bad"):
        HfArgumentParser(Bad)


def test_a_field_called_config_is_refused():
    @dataclass
    class Bad:
        config: str = "x"

    with pytest.raises(ValueError, match=r"Bad.*`config`"):
        TrlParser((Args, Bad))


def test_flags_cannot_be_abbreviated():
    with pytest.raises(ValueError, match=r"--learn.*Did you mean `--learning_rate`"):
        parse("--needed", "1", "--learn", "1")


def test_helpers_keep_their_contract():
    assert string_to_bool("Yes") is True
    assert string_to_bool("0") is False
    with pytest.raises(argparse.ArgumentTypeError):
        string_to_bool("perhaps")
    choose = make_choice_type_function(["a", 1])
    assert (choose("1"), choose("a"), choose("other")) == (1, "a", "other")


def test_dict_and_file_readers(tmp_path):
    parser = TrlParser(Args)
    assert parser.parse_dict({"needed": 1})[0].needed == 1
    with pytest.raises(ValueError, match="nope"):
        parser.parse_dict({"needed": 1, "nope": 2})
    (tmp_path / "a.json").write_text('{"needed": 2}')
    (tmp_path / "a.yaml").write_text("needed: 3")
    assert parser.parse_json_file(tmp_path / "a.json")[0].needed == 2
    assert parser.parse_yaml_file(tmp_path / "a.yaml")[0].needed == 3


# ---- The file, and which of the two wins ----


@pytest.mark.parametrize(
    ("name", "in_file", "value"),
    [
        ("needed", 3, 3),
        ("learning_rate", 1, 1.0),
        ("learning_rate", "1e-3", 1e-3),
        ("steps", 1e3, 1000),
        ("name", 2024, "2024"),
        ("maybe_int", None, None),
        ("maybe_int", "none", None),
        ("maybe_flag", False, False),
        ("off", True, True),
        ("off", "yes", True),
        ("on", False, False),
        ("on", 0, False),
        ("words", ["b", 1], ["b", "1"]),
        ("words", [], []),
        ("numbers", [1, 2], [1.0, 2.0]),
        ("numbers", 3, [3.0]),
        ("maybe_words", None, None),
        ("weights", [0.5, None], [0.5, None]),
        ("options", {"a": {"b": 1}}, {"a": {"b": 1}}),
        ("options", '{"a": 1}', '{"a": 1}'),
        ("size", 8, 8),
        ("mode", False, "no"),  # YAML reads a bare `no` so
        ("kind", 2, 2),
        ("color", "blue", "blue"),
    ],
)
def test_file_sets_a_value(tmp_path, name, in_file, value):
    result = parse(config={"needed": 1, name: in_file}, tmp_path=tmp_path)
    assert getattr(result, name) == value
    assert type(getattr(result, name)) is type(value)


@pytest.mark.parametrize(
    ("name", "in_file", "flags", "value"),
    [
        ("needed", 3, ["--needed", "4"], 4),
        ("learning_rate", 0.5, ["--learning_rate", "0.1"], 0.1),  # back to the dataclass's default
        ("learning_rate", 0.5, ["--learning-rate=0.2"], 0.2),
        ("steps", 9, ["--steps=5"], 5),
        ("name", "file", ["--name", "plain"], "plain"),
        ("maybe_int", 3, ["--maybe_int", "none"], None),
        ("maybe_int", None, ["--maybe-int", "4"], 4),
        ("maybe_flag", True, ["--maybe_flag", "false"], False),
        ("maybe_flag", False, ["--maybe_flag", "none"], None),
        ("off", True, ["--off", "false"], False),
        ("off", False, ["--off"], True),
        ("on", True, ["--no_on"], False),
        ("on", False, ["--on"], True),
        ("words", ["x", "y", "z"], ["--words", "b"], ["b"]),
        ("words", ["x", "y"], ["--words", "a"], ["a"]),
        ("maybe_words", ["x"], ["--maybe_words", "none"], None),
        ("numbers", [1, 2], ["--numbers", "3"], [3.0]),
        ("options", {"a": 1}, ["--options", '{"b": 2}'], '{"b": 2}'),
        ("mode", "slow", ["--mode", "fast"], "fast"),
        ("kind", 2, ["--kind", "x"], "x"),
        ("color", "blue", ["--color=red"], "red"),
    ],
)
@pytest.mark.parametrize("config_first", [True, False])
def test_flag_beats_file(tmp_path, name, in_file, flags, value, config_first):
    """Whatever the type, wherever `--config` stands, and also where the flag says what the dataclass says."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"needed": 1, name: in_file}))
    args = [f"--config={file}", *flags] if config_first else [*flags, "--config", str(file)]
    (result,) = TrlParser(Args).parse_args_and_config(args)
    assert getattr(result, name) == value


def test_hyphens_in_the_file(tmp_path):
    assert parse(config={"needed": 1, "learning-rate": 0.5}, tmp_path=tmp_path).learning_rate == 0.5


@pytest.mark.parametrize(
    ("name", "in_file", "message"),
    [
        ("steps", "many", "`steps` takes a value of type int, found 'many'"),
        ("steps", 1.5, "`steps`.*int.*1.5"),
        ("steps", True, "`steps` takes a number, found True"),
        ("steps", None, "`steps` cannot be empty"),
        ("steps", [1], "`steps` takes one value"),
        ("off", "perhaps", "`off`.*yes/no"),
        ("off", 3, "`off`.*yes/no"),
        ("mode", "slw", "`mode` takes one of fast, slow, no; found 'slw'. Did you mean `slow`"),
        ("kind", 3, "`kind` takes one of x, 2"),
        ("color", "green", "`color` takes one of red, blue"),
        ("options", "{a", "`options` takes a JSON object.*not JSON"),
        ("name", {"a": 1}, "`name` takes no mapping"),
        ("numbers", ["x"], "`numbers` takes a value of type float"),
    ],
)
def test_bad_value_in_the_file_names_the_field(tmp_path, name, in_file, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(config={"needed": 1, name: in_file}, tmp_path=tmp_path)
    assert "run.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("config", "args", "message"),
    [
        ({"lerning_rate": 1}, [], "Unknown key `lerning_rate`.*Did you mean `learning_rate`"),
        ({"no_on": True}, [], "Unknown key `no_on` in the config file.$"),
        ({}, ["--lerning-rate", "1"], "Unknown argument `--lerning-rate`. Did you mean `--learning_rate`"),
        ({}, ["--zzz=1"], "Unknown argument `--zzz`.$"),
        ({}, ["stray"], "Unexpected argument `stray`"),
    ],
)
def test_unknown_names_the_nearest(tmp_path, config, args, message):
    with pytest.raises(ValueError, match=message):
        parse(*args, config={"needed": 1, **config}, tmp_path=tmp_path)


def test_remaining_strings(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("needed: 1\nnum_processes: 2\ndebug_mode: true\n")
    args = ["--config", str(file), "--other", "x", "--steps", "2"]
    from_file, from_flags = ["--num_processes", "2", "--debug_mode", "True"], ["--other", "x"]

    result, remaining = TrlParser(Args).parse_args_and_config(args, return_remaining_strings=True)
    assert (result.steps, remaining) == (2, from_file + from_flags)
    _, *separate = TrlParser(Args).parse_args_and_config(args, separate_remaining_strings=True)
    assert separate == [from_file, from_flags]
    (result,) = TrlParser(Args).parse_args_and_config(args, fail_with_unknown_args=False)
    assert result.steps == 2
    with pytest.raises(ValueError, match="num_processes"):
        TrlParser(Args).parse_args_and_config(args)


def test_set_defaults_with_config():
    parser = TrlParser(Args)
    assert parser.set_defaults_with_config(needed=2, on=False, other=[1]) == ["--other", "[1]"]
    (result,) = parser.parse_args_and_config([])
    assert (result.needed, result.on) == (2, False)


def test_config_reaches_subcommands(tmp_path):
    parser = TrlParser(prog="tool")
    subparsers = parser.add_subparsers(dest="command")
    subparsers.add_parser("run", dataclass_types=Args)
    file = tmp_path / "run.yaml"
    file.write_text("needed: 3\nsteps: 8\n")
    (namespace,) = parser.parse_args_and_config(["run", "--steps", "9", "--config", str(file)])
    assert (namespace.command, namespace.needed, namespace.steps) == ("run", 3, 9)


def test_environment_of_the_file(tmp_path, monkeypatch):
    monkeypatch.delenv("TRL_TEST_C", raising=False)
    parse(config={"needed": 1, "env": {"TRL_TEST_C": 5}}, tmp_path=tmp_path)
    assert os.environ["TRL_TEST_C"] == "5"
    monkeypatch.delenv("TRL_TEST_C")


def test_arguments_of_the_process_are_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--needed", "6"])
    (result,) = TrlParser(Args).parse_args_and_config()
    assert result.needed == 6


def test_parser_needs_no_torch():
    code = "import sys, trl.scripts.parser; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
